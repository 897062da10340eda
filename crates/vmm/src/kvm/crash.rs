//! What is left of a guest that crashed, for a person to read.

use std::fmt::{self, Write as _};

use edgevmm_devices::GuestMemory;
use kvm_bindings::{kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

/// What is left of a guest that crashed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CrashReport {
    /// Number of the vCPU.
    pub vcpu: u8,
    /// What happened.
    pub cause: String,
    /// Registers and the bytes at RIP, several lines.
    pub registers: String,
}

impl fmt::Display for CrashReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vCPU {}: {}\n{}", self.vcpu, self.cause, self.registers)
    }
}

/// What KVM says of an internal error, which must be why the vCPU left the guest.
pub(super) fn internal_error(fd: &mut VcpuFd) -> String {
    let run = fd.get_kvm_run();
    // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, so `internal` is the valid member.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let what = match internal.suberror {
        1 => "an instruction that KVM can't emulate",
        2 => "two events at once",
        3 => "an exception while delivering another",
        4 => "an exit that KVM does not know",
        _ => "an internal error of KVM",
    };
    let len = usize::try_from(internal.ndata)
        .unwrap_or(0)
        .min(internal.data.len());
    let mut text = format!("{what} (suberror {})", internal.suberror);
    for word in internal.data.iter().take(len) {
        let _ = write!(text, " {word:#x}");
    }
    text
}

/// Whether a vCPU is where a reset puts it. After the shutdown that a triple fault is, SVM leaves
/// nothing of the guest's state (AMD APM vol. 2, 15.14.3), so KVM resets the vCPU.
fn is_reset(r: &kvm_regs, s: &kvm_sregs) -> bool {
    r.rip == 0xfff0 && s.cs.base == 0xffff_0000 && s.cr0 & 1 == 0
}

const RESET_NOTE: &str =
    "(those of a reset: an AMD processor leaves none from before a triple fault)\n";

/// Registers and the code at RIP, for a person.
pub(super) fn describe(fd: &VcpuFd, memory: &GuestMemory) -> String {
    let (Ok(r), Ok(s)) = (fd.get_regs(), fd.get_sregs()) else {
        return "registers can't be read".to_owned();
    };
    let mut text = format!(
        "rip={:016x} rflags={:08x} cs={:04x} base={:x}\n\
         rax={:016x} rbx={:016x} rcx={:016x} rdx={:016x}\n\
         rsi={:016x} rdi={:016x} rbp={:016x} rsp={:016x}\n\
         r8 ={:016x} r9 ={:016x} r10={:016x} r11={:016x}\n\
         r12={:016x} r13={:016x} r14={:016x} r15={:016x}\n\
         cr0={:08x} cr2={:016x} cr3={:016x} cr4={:08x} efer={:04x}\n\
         gdt={:x}/{:x} idt={:x}/{:x}\ncode at rip:",
        r.rip,
        r.rflags,
        s.cs.selector,
        s.cs.base,
        r.rax,
        r.rbx,
        r.rcx,
        r.rdx,
        r.rsi,
        r.rdi,
        r.rbp,
        r.rsp,
        r.r8,
        r.r9,
        r.r10,
        r.r11,
        r.r12,
        r.r13,
        r.r14,
        r.r15,
        s.cr0,
        s.cr2,
        s.cr3,
        s.cr4,
        s.efer,
        s.gdt.base,
        s.gdt.limit,
        s.idt.base,
        s.idt.limit
    );
    if is_reset(&r, &s) {
        text.insert_str(0, RESET_NOTE);
    }
    let linear = if s.efer & 1 << 10 == 0 {
        r.rip.wrapping_add(s.cs.base)
    } else {
        r.rip
    };
    let mut code = [0; 16];
    let physical = fd
        .translate_gva(linear)
        .ok()
        .filter(|t| t.valid != 0)
        .map(|t| t.physical_address);
    let read = physical.and_then(|address| memory.read(&mut code, GuestAddress(address)).ok());
    match read {
        Some(len) => {
            for byte in code.iter().take(len) {
                let _ = write!(text, " {byte:02x}");
            }
        }
        None => text.push_str(" not in memory"),
    }
    text
}
