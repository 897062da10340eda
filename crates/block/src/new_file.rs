//! New image files, which appear under their name only once they are complete.
//!
//! A file is made without a name where the filesystem can do that, so that nothing of it is left
//! however this process ends. Elsewhere it has a name that starts with a dot and ends in
//! `.partial`; that one is left when the process is killed.

use std::fs::{File, Metadata, OpenOptions, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, AtFlags};
use tempfile::{NamedTempFile, TempPath};

use crate::host::{HostFile, lock};
use crate::open::check_place;
use crate::{BlockError, open_path};

/// What to do with a file that has the name already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// Leave it and fail.
    Keep,
    /// Put the new file in its place, with its mode and owner, unless somebody uses it.
    Replace,
    /// As [`Existing::Replace`]; whoever uses it is the caller, by [`lock_file`].
    ReplaceLocked,
}

/// Locks the image at `path` for as long as `file`, which it was opened as, or a copy of that is
/// open, as if it was written.
///
/// # Errors
///
/// [`BlockError::Locked`], [`BlockError::Replaced`], or what the host says.
pub fn lock_file(file: &File, path: &Path) -> Result<(), BlockError> {
    let copy = file.try_clone().map_err(failed("open", path))?;
    let name = path.display().to_string();
    lock::lock(&HostFile::new(copy, &name, false)?, true)?;
    check_place(file, path)
}

/// A file that is being written and has no name yet. Dropped, it is gone.
#[derive(Debug)]
pub struct NewFile {
    file: File,
    /// The name it has meanwhile, where it cannot be without.
    partial: Option<TempPath>,
    path: PathBuf,
    dir: PathBuf,
    /// What has the name now, locked.
    replaced: Option<Replaced>,
}

#[derive(Debug)]
struct Replaced {
    metadata: Metadata,
    #[expect(dead_code, reason = "held for its lock")]
    file: File,
}

impl NewFile {
    /// Begins a file that will be at `path`.
    ///
    /// # Errors
    ///
    /// [`BlockError::Exists`] or [`BlockError::Locked`] for what has the name already, else what
    /// the host says about its folder.
    pub fn create(path: &Path, existing: Existing) -> Result<Self, BlockError> {
        Self::create_by(path, existing, open_unnamed)
    }

    fn create_by(
        path: &Path,
        existing: Existing,
        open_unnamed: impl Fn(&Path) -> io::Result<File>,
    ) -> Result<Self, BlockError> {
        let (path, replaced) = match std::fs::symlink_metadata(path) {
            Ok(_) if existing == Existing::Keep => {
                return Err(BlockError::Exists {
                    path: path.display().to_string(),
                });
            }
            // The file itself is replaced, not a link to it.
            Ok(_) => {
                let path = path.canonicalize().map_err(failed("examine", path))?;
                let replaced = Replaced::new(&path, existing)?;
                (path, Some(replaced))
            }
            Err(err) if err.kind() == io::ErrorKind::NotFound => (path.to_owned(), None),
            Err(err) => return Err(failed("examine", path)(err)),
        };
        let dir = match path.parent() {
            Some(dir) if dir != Path::new("") => dir.to_owned(),
            _ => PathBuf::from("."),
        };
        let (file, partial) = match open_unnamed(&dir) {
            Ok(file) => (file, None),
            Err(err) if has_no_unnamed(&err) => {
                let (file, partial) = with_partial_name(&dir, &path, open_new)
                    .map_err(failed("create", &path))?
                    .into_parts();
                (file, Some(partial))
            }
            Err(err) => return Err(failed("create", &path)(err)),
        };
        Ok(Self {
            file,
            partial,
            path,
            dir,
            replaced,
        })
    }

    /// The file, open for reading and writing.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Another handle of it.
    ///
    /// # Errors
    ///
    /// The process has too many files open.
    pub fn clone_file(&self) -> Result<File, BlockError> {
        self.file.try_clone().map_err(failed("open", &self.path))
    }

    /// Cuts it or makes it longer, by a hole.
    ///
    /// # Errors
    ///
    /// The host's filesystem has no such long files.
    pub fn set_len(&self, len: u64) -> Result<(), BlockError> {
        self.file
            .set_len(len)
            .map_err(failed("set the length of", &self.path))
    }

    /// Its name once it is complete.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the content durable and gives the file its name.
    ///
    /// # Errors
    ///
    /// The host refuses; then the file is gone, and what had the name before has it still.
    pub fn finish(self) -> Result<(), BlockError> {
        let Self {
            file,
            partial,
            path,
            dir,
            replaced,
        } = self;
        if let Some(replaced) = &replaced {
            replaced.hand_on(&file).map_err(failed("change", &path))?;
        }
        file.sync_all().map_err(failed("write", &path))?;
        let replace = replaced.is_some();
        let named = match partial {
            None if !replace => link(&file, &path),
            None => with_partial_name(&dir, &path, |partial| link(&file, partial))
                .and_then(|partial| Ok(partial.into_temp_path().persist(&path)?)),
            Some(partial) if replace => partial.persist(&path).map_err(Into::into),
            Some(partial) => partial.persist_noclobber(&path).map_err(Into::into),
        };
        named.map_err(|err| match err.kind() {
            io::ErrorKind::AlreadyExists => BlockError::Exists {
                path: path.display().to_string(),
            },
            _ => failed("name", &path)(err),
        })?;
        File::open(&dir)
            .and_then(|dir| dir.sync_all())
            .map_err(failed("name", &path))
    }
}

