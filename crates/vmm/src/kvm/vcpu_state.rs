//! The state of a vCPU: what a reset returns it to, and what another VMM goes on from.
//!
//! Left out: nested virtualisation, which CPUID does not offer, and processor state that a guest
//! has only after the VMM asked for it (AMX).

use std::collections::BTreeSet;
use std::time::Duration;

use edgevmm_devices::state::ensure;
use kvm_bindings::{
    kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::{KvmError, call, msrs};

/// State of a vCPU, as KVM has it.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    pub(super) regs: kvm_regs,
    pub(super) sregs: kvm_sregs,
    // Large, and on a stack its pages would stay for good.
    lapic: Box<kvm_lapic_state>,
    xsave: Box<kvm_xsave>,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
    msrs: Vec<kvm_msr_entry>,
}

impl VcpuState {
    /// The present state with the model-specific registers of `indices`.
    pub(super) fn of(fd: &VcpuFd, indices: &[u32]) -> Result<VcpuState, KvmError> {
        let error = || call("read a vCPU's state");
        Ok(VcpuState {
            // First: KVM takes pending INITs and SIPIs in here, which changes the others.
            mp_state: fd.get_mp_state().map_err(error())?,
            regs: fd.get_regs().map_err(error())?,
            sregs: fd.get_sregs().map_err(error())?,
            lapic: lapic(fd).map_err(error())?,
            xsave: xsave(fd).map_err(error())?,
            xcrs: fd.get_xcrs().map_err(error())?,
            debug: fd.get_debug_regs().map_err(error())?,
            events: fd.get_vcpu_events().map_err(error())?,
            msrs: msrs::read(fd, indices)?,
        })
    }

    /// Numbers of the model-specific registers that the state has.
    pub(super) fn msr_indices(&self) -> impl Iterator<Item = u32> {
        self.msrs.iter().map(|msr| msr.index)
    }

    /// Refuses a state that has other model-specific registers than `known`: it may come from
    /// anywhere, and KVM lets us write some that are no guest's.
    pub(super) fn check(&self, known: &[u32]) -> Result<(), KvmError> {
        let known: BTreeSet<_> = known.iter().collect();
        for msr in &self.msrs {
            let what = "model-specific register of a vCPU";
            ensure(known.contains(&msr.index), what, msr.index)?;
        }
        Ok(())
    }

    /// Sets the vCPU to this state. The rest is for KVM to check.
    pub(super) fn apply(&self, fd: &VcpuFd) -> Result<(), KvmError> {
        self.apply_after(Duration::ZERO, fd)
    }

    /// As [`VcpuState::apply`], but the time-stamp counter has gone on for `gap` since.
    pub(super) fn apply_after(&self, gap: Duration, fd: &VcpuFd) -> Result<(), KvmError> {
        let error = || call("set a vCPU's state");
        fd.set_mp_state(self.mp_state).map_err(error())?;
        fd.set_regs(&self.regs).map_err(error())?;
        fd.set_sregs(&self.sregs).map_err(error())?;
        // SAFETY: the buffer is a whole kvm_xsave, which is all that KVM reads: no dynamic feature
        // that would need a larger one is ever enabled.
        unsafe { fd.set_xsave(&self.xsave) }.map_err(error())?;
        fd.set_xcrs(&self.xcrs).map_err(error())?;
        fd.set_debug_regs(&self.debug).map_err(error())?;
        fd.set_lapic(&self.lapic).map_err(error())?;
        // The deadline of the local APIC's timer is one of them: KVM takes it only in that mode.
        msrs::write(fd, &self.msrs_after(gap, fd))?;
        fd.set_vcpu_events(&self.events).map_err(error())
    }

    fn msrs_after(&self, gap: Duration, fd: &VcpuFd) -> Vec<kvm_msr_entry> {
        // Where KVM doesn't know, no guest relies on the counter.
        let kilohertz = u128::from(fd.get_tsc_khz().unwrap_or(0));
        let cycles = gap.as_nanos().wrapping_mul(kilohertz) / 1_000_000;
        // It has 64 bits and wraps.
        let cycles = u64::try_from(cycles & u128::from(u64::MAX)).unwrap_or(0);
        let mut all = self.msrs.clone();
        for msr in all.iter_mut().filter(|msr| msr.index == msrs::IA32_TSC) {
            msr.data = msr.data.wrapping_add(cycles);
        }
        all
    }
}

/// The local APIC in a box. Not inlined, as its copies would be part of the caller's frame.
#[inline(never)]
fn lapic(fd: &VcpuFd) -> Result<Box<kvm_lapic_state>, kvm_ioctls::Error> {
    fd.get_lapic().map(Box::new)
}

/// The processor's extended state in a box, as [`lapic`].
#[inline(never)]
fn xsave(fd: &VcpuFd) -> Result<Box<kvm_xsave>, kvm_ioctls::Error> {
    fd.get_xsave().map(Box::new)
}
