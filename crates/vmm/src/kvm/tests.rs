//! The KVM layer against the real /dev/kvm, with payloads of a few instructions: these run even
//! where KVM emulates in software.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::io::Write;
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
use super::{ChipState, Vm, call, msrs};

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
    interrupts: Interrupts,
    /// The vCPU by another descriptor, to look at and change behind its back while it is paused.
    fd: VcpuFd,
    vm: Vm,
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

/// As [`bench`] with a VM that `change` has changed before its vCPU is made.
fn bench_with(code: &[u8], change: impl FnOnce(&mut Vm)) -> Bench {
    let kvm = super::open().expect("these tests need /dev/kvm");
    let memory = crate::memory::create(1 << 20, false).unwrap();
    memory.write_slice(code, GuestAddress(CODE)).unwrap();
    let mut vm = Vm::new(&kvm, &memory).unwrap();
    change(&mut vm);
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
    let vcpu = Vcpu::new(&vm, 0, fd, &msrs::state_indices(&kvm).unwrap()).unwrap();
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
        interrupts,
        fd: other,
        vm,
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

impl Bench {
    /// Has the vCPU take a triple fault that KVM does not report before it runs again.
    fn take_triple_fault(&self) {
        let mut events = self.fd.get_vcpu_events().unwrap();
        events.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
        events.triple_fault.pending = 1;
        self.fd.set_vcpu_events(&events).unwrap();
    }

    /// Runs until the guest has printed or can't go on.
    fn prints(&self) -> bool {
        self.vcpus.resume();
        let before = lock(&self.log).0.len();
        let outcome = loop {
            match self.outcomes.try_recv() {
                Err(TryRecvError::Empty) if lock(&self.log).0.len() == before => {}
                outcome => break outcome,
            }
            std::thread::yield_now();
        };
        self.vcpus.pause();
        outcome.is_err()
    }
}

/// A guest that asks for a reset and crashes on the way may be paused with the fault taken but not
/// reported.
#[test]
fn a_fault_that_is_not_reported_yet_is_gone_after_a_reset() {
    let bench = bench(COUNT);
    bench.take_triple_fault();
    assert!(!bench.prints(), "without a reset it is reported");
    bench.take_triple_fault();
    bench.vcpus.reset(ENTRY).unwrap();
    assert!(bench.prints());
}

/// KVM before Linux 6.0 keeps the fault over a reset.
#[test]
fn a_fault_that_kvm_keeps_over_a_reset_is_not_the_guest_s() {
    let bench = bench_with(COUNT, |vm| vm.shows_triple_faults = false);
    for _ in 0..2 {
        bench.vcpus.reset(ENTRY).unwrap();
        bench.take_triple_fault();
        assert!(bench.prints());
    }
    bench.take_triple_fault();
    assert!(!bench.prints(), "no reset came between");
    bench.vcpus.reset(ENTRY).unwrap();
    assert!(bench.prints());
    let memory = &bench.memory;
    memory
        .write_slice(IO_THEN_CRASH, GuestAddress(CODE))
        .unwrap();
    bench.vcpus.reset(ENTRY).unwrap();
    bench.vcpus.resume();
    bench.crash();
}

fn through_text<T: serde::Serialize + serde::de::DeserializeOwned>(state: &T) -> T {
    serde_json::from_str(&serde_json::to_string(state).unwrap()).unwrap()
}

/// again: inc ebx; mov eax, ebx; out 0x10, eax; jmp again
const COUNT_IN_A_REGISTER: &[u8] = &[0x43, 0x89, 0xd8, 0xe7, 0x10, 0xeb, 0xf9];

#[test]
fn a_saved_vcpu_goes_on_in_another_machine() {
    let count = |bench: &Bench| {
        let log = lock(&bench.log);
        let last = log.0.last_chunk::<4>().unwrap();
        (
            u32::from_le_bytes(log.0[..4].try_into().unwrap()),
            u32::from_le_bytes(*last),
        )
    };
    let first = bench(COUNT_IN_A_REGISTER);
    assert!(first.prints());
    let states = through_text(&first.vcpus.states().unwrap());
    let clock = first.vm.clock().unwrap();

    let second = bench(COUNT_IN_A_REGISTER);
    second.vm.set_clock(clock).unwrap();
    assert!(second.vm.clock().unwrap() >= clock);
    second.vcpus.restore(&states, Duration::ZERO).unwrap();
    assert!(second.prints());
    assert_eq!(count(&second).0, count(&first).1 + 1);
    assert!(first.prints());
}

#[test]
fn the_time_stamp_counter_goes_on() {
    let read = |bench: &Bench| msrs::read(&bench.fd, &[msrs::IA32_TSC]).unwrap()[0].data;
    let first = bench(COUNT);
    let ahead = read(&first) + (1 << 50);
    msrs::write(&first.fd, &msrs::entries(&[(msrs::IA32_TSC, ahead)])).unwrap();
    if read(&first) < ahead {
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED: KVM can't shift the counter here"
        );
        return;
    }
    let states = through_text(&first.vcpus.states().unwrap());
    let second = bench(COUNT);
    assert!(read(&second) < ahead);
    // More than the counter counts in the time that the test may take.
    let gap = Duration::from_secs(1 << 20);
    second.vcpus.restore(&states, gap).unwrap();
    let kilohertz = second.fd.get_tsc_khz().unwrap_or(0);
    let gone_on = ahead + (u64::from(kilohertz) << 20) * 1000;
    assert!(read(&second) >= gone_on);
    second.vcpus.reset(ENTRY).unwrap();
    assert!(read(&second) >= gone_on, "runs on over a reset");
}