impl Replaced {
    /// Locks what is at `path`, so that nobody uses it when it goes.
    fn new(path: &Path, existing: Existing) -> Result<Self, BlockError> {
        let name = path.display().to_string();
        let file = match open_path(path, false) {
            // Nothing is lost with an empty file.
            Err(BlockError::Empty { .. }) => File::open(path).map_err(failed("open", path))?,
            opened => opened?,
        };
        let metadata = file.metadata().map_err(failed("examine", path))?;
        if !metadata.is_file() {
            return Err(BlockError::NotADisk {
                path: name,
                kind: "a block device, which can't be replaced",
            });
        }
        if existing == Existing::Replace {
            lock_file(&file, path)?;
        }
        Ok(Self { metadata, file })
    }

    fn hand_on(&self, file: &File) -> io::Result<()> {
        let now = file.metadata()?;
        let (uid, gid) = (self.metadata.uid(), self.metadata.gid());
        if (uid, gid) != (now.uid(), now.gid()) {
            std::os::unix::fs::fchown(file, Some(uid), Some(gid))?;
        }
        file.set_permissions(Permissions::from_mode(self.metadata.mode() & 0o7777))
    }
}

fn failed(op: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BlockError {
    let path = path.display().to_string();
    move |source| BlockError::File { op, path, source }
}

fn open_unnamed(dir: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .mode(0o666)
        .open(dir)
}

fn open_new(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o666)
        .open(path)
}

/// Whether the filesystem (or a kernel before it) has no files without a name.
fn has_no_unnamed(err: &io::Error) -> bool {
    matches!(
        err.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL)
    )
}

/// Has `make` make something in `dir` with a name of which everybody sees what it is.
fn with_partial_name<R>(
    dir: &Path,
    path: &Path,
    make: impl FnMut(&Path) -> io::Result<R>,
) -> io::Result<NamedTempFile<R>> {
    let name = path.file_name().unwrap_or_default();
    let prefix = format!(".{}.", name.to_string_lossy());
    tempfile::Builder::new()
        .prefix(&prefix)
        .suffix(".partial")
        .make_in(dir, make)
}

fn link(file: &File, path: &Path) -> io::Result<()> {
    let fd = format!("/proc/self/fd/{}", file.as_raw_fd());
    nix::unistd::linkat(
        AT_FDCWD,
        fd.as_str(),
        AT_FDCWD,
        path,
        AtFlags::AT_SYMLINK_FOLLOW,
    )
    .map_err(Into::into)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::Write;

    use super::*;

    fn unsupported(_: &Path) -> io::Result<File> {
        Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(dir).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// Does the same on a filesystem that has files without a name and on one that has not.
    fn both(test: impl Fn(&Path, &dyn Fn(&Path) -> io::Result<File>)) {
        for open in [open_unnamed as fn(&Path) -> _, unsupported] {
            test(tempfile::tempdir().unwrap().path(), &open);
        }
    }

    #[test]
    fn a_file_appears_complete_or_not_at_all() {
        both(|dir, open| {
            let path = dir.join("disk");
            let create = || NewFile::create_by(&path, Existing::Keep, open).unwrap();
            create().file().write_all(b"dropped").unwrap();
            assert!(names(dir).is_empty());
            let new = create();
            assert!(!path.exists());
            new.file().write_all(b"kept").unwrap();
            new.finish().unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), b"kept");
            assert_eq!(names(dir), ["disk"]);
        });
    }

    #[test]
    fn a_name_that_is_taken_stays() {
        both(|dir, open| {
            let path = dir.join("disk");
            let late = NewFile::create_by(&path, Existing::Keep, open).unwrap();
            std::fs::write(&path, "first").unwrap();
            let error = NewFile::create_by(&path, Existing::Keep, open).unwrap_err();
            assert!(matches!(error, BlockError::Exists { .. }), "{error}");
            let error = late.finish().unwrap_err();
            assert!(matches!(error, BlockError::Exists { .. }), "{error}");
            assert_eq!(std::fs::read(&path).unwrap(), b"first");
            assert_eq!(names(dir), ["disk"]);
        });
    }

    #[test]
    fn what_is_replaced_hands_on_its_mode() {
        both(|dir, open| {
            let (path, alias) = (dir.join("disk"), dir.join("alias"));
            std::fs::write(&path, "old").unwrap();
            std::fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
            std::os::unix::fs::symlink("disk", &alias).unwrap();
            let new = NewFile::create_by(&alias, Existing::Replace, open).unwrap();
            new.file().write_all(b"new").unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), b"old");
            new.finish().unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), b"new");
            assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o640);
            assert!(alias.is_symlink());
            assert_eq!(names(dir), ["alias", "disk"]);
        });
    }

    #[test]
    fn what_is_in_use_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, "old").unwrap();
        let used = HostFile::new(File::open(&path).unwrap(), "disk", false).unwrap();
        lock::lock(&used, false).unwrap();
        let error = NewFile::create(&path, Existing::Replace).unwrap_err();
        assert!(matches!(error, BlockError::Locked { .. }), "{error}");
        drop(used);
        NewFile::create(&path, Existing::Replace).unwrap();
    }
}
