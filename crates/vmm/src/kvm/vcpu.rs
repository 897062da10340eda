//! vCPUs: one thread each, their exits, and how they are paused, reset and stopped.

use std::fmt;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use edgevmm_devices::GuestMemory;
use edgevmm_devices::bus::Bus;
use edgevmm_devices::state::same;
use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_mp_state, kvm_run,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::crash::{self, CrashReport};
use super::regs::{self, Entry};
use super::vcpu_state::VcpuState;
use super::{KvmError, Vm, call, msrs};

/// Stack of a vCPU thread. It runs exit handlers only.
const STACK: usize = 256 << 10;

/// The address spaces behind a vCPU's exits.
#[derive(Debug, Default)]
pub struct Buses {
    /// Port I/O.
    pub pio: Bus,
    /// Memory-mapped I/O.
    pub mmio: Bus,
}

/// Why a vCPU can't go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The guest asks for a restart through KVM.
    Reset,
    /// The guest asks to be switched off through KVM.
    PowerOff,
    /// The guest crashed, or KVM can't run it.
    Crash(CrashReport),
    /// A call to KVM failed.
    Failed(String),
}

/// What the thread of a vCPU is told to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Command {
    Run,
    Pause,
    Stop,
}

#[derive(Debug)]
struct Control {
    command: Mutex<(Command, bool)>,
    changed: Condvar,
}

impl Control {
    fn lock(&self) -> MutexGuard<'_, (Command, bool)> {
        self.command.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The parts of a vCPU's `kvm_run` page that are used beside [`VcpuFd`].
#[derive(Debug, Clone, Copy)]
struct RunPage(*mut kvm_run);

// SAFETY: the page is a mapping that outlives all users, because the vCPU's thread owns it and is
// joined before the handle goes. `immediate_exit` is accessed atomically from any thread, the rest
// by the vCPU's own thread alone.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    fn of(fd: &mut VcpuFd) -> RunPage {
        RunPage(fd.get_kvm_run())
    }

    /// Makes KVM leave the guest before its next instruction, or no longer.
    fn set_immediate_exit(self, on: bool) {
        // SAFETY: see the type; the byte is shared with the kernel and other threads, hence atomic.
        let byte = unsafe { AtomicU8::from_ptr(&raw mut (*self.0).immediate_exit) };
        byte.store(u8::from(on), Ordering::SeqCst);
    }

    /// Width in bytes of the port access that the vCPU left the guest for.
    fn io_size(self) -> usize {
        // SAFETY: see the type; called on the vCPU's thread after a port I/O exit, for which `io`
        // is the valid member.
        let size = unsafe { (&raw const (*self.0).__bindgen_anon_1.io.size).read_volatile() };
        usize::from(size.max(1))
    }
}

/// A vCPU that has not started yet.
#[derive(Debug)]
pub struct Vcpu {
    index: u8,
    fd: VcpuFd,
    power_on: VcpuState,
    /// A reset takes a triple fault away that KVM has not reported yet.
    resets_faults: bool,
    /// KVM may still report a triple fault of before the reset.
    stale_fault: bool,
}

impl Vcpu {
    /// Takes over a new vCPU of `vm` whose CPUID is set. `msr_indices` are those of
    /// [`msrs::state_indices`].
    ///
    /// # Errors
    /// Fails when its state can't be read.
    pub fn new(vm: &Vm, index: u8, fd: VcpuFd, msr_indices: &[u32]) -> Result<Vcpu, KvmError> {
        let power_on = VcpuState::of(&fd, msr_indices)?;
        Ok(Vcpu {
            index,
            fd,
            power_on,
            resets_faults: vm.shows_triple_faults(),
            stale_fault: false,
        })
    }

    /// The model-specific registers of a state that another VMM goes on from. The time-stamp
    /// counter comes before the timer's deadline, which counts by it.
    fn msr_indices(&self) -> Vec<u32> {
        let others = self.power_on.msr_indices();
        [msrs::IA32_TSC].into_iter().chain(others).collect()
    }

