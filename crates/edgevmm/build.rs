//! How the program is linked.

use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if knows_packed_relocations() == Some(true) {
        println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    }
}

/// Whether the C library of this host can relocate by `DT_RELR`, as glibc can from 2.36 on. The
/// program's 11 thousand relocations, which each start reads, take 8 kB in that form and else 270. An
/// older glibc refuses to start such a program.
fn knows_packed_relocations() -> Option<bool> {
    let output = Command::new("getconf").arg("GNU_LIBC_VERSION").output();
    let text = String::from_utf8(output.ok()?.stdout).ok()?;
    let (major, minor) = text.trim().strip_prefix("glibc ")?.split_once('.')?;
    let version: (u32, u32) = (major.parse().ok()?, minor.parse().ok()?);
    Some(version >= (2, 36))
}
