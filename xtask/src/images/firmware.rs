//! UEFI firmware, as distributions package it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::Workshop;
use crate::packages::{self, Apt};

/// What the files depend on.
pub(super) const RECIPE: &[&str] = &[include_str!("firmware.rs")];

/// OVMF's code, and its template for variables.
pub(super) const OVMF_FILES: [&str; 2] = ["OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd"];

const CLOUDHV_PACKAGE: &str = "cloudhv-efi-x86-64";

pub(super) fn make(workshop: &Workshop, dir: &Path) -> Result<()> {
    let mirror = &workshop.mirror;
    let cloudhv = format!("usr/share/{CLOUDHV_PACKAGE}/CLOUDHV.fd");
    fetch(
        workshop,
        mirror.newest_suite(),
        CLOUDHV_PACKAGE,
        &[&cloudhv],
        dir,
    )?;
    let ovmf = OVMF_FILES.map(|file| format!("usr/share/OVMF/{file}"));
    let ovmf = ovmf.each_ref().map(String::as_str);
    for (name, suite) in [("new", mirror.lab_suite()), ("old", mirror.guest_suite())] {
        let to = dir.join(name);
        fs::create_dir(&to)?;
        fetch(workshop, suite, "ovmf", &ovmf, &to)?;
    }
    Ok(())
}

/// Puts files of a package of `suite` into `to`.
fn fetch(workshop: &Workshop, suite: &str, package: &str, files: &[&str], to: &Path) -> Result<()> {
    let apt = Apt::open(&workshop.apt, &workshop.mirror, suite)?;
    let archives = apt.download(&[package], |_| true)?;
    let work = tempfile::tempdir_in(to)?;
    packages::unpack(&archives, work.path())?;
    for file in files {
        let from = work.path().join(file);
        let name = from.file_name().context("A file without a name")?;
        fs::copy(&from, to.join(name))
            .with_context(|| format!("{package} of {suite} has no {file}"))?;
    }
    Ok(())
}
