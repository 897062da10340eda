//! Namespaces: mounts that are this process' own, and a process namespace for a child.

use std::fs;
use std::io;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, chdir, fork, geteuid, pivot_root};

use crate::caps;
use crate::report::{Layer, Layers};

/// Folders of which one is there on any host; in this process' own mounts one becomes the root.
const PLACES: [&str; 4] = ["/run", "/tmp", "/var", "/dev"];
const NONE: Option<&str> = None;

/// The process ID as the rest of the host knows it, also from inside a process namespace.
#[must_use]
pub fn host_pid() -> u32 {
    let link = fs::read_link("/proc/self").ok();
    let pid = link.as_deref().and_then(Path::to_str);
    pid.and_then(|pid| pid.parse().ok())
        .unwrap_or_else(std::process::id)
}

/// Has the next child be the first process of a namespace, with all that it starts: they see no
/// other, and end with it. For a process of one thread that starts a VMM. False where the host does
/// not allow it.
pub fn for_next_child() -> bool {
    if geteuid().is_root() {
        return unshare(CloneFlags::CLONE_NEWPID).is_ok();
    }
    let ids = caps::own();
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWPID).is_ok() && map(ids).is_ok()
}

/// Keeps the user and group that this process had.
fn map(ids: caps::Ids) -> io::Result<()> {
    let caps::Ids { uid, gid } = ids;
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/gid_map", format!("{gid} {gid} 1"))?;
    fs::write("/proc/self/uid_map", format!("{uid} {uid} 1"))
}

/// Gives this process mounts of its own. False where the host does not allow it.
pub(crate) fn own_mounts(layers: &mut Layers) -> bool {
    if host_pid() == std::process::id() {
        layers.lacks(
            Layer::Processes,
            "machines in the background and of pods have their own, where the host allows it",
        );
    } else {
        layers.has(Layer::Processes, "own");
    }
    match unshare_mounts() {
        Ok(()) => {
            layers.has(Layer::Mounts, "an empty root");
            true
        }
        Err(error) => {
            layers.lacks(Layer::Mounts, format!("this host forbids them: {error}"));
            false
        }
    }
}

fn unshare_mounts() -> io::Result<()> {
    // Root, or a namespace's own user that made it.
    if unshare(CloneFlags::CLONE_NEWNS).is_err() {
        if geteuid().is_root() {
            return Err(io::Error::last_os_error());
        }
        let ids = caps::own();
        unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS)?;
        map(ids)?;
    }
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(NONE, "/", NONE, private, NONE)?;
    Ok(())
}

/// Leaves nothing of the host's files: the root is an empty file system that can't be written.
pub(crate) fn empty_root() -> io::Result<()> {
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let mut result = Err(io::ErrorKind::NotFound.into());
    for place in PLACES {
        result = mount(
            Some("none"),
            place,
            Some("tmpfs"),
            flags,
            Some("size=4k,mode=555"),
        )
        .map(|()| place)
        .map_err(io::Error::from);
        if result.is_ok() {
            break;
        }
    }
    chdir(result?)?;
    // The old root goes on top of the new one, and from there.
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")?;
    Ok(())
}

/// Tells whether this host allows mounts of one's own, by a child that tries.
pub(crate) fn try_mounts(layers: &mut Layers) {
    // SAFETY: the child makes system calls and leaves by `_exit`; this process has one thread.
    let child = match unsafe { fork() } {
        Ok(ForkResult::Child) => {
            let tried = unshare_mounts().and_then(|()| empty_root());
            let errno = tried
                .err()
                .map_or(0, |error| error.raw_os_error().unwrap_or(1));
            // SAFETY: ends the child.
            unsafe { libc::_exit(errno) };
        }
        Ok(ForkResult::Parent { child }) => child,
        Err(error) => return layers.lacks(Layer::Mounts, error.to_string()),
    };
    match waitpid(child, None) {
        Ok(WaitStatus::Exited(_, 0)) => layers.has(Layer::Mounts, "an empty root"),
        Ok(WaitStatus::Exited(_, errno)) => {
            let error = io::Error::from_raw_os_error(errno);
            layers.lacks(Layer::Mounts, format!("this host forbids them: {error}"));
        }
        _ => layers.lacks(Layer::Mounts, "this host forbids them"),
    }
}
