//! Who a thread is: its user, its capabilities, and that it gains none.
//!
//! By plain system calls, as the C library's own would change all threads at once, and those that
//! have entered already may not.

use std::io;

use nix::errno::Errno;
use nix::unistd::{getegid, geteuid};
use serde::{Deserialize, Serialize};

use crate::report::{Layer, Layers};

/// First of the users that no package, container or service manager gives out; see systemd's
/// `UIDS-GIDS`. The process ID is added, so each VMM is a user that nobody else is.
const OWN_BASE: u32 = 0x7000_0000;
/// The highest capability that a kernel may have.
const LAST_CAPABILITY: libc::c_ulong = 63;
/// `_LINUX_CAPABILITY_VERSION_3`.
const VERSION: u32 = 0x2008_0522;

/// A user and a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ids {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

impl Ids {
    /// A user that no other process is, as long as this one lives.
    #[must_use]
    pub fn own() -> Ids {
        let id = OWN_BASE | (crate::namespaces::host_pid() & 0x00ff_ffff);
        Ids { uid: id, gid: id }
    }
}

/// Whom this process becomes: `wanted`, or a user of its own, if it is root of this host.
pub(crate) fn choose(wanted: Option<Ids>, layers: &mut Layers) -> Option<Ids> {
    if !geteuid().is_root() {
        layers.has(Layer::User, format!("{}, no capabilities", geteuid()));
        return None;
    }
    let ids = wanted.unwrap_or_else(Ids::own);
    if !may_change_user() {
        layers.lacks(
            Layer::User,
            "root without the capabilities to become another user; no capabilities are kept",
        );
        return None;
    }
    layers.has(Layer::User, format!("{}, no capabilities", ids.uid));
    Some(ids)
}

fn may_change_user() -> bool {
    const SETGID: u32 = 6;
    const SETUID: u32 = 7;
    let need = 1 << SETGID | 1 << SETUID;
    // In a user namespace only what is mapped can be become, which an own user never is.
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let all = map.split_whitespace().nth(2) == Some("4294967295");
    all && get().is_ok_and(|sets| sets[0].effective & need == need)
}

/// Becomes `ids`, gives up all capabilities, and the ways to get any.
pub(crate) fn drop_all(ids: Option<Ids>) -> io::Result<()> {
    // Refused without the capability for it: then there are none to bound.
    for capability in 0..=LAST_CAPABILITY {
        // SAFETY: these arguments are plain numbers.
        let dropped = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        if dropped < 0 {
            break;
        }
    }
    let mut signal: libc::c_int = 0;
    // SAFETY: writes one int, which lives here.
    done(unsafe { libc::prctl(libc::PR_GET_PDEATHSIG, &raw mut signal) }.into())?;
    if let Some(Ids { uid, gid }) = ids {
        // SAFETY: an empty list is read from nowhere.
        done(unsafe { libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<u32>()) })?;
        // SAFETY: plain numbers.
        done(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) })?;
        // SAFETY: plain numbers.
        done(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) })?;
    }
    set_none()?;
    // Who becomes another user outlives its parent again, unless it says once more that it must not.
    if signal != 0 {
        // SAFETY: plain numbers.
        done(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal, 0, 0, 0) }.into())?;
    }
    // SAFETY: plain numbers.
    done(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())?;
    // SAFETY: plain numbers. Nobody of the same user looks into this process.
    done(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) }.into())
}

fn done(result: libc::c_long) -> io::Result<()> {
    if result < 0 {
        return Err(Errno::last().into());
    }
    Ok(())
}

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Sets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

static HEADER: Header = Header {
    version: VERSION,
    pid: 0,
};

fn get() -> io::Result<[Sets; 2]> {
    let mut sets = [Sets::default(); 2];
    // SAFETY: the kernel reads a header and writes two sets, which live here.
    done(unsafe { libc::syscall(libc::SYS_capget, &raw const HEADER, sets.as_mut_ptr()) })?;
    Ok(sets)
}

/// Empties all sets; the ambient one follows the inheritable.
fn set_none() -> io::Result<()> {
    let sets = [Sets::default(); 2];
    // SAFETY: the kernel reads a header and two sets, which live here.
    done(unsafe { libc::syscall(libc::SYS_capset, &raw const HEADER, sets.as_ptr()) })
}

/// The group of this process, for a mapping that keeps it.
pub(crate) fn own() -> Ids {
    Ids {
        uid: geteuid().as_raw(),
        gid: getegid().as_raw(),
    }
}
