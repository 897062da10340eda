//! A process namespace for the process that becomes a VMM: it sees no other process, and all that it
//! starts ends with it.
//!
//! Only a child can be first in a new one, so the thread that starts it asks for that, and takes it
//! back. Meanwhile it can start no threads.

use std::fs::File;
use std::io;

use nix::sched::{CloneFlags, setns, unshare};

/// Does `start`, which starts a process, so that it is the first one of a namespace. Where the host
/// forbids that, it is in this one's, as the VMM tells.
///
/// # Errors
///
/// As `start`, or when this thread can't come back.
pub fn in_own<T>(start: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let own = File::open("/proc/self/ns/pid")?;
    let asked = unshare(CloneFlags::CLONE_NEWPID).is_ok();
    let started = start();
    if asked {
        setns(own, CloneFlags::CLONE_NEWPID)?;
    }
    started
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::process::Command;

    use super::*;

    #[test]
    fn only_that_child_has_its_own() {
        let look = || {
            let output = Command::new("sh").args(["-c", "echo $$"]).output()?;
            Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
        };
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        assert_eq!(in_own(look).unwrap(), "1");
        assert_ne!(look().unwrap(), "1");
        std::thread::spawn(|| ()).join().unwrap();
    }
}
