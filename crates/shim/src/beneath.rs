//! Opens files beneath a folder that others may write to: images, and volumes.
//!
//! Paths are looked up beneath the folder only (openat2), so that no link in it leads to a file of the
//! host. A file is looked at before it is opened for data, as a FIFO would wait for its other end and
//! a device might do anything.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::unistd::{UnlinkatFlags, unlinkat};

/// What is done about links.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Links {
    /// None is followed.
    Refuse,
    /// Those that stay beneath the folder are followed.
    FollowBeneath,
}

/// A folder.
#[derive(Debug)]
pub struct Folder {
    fd: OwnedFd,
}

impl Folder {
    /// The folder at `path`, which is trusted.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let fd = nix::fcntl::open(path, flags, Mode::empty())?;
        Ok(Self { fd })
    }

    /// The folder at `path` beneath this one.
    ///
    /// # Errors
    ///
    /// When there is none, or a link that is not to be followed leads there.
    pub fn folder(&self, path: &Path, links: Links) -> io::Result<Self> {
        let fd = self.look_up(path, OFlag::O_PATH | OFlag::O_DIRECTORY, links)?;
        Ok(Self { fd })
    }

    /// A handle on the regular file at `path`, which is not open for data.
    ///
    /// # Errors
    ///
    /// When there is none; `InvalidInput` when it is something else.
    pub fn regular(&self, path: &Path, links: Links) -> io::Result<OwnedFd> {
        let fd = self.look_up(path, OFlag::O_PATH, links)?;
        if kind(&fd)? == SFlag::S_IFREG {
            return Ok(fd);
        }
        let message = "it is not a regular file";
        Err(io::Error::new(io::ErrorKind::InvalidInput, message))
    }

    /// Whether `path` is a folder.
    ///
    /// # Errors
    ///
    /// When there is nothing, or a link that is not to be followed leads there.
    pub fn is_folder(&self, path: &Path, links: Links) -> io::Result<bool> {
        let fd = self.look_up(path, OFlag::O_PATH, links)?;
        Ok(kind(&fd)? == SFlag::S_IFDIR)
    }

    /// Makes a regular file; its name has no path in it.
    ///
    /// # Errors
    ///
    /// When something has the name already, or the file can't be made.
    pub fn create(&self, name: &str) -> io::Result<File> {
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL;
        let how = how(flags, Links::Refuse).mode(Mode::S_IRUSR | Mode::S_IWUSR);
        Ok(openat2(&self.fd, name, how)?.into())
    }

    /// Removes a file; its name has no path in it.
    ///
    /// # Errors
    ///
    /// When there is none, or it can't be removed.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        Ok(unlinkat(&self.fd, name, UnlinkatFlags::NoRemoveDir)?)
    }

    /// Names of what is in it, in their order.
    ///
    /// # Errors
    ///
    /// When they can't be read, or there are more than `most`.
    pub fn names(&self, most: usize) -> io::Result<Vec<OsString>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(path_of(&self.fd))? {
            if names.len() == most {
                let message = format!("it has more than {most} files");
                return Err(io::Error::other(message));
            }
            names.push(entry?.file_name());
        }
        names.sort();
        Ok(names)
    }

    /// What `path` leads to, opened as `flags` say.
    ///
    /// # Errors
    ///
    /// When there is nothing, or a link that is not to be followed leads there.
    pub fn look_up(&self, path: &Path, flags: OFlag, links: Links) -> io::Result<OwnedFd> {
        Ok(openat2(&self.fd, path, how(flags, links))?)
    }
}

impl AsFd for Folder {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Opens for reading what a handle is on.
///
/// # Errors
///
/// When the kernel refuses.
pub fn read(handle: &OwnedFd) -> io::Result<File> {
    OpenOptions::new().read(true).open(path_of(handle))
}

/// The path by which this process, and those that inherit the handle, reach what it is on.
pub fn path_of(handle: &impl AsFd) -> PathBuf {
    format!("/proc/self/fd/{}", handle.as_fd().as_raw_fd()).into()
}

fn how(flags: OFlag, links: Links) -> OpenHow {
    let mut resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    if links == Links::Refuse {
        resolve |= ResolveFlag::RESOLVE_NO_SYMLINKS;
    }
    OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(resolve)
}

fn kind(fd: &OwnedFd) -> io::Result<SFlag> {
    let mode = fstat(fd)?.st_mode;
    Ok(SFlag::from_bits_truncate(mode) & SFlag::S_IFMT)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::Read;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_are_followed_beneath_the_folder_only_and_when_asked_to() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        fs::create_dir(path("in")).unwrap();
        fs::write(path("in/file"), "text").unwrap();
        symlink("in/file", path("good")).unwrap();
        symlink("/etc/passwd", path("absolute")).unwrap();
        symlink("../../../../etc/passwd", path("up")).unwrap();
        symlink("loop", path("loop")).unwrap();
        let folder = Folder::open(root.path()).unwrap();
        let open = |name: &str, links| folder.regular(Path::new(name), links);
        let mut text = String::new();
        let good = open("good", Links::FollowBeneath).unwrap();
        read(&good).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "text");
        open("good", Links::Refuse).unwrap_err();
        for name in ["absolute", "up", "loop", "../x", "/etc/passwd"] {
            open(name, Links::FollowBeneath).unwrap_err();
        }
    }

    #[test]
    fn only_regular_files_are_files() {
        let root = tempfile::tempdir().unwrap();
        nix::unistd::mkfifo(&root.path().join("pipe"), Mode::S_IRWXU).unwrap();
        let folder = Folder::open(root.path()).unwrap();
        for name in ["pipe", "."] {
            let error = folder.regular(Path::new(name), Links::Refuse).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
        symlink("/tmp/elsewhere", root.path().join("new")).unwrap();
        folder.create("new").unwrap_err();
        folder.create("other").unwrap();
        assert_eq!(folder.names(3).unwrap(), ["new", "other", "pipe"]);
        folder.names(2).unwrap_err();
    }
}
