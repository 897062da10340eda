//! The fuzz targets of this crate on their seeds. Not in `tests/`, for which the firmware itself
//! would be built as a test is, with unwinding.

#![allow(clippy::unwrap_used)]

#[path = "../../../fuzz/src/fast.rs"]
pub mod fast;

#[test]
fn the_targets_take_their_seeds() {
    type Target = fn(&[u8]);
    let targets: [(&str, Target); 3] = [
        ("fast_disk", fast::disk),
        ("fast_grub", fast::grub),
        ("fast_entries", fast::entries),
    ];
    for (name, target) in targets {
        let dir = format!("{}/../../fuzz/seeds/{name}", env!("CARGO_MANIFEST_DIR"));
        let mut count = 0;
        for file in std::fs::read_dir(dir).unwrap() {
            let path = file.unwrap().path();
            println!("{}", path.display());
            target(&std::fs::read(path).unwrap());
            count += 1;
        }
        assert!(count > 0, "{name} has no seeds");
    }
}