    /// Puts the vCPU where it begins. Only the boot vCPU (number 0) uses `entry`; the others
    /// wait for it to start them.
    ///
    /// # Errors
    /// Fails when KVM refuses, or guest memory has no room for the entry's tables.
    fn reset(&mut self, memory: &GuestMemory, entry: Entry, first: bool) -> Result<(), KvmError> {
        if !first {
            self.power_on.apply(&self.fd)?;
            self.stale_fault = !self.resets_faults;
        }
        if self.index != 0 || entry == Entry::ResetVector {
            return Ok(());
        }
        let (mut sregs, mut regs) = (self.power_on.sregs, self.power_on.regs);
        regs::setup(memory, entry, &mut sregs, &mut regs).map_err(|_| KvmError::Call {
            what: "start a kernel in so little memory",
            source: kvm_ioctls::Error::new(libc::ENOMEM),
        })?;
        self.fd
            .set_sregs(&sregs)
            .map_err(call("set a vCPU's system registers"))?;
        self.fd
            .set_regs(&regs)
            .map_err(call("set a vCPU's registers"))?;
        msrs::write(&self.fd, &msrs::entries(&msrs::DIRECT_BOOT))?;
        let runnable = kvm_mp_state {
            mp_state: KVM_MP_STATE_RUNNABLE,
        };
        self.fd
            .set_mp_state(runnable)
            .map_err(call("make a vCPU runnable"))
    }

    fn crash(&self, memory: &GuestMemory, cause: String) -> Outcome {
        Outcome::Crash(CrashReport {
            vcpu: self.index,
            cause,
            registers: crash::describe(&self.fd, memory),
        })
    }
}

/// How a vCPU thread reports that it can't go on. Never blocks.
pub type Report = Arc<dyn Fn(Outcome) + Send + Sync>;

/// What all vCPU threads share.
#[derive(Clone)]
pub struct Surroundings {
    /// The address spaces behind exits.
    pub buses: Arc<Buses>,
    /// Guest memory.
    pub memory: Arc<GuestMemory>,
    /// Where outcomes go.
    pub report: Report,
}

impl fmt::Debug for Surroundings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Surroundings")
            .field("buses", &self.buses)
            .finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Handle {
    control: Arc<Control>,
    run_page: RunPage,
    vcpu: Arc<Mutex<Vcpu>>,
    thread: Option<JoinHandle<()>>,
}

/// All vCPUs of a machine with their threads. They begin paused.
#[derive(Debug)]
pub struct Vcpus {
    handles: Vec<Handle>,
    memory: Arc<GuestMemory>,
}

impl Vcpus {
    /// Starts the threads, all paused before their first instruction at `entry`.
    ///
    /// # Errors
    /// Fails when a thread can't be had or KVM refuses the entry state.
    pub fn start(
        vcpus: Vec<Vcpu>,
        surroundings: &Surroundings,
        entry: Entry,
    ) -> Result<Vcpus, KvmError> {
        install_kick_handler().map_err(KvmError::Open)?;
        let mut all = Vcpus {
            handles: Vec::new(),
            memory: Arc::clone(&surroundings.memory),
        };
        for mut vcpu in vcpus {
            vcpu.reset(&surroundings.memory, entry, true)?;
            let run_page = RunPage::of(&mut vcpu.fd);
            let index = vcpu.index;
            let vcpu = Arc::new(Mutex::new(vcpu));
            let control = Arc::new(Control {
                command: Mutex::new((Command::Pause, false)),
                changed: Condvar::new(),
            });
            let runner = Runner {
                vcpu: Arc::clone(&vcpu),
                control: Arc::clone(&control),
                run_page,
                surroundings: surroundings.clone(),
            };
            let thread = Builder::new()
                .name(format!("vcpu{index}"))
                .stack_size(STACK)
                .spawn(move || {
                    edgevmm_sandbox::enter(edgevmm_sandbox::Kind::Vcpu);
                    runner.main();
                })
                .map_err(KvmError::Open)?;
            all.handles.push(Handle {
                control,
                run_page,
                vcpu,
                thread: Some(thread),
            });
        }
        Ok(all)
    }

