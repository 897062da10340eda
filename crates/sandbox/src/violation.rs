//! What happens when a thread makes a system call that is not of its kind: one line tells which
//! call and thread it was, and the process ends.
//!
//! The call was not made by then. A thread that was taken over could change the handler and go on,
//! but gets no further with the next call.

use std::io;

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Exit code of a VMM that failed.
const FAILED: i32 = 1;
/// Longest name of a thread.
const NAME: usize = 16;

/// Makes SIGSYS tell and end.
pub(crate) fn install() -> io::Result<()> {
    let handler = SigHandler::SigAction(on_violation);
    let flags = SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK | SaFlags::SA_NODEFER;
    let action = SigAction::new(handler, flags, SigSet::empty());
    // SAFETY: the handler makes system calls and touches its own stack only.
    unsafe { sigaction(Signal::SIGSYS, &action) }?;
    let mut unblocked = SigSet::empty();
    unblocked.add(Signal::SIGSYS);
    unblocked.thread_unblock()?;
    Ok(())
}

/// Writes to standard error, which is all that is left.
pub(crate) fn tell(text: &str) {
    // SAFETY: the bytes live in `text`.
    unsafe { libc::write(2, text.as_ptr().cast(), text.len()) };
}

extern "C" fn on_violation(_: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let mut line = Line::default();
    line.push(b"edgevmm: the sandbox has ended this process: its thread ");
    let mut name = [0_u8; NAME];
    // SAFETY: the kernel writes as many bytes as a name may have.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    let end = name.iter().position(|&byte| byte == 0).unwrap_or(NAME);
    line.push(name.get(..end).unwrap_or_default());
    line.push(b" made system call ");
    line.number(call_number(info));
    line.push(b" (second argument ");
    line.number(second_argument(context));
    line.push(b"), which is not of its kind\n");
    let text = line.text();
    // SAFETY: the bytes live on this stack.
    unsafe { libc::write(2, text.as_ptr().cast(), text.len()) };
    // SAFETY: ends the process, and may be called in a handler.
    unsafe { libc::_exit(FAILED) };
}

/// The number of the call: a union that the C library's type does not show.
fn call_number(info: *const libc::siginfo_t) -> u32 {
    /// Bytes before `si_syscall`: three numbers, padding, and the address of the call.
    const OFFSET: usize = 24;
    // SAFETY: the kernel has handed in a whole one, which is much longer, and aligned to 8.
    unsafe { info.byte_add(OFFSET).cast::<u32>().read() }
}

/// The lower half of the call's second argument, such as the request of an `ioctl`.
fn second_argument(context: *const libc::c_void) -> u32 {
    const RSI: usize = libc::REG_RSI.cast_unsigned() as usize;
    // SAFETY: the kernel has handed in a whole one, and its place is in bounds.
    let register = unsafe { (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[RSI] };
    u32::try_from(register.cast_unsigned() & u64::from(u32::MAX)).unwrap_or_default()
}

/// Text without an allocator, which the thread may have been in.
#[derive(Debug)]
struct Line {
    bytes: [u8; 160],
    len: usize,
}

impl Default for Line {
    fn default() -> Self {
        Line {
            bytes: [0; 160],
            len: 0,
        }
    }
}

impl Line {
    fn push(&mut self, text: &[u8]) {
        for &byte in text {
            if let Some(place) = self.bytes.get_mut(self.len) {
                *place = byte;
                self.len += 1;
            }
        }
    }

    fn number(&mut self, mut number: u32) {
        let mut digits = [0; 10];
        let mut first = digits.len();
        for place in digits.iter_mut().rev() {
            // The remainder is a digit.
            *place = b'0' + u8::try_from(number % 10).unwrap_or(0);
            number /= 10;
            first -= 1;
            if number == 0 {
                break;
            }
        }
        self.push(digits.get(first..).unwrap_or_default());
    }

    fn text(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_and_nothing_overflows() {
        for number in [0, 9, 10, 435, u32::MAX] {
            let mut line = Line::default();
            line.number(number);
            assert_eq!(line.text(), number.to_string().as_bytes());
        }
        let mut line = Line::default();
        line.push(&[b'x'; 1000]);
        assert_eq!(line.text().len(), 160);
    }
}
