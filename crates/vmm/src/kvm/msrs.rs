//! Model-specific registers: what a machine starts with and returns to.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use super::{KvmError, call};

/// The time-stamp counter: runs on over a reset, as on many real machines.
pub const IA32_TSC: u32 = 0x10;
const IA32_MISC_ENABLE: u32 = 0x1a0;
/// REP string instructions at full speed.
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, everything write-back.
const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;

/// What firmware would have set up, for a kernel that starts without one.
pub const DIRECT_BOOT: [(u32, u64); 2] = [
    (IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
    (MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK),
];

/// Which registers a vCPU returns to at a reset on this host: all of its state but the time-stamp
/// counter.
///
/// # Errors
/// Fails when the kernel refuses the list.
pub fn state_indices(kvm: &Kvm) -> Result<Vec<u32>, KvmError> {
    let list = kvm.get_msr_index_list().map_err(call("list the MSRs"))?;
    Ok(list
        .as_slice()
        .iter()
        .copied()
        .filter(|index| *index != IA32_TSC)
        .collect())
}

/// Reads registers one call at a time over those that the kernel lists and does not give.
///
/// # Errors
/// Fails when the kernel refuses altogether.
pub fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let entries: Vec<_> = rest
            .iter()
            .map(|index| kvm_msr_entry {
                index: *index,
                ..Default::default()
            })
            .collect();
        let mut msrs = from_entries(&entries)?;
        let read = vcpu.get_msrs(&mut msrs).map_err(call("read the MSRs"))?;
        values.extend_from_slice(msrs.as_slice().get(..read).unwrap_or_default());
        // The call stops at the first one it can't read: step over it.
        rest = rest.get(read + 1..).unwrap_or_default();
    }
    Ok(values)
}

/// Writes registers, stepping over those that the kernel does not take.
///
/// # Errors
/// Fails when the kernel refuses altogether.
pub fn write(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), KvmError> {
    let mut rest = entries;
    while !rest.is_empty() {
        let msrs = from_entries(rest)?;
        let written = vcpu.set_msrs(&msrs).map_err(call("write the MSRs"))?;
        if let Some(refused) = rest.get(written) {
            tracing::debug!(index = refused.index, "KVM keeps this MSR as it is");
        }
        rest = rest.get(written + 1..).unwrap_or_default();
    }
    Ok(())
}

/// Entries out of (index, value) pairs.
pub fn entries(values: &[(u32, u64)]) -> Vec<kvm_msr_entry> {
    let entry = |(index, data): &(u32, u64)| kvm_msr_entry {
        index: *index,
        data: *data,
        ..Default::default()
    };
    values.iter().map(entry).collect()
}

fn from_entries(entries: &[kvm_msr_entry]) -> Result<Msrs, KvmError> {
    Msrs::from_entries(entries).map_err(|_| KvmError::Call {
        what: "hold that many MSRs",
        source: kvm_ioctls::Error::new(libc::E2BIG),
    })
}
