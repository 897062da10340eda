//! The fuzz targets of this crate on their seeds.

#![allow(clippy::unwrap_used)]

#[path = "../../../fuzz/src/config.rs"]
mod config;

type Target = fn(&[u8]);

#[test]
fn targets_take_their_seeds() {
    let targets: [(&str, Target); 2] = [("config", config::config), ("flag", config::flag)];
    for (name, target) in targets {
        let seeds = format!("{}/../../fuzz/seeds/{name}", env!("CARGO_MANIFEST_DIR"));
        let mut count = 0;
        for file in std::fs::read_dir(seeds).unwrap() {
            let path = file.unwrap().path();
            println!("{}", path.display());
            target(&std::fs::read(path).unwrap());
            count += 1;
        }
        assert!(count > 0, "{name} has no seeds");
    }
}
