//! The KVM layer against the real /dev/kvm, with payloads of a few instructions: these run even
//! where KVM emulates in software.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use edgevmm_config::Topology;
use edgevmm_devices::GuestMemory;
use edgevmm_devices::bus::{BusDevice, lock, shared};
use kvm_bindings::KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::cpuid;
use super::interrupts::Interrupts;
use super::regs::Entry;
use super::vcpu::{Buses, Outcome, Surroundings, Vcpu, Vcpus};
use super::{Vm, call, msrs};

const CODE: u64 = 0x1000;
const ENTRY: Entry = Entry::Pvh {
    entry: CODE,
    start_info: 0,
};
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Default)]
struct Log(Vec<u8>);

impl BusDevice for Log {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0x5a);
    }
    fn write(&mut self, _: u64, data: &[u8]) {
        self.0.extend_from_slice(data);
    }
}

struct Bench {
    vcpus: Vcpus,
    log: Arc<Mutex<Log>>,
    outcomes: Receiver<Outcome>,
    memory: Arc<GuestMemory>,
    _interrupts: Interrupts,
    _vm: Vm,
}

fn dup(fd: &VcpuFd) -> RawFd {
    // SAFETY: duplicates a descriptor that is open.
    let copy = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 0) };
    assert!(copy >= 0);
    copy
}

/// A machine of one vCPU that runs `code`; port 0x10 and address 0xd000_0000 lead to the log.
fn bench(code: &[u8]) -> Bench {
    bench_with(code, |_| ())
}

/// As [`bench`]; `change` has the vCPU after its state at power-on was taken.
fn bench_with(code: &[u8], change: impl FnOnce(&VcpuFd)) -> Bench {
    let kvm = super::open().expect("these tests need /dev/kvm");
    let memory = crate::memory::create(1 << 20, false).unwrap();
    memory.write_slice(code, GuestAddress(CODE)).unwrap();
    let vm = Vm::new(&kvm, &memory).unwrap();
    vm.create_interrupt_controllers().unwrap();
    let interrupts = Interrupts::new(vm.fd()).unwrap();
    let fd = vm.fd().create_vcpu(0).map_err(call("make a vCPU")).unwrap();
    let one = Topology {
        sockets: 1,
        cores: 1,
        threads: 1,
    };
    let cpuid = cpuid::for_vcpu(&cpuid::supported(&kvm).unwrap(), one, 0).unwrap();
    fd.set_cpuid2(&cpuid).unwrap();
    // SAFETY: the descriptor was made just now and is nobody else's.
    let other = unsafe { vm.fd().create_vcpu_from_rawfd(dup(&fd)) }.unwrap();
    let vcpu = Vcpu::new(0, fd, &msrs::state_indices(&kvm).unwrap()).unwrap();
    change(&other);
    let log = shared(Log::default());
    let mut buses = Buses::default();
    buses.pio.insert(0x10, 4, log.clone()).unwrap();
    buses.mmio.insert(0xd000_0000, 0x1000, log.clone()).unwrap();
    let (sender, outcomes) = channel();
    let surroundings = Surroundings {
        buses: Arc::new(buses),
        memory: Arc::clone(&memory),
        report: Arc::new(move |outcome| sender.send(outcome).unwrap()),
    };
    let vcpus = Vcpus::start(vec![vcpu], &surroundings, ENTRY).unwrap();
    Bench {
        vcpus,
        log,
        outcomes,
        memory,
        _interrupts: interrupts,
        _vm: vm,
    }
}

impl Bench {
    fn crash(&self) -> super::crash::CrashReport {
        match self.outcomes.recv_timeout(PATIENCE).unwrap() {
            Outcome::Crash(report) => report,
            other => panic!("{other:?}"),
        }
    }
}

/// in al, 0x10; inc al; out 0x10, al; mov al, [0xd0000000]; mov [0xd0000004], al;
/// lidt of an empty table; int3: a triple fault.
const IO_THEN_CRASH: &[u8] = &[
    0xe4, 0x10, 0xfe, 0xc0, 0xe6, 0x10, 0xa0, 0x00, 0x00, 0x00, 0xd0, 0xa2, 0x04, 0x00, 0x00, 0xd0,
    0x0f, 0x01, 0x1d, 0x00, 0x20, 0x00, 0x00, 0xcc,
];

#[test]
fn exits_reach_the_buses_and_a_crash_is_explained() {
    let bench = bench(IO_THEN_CRASH);
    bench.vcpus.resume();
    let report = bench.crash();
    assert_eq!(lock(&bench.log).0, [0x5b, 0x5a]);
    assert_eq!(report.vcpu, 0);
    assert!(report.registers.contains("rip="), "{report}");
    assert!(report.registers.contains("code at rip: "), "{report}");
}

/// again: mov eax, [0x3000]; out 0x10, al; inc byte [0x3001]; jmp again
const COUNT: &[u8] = &[
    0xa1, 0x00, 0x30, 0x00, 0x00, 0xe6, 0x10, 0xfe, 0x05, 0x01, 0x30, 0x00, 0x00, 0xeb, 0xf1,
];

#[test]
fn pause_halts_and_resume_goes_on() {
    let bench = bench(COUNT);
    let printed = || lock(&bench.log).0.len();
    assert_eq!(printed(), 0, "nothing runs before it is told to");
    for _ in 0..3 {
        bench.vcpus.resume();
        let before = printed();
        while printed() == before {
            std::thread::yield_now();
        }
        bench.vcpus.pause();
        let halted = printed();
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(printed(), halted);
    }
    assert_eq!(
        bench.outcomes.recv_timeout(Duration::ZERO),
        Err(RecvTimeoutError::Timeout)
    );
}

#[test]
fn reset_begins_again() {
    let bench = bench(IO_THEN_CRASH);
    for round in 1..=3 {
        bench.vcpus.resume();
        bench.crash();
        bench.vcpus.pause();
        assert_eq!(lock(&bench.log).0.len(), 2 * round);
        bench.vcpus.reset(ENTRY).unwrap();
    }
    bench.memory.write_slice(COUNT, GuestAddress(CODE)).unwrap();
    bench.vcpus.resume();
    std::thread::sleep(Duration::from_millis(20));
    bench.vcpus.pause();
    assert!(lock(&bench.log).0.len() > 6);
}

/// A guest that asks for a reset and crashes on the way may be paused with the fault taken but not
/// reported.
#[test]
fn a_fault_that_is_not_reported_yet_is_gone_after_a_reset() {
    let bench = bench_with(COUNT, |fd| {
        let mut events = fd.get_vcpu_events().unwrap();
        events.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        events.triple_fault.pending = 1;
        fd.set_vcpu_events(&events).unwrap();
    });
    bench.vcpus.reset(ENTRY).unwrap();
    bench.vcpus.resume();
    while lock(&bench.log).0.is_empty() {
        assert_eq!(bench.outcomes.try_recv(), Err(TryRecvError::Empty));
        std::thread::yield_now();
    }
}
