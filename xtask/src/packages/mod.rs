//! A tree of unpacked distribution packages, made without root and without installing anything.
//!
//! The tree serves twice: it becomes the root file system of the lab's L1, and its programs (QEMU,
//! `mke2fs`, `grub-mkimage`, …) run right here through the tree's own dynamic loader. So the lab
//! depends neither on the versions this system has nor on their libraries.

mod apt;
mod sources;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::PoisonError;

use anyhow::{Context, Result, bail};

pub use apt::Apt;
pub use sources::Mirror;

/// What is left out of an unpacked tree: nobody reads it there.
const EXCLUDED: &[&str] = &[
    "./usr/share/doc",
    "./usr/share/man",
    "./usr/share/info",
    "./usr/share/locale",
    "./usr/share/bash-completion",
    "./usr/share/zsh",
    "./usr/share/lintian",
    "./usr/lib/systemd",
    "./usr/lib/python3*",
];

/// Unpacks package files into `root`, several at a time. No maintainer script runs.
///
/// # Errors
/// A file is missing or damaged, or the disk is full.
pub fn unpack(archives: &[PathBuf], root: &Path) -> Result<()> {
    // /bin and its like must be links before the first package that still ships files there.
    for dir in ["bin", "sbin", "lib", "lib64"] {
        fs::create_dir_all(root.join("usr").join(dir))?;
        if fs::symlink_metadata(root.join(dir)).is_err() {
            symlink(format!("usr/{dir}"), root.join(dir))?;
        }
    }
    let queue = Mutex::new(archives.iter());
    let worker = || -> Result<()> {
        loop {
            let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some(archive) = next else { return Ok(()) };
            unpack_one(archive, root)?;
        }
    };
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        workers
            .into_iter()
            .try_for_each(|each| each.join().unwrap_or_else(|_| bail!("A worker panicked")))
    })
}

fn unpack_one(archive: &Path, root: &Path) -> Result<()> {
    let mut unpacker = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(archive)
        .stdout(Stdio::piped())
        .spawn()
        .context("Cannot start dpkg-deb")?;
    let stream = unpacker.stdout.take().context("dpkg-deb has no output")?;
    let mut tar = Command::new("tar");
    tar.arg("-x")
        .arg("-C")
        .arg(root)
        .args(["--keep-directory-symlink", "--no-same-owner"]);
    tar.args(EXCLUDED.iter().map(|path| format!("--exclude={path}")));
    let output = tar.stdin(stream).output().context("Cannot start tar")?;
    let unpacked = unpacker.wait().context("Cannot wait for dpkg-deb")?;
    if output.status.success() && unpacked.success() {
        return Ok(());
    }
    bail!(
        "Cannot unpack {}: {}",
        archive.display(),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Programs of an unpacked tree, run on this system through the tree's own loader and libraries.
#[derive(Debug, Clone)]
pub struct Tools {
    root: PathBuf,
}

impl Tools {
    /// Uses the tree at `root`.
    #[must_use]
    pub fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// The path of a file in the tree.
    #[must_use]
    pub fn path(&self, inside: &str) -> PathBuf {
        self.root.join(inside)
    }

    /// A command for a program of the tree, given by its path inside (`usr/bin/mcopy`).
    #[must_use]
    pub fn command(&self, inside: &str) -> Command {
        self.command_at(&self.path(inside))
    }

    /// A command for a program that needs the tree's libraries but lies elsewhere.
    #[must_use]
    pub fn command_at(&self, program: &Path) -> Command {
        let libraries = self.path("usr/lib/x86_64-linux-gnu");
        let mut command = Command::new(self.path("usr/lib64/ld-linux-x86-64.so.2"));
        command.arg("--library-path").arg(&libraries);
        command.arg("--argv0").arg(program).arg(program);
        // The C library's character sets, for mtools.
        command.env("GCONV_PATH", libraries.join("gconv"));
        // mke2fs refuses to be quiet about an unusable locale.
        command.env("LC_ALL", "C.UTF-8");
        command
    }
}
