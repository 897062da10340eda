//! What the threads of a VMM ask devices of the host for, once its sandbox is closed.

use edgevmm_sandbox::Kind;

/// Of a vCPU: to run, and to take its state for a report.
const VCPU: [u32; 27] = [
    0xae80,      // KVM_RUN
    0x8090_ae81, // KVM_GET_REGS
    0x4090_ae82, // KVM_SET_REGS
    0x8138_ae83, // KVM_GET_SREGS
    0x4138_ae84, // KVM_SET_SREGS
    0xc008_ae88, // KVM_GET_MSRS
    0x4008_ae89, // KVM_SET_MSRS
    0x81a0_ae8c, // KVM_GET_FPU
    0x41a0_ae8d, // KVM_SET_FPU
    0x8400_ae8e, // KVM_GET_LAPIC
    0x4400_ae8f, // KVM_SET_LAPIC
    0x8004_ae98, // KVM_GET_MP_STATE
    0x4004_ae99, // KVM_SET_MP_STATE
    0x8040_ae9f, // KVM_GET_VCPU_EVENTS
    0x4040_aea0, // KVM_SET_VCPU_EVENTS
    0x8080_aea1, // KVM_GET_DEBUGREGS
    0x4080_aea2, // KVM_SET_DEBUGREGS
    0x9000_aea4, // KVM_GET_XSAVE
    0x5000_aea5, // KVM_SET_XSAVE
    0x9000_aecf, // KVM_GET_XSAVE2
    0x8188_aea6, // KVM_GET_XCRS
    0x4188_aea7, // KVM_SET_XCRS
    0xaead,      // KVM_KVMCLOCK_CTRL
    0xae9a,      // KVM_NMI
    0xc018_ae85, // KVM_TRANSLATE
    0xaea2,      // KVM_SET_TSC_KHZ
    0xaea3,      // KVM_GET_TSC_KHZ
];

/// Of whoever interrupts the guest: by a line, or by a vector that is used for the first time.
const INTERRUPTS: [u32; 4] = [
    0x4008_ae61, // KVM_IRQ_LINE
    0x4020_ae76, // KVM_IRQFD
    0x4008_ae6a, // KVM_SET_GSI_ROUTING
    0x4020_aea5, // KVM_SIGNAL_MSI
];

/// Of the machine: what drivers have connected and moved, and its chips at a reset.
const MACHINE: [u32; 9] = [
    0x4040_ae79, // KVM_IOEVENTFD
    0x4020_ae46, // KVM_SET_USER_MEMORY_REGION
    0xc208_ae62, // KVM_GET_IRQCHIP
    0x8208_ae63, // KVM_SET_IRQCHIP
    0x8070_ae9f, // KVM_GET_PIT2
    0x4070_aea0, // KVM_SET_PIT2
    0x8030_ae7c, // KVM_GET_CLOCK
    0x4030_ae7b, // KVM_SET_CLOCK
    0xae03,      // KVM_CHECK_EXTENSION
];

/// Of a tap: what the guest's driver can take.
const TAP: [u32; 1] = [0x4004_54d0]; // TUNSETOFFLOAD

const DEVICES: [u32; INTERRUPTS.len() + TAP.len()] = join(&INTERRUPTS, &TAP);
const ACCESSES: [u32; DEVICES.len() + MACHINE.len()] = join(&DEVICES, &MACHINE);
const ALL: [u32; ACCESSES.len() + VCPU.len()] = join(&ACCESSES, &VCPU);

const fn join<const N: usize>(first: &[u32], second: &[u32]) -> [u32; N] {
    let mut all = [0; N];
    let mut at = 0;
    while at < N {
        all[at] = if at < first.len() {
            first[at]
        } else {
            second[at - first.len()]
        };
        at += 1;
    }
    all
}

/// The `ioctl`s of a kind of thread.
#[must_use]
pub fn ioctls(kind: Kind) -> &'static [u32] {
    match kind {
        // A driver's accesses are carried out by the vCPU that makes them, a reset by the main
        // thread.
        Kind::Main | Kind::Vcpu => &ALL,
        Kind::Devices => &DEVICES,
        // The thread of a disk inherits the limits of the one that has started it.
        Kind::Disk | Kind::Starter => &INTERRUPTS,
        _ => &[],
    }
}
