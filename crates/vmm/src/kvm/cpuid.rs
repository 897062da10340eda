//! What CPUID tells the guest: what KVM supports here, less what a guest should not build on,
//! made consistent with the machine's topology.
//!
//! Intel SDM vol. 2A (CPUID), AMD APM vol. 3 appendix E. Nested virtualisation and the
//! performance counters are left out.

use edgevmm_config::Topology;
use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::{Cap, Kvm};

use super::{KvmError, call};

/// vCPUs of one socket.
fn threads_per_socket(topology: Topology) -> u32 {
    u32::from(topology.cores) * u32::from(topology.threads)
}

/// Bits of an APIC ID that number the cores of a socket.
fn core_bits(topology: Topology) -> u32 {
    topology.socket_shift() - topology.core_shift()
}

/// CPUID of the machine, before it is made one vCPU's own by [`for_vcpu`].
///
/// # Errors
/// Fails when the kernel refuses.
pub fn supported(kvm: &Kvm) -> Result<Vec<kvm_cpuid_entry2>, KvmError> {
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(call("tell the CPU features it supports"))?;
    let mut entries = cpuid.as_slice().to_vec();
    let deadline_timer = kvm.check_extension(Cap::TscDeadlineTimer);
    for entry in &mut entries {
        match entry.function {
            1 => {
                set(&mut entry.ecx, 1 << 5, false); // VMX
                set(&mut entry.ecx, 1 << 24, deadline_timer);
                set(&mut entry.ecx, 1 << 31, true); // hypervisor
            }
            // No performance counters.
            0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            0x8000_0001 => {
                set(&mut entry.ecx, 1 << 2, false); // SVM
                set(&mut entry.ecx, 1 << 23, false); // extended performance counters
            }
            0x8000_000a => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            _ => {}
        }
    }
    Ok(entries)
}

/// Makes `entries` those of vCPU `index`.
///
/// # Errors
/// Fails when there are more entries than the kernel takes.
pub fn for_vcpu(
    entries: &[kvm_cpuid_entry2],
    topology: Topology,
    index: u8,
) -> Result<CpuId, KvmError> {
    let apic_id = topology.apic_id(index);
    let highest = entries
        .iter()
        .find(|e| e.function == 0)
        .map_or(0, |e| e.eax);
    let mut own: Vec<_> = entries
        .iter()
        .copied()
        .filter(|e| !matches!(e.function, 0xb | 0x1f))
        .collect();
    for entry in &mut own {
        patch(entry, topology, apic_id);
    }
    for function in [0xb, 0x1f] {
        if highest >= function {
            own.extend(extended_topology(function, topology, apic_id));
        }
    }
    CpuId::from_entries(&own).map_err(|_| KvmError::Call {
        what: "hold that many CPUID entries",
        source: kvm_ioctls::Error::new(libc::E2BIG),
    })
}

fn patch(entry: &mut kvm_cpuid_entry2, topology: Topology, apic_id: u32) {
    let per_socket = threads_per_socket(topology);
    match entry.function {
        1 => {
            let siblings = 1_u32 << topology.socket_shift().min(7);
            entry.ebx = entry.ebx & 0xffff | apic_id << 24 | siblings << 16;
            set(&mut entry.edx, 1 << 28, per_socket > 1); // HTT
        }
        // Deterministic cache parameters: levels 1 and 2 belong to a core, 3 to a socket.
        4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let shift = if level < 3 {
                topology.core_shift()
            } else {
                topology.socket_shift()
            };
            let sharing = (1_u32 << shift) - 1;
            entry.eax = entry.eax & 0x3fff | sharing << 14;
            if entry.function == 4 {
                entry.eax |= ((1_u32 << core_bits(topology)) - 1) << 26;
            }
        }
        0x8000_0001 => set(&mut entry.ecx, 1 << 1, per_socket > 1), // CmpLegacy, AMD
        0x8000_0008 => {
            entry.ecx =
                entry.ecx & !0xf0ff | (per_socket - 1) & 0xff | topology.socket_shift() << 12;
        }
        0x8000_001e => {
            entry.eax = apic_id;
            let core = apic_id >> topology.core_shift() & ((1 << core_bits(topology)) - 1);
            entry.ebx = (u32::from(topology.threads) - 1) << 8 | core;
            entry.ecx = apic_id >> topology.socket_shift();
        }
        _ => {}
    }
}

/// Leaf 0xb (and 0x1f, its newer form): threads, then cores, then the end.
fn extended_topology(function: u32, topology: Topology, apic_id: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |index: u32, shift: u32, count: u32, kind: u32| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: kind << 8 | index,
        edx: apic_id,
        ..Default::default()
    };
    [
        level(0, topology.core_shift(), u32::from(topology.threads), 1),
        level(1, topology.socket_shift(), threads_per_socket(topology), 2),
        level(2, 0, 0, 0),
    ]
}

fn set(register: &mut u32, bit: u32, on: bool) {
    if on {
        *register |= bit;
    } else {
        *register &= !bit;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const ODD: Topology = Topology {
        sockets: 2,
        cores: 3,
        threads: 2,
    };

    #[test]
    fn each_vcpu_gets_its_own_leaves() {
        let entry = |function, eax| kvm_cpuid_entry2 {
            function,
            eax,
            ..Default::default()
        };
        let base = [
            entry(0, 0xd),
            entry(1, 0),
            entry(0xb, 0x77),
            entry(4, 3 << 5 | 1),
        ];
        let cpuid = for_vcpu(&base, ODD, 7).unwrap();
        let find = |function, index| {
            *cpuid
                .as_slice()
                .iter()
                .find(|e| e.function == function && e.index == index)
                .unwrap()
        };
        assert_eq!(find(1, 0).ebx >> 24, 9);
        assert_eq!(find(1, 0).ebx >> 16 & 0xff, 8);
        assert_eq!(find(1, 0).edx >> 28 & 1, 1);
        assert_eq!(
            (find(0xb, 0).eax, find(0xb, 0).ebx, find(0xb, 0).edx),
            (1, 2, 9)
        );
        assert_eq!((find(0xb, 1).eax, find(0xb, 1).ebx), (3, 6));
        assert_eq!(find(4, 0).eax >> 14 & 0xfff, 7);
        assert!(cpuid.as_slice().iter().all(|e| e.function != 0x1f));
    }

    #[test]
    fn one_vcpu_is_not_hyperthreaded() {
        let one = Topology {
            sockets: 1,
            cores: 1,
            threads: 1,
        };
        let base = [kvm_cpuid_entry2 {
            function: 1,
            edx: u32::MAX,
            ..Default::default()
        }];
        let cpuid = for_vcpu(&base, one, 0).unwrap();
        assert_eq!(cpuid.as_slice()[0].edx >> 28 & 1, 0);
    }
}
