//! Mounts a container's root file system, of which containerd has only prepared the layers.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::proto::task::Mount;

/// Longest data of a mount, in bytes: the kernel takes less than a page.
const MAX_DATA: usize = 4095;
/// Times that something is taken off a mount point: a shim that died may have left several there.
const MAX_DEPTH: usize = 16;

/// Why a root file system can't be mounted.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// Its options are too long.
    #[error("The root file system has too many layers for one mount: use an image with fewer")]
    Options,
    /// The folder can't be made.
    #[error("Can't make {}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
    /// The kernel refuses.
    #[error("Can't mount a root file system of type {kind} at {}", path.display())]
    Mount {
        /// Its type.
        kind: String,
        /// The mount point.
        path: PathBuf,
        /// What the kernel says.
        source: Errno,
    },
    /// It can't be unmounted.
    #[error("Can't unmount {}", path.display())]
    Unmount {
        /// The mount point.
        path: PathBuf,
        /// What the kernel says.
        source: Errno,
    },
}

/// Mounts all of `mounts` at `root`, one over the other. Leaves nothing behind when one fails.
///
/// # Errors
///
/// When one can't be mounted.
pub fn mount_all(mounts: &[Mount], root: &Path) -> Result<(), RootfsError> {
    if mounts.is_empty() {
        return Ok(());
    }
    fs::create_dir_all(root).map_err(|source| RootfsError::Folder {
        path: root.to_owned(),
        source,
    })?;
    for one in mounts {
        if let Err(error) = mount_one(one, root) {
            let _ = unmount(root);
            return Err(error);
        }
    }
    Ok(())
}

fn mount_one(what: &Mount, root: &Path) -> Result<(), RootfsError> {
    let (flags, data) = options(&what.options);
    if data.len() > MAX_DATA {
        return Err(RootfsError::Options);
    }
    let call = |kind: Option<&str>, flags| {
        mount(
            Some(what.source.as_str()),
            root,
            kind,
            flags,
            Some(data.as_str()),
        )
        .map_err(|source| RootfsError::Mount {
            kind: what.r#type.clone(),
            path: root.to_owned(),
            source,
        })
    };
    let bind = what.r#type == "bind" || flags.contains(MsFlags::MS_BIND);
    if !bind {
        return call(Some(&what.r#type), flags);
    }
    // A bind mount takes its other flags by a second call only.
    call(None, MsFlags::MS_BIND | (flags & MsFlags::MS_REC))?;
    let rest = flags - MsFlags::MS_BIND - MsFlags::MS_REC;
    if rest.is_empty() {
        return Ok(());
    }
    call(None, rest | MsFlags::MS_BIND | MsFlags::MS_REMOUNT)
}

/// Takes apart options as mount(8) has them: flags, and data for the file system.
fn options(options: &[String]) -> (MsFlags, String) {
    let mut flags = MsFlags::empty();
    let mut data: Vec<&str> = Vec::new();
    for option in options {
        match option.as_str() {
            "ro" => flags |= MsFlags::MS_RDONLY,
            "rw" => flags -= MsFlags::MS_RDONLY,
            "bind" => flags |= MsFlags::MS_BIND,
            "rbind" => flags |= MsFlags::MS_BIND | MsFlags::MS_REC,
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "nodev" => flags |= MsFlags::MS_NODEV,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            "noatime" => flags |= MsFlags::MS_NOATIME,
            "relatime" => flags |= MsFlags::MS_RELATIME,
            "sync" => flags |= MsFlags::MS_SYNCHRONOUS,
            "defaults" => {}
            other => data.push(other),
        }
    }
    (flags, data.join(","))
}

/// Unmounts whatever is mounted at `root`; that there is nothing is fine.
///
/// # Errors
///
/// When something stays mounted.
pub fn unmount(root: &Path) -> Result<(), RootfsError> {
    for _ in 0..MAX_DEPTH {
        // Detached, so that a process which still has a file open there keeps nobody waiting.
        match umount2(root, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(source) => {
                return Err(RootfsError::Unmount {
                    path: root.to_owned(),
                    source,
                });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_flags_or_data() {
        let all = ["ro", "index=off", "rbind", "lowerdir=/a:/b", "nosuid"];
        let (flags, data) = options(&all.map(ToOwned::to_owned));
        let expected = MsFlags::MS_RDONLY | MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_NOSUID;
        assert_eq!(flags, expected);
        assert_eq!(data, "index=off,lowerdir=/a:/b");
    }

    #[test]
    fn options_that_the_kernel_would_cut_off_are_refused() {
        let mount = Mount {
            r#type: "overlay".to_owned(),
            options: vec![format!("lowerdir={}", "/x".repeat(2100))],
            ..Mount::default()
        };
        let result = mount_one(&mount, Path::new("/nowhere"));
        assert!(matches!(result, Err(RootfsError::Options)));
    }
}
