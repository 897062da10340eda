//! Removes what a machine in the foreground leaves on the host when it ends: the VMM itself reaches
//! no files any more then. A process of its own that waits for nothing but the VMM's end, however
//! that comes.

use std::fs::{self, File};
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use edgevmm_api::MachineClaim;
use nix::unistd::{ForkResult, dup2_stderr, dup2_stdin, dup2_stdout, fork, setsid};

/// The way to the process.
#[derive(Debug)]
pub struct Janitor(UnixStream);

impl Janitor {
    /// Starts it, to remove `sockets` and the folder of `claim`; while this process has one thread.
    ///
    /// # Errors
    ///
    /// When there are no more processes or files to be had.
    pub fn start(claim: MachineClaim, sockets: &[PathBuf]) -> io::Result<(Self, MachineClaim)> {
        let (vmm, janitor) = UnixStream::pair()?;
        // SAFETY: this process has one thread, so that the child can go on as any process can.
        match unsafe { fork() }? {
            ForkResult::Parent { .. } => Ok((Self(vmm), claim)),
            ForkResult::Child => {
                drop(vmm);
                wait_and_remove(janitor, claim, sockets);
                // SAFETY: ends the process, without what is to be done at the parent's end.
                unsafe { nix::libc::_exit(0) }
            }
        }
    }

    /// Has it done, and waits for that.
    pub fn finish(mut self) {
        let _ = self.0.shutdown(Shutdown::Write);
        let _ = self.0.read(&mut [0]);
    }
}

fn wait_and_remove(mut vmm: UnixStream, claim: MachineClaim, sockets: &[PathBuf]) {
    // Away from the terminal and its signals, and from pipes whose readers wait for their end.
    let _ = setsid();
    if let Ok(null) = File::options().read(true).write(true).open("/dev/null") {
        let _ = dup2_stdin(&null);
        let _ = dup2_stdout(&null);
        let _ = dup2_stderr(&null);
    }
    let mut byte = [0];
    while vmm.read(&mut byte).is_ok_and(|length| length > 0) {}
    for socket in sockets {
        let _ = fs::remove_file(socket);
    }
    let _ = claim.remove();
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use edgevmm_api::RuntimeDir;

    use super::*;

    #[test]
    fn nothing_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let claim = RuntimeDir::new(folder.path()).claim("vm").unwrap();
        let socket = folder.path().join("channel");
        fs::write(&socket, "").unwrap();
        let (janitor, _claim) = Janitor::start(claim, std::slice::from_ref(&socket)).unwrap();
        assert!(folder.path().join("vm").exists());
        janitor.finish();
        assert!(!folder.path().join("vm").exists() && !socket.exists());
    }
}
