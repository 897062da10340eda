//! `start`: makes sure that a daemon serves the pod, and prints its address.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::fcntl::{Flock, FlockArg, OFlag};
use uuid::Uuid;

use crate::Failure;
use crate::bootstrap::Bootstrap;
use crate::cli::Cli;
use crate::spec::Spec;

/// File in the bundle with the daemon's address, which containerd 1.6 reads after its restart.
pub const ADDRESS_FILE: &str = "address";
/// Times that a socket is taken from a dead daemon while others try the same.
const BIND_ATTEMPTS: u32 = 8;

/// Starts a daemon, or finds the one of the container's pod.
///
/// # Errors
///
/// When there is no bundle in the current folder, or no socket can be made.
pub fn run(cli: &Cli) -> Result<(), Failure> {
    let bootstrap = Bootstrap::read(io::stdin().lock(), cli)?;
    let bundle = std::env::current_dir()?;
    let spec = Spec::read(&bundle)?;
    let group = spec.sandbox_id().unwrap_or(&cli.id);
    let socket = socket_path(&bootstrap.socket_dir(), cli, group);
    let address = format!("unix://{}", socket.display());
    if let Some(listener) = listen(&socket)? {
        spawn(cli, &socket, listener, &bundle).inspect_err(|_| {
            let _ = fs::remove_file(&socket);
        })?;
    }
    fs::write(bundle.join(ADDRESS_FILE), &address)?;
    io::stdout().write_all(&bootstrap.reply(&address))?;
    Ok(())
}

/// Where the daemon of a group of containers listens. Paths of sockets are short, so all that makes
/// a group unique is in a hash.
fn socket_path(folder: &Path, cli: &Cli, group: &str) -> PathBuf {
    let key = format!("{}\n{}\n{group}", cli.address, cli.namespace);
    let hash = Uuid::new_v5(&Uuid::NAMESPACE_URL, key.as_bytes());
    folder.join(hash.simple().to_string())
}

/// Listens at `path`. `None` when a living daemon does so already.
fn listen(path: &Path) -> io::Result<Option<UnixListener>> {
    if let Some(folder) = path.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(folder)?;
    }
    let _alone = alone(path)?;
    for _ in 0..BIND_ATTEMPTS {
        match UnixListener::bind(path) {
            Ok(listener) => {
                fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
                return Ok(Some(listener));
            }
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(error),
        }
        if UnixStream::connect(path).is_ok() {
            return Ok(None);
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Err(io::ErrorKind::AddrInUse.into())
}

/// A socket that its holder is alone with: of several who find a dead daemon's one takes it, and the
/// others find what that one made of it.
#[derive(Debug)]
pub struct Alone {
    path: PathBuf,
    /// Dropped after the name is gone.
    _lock: Flock<fs::File>,
}

impl Drop for Alone {
    fn drop(&mut self) {
        // Whoever waits for the lock finds that the file has lost its name, and makes another.
        let _ = fs::remove_file(&self.path);
    }
}

/// Waits until nobody else is about to take or remove a socket. Those of other pods are theirs.
///
/// # Errors
///
/// When no lock can be made beside it.
pub fn alone(socket: &Path) -> io::Result<Alone> {
    let path = socket.with_extension("lock");
    loop {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(OFlag::O_NOFOLLOW.bits())
            .open(&path)?;
        let lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error)?;
        let (locked, named) = (lock.metadata()?, fs::symlink_metadata(&path));
        if named.is_ok_and(|named| (named.dev(), named.ino()) == (locked.dev(), locked.ino())) {
            return Ok(Alone { path, _lock: lock });
        }
    }
}

/// Starts the daemon with the socket as its standard input.
fn spawn(cli: &Cli, socket: &Path, listener: UnixListener, bundle: &Path) -> io::Result<()> {
    let child = Command::new("/proc/self/exe")
        .arg0(std::env::args_os().next().unwrap_or_default())
        .args(["-namespace", &cli.namespace, "-address", &cli.address])
        .args(["-id", &cli.id, "-socket"])
        .arg(socket)
        .arg("daemon")
        .current_dir(bundle)
        .stdin(OwnedFd::from(listener))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()?;
    // Refused where privileges are missing; then the daemon is as easy a victim as containerd.
    let _ = protect(child.id());
    Ok(())
}

/// Makes the out-of-memory killer take the daemon after its containers, as containerd's own shims
/// do: by one step easier than containerd.
fn protect(pid: u32) -> io::Result<()> {
    let parent = nix::unistd::getppid();
    let score = fs::read_to_string(format!("/proc/{parent}/oom_score_adj"))?;
    let score: i32 = score.trim().parse().map_err(io::Error::other)?;
    let score = score.saturating_add(1).min(1000);
    fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn a_dead_daemon_gives_its_socket_up_and_a_living_one_keeps_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s/socket");
        let living = listen(&path).unwrap().unwrap();
        assert!(listen(&path).unwrap().is_none());
        drop(living);
        assert!(listen(&path).unwrap().is_some());
    }

    #[test]
    fn of_many_who_find_a_dead_daemon_one_listens() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        for _ in 0..200 {
            drop(listen(&path).unwrap());
            let listeners: Vec<_> = std::thread::scope(|scope| {
                let tries: Vec<_> = (0..8)
                    .map(|_| scope.spawn(|| listen(&path).unwrap()))
                    .collect();
                tries.into_iter().map(|it| it.join().unwrap()).collect()
            });
            assert_eq!(listeners.iter().flatten().count(), 1);
        }
        let names: Vec<_> = fs::read_dir(folder.path()).unwrap().collect();
        assert_eq!(names.len(), 1, "{names:?}");
    }

    #[test]
    fn pods_do_not_wait_for_each_other_and_each_is_alone_with_its_socket() {
        let folder = tempfile::tempdir().unwrap();
        let (one, other) = (folder.path().join("one"), folder.path().join("other"));
        let _one = alone(&one).unwrap();
        let _other = alone(&other).unwrap();
        let third = folder.path().join("third");
        let inside = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let _alone = alone(&third).unwrap();
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        std::thread::yield_now();
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert!(!folder.path().join("third.lock").exists());
    }
}
