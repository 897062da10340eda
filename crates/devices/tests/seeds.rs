//! The fuzz targets of this crate on their seeds.

#![allow(clippy::unwrap_used)]

#[path = "../../../fuzz/src/ahci.rs"]
mod ahci;
#[path = "../../../fuzz/src/legacy.rs"]
mod legacy;

fn take_seeds(name: &str, target: fn(&[u8])) {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/seeds");
    let mut count = 0;
    for file in std::fs::read_dir(format!("{dir}/{name}")).unwrap() {
        let path = file.unwrap().path();
        println!("{}", path.display());
        target(&std::fs::read(path).unwrap());
        count += 1;
    }
    assert!(count > 0, "there are no seeds");
}

#[test]
fn a_sata_adapter_takes_its_seeds() {
    take_seeds("ahci", ahci::ahci);
}

#[test]
fn fw_cfg_takes_its_seeds() {
    take_seeds("fw_cfg", legacy::fw_cfg);
}

#[test]
fn a_flash_takes_its_seeds() {
    take_seeds("pflash", legacy::pflash);
}
