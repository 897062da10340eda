//! What is handed out: a Debian package, a container image that holds the programs for nodes, and an
//! archive for nodes without a network.
//!
//! Of the same programs they are the same bytes: times are those of the commit or of
//! `SOURCE_DATE_EPOCH`, owners are root, names are in order.

mod archive;
mod deb;
mod image;
mod tree;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::process;
use crate::progress::step;
use tree::Tree;

pub use image::NAME as IMAGE;

/// The programs, in the order of their names.
pub const PROGRAMS: [&str; 3] = ["containerd-shim-edgevmm-v1", "edgevmm", FIRMWARE];
/// Runs in guests, and is found by `edgevmm`.
const FIRMWARE: &str = "edgevmm-fast";
/// What is read beside the programs, from the root of the workspace.
const DOCUMENTS: [&str; 4] = ["LICENSE", "README.md", "docs/guests.md", "docs/pods.md"];

/// A release to be packed.
#[derive(Debug)]
pub struct Release {
    /// The root of the workspace.
    pub workspace: PathBuf,
    /// The folder of the programs.
    pub programs: PathBuf,
    /// What it is called, as Debian orders versions: `0.1.0`, or `0.1.0~20260131.abcdef012` before it.
    pub version: String,
    /// The time of all files, in seconds since 1970.
    pub epoch: u64,
}

/// A kind of package.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// For Debian and its kin.
    Deb,
    /// For registries.
    Image,
    /// For nodes without a network.
    Archive,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Deb, Self::Image, Self::Archive];

    fn what(self) -> &'static str {
        match self {
            Self::Deb => "Making the Debian package",
            Self::Image => "Making the container image",
            Self::Archive => "Making the archive",
        }
    }
}

impl Release {
    /// The release of this checkout, whose programs are in `programs`.
    ///
    /// # Errors
    /// This is no checkout.
    pub fn of_checkout(workspace: &Path, programs: &Path) -> Result<Self> {
        let git = |arguments: &[&str]| {
            let mut git = Command::new("git");
            process::output(git.current_dir(workspace).args(arguments))
        };
        let commit: u64 = git(&["log", "-1", "--format=%ct"])?.trim().parse()?;
        let epoch = match std::env::var("SOURCE_DATE_EPOCH") {
            Ok(text) => text.parse().context("SOURCE_DATE_EPOCH is no number")?,
            Err(_) => commit,
        };
        let version = env!("CARGO_PKG_VERSION");
        let released = git(&["tag", "--points-at", "HEAD"])?;
        let version = if released.lines().any(|tag| tag == format!("v{version}")) {
            version.to_owned()
        } else {
            let day = [
                "log",
                "-1",
                "--date=format:%Y%m%d",
                "--format=%cd.%h",
                "--abbrev=9",
            ];
            format!("{version}~{}", git(&day)?.trim())
        };
        Ok(Self {
            workspace: workspace.to_owned(),
            programs: programs.to_owned(),
            version,
            epoch,
        })
    }

    /// Makes a package in `out`, and returns its path.
    ///
    /// # Errors
    /// A program is missing, or a tool that packs.
    pub fn pack(&self, kind: Kind, out: &Path) -> Result<PathBuf> {
        fs::create_dir_all(out).with_context(|| format!("Cannot make {}", out.display()))?;
        let out = std::path::absolute(out)?;
        step(kind.what(), || match kind {
            Kind::Deb => deb::make(self, &out),
            Kind::Image => image::make(self, &out),
            Kind::Archive => archive::make(self, &out),
        })
    }

    /// The path of a program.
    fn program(&self, name: &str) -> PathBuf {
        self.programs.join(name)
    }

    /// What the program itself says.
    fn says(&self, arguments: &[&str]) -> Result<String> {
        process::output(Command::new(self.program("edgevmm")).args(arguments))
    }

    /// Puts the documents into a folder.
    fn documents(&self, tree: &Tree, folder: &str) -> Result<()> {
        for document in DOCUMENTS {
            let to = format!("{folder}/{document}");
            tree.copy(&self.workspace.join(document), &to, 0o644)?;
        }
        Ok(())
    }
}

/// Writes the hashes of all packages in `out` that `files` names, as `sha256sum -c` reads them.
///
/// # Errors
/// One cannot be read.
pub fn checksums(out: &Path, files: &[PathBuf]) -> Result<PathBuf> {
    let mut names: Vec<_> = files.iter().filter_map(|file| file.file_name()).collect();
    names.sort();
    let path = out.join("SHA256SUMS");
    fs::write(&path, sha256sums(out, &names)?)?;
    Ok(path)
}

fn sha256sums<S: AsRef<std::ffi::OsStr>>(folder: &Path, names: &[S]) -> Result<String> {
    process::output(Command::new("sha256sum").current_dir(folder).args(names))
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .with_context(|| format!("Cannot change the mode of {}", path.display()))
}

#[cfg(test)]
mod tests;
