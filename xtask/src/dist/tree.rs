//! Folders that become packages.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::set_mode;
use crate::process;

/// A folder to be packed. It goes when dropped.
#[derive(Debug)]
pub(super) struct Tree(tempfile::TempDir);

impl Tree {
    pub(super) fn new() -> Result<Self> {
        let folder = tempfile::tempdir().context("Cannot make a folder")?;
        set_mode(folder.path(), 0o755)?;
        Ok(Self(folder))
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(super) fn root(&self) -> &Path {
        self.0.path()
    }

    pub(super) fn write(&self, name: &str, content: impl AsRef<[u8]>, mode: u32) -> Result<()> {
        let path = self.make_room(name)?;
        fs::write(&path, content).with_context(|| format!("Cannot write {}", path.display()))?;
        set_mode(&path, mode)
    }

    pub(super) fn copy(&self, from: &Path, name: &str, mode: u32) -> Result<()> {
        let path = self.make_room(name)?;
        fs::copy(from, &path).with_context(|| format!("Cannot copy {}", from.display()))?;
        set_mode(&path, mode)
    }

    /// Makes the folders above a file, whatever the umask says.
    fn make_room(&self, name: &str) -> Result<PathBuf> {
        let path = self.path(name);
        let folders = Path::new(name).ancestors().skip(1);
        let mut folders: Vec<_> = folders.filter(|it| !it.as_os_str().is_empty()).collect();
        folders.reverse();
        for folder in folders {
            let folder = self.root().join(folder);
            if !folder.exists() {
                fs::create_dir(&folder)?;
                set_mode(&folder, 0o755)?;
            }
        }
        Ok(path)
    }

    /// Packs all that is in the tree, or `names` of it, as a tar file. A name ending in `.gz` has it
    /// compressed.
    pub(super) fn tar(&self, names: &[&str], epoch: u64, to: &Path) -> Result<()> {
        let mut tar = Command::new("tar");
        tar.arg("--directory").arg(self.root());
        tar.args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner"]);
        tar.args(["--format=gnu", "--create"]);
        tar.arg(format!("--mtime=@{epoch}"));
        if to.extension().is_some_and(|end| end == "gz") {
            // Without a time of its own.
            tar.arg("--use-compress-program=gzip -9n");
        }
        process::output(tar.arg("--file").arg(to).args(names)).map(drop)
    }
}
