//! Interrupt lines and message-signalled interrupts on the in-kernel controllers.
//!
//! The kernel's GSI table starts with the 24 lines of PIC and I/O APIC; each MSI-X vector gets a
//! GSI of its own after them. A vector is an eventfd that is an irqfd while the vector is
//! unmasked: signals that fall in a masked time stay in the eventfd's counter, and the kernel
//! delivers them when the irqfd is attached again.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use edgevmm_devices::platform::{IrqLine, MsiMessage, MsiVectors};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::VmFd;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::{AsRawFd, BorrowedFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::doorbells::to_io;
use super::{KvmError, call};

/// Lines of the I/O APIC.
const LINES: u32 = 24;
/// Lines that the two PICs have as well.
const ISA_LINES: u32 = 16;

/// A line that several devices may share: raised while any of them asserts it.
#[derive(Debug)]
struct SharedLine {
    vm: Arc<VmFd>,
    gsi: u32,
    /// One bit per asserting device, and the order of level changes.
    asserted: Mutex<u32>,
}

#[derive(Debug)]
struct LineUser {
    line: Arc<SharedLine>,
    bit: u32,
}

impl IrqLine for LineUser {
    fn set_level(&self, asserted: bool) {
        let mut users = self
            .line
            .asserted
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let before = *users;
        if asserted {
            *users |= self.bit;
        } else {
            *users &= !self.bit;
        }
        if (before == 0) != (*users == 0)
            && let Err(error) = self.line.vm.set_irq_line(self.line.gsi, asserted)
        {
            tracing::error!(gsi = self.line.gsi, %error, "KVM refused an interrupt");
        }
    }
}

/// Hands out interrupt lines and vectors of one VM.
#[derive(Debug)]
pub struct Interrupts {
    vm: Arc<VmFd>,
    lines: Vec<(Arc<SharedLine>, AtomicU32)>,
    routes: Arc<Routes>,
}

impl Interrupts {
    /// The interrupts of `vm`, whose controllers exist.
    ///
    /// # Errors
    /// Fails when the kernel refuses the routing table.
    pub fn new(vm: &Arc<VmFd>) -> Result<Interrupts, KvmError> {
        let line = |gsi| {
            let line = SharedLine {
                vm: Arc::clone(vm),
                gsi,
                asserted: Mutex::new(0),
            };
            (Arc::new(line), AtomicU32::new(0))
        };
        let routes = Routes {
            vm: Arc::clone(vm),
            messages: Mutex::new(Vec::new()),
        };
        routes.install(&[]).map_err(call("route interrupts"))?;
        Ok(Interrupts {
            vm: Arc::clone(vm),
            lines: (0..LINES).map(line).collect(),
            routes: Arc::new(routes),
        })
    }

    /// A new user of line `gsi`. `None` when there is no such line or it has 32 users.
    pub fn line(&self, gsi: u32) -> Option<Arc<dyn IrqLine>> {
        let (line, users) = self.lines.get(usize::try_from(gsi).ok()?)?;
        let bit = 1_u32.checked_shl(users.fetch_add(1, Ordering::Relaxed))?;
        Some(Arc::new(LineUser {
            line: Arc::clone(line),
            bit,
        }))
    }

    /// `count` new vectors for one function.
    ///
    /// # Errors
    /// Fails when the process is out of descriptors.
    pub fn vectors(&self, count: u16) -> io::Result<Arc<dyn MsiVectors>> {
        let mut messages = self
            .routes
            .messages
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let vectors = (0..count)
            .map(|_| {
                let event = EventFd::new(EFD_NONBLOCK)?;
                let index = messages.len();
                messages.push(None);
                Ok(Vector {
                    index,
                    event,
                    attached: Mutex::new(false),
                })
            })
            .collect::<io::Result<_>>()?;
        Ok(Arc::new(KvmVectors {
            vm: Arc::clone(&self.vm),
            routes: Arc::clone(&self.routes),
            vectors,
        }))
    }
}

/// The message of each vector that has one; index + [`LINES`] is the vector's GSI.
#[derive(Debug)]
struct Routes {
    vm: Arc<VmFd>,
    messages: Mutex<Vec<Option<MsiMessage>>>,
}

