//! Files of volumes that the VMM is given.
//!
//! Others may write to a volume while the machine starts: another container, or another pod. So the
//! process that becomes the VMM opens each file beneath its volume, checks it and keeps the handle;
//! the VMM reaches it by a link in the container's bundle that leads to the handle, whatever becomes
//! of the name in the volume.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use edgevmm_config::{DiskFormat, escape_value};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use serde::{Deserialize, Serialize};

use crate::Failure;
use crate::beneath::{Folder, Links, path_of};

/// A file of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Given {
    /// Where the volume is on the host.
    pub folder: PathBuf,
    /// Name of the file at its top.
    pub file: String,
    /// Where the VMM finds it.
    pub link: PathBuf,
    /// What it is an overlay over; such a file is made when it is not there.
    pub over: Option<Over>,
}

/// The base of an overlay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Over {
    /// Where the VMM finds it.
    pub path: PathBuf,
    /// Its format; found from the content when absent.
    pub format: Option<DiskFormat>,
}

impl Given {
    /// Opens the file for the program that this process becomes, and links it. `program` is edgevmm.
    ///
    /// # Errors
    ///
    /// When there is no such file, or it can't be made.
    pub fn open(&self, program: &Path) -> Result<OwnedFd, Failure> {
        let folder = Folder::open(&self.folder).map_err(|error| self.failed(&error))?;
        let mut handle = folder.regular(Path::new(&self.file), Links::Refuse);
        if let (Err(error), Some(over)) = (&handle, &self.over)
            && error.kind() == io::ErrorKind::NotFound
        {
            self.make_overlay(&folder, over, program)?;
            handle = folder.regular(Path::new(&self.file), Links::Refuse);
        }
        let handle = handle.map_err(|error| self.failed(&error))?;
        keep(&handle)?;
        let parent = self.link.parent().unwrap_or_else(|| Path::new("/"));
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700).create(parent)?;
        match fs::remove_file(&self.link) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        symlink(path_of(&handle), &self.link)?;
        Ok(handle)
    }

    fn make_overlay(&self, folder: &Folder, over: &Over, program: &Path) -> Result<(), Failure> {
        keep(folder)?;
        let mut base = escape_value(&over.path.display().to_string());
        if let Some(format) = over.format {
            let format = serde_json::to_value(format)?;
            base = format!("{base},format={}", format.as_str().unwrap_or_default());
        }
        let made = Command::new(program)
            .args(["image", "overlay"])
            .arg(base)
            .arg(path_of(folder).join(&self.file))
            .stdin(Stdio::null())
            .output()?;
        if made.status.success() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&made.stderr);
        Err(format!("Can't make the overlay {}: {}", self.name(), text.trim()).into())
    }

    fn failed(&self, error: &io::Error) -> Failure {
        format!("Can't use {}: {error}; links are not followed", self.name()).into()
    }

    fn name(&self) -> String {
        self.folder.join(&self.file).display().to_string()
    }
}

/// Hands a handle down to programs that this process becomes or starts.
fn keep(handle: &impl AsFd) -> nix::Result<()> {
    fcntl(handle, FcntlArg::F_SETFD(FdFlag::empty())).map(drop)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn given(root: &Path, over: Option<Over>) -> Given {
        Given {
            folder: root.join("volume"),
            file: "disk.img".to_owned(),
            link: root.join("bundle/volumes/data/disk.img"),
            over,
        }
    }

    #[test]
    fn a_file_is_the_one_that_was_opened_whatever_becomes_of_its_name() {
        let root = tempfile::tempdir().unwrap();
        let given = given(root.path(), None);
        fs::create_dir(&given.folder).unwrap();
        let path = given.folder.join("disk.img");
        fs::write(&path, "disk").unwrap();
        for _ in 0..2 {
            let _handle = given.open(Path::new("none")).unwrap();
            fs::rename(&path, given.folder.join("old")).unwrap();
            symlink("/etc/passwd", &path).unwrap();
            assert_eq!(fs::read_to_string(&given.link).unwrap(), "disk");
            fs::rename(given.folder.join("old"), &path).unwrap();
        }
        fs::remove_file(&path).unwrap();
        symlink("/etc/passwd", &path).unwrap();
        given.open(Path::new("none")).unwrap_err();
    }

    #[test]
    fn only_an_overlay_is_made_and_its_failure_is_told() {
        let root = tempfile::tempdir().unwrap();
        let plain = given(root.path(), None);
        fs::create_dir(&plain.folder).unwrap();
        plain.open(Path::new("/bin/true")).unwrap_err();
        let over = Over {
            path: root.path().join("a,b"),
            format: Some(DiskFormat::Vmdk),
        };
        let overlay = given(root.path(), Some(over));
        let script = root.path().join("edgevmm");
        fs::write(&script, "#!/bin/sh\necho \"$3 no\" >&2; exit 1").unwrap();
        fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        let error = overlay.open(&script).unwrap_err().to_string();
        assert!(error.contains("a,,b,format=vmdk no"), "{error}");
    }
}
