//! Builds an initial RAM disk: busybox, kernel modules, an init script. A cpio archive in the
//! "newc" format (Linux `Documentation/driver-api/early-userspace/buffer-format.rst`), not packed.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::modules::{Modules, unpacked_path};

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const REGULAR: u32 = 0o100_644;
const LINK: u32 = 0o120_777;

/// An initial RAM disk being put together.
#[derive(Debug, Default)]
pub struct Initrd {
    archive: Vec<u8>,
    inode: u32,
}

impl Initrd {
    /// Starts with `busybox` (a static binary) as every command and `init` as `/init`.
    ///
    /// # Errors
    /// `busybox` cannot be read.
    pub fn new(busybox: &Path, init: &str) -> Result<Self> {
        let busybox =
            fs::read(busybox).with_context(|| format!("Cannot read {}", busybox.display()))?;
        let mut initrd = Self::default();
        for dir in [
            "bin", "dev", "proc", "sys", "mnt", "new", "modules", "tmp", "etc",
        ] {
            initrd.entry(dir, DIRECTORY, &[]);
        }
        initrd.entry("bin/busybox", PROGRAM, &busybox);
        // The script's interpreter; the script itself asks busybox for the other commands.
        initrd.entry("bin/sh", LINK, b"busybox");
        initrd.entry("init", PROGRAM, init.as_bytes());
        Ok(initrd)
    }

    /// Adds `names` and what they depend on, unpacked; `/modules/order` lists them for `insmod`.
    ///
    /// # Errors
    /// A module cannot be read.
    pub fn modules(mut self, modules: &Modules, names: &[&str]) -> Result<Self> {
        let mut order = String::new();
        for path in modules.closure(names) {
            let plain = unpacked_path(&path);
            let file = plain.rsplit('/').next().unwrap_or(plain);
            self.entry(&format!("modules/{file}"), REGULAR, &modules.read(&path)?);
            order.push_str(file);
            order.push('\n');
        }
        self.entry("modules/order", REGULAR, order.as_bytes());
        Ok(self)
    }

    /// Adds a program or script.
    #[must_use]
    pub fn program(mut self, path: &str, content: impl AsRef<[u8]>) -> Self {
        self.entry(path, PROGRAM, content.as_ref());
        self
    }

    /// The finished archive.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.archive
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.inode += 1;
        let links = if mode == DIRECTORY { 2 } else { 1 };
        let size = content.len();
        let header = format!(
            "070701{:08x}{mode:08x}{:08x}{:08x}{links:08x}{:08x}{size:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}",
            self.inode,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            name.len() + 1,
            0,
        );
        self.archive.extend_from_slice(header.as_bytes());
        self.archive.extend_from_slice(name.as_bytes());
        self.archive.push(0);
        self.pad();
        self.archive.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.archive
            .resize(self.archive.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// The entries of an archive, read as the kernel does.
    fn entries(mut archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        loop {
            assert_eq!(&archive[..6], b"070701");
            let field = |index: usize| {
                let digits = std::str::from_utf8(&archive[6 + 8 * index..][..8]).unwrap();
                u32::from_str_radix(digits, 16).unwrap()
            };
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let name = String::from_utf8(archive[110..110 + name_size - 1].to_vec()).unwrap();
            assert_eq!(archive[110 + name_size - 1], 0);
            if name == "TRAILER!!!" {
                return entries;
            }
            let content = (110 + name_size).next_multiple_of(4);
            entries.push((name, mode, archive[content..content + size].to_vec()));
            archive = &archive[(content + size).next_multiple_of(4)..];
        }
    }

    #[test]
    fn the_archive_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let busybox = dir.path().join("busybox");
        fs::write(&busybox, "odd").unwrap();
        let archive = Initrd::new(&busybox, "#!/bin/sh\n")
            .unwrap()
            .program("bin/x", "y")
            .finish();
        let entries = entries(&archive);
        for (name, mode, content) in [
            ("dev", DIRECTORY, ""),
            ("bin/busybox", PROGRAM, "odd"),
            ("bin/sh", LINK, "busybox"),
            ("init", PROGRAM, "#!/bin/sh\n"),
            ("bin/x", PROGRAM, "y"),
        ] {
            assert!(
                entries.contains(&(name.into(), mode, content.into())),
                "{name}"
            );
        }
    }
}