impl Routes {
    fn set(&self, index: usize, message: MsiMessage) -> io::Result<()> {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(entry) = messages.get_mut(index) else {
            return Ok(());
        };
        if *entry == Some(message) {
            return Ok(());
        }
        let before = entry.replace(message);
        let result = self.install(&messages);
        if result.is_err()
            && let Some(entry) = messages.get_mut(index)
        {
            *entry = before;
        }
        result.map_err(to_io)
    }

    fn install(&self, messages: &[Option<MsiMessage>]) -> Result<(), kvm_ioctls::Error> {
        let mut table = Vec::new();
        for gsi in 0..LINES {
            if gsi < ISA_LINES {
                let (chip, pin) = match gsi {
                    0..8 => (KVM_IRQCHIP_PIC_MASTER, gsi),
                    _ => (KVM_IRQCHIP_PIC_SLAVE, gsi - 8),
                };
                table.push(line_entry(gsi, chip, pin));
            }
            // As on every PC the timer's ISA line 0 arrives at pin 2, where the MADT says so.
            match gsi {
                0 => table.push(line_entry(0, KVM_IRQCHIP_IOAPIC, 2)),
                2 => {}
                _ => table.push(line_entry(gsi, KVM_IRQCHIP_IOAPIC, gsi)),
            }
        }
        for (gsi, message) in (LINES..).zip(messages) {
            if let Some(message) = message {
                table.push(msi_entry(gsi, *message));
            }
        }
        let routing =
            KvmIrqRouting::from_entries(&table).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))?;
        self.vm.set_gsi_routing(&routing)
    }
}

fn line_entry(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    entry.u.irqchip.irqchip = irqchip;
    entry.u.irqchip.pin = pin;
    entry
}

fn msi_entry(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    let [a, b, c, d, e, f, g, h] = message.address.to_le_bytes();
    entry.u.msi.address_lo = u32::from_le_bytes([a, b, c, d]);
    entry.u.msi.address_hi = u32::from_le_bytes([e, f, g, h]);
    entry.u.msi.data = message.data;
    entry
}

#[derive(Debug)]
struct Vector {
    index: usize,
    event: EventFd,
    /// Whether the eventfd is an irqfd now.
    attached: Mutex<bool>,
}

#[derive(Debug)]
struct KvmVectors {
    vm: Arc<VmFd>,
    routes: Arc<Routes>,
    vectors: Vec<Vector>,
}

impl MsiVectors for KvmVectors {
    fn route(&self, vector: u16, message: Option<MsiMessage>) -> io::Result<()> {
        let Some(vector) = self.vectors.get(usize::from(vector)) else {
            return Ok(());
        };
        let gsi = LINES + u32::try_from(vector.index).unwrap_or(u32::MAX - LINES);
        let mut attached = vector
            .attached
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match message {
            Some(message) => {
                self.routes.set(vector.index, message)?;
                if !*attached {
                    self.vm.register_irqfd(&vector.event, gsi).map_err(to_io)?;
                    *attached = true;
                }
            }
            None if *attached => {
                self.vm
                    .unregister_irqfd(&vector.event, gsi)
                    .map_err(to_io)?;
                *attached = false;
            }
            None => {}
        }
        Ok(())
    }

    fn trigger(&self, vector: u16) {
        if let Some(vector) = self.vectors.get(usize::from(vector)) {
            // Only a counter at its limit would refuse, and then the signal is pending anyway.
            let _ = vector.event.write(1);
        }
    }

    fn pending(&self, vector: u16) -> bool {
        let Some(vector) = self.vectors.get(usize::from(vector)) else {
            return false;
        };
        if *vector
            .attached
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
        {
            return false;
        }
        // SAFETY: the eventfd is open for as long as `vector` lives, which is beyond this call.
        let fd = unsafe { BorrowedFd::borrow_raw(vector.event.as_raw_fd()) };
        let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    fn clear(&self, vector: u16) {
        let Some(vector) = self.vectors.get(usize::from(vector)) else {
            return;
        };
        let attached = vector
            .attached
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // The kernel takes the count of an eventfd that is an irqfd at once.
        if !*attached {
            // Fails when there is nothing to forget.
            let _ = vector.event.read();
        }
    }
}