#[test]
fn the_timer_s_deadline_is_restored() {
    const IA32_TSC_DEADLINE: u32 = 0x6e0;
    const LVT_TIMER: usize = 0x320;
    const SPURIOUS_VECTOR: usize = 0xf0;
    let deadline = |fd: &VcpuFd| msrs::read(fd, &[IA32_TSC_DEADLINE]).unwrap()[0].data;
    let first = bench(COUNT);
    let mut lapic = first.fd.get_lapic().unwrap();
    for (register, value) in [(SPURIOUS_VECTOR, 0x1ff), (LVT_TIMER, 2 << 17 | 0x30)] {
        let bytes = i32::to_le_bytes(value).map(u8::cast_signed);
        lapic.regs[register..register + 4].copy_from_slice(&bytes);
    }
    first.fd.set_lapic(&lapic).unwrap();
    let far = u64::MAX / 4;
    msrs::write(&first.fd, &msrs::entries(&[(IA32_TSC_DEADLINE, far)])).unwrap();
    assert_eq!(deadline(&first.fd), far, "the mode that takes one is on");
    let states = through_text(&first.vcpus.states().unwrap());
    let second = bench(COUNT);
    second.vcpus.restore(&states, Duration::ZERO).unwrap();
    assert_eq!(deadline(&second.fd), far);
    second.vcpus.reset(ENTRY).unwrap();
    assert_eq!(deadline(&second.fd), 0);
}

#[test]
fn states_of_other_machines_are_refused() {
    let bench = bench(COUNT);
    let states = bench.vcpus.states().unwrap();
    bench.vcpus.restore(&[], Duration::ZERO).unwrap_err();
    let mut value = serde_json::to_value(&states).unwrap();
    let msr = msrs::entries(&[(0xdead_0000, 1)]);
    value[0]["msrs"] = serde_json::to_value(msr).unwrap();
    let foreign: Vec<_> = serde_json::from_value(value).unwrap();
    let error = bench.vcpus.restore(&foreign, Duration::ZERO).unwrap_err();
    assert!(error.to_string().contains("0xdead0000"), "{error}");
    bench.vcpus.restore(&states, Duration::ZERO).unwrap();
    assert!(bench.prints());
}

#[test]
fn saved_interrupt_controllers_go_on_in_another_machine() {
    // Not the timer: it has host time in it.
    let irqchips = |state: &ChipState| serde_json::to_string(&state.irqchips).unwrap();
    let first = bench(COUNT);
    let before = irqchips(&first.vm.chips().unwrap());
    let line = first.interrupts.line(10).unwrap();
    line.set_level(true);
    let saved = first.vm.chips().unwrap();
    assert_ne!(irqchips(&saved), before);
    let second = bench(COUNT);
    second.vm.restore_chips(&through_text(&saved)).unwrap();
    let restored = second.vm.chips().unwrap();
    assert_eq!(irqchips(&restored), irqchips(&saved));

    let mut state = saved;
    state.irqchips.swap(0, 2);
    second.vm.restore_chips(&state).unwrap_err();
    state.irqchips.clear();
    second.vm.restore_chips(&state).unwrap_err();
}

#[test]
fn a_vector_forgets_what_waits_to_be_delivered() {
    let bench = bench(COUNT);
    let vectors = bench.interrupts.vectors(2).unwrap();
    vectors.trigger(0);
    vectors.trigger(1);
    assert!(vectors.pending(0) && vectors.pending(1));
    vectors.clear(0);
    vectors.clear(0);
    assert!(!vectors.pending(0) && vectors.pending(1));
    vectors.trigger(0);
    assert!(vectors.pending(0));
}
