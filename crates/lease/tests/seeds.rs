//! The fuzz target of this crate on its seeds.

#![allow(clippy::unwrap_used)]

#[path = "../../../fuzz/src/lease.rs"]
mod lease;

#[test]
fn the_target_takes_its_seeds() {
    let seeds = format!("{}/../../fuzz/seeds/lease", env!("CARGO_MANIFEST_DIR"));
    let mut count = 0;
    for file in std::fs::read_dir(seeds).unwrap() {
        let path = file.unwrap().path();
        println!("{}", path.display());
        lease::lease(&std::fs::read(path).unwrap());
        count += 1;
    }
    assert!(count > 0);
}
