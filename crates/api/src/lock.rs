//! Locks that tell whether a machine lives.
//!
//! These are the kernel's locks of open file descriptions: they go over to whoever inherits the
//! file descriptor, end with the last one, and can be looked at without being taken, so that
//! somebody who lists machines never stands in the way of somebody who starts one.

use std::fs::File;
use std::io;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc::{self, SEEK_SET, c_int, c_short};

/// Describes an exclusive lock of the whole file.
fn whole_file() -> libc::flock {
    libc::flock {
        l_type: short(libc::F_WRLCK),
        l_whence: short(SEEK_SET),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

/// Narrows a constant of the interface, all of which are below 10.
const fn short(constant: c_int) -> c_short {
    constant.to_le_bytes()[0] as c_short
}

/// Takes the lock. False when somebody else has it.
pub(crate) fn try_lock(file: &File) -> io::Result<bool> {
    match fcntl(file, FcntlArg::F_OFD_SETLK(&whole_file())) {
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Tells whether somebody has the lock.
pub(crate) fn is_locked(file: &File) -> io::Result<bool> {
    let mut lock = whole_file();
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(lock.l_type != short(libc::F_UNLCK))
}
