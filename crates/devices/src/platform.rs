//! What devices ask of the machine they sit in: interrupt lines, message-signalled interrupts,
//! doorbells and a way to end or reset the machine. The VMM implements these on KVM; tests
//! implement them with plain memory.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use event_manager::{MutEventSubscriber, SubscriberId};
use vmm_sys_util::eventfd::EventFd;

/// An interrupt line of the machine's interrupt controllers (a GSI).
///
/// Callers may sit on any thread. Setting the same level twice is harmless.
pub trait IrqLine: Send + Sync + Debug {
    /// Raises (`true`) or lowers (`false`) the line.
    fn set_level(&self, asserted: bool);

    /// Raises and lowers the line: one edge, for ISA devices.
    fn pulse(&self) {
        self.set_level(true);
        self.set_level(false);
    }
}

/// Address and data of a message-signalled interrupt, as the guest wrote them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsiMessage {
    /// Message address (low and high dword joined).
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// The message-signalled interrupts of one PCI function, one per MSI-X table entry.
pub trait MsiVectors: Send + Sync + Debug {
    /// Connects `vector` to `message`, or masks it with `None`.
    ///
    /// A trigger that falls in a masked time is remembered and delivered when the vector is
    /// connected again.
    ///
    /// # Errors
    /// Fails when the interrupt controller refuses the route.
    fn route(&self, vector: u16, message: Option<MsiMessage>) -> io::Result<()>;

    /// Signals `vector`.
    fn trigger(&self, vector: u16);

    /// Whether `vector` was triggered while masked and still waits for delivery.
    fn pending(&self, vector: u16) -> bool;

    /// Forgets a trigger of `vector` that still waits for delivery.
    fn clear(&self, vector: u16);
}

/// Doorbells: guest writes to an address that become eventfd signals without an exit to us.
pub trait Doorbells: Send + Sync + Debug {
    /// Signals `event` whenever the guest writes to guest-physical `address`, whatever the value.
    ///
    /// # Errors
    /// Fails when the address is taken or the kernel's limit is reached.
    fn attach(&self, address: u64, event: &EventFd) -> io::Result<()>;

    /// Undoes [`Doorbells::attach`] with the same arguments.
    ///
    /// # Errors
    /// Fails when there is no such doorbell.
    fn detach(&self, address: u64, event: &EventFd) -> io::Result<()>;
}

/// What a guest can ask of the machine as a whole through a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MachineRequest {
    /// Restart in place (0xcf9, i8042 0xfe, ACPI reset register).
    Reset,
    /// Power off (ACPI S5).
    PowerOff,
    /// Hear what the boot firmware has decided (its control port).
    BootDecided,
    /// Do what is to be done when the guest's kernel has panicked.
    Panicked,
    /// Do what is to be done when the guest has let its watchdog run out.
    WatchdogExpired,
}

/// Takes requests that concern the machine as a whole. Never blocks.
pub trait MachineControl: Send + Sync + Debug {
    /// Files `request`; it is carried out on the main thread soon after.
    fn request(&self, request: MachineRequest);

    /// Asks for the vCPUs to be halted until somebody has the machine go on, because of `reason`,
    /// which is for people. A device that can't go on without help from outside calls it.
    fn pause(&self, reason: String);
}

/// A handler that lives on the shared device thread.
pub type LoopHandler = Box<dyn MutEventSubscriber + Send>;

/// The shared device thread: one epoll loop for every device that needs no thread of its own.
///
/// Handlers run on that thread only. A handler must never take a lock that a vCPU thread may
/// hold while it waits for [`DeviceLoop::remove`]: transports wait for it with their lock held.
pub trait DeviceLoop: Send + Sync + Debug {
    /// Moves `handler` to the device thread and calls its `init` there.
    ///
    /// # Errors
    /// Fails when the device thread is gone.
    fn add(&self, handler: LoopHandler) -> io::Result<SubscriberId>;

    /// Takes a handler off the device thread and drops it; returns when it no longer runs.
    ///
    /// # Errors
    /// Fails when there is no such handler or the device thread is gone.
    fn remove(&self, id: SubscriberId) -> io::Result<()>;
}

/// What a device gets to reach the machine.
#[derive(Debug, Clone)]
pub struct Platform {
    /// Doorbell registry.
    pub doorbells: Arc<dyn Doorbells>,
    /// The shared device thread.
    pub device_loop: Arc<dyn DeviceLoop>,
    /// Requests for the whole machine.
    pub control: Arc<dyn MachineControl>,
}
