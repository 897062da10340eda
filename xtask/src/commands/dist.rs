//! `cargo xtask dist`: make what is handed out.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use xtask::dist::{Kind, Release, checksums};

use super::build;

/// Make a Debian package, a container image and an archive for nodes without a network.
///
/// Builds for release first. Of the same programs the files are the same bytes, with the time of the
/// commit or $SOURCE_DATE_EPOCH. SHA256SUMS beside them has their hashes.
///
///   edgevmm_VERSION_amd64.deb              for Debian and its kin: `apt install ./FILE`
///   edgevmm-VERSION-image.tar              an OCI image for init containers: `ctr images import FILE`
///   edgevmm-VERSION-linux-amd64.tar.gz     unpack it on a node and run ./install.sh
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub struct DistCommand {
    /// Make only this; may be given several times.
    #[arg(long, value_enum, value_name = "KIND")]
    only: Vec<Only>,
    /// Pack the programs in this folder instead of building them.
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,
    /// Where to put the files [default: target/dist].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Only {
    Deb,
    Image,
    Archive,
}

impl DistCommand {
    /// Builds and packs.
    ///
    /// # Errors
    /// It does not build, or a tool that packs is missing.
    pub fn run(&self) -> Result<ExitCode> {
        let programs = match &self.programs {
            Some(folder) => std::path::absolute(folder)?,
            None => {
                let edgevmm = build::release_binary()?;
                edgevmm.parent().context("It is nowhere")?.to_owned()
            }
        };
        let workspace = build::workspace();
        let release = Release::of_checkout(&workspace, &programs)?;
        let out = self.out.clone();
        let out = out.unwrap_or_else(|| workspace.join("target/dist"));
        let mut files = Vec::new();
        for kind in Kind::ALL {
            let asked = |only: &Only| {
                kind == match only {
                    Only::Deb => Kind::Deb,
                    Only::Image => Kind::Image,
                    Only::Archive => Kind::Archive,
                }
            };
            if self.only.is_empty() || self.only.iter().any(asked) {
                files.push(release.pack(kind, &out)?);
            }
        }
        files.push(checksums(&out, &files)?);
        for file in files {
            println!("{}", file.display());
        }
        Ok(ExitCode::SUCCESS)
    }
}
