//! `cargo xtask images`: make the test images.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, ValueEnum};
use xtask::images::{Image, Images};

/// Make the test images (in ~/.cache/edgevmm/images or $EDGEVMM_IMAGES) and print their paths.
///
/// Images already there are kept unless their recipe changed.
#[derive(Debug, Args)]
pub struct ImagesCommand {
    /// Which ones; all by default.
    #[arg(value_enum)]
    names: Vec<Name>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Name {
    /// A stock kernel (vmlinuz and vmlinux) and an initrd for direct boot.
    Kernel,
    /// A 64 MiB disk that boots in seconds, raw and qcow2.
    Mini,
    /// A disk, a kernel, GRUB's rescue disc and the installer, to boot from SATA.
    Sata,
    /// A whole Debian 12 as qcow2; log in as root with password root.
    Debian12,
    /// UEFI firmware as packages have it.
    Firmware,
}

impl ImagesCommand {
    /// Makes what is missing.
    ///
    /// # Errors
    /// An image cannot be made.
    pub fn run(&self) -> Result<ExitCode> {
        let names = if self.names.is_empty() {
            Name::value_variants()
        } else {
            &self.names
        };
        let images = Images::of_this_user();
        let mut files = Vec::new();
        for name in names {
            let image = match name {
                Name::Kernel => Image::Kernel,
                Name::Mini => Image::Mini,
                Name::Sata => Image::Sata,
                Name::Debian12 => Image::Debian12,
                Name::Firmware => Image::Firmware,
            };
            images.ensure(image)?;
            files.extend(images.files(image));
        }
        if self.json {
            println!("{}", serde_json::to_string(&files)?);
        } else {
            files.iter().for_each(|file| println!("{}", file.display()));
        }
        Ok(ExitCode::SUCCESS)
    }
}
