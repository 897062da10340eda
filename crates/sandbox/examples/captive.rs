//! Plays a thread of a VMM that its guest took over: closes the sandbox around itself, then makes
//! one attempt to get out. For the tests.
//!
//! `captive KIND|none ATTEMPT`: says `REACHED` if the attempt came through. `none` is without a
//! sandbox, and shows that an attempt is one.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};

use edgevmm_sandbox::{Kind, Settings, begin, close, enter, threads};

fn main() {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [kind, attempt] = &arguments[..] else {
        println!("captive KIND|none ATTEMPT");
        return;
    };
    let attempt = attempt.clone();
    let Some(kind) = Kind::ALL.into_iter().find(|it| format!("{it:?}") == *kind) else {
        return tell(&attempt, make(&attempt));
    };
    let settings = Settings {
        ids: None,
        ioctls: |_| &[],
    };
    if let Err(error) = begin(&settings) {
        println!("can't begin: {error}");
        return;
    }
    if kind == Kind::Main {
        closed();
        return tell(&attempt, make(&attempt));
    }
    let thread = threads::spawn("captive".into(), 128 << 10, move || {
        // The root file system is emptied meanwhile.
        std::thread::sleep(std::time::Duration::from_millis(50));
        enter(kind);
        tell(&attempt, make(&attempt));
    });
    closed();
    let _ = thread.map(std::thread::JoinHandle::join);
}

fn closed() {
    match close(&[]) {
        Ok(Some(layers)) => println!("layers: {layers}"),
        Ok(None) => println!("no sandbox"),
        Err(error) => println!("can't close: {error}"),
    }
}

fn tell(attempt: &str, result: io::Result<()>) {
    match result {
        Ok(()) => println!("REACHED {attempt}"),
        Err(error) => println!("refused {attempt}: {error}"),
    }
}

fn call(result: libc::c_long) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn make(attempt: &str) -> io::Result<()> {
    let null = std::ptr::null::<u8>();
    match attempt {
        "work" => work(),
        "host-file" => File::open("/etc/passwd").map(drop),
        "own-program" => File::open("/proc/self/exe").map(drop),
        "other-process" => fs::read("/proc/1/status").map(drop),
        "kvm-again" => OpenOptions::new().read(true).open("/dev/null").map(drop),
        "list" => fs::read_dir("/").map(drop),
        "write" => fs::write("/tmp/edgevmm-captive", "out").map(drop),
        "tcp" => TcpListener::bind("127.0.0.1:0")
            .and_then(|listener| TcpStream::connect(listener.local_addr()?))
            .map(drop),
        "udp" => UdpSocket::bind("127.0.0.1:0").map(drop),
        "unix" => UnixStream::pair().map(drop),
        "listen" => {
            UnixListener::bind(format!("/tmp/edgevmm-captive-{}", std::process::id())).map(drop)
        }
        "program" => execute(),
        "process" => fork(),
        "thread" => {
            let thread = std::thread::Builder::new().spawn(|| ())?;
            thread.join().map_err(|_| io::Error::other("died"))
        }
        // SAFETY: asks to be traced, which reads nothing.
        "trace" => call(unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, null, null) }),
        // SAFETY: a signal that does nothing, to this process' parent.
        "signal" => call(unsafe { libc::kill(libc::getppid(), 0) }.into()),
        // SAFETY: plain numbers.
        "namespace" => call(unsafe { libc::unshare(libc::CLONE_NEWNS) }.into()),
        "executable" => executable(),
        // SAFETY: reads one byte, which lives in the program.
        "type" => call(unsafe { libc::ioctl(0, libc::TIOCSTI, c"x".as_ptr()) }.into()),
        // SAFETY: plain numbers; already the user that is asked for.
        "root" => call(unsafe { libc::setuid(libc::getuid()) }.into()),
        // SAFETY: the name lives in the program.
        "memory-file" => call(unsafe { libc::memfd_create(c"x".as_ptr(), 0) }.into()),
        "uring" => uring(),
        // SAFETY: a plain number.
        "watch" => call(unsafe { libc::inotify_init1(0) }.into()),
        _ => Err(io::Error::other("there is no such attempt")),
    }
}

/// What every thread may do.
fn work() -> io::Result<()> {
    let memory = vec![1_u8; 1 << 20];
    std::thread::sleep(std::time::Duration::from_millis(1));
    let null = io::stdin();
    let mut byte = [0_u8; 1];
    // SAFETY: the byte lives here.
    call(unsafe { libc::read(null.as_raw_fd(), byte.as_mut_ptr().cast(), 1) } as libc::c_long)?;
    (memory.iter().map(|&byte| usize::from(byte)).sum::<usize>() == 1 << 20)
        .then_some(())
        .ok_or_else(|| io::Error::other("wrong"))
}

fn execute() -> io::Result<()> {
    let text = |text| CString::new(text).map_err(io::Error::other);
    let (program, word) = (text("/bin/echo")?, text("REACHED program")?);
    let arguments = [program.as_ptr(), word.as_ptr(), std::ptr::null()];
    // SAFETY: the strings live until the call has failed.
    unsafe { libc::execv(program.as_ptr(), arguments.as_ptr()) };
    Err(io::Error::last_os_error())
}

fn fork() -> io::Result<()> {
    // SAFETY: the child ends at once.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: ends the child.
        unsafe { libc::_exit(0) };
    }
    call(child.into())
}

fn executable() -> io::Result<()> {
    let protection = libc::PROT_READ | libc::PROT_EXEC;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: new memory, where the kernel likes.
    let memory = unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0) };
    if memory == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn uring() -> io::Result<()> {
    let mut setup = [0_u8; 256];
    // SAFETY: the kernel writes less than there is.
    call(unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, setup.as_mut_ptr()) })
}
