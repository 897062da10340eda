//! Doorbells as ioeventfds.

use std::io;
use std::sync::Arc;

use edgevmm_devices::platform::Doorbells;
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

/// Registers doorbells with the kernel.
#[derive(Debug)]
pub struct KvmDoorbells {
    vm: Arc<VmFd>,
}

impl KvmDoorbells {
    /// Doorbells of `vm`.
    pub fn new(vm: Arc<VmFd>) -> KvmDoorbells {
        KvmDoorbells { vm }
    }
}

// Without a datamatch the kernel takes writes of any width and need not decode the instruction.
impl Doorbells for KvmDoorbells {
    fn attach(&self, address: u64, event: &EventFd) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        self.vm
            .register_ioevent(event, &address, NoDatamatch)
            .map_err(to_io)
    }

    fn detach(&self, address: u64, event: &EventFd) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        self.vm
            .unregister_ioevent(event, &address, NoDatamatch)
            .map_err(to_io)
    }
}

pub(super) fn to_io(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}
