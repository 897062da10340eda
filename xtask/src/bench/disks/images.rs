//! The images that are measured, made in a directory of their own.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::cases::{DISK, Image, PACKED_DISK};
use crate::process;

/// Images in a directory.
#[derive(Debug)]
pub struct Images {
    dir: PathBuf,
}

impl Images {
    /// Makes those that all runs use.
    ///
    /// # Errors
    /// There is no `qemu-img`, or the disk is full.
    pub fn make(dir: &Path) -> Result<Self> {
        let this = Self {
            dir: dir.to_owned(),
        };
        let raw = this.path(Image::Raw);
        fill(&raw, DISK, &noise())?;
        this.convert(&raw, Image::Qcow2, &[])?;
        // A program, as disks of systems are full of.
        let program = fs::read(std::env::current_exe()?)?;
        let plain = dir.join("plain");
        fill(&plain, PACKED_DISK, &program)?;
        for (image, kind) in [(Image::Zlib, "zlib"), (Image::Zstd, "zstd")] {
            let option = format!("compression_type={kind}");
            this.convert(&plain, image, &["-c", "-o", &option])?;
        }
        fs::remove_file(plain)?;
        Ok(this)
    }

    /// Where an image is.
    #[must_use]
    pub fn path(&self, image: Image) -> PathBuf {
        self.dir.join(match image {
            Image::Raw => "disk.raw",
            Image::Qcow2 => "disk.qcow2",
            Image::NewRaw => "new.raw",
            Image::NewQcow2 => "new.qcow2",
            Image::Zlib => "zlib.qcow2",
            Image::Zstd => "zstd.qcow2",
        })
    }

    /// Has an image be as a run shall find it: written out, and on the disk only if it is `direct`.
    ///
    /// # Errors
    /// It cannot be made, read or written.
    pub fn prepare(&self, image: Image, direct: bool) -> Result<()> {
        let path = self.path(image);
        match image {
            Image::NewRaw => return Ok(File::create(path)?.set_len(DISK)?),
            Image::NewQcow2 => {
                let mut create = Command::new("qemu-img");
                create.args(["create", "-q", "-f", "qcow2"]).arg(path);
                return process::output(create.arg(DISK.to_string())).map(drop);
            }
            _ => {}
        }
        let file = File::options().read(true).write(true).open(&path)?;
        file.sync_data()?;
        if direct {
            posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        }
        Ok(())
    }

    /// Reads an image that is there into the page cache.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn warm(&self, image: Image) -> Result<()> {
        let path = self.path(image);
        if path.exists() {
            std::io::copy(&mut File::open(path)?, &mut std::io::sink())?;
        }
        Ok(())
    }

    fn convert(&self, from: &Path, image: Image, options: &[&str]) -> Result<()> {
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-f", "raw", "-O", "qcow2"]);
        convert.args(options).arg(from).arg(self.path(image));
        process::output(&mut convert).map(drop)
    }
}

/// Writes a disk of `len` bytes, which are `content` again and again.
fn fill(path: &Path, len: u64, content: &[u8]) -> Result<()> {
    let mut file = File::create(path).with_context(|| format!("Cannot make {}", path.display()))?;
    let mut left = len;
    while left > 0 {
        let part = usize::try_from(left).map_or(content.len(), |left| left.min(content.len()));
        file.write_all(content.get(..part).unwrap_or_default())?;
        left -= part as u64;
    }
    file.sync_data()?;
    Ok(())
}

/// Bytes that are alike nowhere, and no zeroes.
fn noise() -> Vec<u8> {
    let mut state: u64 = 0x9e37_79b9_7f4a_7c15;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_ne_bytes()
    };
    (0..1_u32 << 17).flat_map(next).collect()
}
