//! One writer for each image file, or any number of readers.
//!
//! The locks are advisory open-file-description locks on the bytes where QEMU keeps its own, so
//! that QEMU and qemu-img notice this program and the other way round. Two groups of bytes carry
//! one bit for each permission: the first says "I use it", the second "nobody else may". All locks
//! are shared ones; whoever finds a foreign lock on the counterpart of one of its own bytes gives
//! up.
//!
//! Such a lock belongs to the open file, not to the process: a child that inherits the file keeps
//! it locked until it closes the file or calls exec.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use super::file::{HostFile, identity};
use crate::BlockError;

const USED: libc::off_t = 100;
const DENIED: libc::off_t = 200;

const CONSISTENT_READ: libc::off_t = 0;
const WRITE: libc::off_t = 1;
const RESIZE: libc::off_t = 3;

/// Locks `file` for as long as it is open: against other writers, and, if `writable`, readers.
///
/// A filesystem that has no such locks leaves the file unlocked, with a warning.
pub fn lock(file: &HostFile, writable: bool) -> Result<(), BlockError> {
    let used: &[libc::off_t] = if writable {
        &[CONSISTENT_READ, WRITE, RESIZE]
    } else {
        &[CONSISTENT_READ]
    };
    let denied = [WRITE, RESIZE];
    match try_lock(file.file(), used, &denied) {
        Ok(true) => Ok(()),
        Ok(false) => {
            let holder = find_holder(file.file()).map_or_else(
                || "another disk of this machine, or a process that cannot be seen".to_owned(),
                |pid| format!("process {pid}"),
            );
            Err(BlockError::Locked {
                path: file.name().to_owned(),
                holder,
                hint: if writable {
                    "stop that one, or open the image read-only or as a snapshot if that one only \
                     reads it"
                } else {
                    "stop that one, as it writes to the image"
                },
            })
        }
        Err(err) if is_unsupported(&err) => {
            tracing::warn!(
                disk = file.name(),
                "The filesystem has no locks; image is unprotected"
            );
            Ok(())
        }
        Err(source) => Err(BlockError::File {
            op: "lock",
            path: file.name().to_owned(),
            source,
        }),
    }
}

fn is_unsupported(err: &io::Error) -> bool {
    matches!(
        err.raw_os_error(),
        Some(libc::EINVAL | libc::ENOLCK | libc::EOPNOTSUPP)
    )
}

/// Takes the locks, then looks for conflicts; in this order two that race both notice.
fn try_lock(file: &File, used: &[libc::off_t], denied: &[libc::off_t]) -> io::Result<bool> {
    let own = used
        .iter()
        .map(|bit| USED + bit)
        .chain(denied.iter().map(|bit| DENIED + bit));
    for byte in own {
        match fcntl(file, libc::F_OFD_SETLK, libc::F_RDLCK, byte) {
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            done => done?,
        };
    }
    let foreign = used
        .iter()
        .map(|bit| DENIED + bit)
        .chain(denied.iter().map(|bit| USED + bit));
    for byte in foreign {
        let found = fcntl(file, libc::F_OFD_GETLK, libc::F_WRLCK, byte)?;
        if i32::from(found.l_type) != libc::F_UNLCK {
            return Ok(false);
        }
    }
    Ok(true)
}

fn fcntl(
    file: &File,
    op: libc::c_int,
    kind: libc::c_int,
    byte: libc::off_t,
) -> io::Result<libc::flock> {
    let mut lock = libc::flock {
        l_type: libc::c_short::try_from(kind).map_err(io::Error::other)?,
        l_whence: libc::c_short::try_from(libc::SEEK_SET).map_err(io::Error::other)?,
        l_start: byte,
        l_len: 1,
        // Open-file-description locks belong to no process.
        l_pid: 0,
    };
    // SAFETY: the kernel reads and writes `lock`, which lives here.
    if unsafe { libc::fcntl(file.as_raw_fd(), op, &raw mut lock) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(lock)
}

/// A process that has the file open, other than this one where there is a choice.
///
/// The kernel does not tell who holds such a lock; who has the file open is the next best thing.
fn find_holder(file: &File) -> Option<u32> {
    let wanted = identity(&file.metadata().ok()?);
    // In a process namespace of its own this process is another one there.
    let own = std::fs::read_link("/proc/self").ok();
    std::fs::read_dir("/proc")
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.file_name()))
        .filter(|name| own.as_ref().is_none_or(|own| own.as_os_str() != name))
        .filter_map(|name| name.to_str()?.parse::<u32>().ok())
        .find(|pid| has_open(Path::new(&format!("/proc/{pid}/fd")), wanted))
}

fn has_open(fds: &Path, wanted: (u64, u64)) -> bool {
    std::fs::read_dir(fds)
        .into_iter()
        .flatten()
        .flatten()
        .any(|fd| std::fs::metadata(fd.path()).is_ok_and(|metadata| identity(&metadata) == wanted))
}
