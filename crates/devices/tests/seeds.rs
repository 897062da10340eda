//! The fuzz target of this crate on its seeds.

#![allow(clippy::unwrap_used)]

#[path = "../../../fuzz/src/ahci.rs"]
mod ahci;

#[test]
fn the_target_takes_its_seeds() {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/seeds/ahci");
    let mut count = 0;
    for file in std::fs::read_dir(dir).unwrap() {
        let path = file.unwrap().path();
        println!("{}", path.display());
        ahci::ahci(&std::fs::read(path).unwrap());
        count += 1;
    }
    assert!(count > 0, "there are no seeds");
}
