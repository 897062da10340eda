//! A thread of another process that makes the system calls it is told to, as one that a guest took over
//! would: the kernel takes them for its own.

use std::fs;

use nix::errno::Errno;
use nix::libc::{c_long, user_regs_struct};
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// Code of the instruction that makes a system call.
const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// How far beneath the stack's end texts are put, beyond what its functions may use.
const BENEATH: u64 = 1024;

/// What came of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It was made, with this result.
    Made(i64),
    /// The kernel refused it.
    Refused(Errno),
    /// Its filter ended it, and would have ended the process.
    Trapped,
}

/// An argument of a call.
#[derive(Debug, Clone, Copy)]
pub enum Argument<'a> {
    Number(i64),
    Text(&'a str),
}

/// A thread that is held still.
pub struct Puppet {
    thread: Pid,
    at: user_regs_struct,
}

impl Puppet {
    /// Takes hold of a thread that waits in a system call.
    pub fn hold(thread: i32) -> Self {
        let thread = Pid::from_raw(thread);
        ptrace::seize(thread, Options::PTRACE_O_EXITKILL).unwrap();
        ptrace::interrupt(thread).unwrap();
        wait(thread);
        let mut at = ptrace::getregs(thread).unwrap();
        at.rip -= 2;
        let code = ptrace::read(thread, at.rip as *mut _).unwrap();
        assert_eq!(code.to_le_bytes()[..2], SYSCALL, "it is in no system call");
        // Nothing is to be begun again.
        at.orig_rax = u64::MAX;
        Self { thread, at }
    }

    /// Has it make a call.
    pub fn call(&self, number: c_long, arguments: &[Argument<'_>]) -> Outcome {
        let mut regs = self.at;
        regs.rax = number.cast_unsigned();
        let mut values = [0; 6];
        let mut text_at = (self.at.rsp - BENEATH) & !7;
        for (value, argument) in values.iter_mut().zip(arguments) {
            *value = match argument {
                Argument::Number(number) => number.cast_unsigned(),
                Argument::Text(text) => {
                    text_at -= (text.len() as u64 / 8 + 1) * 8;
                    self.write(text_at, text);
                    text_at
                }
            };
        }
        [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = values;
        ptrace::setregs(self.thread, regs).unwrap();
        loop {
            ptrace::step(self.thread, None).unwrap();
            match wait(self.thread) {
                Some(Signal::SIGSYS) => return Outcome::Trapped,
                Some(Signal::SIGTRAP) => {}
                // What wakes a vCPU, and the like.
                _ => continue,
            }
            let regs = ptrace::getregs(self.thread).unwrap();
            // The step of a call that was trapped may be told once more, before this one is made.
            if regs.rip == self.at.rip {
                continue;
            }
            let result = regs.rax.cast_signed();
            return match i32::try_from(result) {
                Ok(errno @ -4095..=-1) => Outcome::Refused(Errno::from_raw(-errno)),
                _ => Outcome::Made(result),
            };
        }
    }

    fn write(&self, address: u64, text: &str) {
        let mut bytes = text.as_bytes().to_vec();
        bytes.resize((text.len() / 8 + 1) * 8, 0);
        for (index, word) in bytes.chunks_exact(8).enumerate() {
            let word = c_long::from_le_bytes(word.try_into().unwrap());
            let place = address + index as u64 * 8;
            ptrace::write(self.thread, place as *mut _, word).unwrap();
        }
    }
}

/// Waits until a thread stands still, and tells by which signal.
fn wait(thread: Pid) -> Option<Signal> {
    match waitpid(thread, Some(WaitPidFlag::__WALL)).unwrap() {
        WaitStatus::Stopped(_, signal) => Some(signal),
        WaitStatus::PtraceEvent(..) | WaitStatus::PtraceSyscall(_) => None,
        ended => panic!("{ended:?}"),
    }
}

/// Threads of a process, by name.
pub fn threads(process: u32) -> Vec<(String, i32)> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let tasks = tasks.map(|entry| entry.unwrap());
    let name = |path: std::path::PathBuf| fs::read_to_string(path.join("comm")).unwrap();
    tasks
        .map(|entry| {
            let id = entry.file_name().to_str().unwrap().parse().unwrap();
            (name(entry.path()).trim().to_owned(), id)
        })
        .collect()
}