    /// Lets all vCPUs run.
    pub fn resume(&self) {
        for handle in &self.handles {
            let mut command = handle.control.lock();
            handle.run_page.set_immediate_exit(false);
            command.0 = Command::Run;
            handle.control.changed.notify_all();
        }
    }

    /// Stops all vCPUs between two instructions; returns when none runs.
    ///
    /// A guest with a paravirtual clock is told, so that it does not take the gap for a hang.
    pub fn pause(&self) {
        for handle in &self.handles {
            handle.tell(Command::Pause);
        }
        for handle in &self.handles {
            let mut command = handle.control.lock();
            while !command.1 {
                command = handle
                    .control
                    .changed
                    .wait(command)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
        self.tell_of_gap();
    }

    /// Has a guest with a paravirtual clock know that its vCPUs did not run.
    fn tell_of_gap(&self) {
        for handle in &self.handles {
            // Refused where the guest uses no such clock.
            let _ = handle.lock().fd.kvmclock_ctrl();
        }
    }

    /// Returns all vCPUs to the state after power-on, with the boot vCPU at `entry`. They must
    /// be paused.
    ///
    /// # Errors
    /// Fails when KVM refuses.
    pub fn reset(&self, entry: Entry) -> Result<(), KvmError> {
        for handle in &self.handles {
            // No I/O instruction is half done: a paused vCPU has left KVM by a signal, which KVM
            // heeds only after it has completed the instruction.
            handle.lock().reset(&self.memory, entry, false)?;
        }
        Ok(())
    }

    /// The state of all vCPUs, which must be paused.
    ///
    /// # Errors
    /// Fails when KVM refuses.
    pub fn states(&self) -> Result<Vec<VcpuState>, KvmError> {
        let state = |handle: &Handle| {
            let vcpu = handle.lock();
            VcpuState::of(&vcpu.fd, &vcpu.msr_indices())
        };
        self.handles.iter().map(state).collect()
    }

    /// Sets the state of all vCPUs, which must be paused, with CPUID as it was then. Their guest
    /// sees that `gap` has passed since.
    ///
    /// # Errors
    /// Refuses another number of vCPUs, and fails when KVM refuses; reset them then.
    pub fn restore(&self, states: &[VcpuState], gap: Duration) -> Result<(), KvmError> {
        same("number of vCPUs", states.len(), self.handles.len())?;
        for (handle, state) in self.handles.iter().zip(states) {
            state.check(&handle.lock().msr_indices())?;
        }
        for (handle, state) in self.handles.iter().zip(states) {
            state.apply_after(gap, &handle.lock().fd)?;
        }
        self.tell_of_gap();
        Ok(())
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        for handle in &self.handles {
            handle.tell(Command::Stop);
        }
        for handle in &mut self.handles {
            if let Some(thread) = handle.thread.take() {
                let _ = thread.join();
            }
        }
    }
}

impl Handle {
    /// The vCPU, while its thread is paused.
    fn lock(&self) -> MutexGuard<'_, Vcpu> {
        self.vcpu.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a command and makes the thread look at it.
    fn tell(&self, what: Command) {
        let mut command = self.control.lock();
        command.0 = what;
        // Set first, so a thread on its way into KVM leaves again; the signal is for one inside.
        self.run_page.set_immediate_exit(true);
        self.control.changed.notify_all();
        if let Some(thread) = &self.thread
            && !command.1
        {
            // SAFETY: the thread is not joined yet, so its pthread is valid.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
        }
    }
}

/// The body of a vCPU thread.
struct Runner {
    vcpu: Arc<Mutex<Vcpu>>,
    control: Arc<Control>,
    run_page: RunPage,
    surroundings: Surroundings,
}

impl Runner {
    fn main(self) {
        while self.wait_for_run() {
            let outcome = {
                let mut vcpu = self.vcpu.lock().unwrap_or_else(PoisonError::into_inner);
                self.run(&mut vcpu)
            };
            if let Some(outcome) = outcome {
                // Parked here until the machine decides; it pauses or stops this vCPU.
                (self.surroundings.report)(outcome);
                let mut command = self.control.lock();
                if command.0 == Command::Run {
                    command.0 = Command::Pause;
                }
            }
        }
    }

    /// Waits while paused. `false` means stop.
    fn wait_for_run(&self) -> bool {
        let mut command = self.control.lock();
        loop {
            match command.0 {
                Command::Run => {
                    command.1 = false;
                    return true;
                }
                Command::Stop => return false,
                Command::Pause => {
                    command.1 = true;
                    self.control.changed.notify_all();
                    command = self
                        .control
                        .changed
                        .wait(command)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// Runs the guest until a command comes (`None`) or the vCPU can't go on.
    fn run(&self, vcpu: &mut Vcpu) -> Option<Outcome> {
        let buses = &self.surroundings.buses;
        let memory = &self.surroundings.memory;
        loop {
            let exit = vcpu.fd.run();
            // An error is that KVM did not run the guest.
            let stale_fault = vcpu.stale_fault && matches!(exit, Ok(VcpuExit::Shutdown));
            vcpu.stale_fault &= exit.is_err();
            let cause = match exit {
                // A string instruction is one exit for many accesses to the port.
                Ok(VcpuExit::IoIn(port, data)) => {
                    for data in data.chunks_mut(self.run_page.io_size()) {
                        buses.pio.read(u64::from(port), data);
                    }
                    continue;
                }
                Ok(VcpuExit::IoOut(port, data)) => {
                    for data in data.chunks(self.run_page.io_size()) {
                        buses.pio.write(u64::from(port), data);
                    }
                    continue;
                }
                Ok(VcpuExit::MmioRead(address, data)) => {
                    buses.mmio.read(address, data);
                    continue;
                }
                Ok(VcpuExit::MmioWrite(address, data)) => {
                    buses.mmio.write(address, data);
                    continue;
                }
                Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => {
                    if self.interrupted() {
                        return None;
                    }
                    continue;
                }
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                    if self.interrupted() {
                        return None;
                    }
                    continue;
                }
                Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => {
                    return Some(Outcome::Reset);
                }
                Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => {
                    return Some(Outcome::PowerOff);
                }
                Ok(VcpuExit::Shutdown) if stale_fault => continue,
                Ok(VcpuExit::Shutdown) => "triple fault".to_owned(),
                Ok(VcpuExit::FailEntry(reason, _)) => {
                    format!("the processor refuses the guest's state (reason {reason:#x})")
                }
                Ok(VcpuExit::InternalError) => crash::internal_error(&mut vcpu.fd),
                Ok(other) => format!("KVM left the guest for an unexpected reason: {other:?}"),
                Err(error) => {
                    return Some(Outcome::Failed(format!(
                        "KVM can't run vCPU {}: {error}",
                        vcpu.index
                    )));
                }
            };
            return Some(vcpu.crash(memory, cause));
        }
    }

    fn interrupted(&self) -> bool {
        let command = self.control.lock();
        if command.0 == Command::Run {
            self.run_page.set_immediate_exit(false);
            return false;
        }
        true
    }
}

/// The signal that takes a vCPU thread out of KVM.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn on_kick(_: libc::c_int) {}

/// A handler that does nothing: the point is that the system call ends.
fn install_kick_handler() -> io::Result<()> {
    // SAFETY: an all-zero sigaction is valid (no flags, empty mask), the handler is async-signal
    // safe, and SIGRTMIN is ours to use.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_kick as *const () as usize;
        libc::sigaction(kick_signal(), &raw const action, std::ptr::null_mut())
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
