//! What the process of a VMM, and each of its threads, may do once a guest runs in it.
//!
//! Knows nothing of KVM or devices: who runs a guest says which `ioctl`s each kind of thread makes.
//! A process closes its sandbox in three steps:
//!
//! 1. [`begin`], while it has one thread: namespaces, and what each thread will put on. Whatever
//!    the guest needs of the host is opened after that, by path, as ever.
//! 2. [`enter`], by each thread as the first thing it does: another user, no capabilities,
//!    `no_new_privs`, Landlock, and the system calls of its kind only. Threads that come
//!    and go while the guest runs are started by [`threads`], as a thread hands its own limits down
//!    to those that it starts.
//! 3. [`close`], by the main thread when all is open: an empty root file system, then as in 2.
//!    From then on files come as descriptors only.
//!
//! Each layer is there for itself: where the host forbids one, the others are put on, and
//! [`Layers`] tells what is missing. Left out: a network namespace, as no thread may make a socket
//! and making one costs more than all the rest.

mod caps;
mod filter;
mod landlocked;
mod lists;
pub mod namespaces;
mod report;
pub mod threads;
mod violation;

use std::io;
use std::os::fd::RawFd;
use std::sync::{Mutex, OnceLock, PoisonError};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

pub use caps::Ids;
pub use report::{Layer, Layers, host_layers};

/// Most files that a process in a sandbox may have open, where it may have as many outside.
const FILES: u64 = 8192;

/// What kind of work a thread does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(usize)]
pub enum Kind {
    /// The main thread, and those that tokio starts for what may block.
    Main,
    /// Runs a vCPU.
    Vcpu,
    /// The loop of devices.
    Devices,
    /// Serves a queue of a disk; its io_uring is made before it enters.
    Disk,
    /// Does slow requests of a disk.
    DiskHelper,
    /// Copies between descriptors: console, messages.
    Copy,
    /// Starts other threads, and may do what any of those may.
    Starter,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Kind; 7] = [
        Kind::Main,
        Kind::Vcpu,
        Kind::Devices,
        Kind::Disk,
        Kind::DiskHelper,
        Kind::Copy,
        Kind::Starter,
    ];
}

/// What a sandbox is to be like.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The user and group that root becomes; `None` for [`Ids::own`].
    pub ids: Option<Ids>,
    /// The requests that threads make by `ioctl`, beyond those on plain files and terminals.
    pub ioctls: fn(Kind) -> &'static [u32],
}

/// Why a sandbox can't be closed around a thread that must be in it.
#[derive(Debug, thiserror::Error)]
#[error("Can't close the sandbox: {what} failed")]
pub struct SandboxError {
    what: &'static str,
    #[source]
    source: io::Error,
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> SandboxError {
    move |source| SandboxError { what, source }
}

/// The sandbox of this process.
#[derive(Debug)]
struct Sandbox {
    /// Whom root becomes.
    ids: Option<Ids>,
    rules: Option<landlocked::Rules>,
    filters: Option<filter::Filters>,
    /// Whether there is a mount namespace to empty.
    mounts: bool,
    layers: Mutex<Layers>,
}

static SANDBOX: OnceLock<Sandbox> = OnceLock::new();

/// Begins the sandbox of this process, which has one thread.
///
/// # Errors
/// Fails when no thread can be started, or when it is begun already.
pub fn begin(settings: &Settings) -> Result<(), SandboxError> {
    let mut layers = Layers::default();
    let mounts = namespaces::own_mounts(&mut layers);
    let ids = caps::choose(settings.ids, &mut layers);
    limit_files();
    let sandbox = Sandbox {
        ids,
        rules: landlocked::Rules::new(&mut layers),
        filters: filter::Filters::new(settings.ioctls, &mut layers),
        mounts,
        layers: Mutex::new(layers),
    };
    if sandbox.filters.is_some() {
        violation::install().map_err(failed("handling SIGSYS"))?;
    }
    SANDBOX.set(sandbox).map_err(|_| SandboxError {
        what: "a second begin",
        source: io::ErrorKind::AlreadyExists.into(),
    })?;
    threads::start_starter().map_err(failed("starting a thread"))
}

/// Closes the sandbox around the calling thread. Does nothing where none was begun. A thread that
/// can't be closed in ends the process, as what it would do may be a guest's will.
pub fn enter(kind: Kind) {
    let Some(sandbox) = SANDBOX.get() else {
        return;
    };
    if let Err(error) = sandbox.enter(kind, &[]) {
        let source = &error.source;
        violation::tell(&format!("edgevmm: {error}: {source}\n"));
        std::process::abort();
    }
}

/// Closes the sandbox around the main thread, and around the file system of all. The process may
/// kill its `children` and nobody else. Does nothing where none was begun, and gives what is active.
///
/// # Errors
/// Fails when a layer that this host has can't be put on.
pub fn close(children: &[u32]) -> Result<Option<Layers>, SandboxError> {
    let Some(sandbox) = SANDBOX.get() else {
        return Ok(None);
    };
    if sandbox.mounts {
        namespaces::empty_root().map_err(failed("emptying the root file system"))?;
    }
    sandbox.enter(Kind::Main, children)?;
    let layers = sandbox.layers.lock();
    Ok(Some(layers.unwrap_or_else(PoisonError::into_inner).clone()))
}

/// Whether this process has begun a sandbox.
pub fn is_begun() -> bool {
    SANDBOX.get().is_some()
}

impl Sandbox {
    fn enter(&self, kind: Kind, children: &[u32]) -> Result<(), SandboxError> {
        if !threads::was_started() {
            caps::drop_all(self.ids).map_err(failed("giving up privileges"))?;
            if let Some(rules) = &self.rules {
                rules.apply().map_err(failed("Landlock"))?;
            }
        }
        if let Some(filters) = &self.filters {
            filters.apply(kind, children).map_err(failed("seccomp"))?;
        }
        Ok(())
    }
}

/// No core files, which would hold the guest's memory, and no more descriptors than are of use.
/// What io_uring and huge pages lock is the guest's memory, which the limit is not about.
fn limit_files() {
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let files = hard.min(FILES);
        let _ = setrlimit(Resource::RLIMIT_NOFILE, files, files);
    }
    if nix::unistd::geteuid().is_root() {
        let all = libc::RLIM_INFINITY;
        let _ = setrlimit(Resource::RLIMIT_MEMLOCK, all, all);
    }
}

/// Closes the descriptors that whoever started this process left open, but for standard streams and
/// `keep`. For the begin of a process, before it has files of its own.
///
/// # Errors
/// Fails when the kernel does not tell which are open.
pub fn close_inherited(keep: &[RawFd]) -> io::Result<()> {
    let mut open = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let name = entry?.file_name();
        open.extend(name.to_str().and_then(|name| name.parse::<RawFd>().ok()));
    }
    for fd in open {
        if fd > 2 && !keep.contains(&fd) {
            // SAFETY: nothing of this process owns it yet; the folder's own is closed already, which
            // the kernel says and nobody minds.
            unsafe { libc::close(fd) };
        }
    }
    Ok(())
}
