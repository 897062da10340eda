//! A flash's array as a memory slot that comes and goes.

use std::io;
use std::sync::{Arc, Mutex};

use edgevmm_devices::bus::lock;
use edgevmm_devices::legacy::pflash::FlashWindow;
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::MmapRegion;

/// The slot of a flash. It is there from the start.
#[derive(Debug)]
pub(super) struct KvmFlashWindow {
    fd: Arc<VmFd>,
    slot: u32,
    address: u64,
    array: Arc<MmapRegion>,
    mapped: Mutex<bool>,
}

impl KvmFlashWindow {
    pub fn new(fd: Arc<VmFd>, slot: u32, address: u64, array: Arc<MmapRegion>) -> Self {
        Self {
            fd,
            slot,
            address,
            array,
            mapped: Mutex::new(true),
        }
    }
}

impl FlashWindow for KvmFlashWindow {
    fn show(&self, array: bool) -> io::Result<()> {
        let mut mapped = lock(&self.mapped);
        if *mapped == array {
            return Ok(());
        }
        let region = kvm_userspace_memory_region {
            slot: self.slot,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: self.address,
            // A slot without length is one that goes.
            memory_size: if array { self.array.size() as u64 } else { 0 },
            userspace_addr: self.array.as_ptr() as u64,
        };
        // SAFETY: the host range is a mapping that `self` and the VM keep, and nobody holds Rust
        // references into it: access goes through volatile slices.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(io::Error::from)?;
        *mapped = array;
        Ok(())
    }
}
