//! Seccomp: makes programs for the kernel of the [`lists`] and puts them on.
//!
//! What is not listed raises SIGSYS, see [`violation`](crate::violation).

use std::collections::BTreeMap;
use std::io;
use std::sync::OnceLock;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, sock_filter,
};

use crate::Kind;
use crate::lists::{self, THREAD_FLAGS, When};
use crate::report::{Layer, Layers};

/// `PROT_EXEC`.
const EXECUTABLE: u64 = 4;
/// `BPF_LD | BPF_W | BPF_ABS`, of the number of the call, which is first.
const LOAD_NUMBER: u16 = 0x20;
/// `BPF_JMP | BPF_JEQ | BPF_K`.
const JUMP_IF_EQUAL: u16 = 0x15;
/// `BPF_RET | BPF_K`.
const RETURN: u16 = 0x06;

/// Programs by kind, each made when it is needed first.
#[derive(Debug)]
pub(crate) struct Filters {
    ioctls: fn(Kind) -> &'static [u32],
    programs: [OnceLock<BpfProgram>; Kind::ALL.len()],
}

impl Filters {
    pub(crate) fn new(ioctls: fn(Kind) -> &'static [u32], layers: &mut Layers) -> Option<Filters> {
        if let Err(error) = check() {
            layers.lacks(Layer::Seccomp, format!("this host forbids it: {error}"));
            return None;
        }
        layers.has(Layer::Seccomp, "a list for each kind of thread");
        Some(Filters {
            ioctls,
            programs: [const { OnceLock::new() }; Kind::ALL.len()],
        })
    }

    /// Puts the filter of `kind` on the calling thread, which may kill `children`.
    pub(crate) fn apply(&self, kind: Kind, children: &[u32]) -> io::Result<()> {
        let compile = || compile(kind, (self.ioctls)(kind), children).map_err(io::Error::other);
        let cached = self
            .programs
            .get(kind as usize)
            .filter(|_| children.is_empty());
        let made;
        let program = match cached.and_then(OnceLock::get) {
            Some(program) => program,
            None => {
                made = compile()?;
                match cached {
                    Some(place) => place.get_or_init(|| made),
                    None => &made,
                }
            }
        };
        seccompiler::apply_filter(program).map_err(io::Error::other)
    }
}

/// Asks whether the kernel knows the action that is used, which filters themselves are subject to.
fn check() -> io::Result<()> {
    const GET_ACTION_AVAIL: libc::c_uint = 2;
    let action = libc::SECCOMP_RET_TRAP;
    // SAFETY: the kernel reads a number that lives here.
    let known = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            GET_ACTION_AVAIL,
            0_u32,
            &raw const action,
        )
    };
    if known < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// The program of a kind.
pub(crate) fn compile(
    kind: Kind,
    ioctls: &[u32],
    children: &[u32],
) -> Result<BpfProgram, BackendError> {
    let mut rules = Rules::new();
    for &(call, when) in lists::of(kind).iter().copied().flatten() {
        allow(&mut rules, call, when)?;
    }
    for &request in ioctls {
        add(&mut rules, libc::SYS_ioctl, &[equal(1, request.into())?])?;
    }
    for &child in children {
        let sure = libc::SIGKILL.cast_unsigned();
        let conditions = [equal(0, child.into())?, equal(1, sure.into())?];
        add(&mut rules, libc::SYS_kill, &conditions)?;
    }
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Trap,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?;
    let listed = BpfProgram::try_from(filter)?;
    Ok(refusals().chain(listed).collect())
}

/// Answers the calls that are refused, before the lists are looked at.
fn refusals() -> impl Iterator<Item = sock_filter> {
    let load = sock_filter {
        code: LOAD_NUMBER,
        jt: 0,
        jf: 0,
        k: 0,
    };
    let each = lists::REFUSED.iter().flat_map(|&(call, errno)| {
        let answer = libc::SECCOMP_RET_ERRNO | errno.cast_unsigned();
        [
            sock_filter {
                code: JUMP_IF_EQUAL,
                jt: 0,
                jf: 1,
                // Numbers of calls are small.
                k: u32::try_from(call).unwrap_or(u32::MAX),
            },
            sock_filter {
                code: RETURN,
                jt: 0,
                jf: 0,
                k: answer,
            },
        ]
    });
    std::iter::once(load).chain(each)
}

fn allow(rules: &mut Rules, call: i64, when: When) -> Result<(), BackendError> {
    match when {
        When::Always => {
            rules.insert(call, Vec::new());
            Ok(())
        }
        When::NotExecutable(argument) => add(rules, call, &[masked(argument, EXECUTABLE, 0)?]),
        When::Requests(requests) => requests
            .iter()
            .try_for_each(|&request| add(rules, call, &[equal(1, request.into())?])),
        When::OneOf(argument, values) => values
            .iter()
            .try_for_each(|&value| add(rules, call, &[equal(argument, value.into())?])),
        When::Thread => add(rules, call, &[equal(0, THREAD_FLAGS)?]),
        When::OwnProcess => add(rules, call, &[equal(0, std::process::id().into())?]),
    }
}

/// Adds a way in which `call` is allowed to those that are there.
fn add(rules: &mut Rules, call: i64, conditions: &[SeccompCondition]) -> Result<(), BackendError> {
    let rule = SeccompRule::new(conditions.to_vec())?;
    rules.entry(call).or_default().push(rule);
    Ok(())
}

/// Arguments of system calls are looked at by their lower half, as the kernel does with these.
fn equal(argument: u8, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
}

fn masked(argument: u8, mask: u64, value: u64) -> Result<SeccompCondition, BackendError> {
    let compare = SeccompCmpOp::MaskedEq(mask);
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, compare, value)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn programs_fit_the_kernels_limit() {
        const MOST: usize = 4096;
        for kind in Kind::ALL {
            let program = compile(kind, &[1; 60], &[7, 8]).unwrap();
            assert!(program.len() < MOST / 2, "{kind:?}: {}", program.len());
        }
    }

    #[test]
    fn nobody_makes_sockets_processes_or_programs() {
        let never = [
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_ptrace,
            libc::SYS_process_vm_writev,
            libc::SYS_mount,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_bpf,
            libc::SYS_kill,
            libc::SYS_pidfd_send_signal,
            libc::SYS_openat2,
            libc::SYS_open_by_handle_at,
            libc::SYS_memfd_create,
            libc::SYS_keyctl,
            libc::SYS_userfaultfd,
        ];
        for kind in Kind::ALL {
            let calls: Vec<_> = lists::of(kind).iter().copied().flatten().collect();
            for call in never {
                assert!(
                    !calls.iter().any(|(listed, _)| *listed == call),
                    "{kind:?} {call}"
                );
            }
            let uring = calls
                .iter()
                .any(|(call, _)| *call == libc::SYS_io_uring_setup);
            assert_eq!(uring, kind == Kind::Starter);
        }
    }
}
