//! The system calls of each kind of thread, derived from what they make in the end-to-end tests.
//!
//! Those of the C library are of glibc 2.31 to 2.41 (Debian 11 to 13).

use crate::Kind;

/// When a system call is allowed.
#[derive(Debug, Clone, Copy)]
pub(crate) enum When {
    /// Always.
    Always,
    /// With an argument that maps no memory to be executed.
    NotExecutable(u8),
    /// `ioctl` with one of these requests, and of those that its user has for the kind.
    Requests(&'static [u32]),
    /// An argument is one of these.
    OneOf(u8, &'static [u32]),
    /// `clone` that makes a thread and nothing else.
    Thread,
    /// The first argument is this process.
    OwnProcess,
}

/// A call, and when it is allowed.
pub(crate) type Call = (libc::c_long, When);

use When::{Always, NotExecutable, OneOf, OwnProcess, Requests, Thread};

/// Flags by which all versions of the C library make threads: memory, file systems, files, signal
/// handlers, System V semaphores, thread-local storage and where to tell of begin and end.
pub(crate) const THREAD_FLAGS: u64 = 0x003d_0f00;

/// `ioctl`s on whatever is read or written: whether it blocks, the terminal's mode and size.
const PLAIN_REQUESTS: &[u32] = &[
    0x5421,      // FIONBIO
    0x5401,      // TCGETS
    0x5402,      // TCSETS
    0x5403,      // TCSETSW
    0x5404,      // TCSETSF
    0x5413,      // TIOCGWINSZ
    0x802c_542a, // TCGETS2, of newer C libraries
    0x402c_542b, // TCSETS2
    0x402c_542c, // TCSETSW2
    0x402c_542d, // TCSETSF2
];

/// `ioctl`s on block devices.
const DISK_REQUESTS: &[u32] = &[
    0x8008_1272, // BLKGETSIZE64
    0x1268,      // BLKSSZGET
    0x127b,      // BLKPBSZGET
    0x125e,      // BLKROGET
    0x1277,      // BLKDISCARD
    0x127f,      // BLKZEROOUT
];

/// What files are set to: flags, locks of open files (disks), and copies for threads.
const FILE_COMMANDS: &[u32] = &[
    libc::F_GETFL.cast_unsigned(),
    libc::F_SETFL.cast_unsigned(),
    libc::F_GETFD.cast_unsigned(),
    libc::F_SETFD.cast_unsigned(),
    libc::F_DUPFD_CLOEXEC.cast_unsigned(),
    libc::F_OFD_GETLK.cast_unsigned(),
    libc::F_OFD_SETLK.cast_unsigned(),
];

/// Of every thread: memory, locks, time, its own begin and end, and what is open already.
const ALL: &[Call] = &[
    (libc::SYS_read, Always),
    (libc::SYS_write, Always),
    (libc::SYS_readv, Always),
    (libc::SYS_writev, Always),
    (libc::SYS_close, Always),
    (libc::SYS_fcntl, OneOf(1, FILE_COMMANDS)),
    (libc::SYS_ioctl, Requests(PLAIN_REQUESTS)),
    (libc::SYS_poll, Always),
    (libc::SYS_ppoll, Always),
    (libc::SYS_futex, Always),
    (libc::SYS_mmap, NotExecutable(2)),
    (libc::SYS_mprotect, NotExecutable(2)),
    (libc::SYS_mremap, Always),
    (libc::SYS_munmap, Always),
    (libc::SYS_madvise, Always),
    (libc::SYS_brk, Always),
    (libc::SYS_rt_sigaction, Always),
    (libc::SYS_rt_sigprocmask, Always),
    (libc::SYS_rt_sigreturn, Always),
    (libc::SYS_sigaltstack, Always),
    (libc::SYS_gettid, Always),
    (libc::SYS_getpid, Always),
    // An abort, and what wakes vCPUs out of KVM.
    (libc::SYS_tgkill, OwnProcess),
    (libc::SYS_sched_yield, Always),
    // The C library asks for it when it looks for the bounds of a stack.
    (libc::SYS_sched_getaffinity, Always),
    // Where the host's clock can't be read without the kernel.
    (libc::SYS_clock_gettime, Always),
    (libc::SYS_gettimeofday, Always),
    (libc::SYS_clock_nanosleep, Always),
    (libc::SYS_nanosleep, Always),
    (libc::SYS_restart_syscall, Always),
    (libc::SYS_set_robust_list, Always),
    (libc::SYS_rseq, Always),
    (libc::SYS_getrandom, Always),
    (libc::SYS_prctl, OneOf(0, &[15, 16])), // PR_SET_NAME, PR_GET_NAME
    (libc::SYS_exit, Always),
    (libc::SYS_exit_group, Always),
];

/// Of those that serve guests' requests at all: signalling, timers and data of open files.
const DEVICES: &[Call] = &[
    (libc::SYS_eventfd2, Always),
    (libc::SYS_epoll_create1, Always),
    (libc::SYS_epoll_ctl, Always),
    (libc::SYS_epoll_wait, Always),
    (libc::SYS_epoll_pwait, Always),
    (libc::SYS_timerfd_create, Always),
    (libc::SYS_timerfd_settime, Always),
    (libc::SYS_timerfd_gettime, Always),
    // UEFI variables are stored by the vCPU that writes them.
    (libc::SYS_pread64, Always),
    (libc::SYS_pwrite64, Always),
    (libc::SYS_fdatasync, Always),
    // Memory that a balloon gives back; a hole in a file of shared memory.
    (libc::SYS_fallocate, Always),
];

/// Of the threads of disks.
const DISKS: &[Call] = &[
    (libc::SYS_eventfd2, Always),
    (libc::SYS_epoll_wait, Always),
    (libc::SYS_epoll_pwait, Always),
    (libc::SYS_epoll_ctl, Always),
    (libc::SYS_pread64, Always),
    (libc::SYS_pwrite64, Always),
    (libc::SYS_preadv, Always),
    (libc::SYS_pwritev, Always),
    (libc::SYS_preadv2, Always),
    (libc::SYS_pwritev2, Always),
    (libc::SYS_lseek, Always),
    (libc::SYS_fsync, Always),
    (libc::SYS_fdatasync, Always),
    (libc::SYS_sync_file_range, Always),
    (libc::SYS_fallocate, Always),
    (libc::SYS_ftruncate, Always),
    (libc::SYS_copy_file_range, Always),
    (libc::SYS_fstat, Always),
    (libc::SYS_newfstatat, Always),
    (libc::SYS_statx, Always),
    (libc::SYS_ioctl, Requests(DISK_REQUESTS)),
];

/// Sockets that are open, and new connections to them; none can be made.
const SOCKETS: &[Call] = &[
    (libc::SYS_recvfrom, Always),
    (libc::SYS_recvmsg, Always),
    (libc::SYS_sendto, Always),
    (libc::SYS_sendmsg, Always),
    (libc::SYS_shutdown, Always),
];

const MAIN: &[Call] = &[
    (libc::SYS_accept4, Always),
    (libc::SYS_getsockopt, Always),
    (libc::SYS_setsockopt, Always),
    (libc::SYS_getsockname, Always),
    (libc::SYS_getpeername, Always),
    // tokio's threads for what may block. The newer call's flags can't be looked at; see `filter`.
    (libc::SYS_clone, Thread),
    (libc::SYS_wait4, Always),
    (libc::SYS_waitid, Always),
    (libc::SYS_prlimit64, OneOf(0, &[0])),
    // Who talks is told by the socket; this is of the C library.
    (libc::SYS_geteuid, Always),
];

const VCPU: &[Call] = &[
    // The signal that wakes it is taken away again.
    (libc::SYS_rt_sigtimedwait, Always),
    (libc::SYS_rt_sigpending, Always),
];

/// What is made of an io_uring that is there.
const URING: &[Call] = &[(libc::SYS_io_uring_enter, Always)];

/// What a thread of a disk makes before it enters, and what else there is to wait by without it.
const NEW_URING: &[Call] = &[
    (libc::SYS_epoll_create1, Always),
    (libc::SYS_io_uring_setup, Always),
    (libc::SYS_io_uring_register, Always),
];

/// What a thread needs to put a filter on: all else it has inherited from the one that starts it.
const ENTER: &[Call] = &[
    (libc::SYS_seccomp, Always),
    (libc::SYS_prctl, OneOf(0, &[38])), // PR_SET_NO_NEW_PRIVS
    (libc::SYS_clone, Thread),
];

/// The lists of a kind.
pub(crate) fn of(kind: Kind) -> &'static [&'static [Call]] {
    match kind {
        Kind::Main => &[ALL, DEVICES, DISKS, SOCKETS, MAIN, VCPU],
        Kind::Vcpu => &[ALL, DEVICES, VCPU],
        Kind::Devices => &[ALL, DEVICES, SOCKETS],
        Kind::Disk => &[ALL, DISKS, URING],
        Kind::DiskHelper => &[ALL, DISKS],
        Kind::Copy => &[ALL],
        // It starts threads of disks only.
        Kind::Starter => &[ALL, DISKS, URING, NEW_URING, ENTER],
    }
}

/// Calls that are answered with an error and don't end the process: libraries make them, and do
/// without.
pub(crate) const REFUSED: &[(libc::c_long, i32)] = &[
    // The C library then makes threads by `clone`, whose flags can be looked at.
    (libc::SYS_clone3, libc::ENOSYS),
    // Time zones, settings of the host and the like. There are no paths inside.
    (libc::SYS_open, libc::EACCES),
    (libc::SYS_openat, libc::EACCES),
    (libc::SYS_access, libc::EACCES),
    (libc::SYS_faccessat, libc::EACCES),
    (libc::SYS_readlink, libc::EACCES),
    (libc::SYS_readlinkat, libc::EACCES),
    (libc::SYS_unlink, libc::EACCES),
    (libc::SYS_unlinkat, libc::EACCES),
    // A lock's holder is looked for in /proc.
    (libc::SYS_getdents64, libc::EACCES),
];
