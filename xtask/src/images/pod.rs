//! The guest of tests of pods: a stock kernel with all that it does in an initial RAM disk.

use std::path::Path;

use anyhow::Result;

use super::kernel::DHCP_SCRIPT;
use super::{Image, Images};
use crate::kernel::{Initrd, Kernel};

/// What the guest does; part of what a saved cluster is made of.
pub const POD_INIT: &str = include_str!("pod-init.sh");

/// Drivers for what a pod's machine has, its volumes with files and its power button.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
    "af_packet",
    "isofs",
    "evdev",
    "button",
];

/// An initial RAM disk for the kernel of [`Image::Kernel`] that gets an address by DHCP, says
/// `GUEST-READY` on the console, and runs the script `run` of a ConfigMap that is its volume `config`.
/// Without one it serves its address at port 80. The power button ends it.
///
/// # Errors
/// No apt, no network, or not enough disk for what it is made of.
pub fn pod_initrd(busybox: &Path) -> Result<Vec<u8>> {
    let images = Images::of_this_user();
    images.ensure(Image::Kernel)?;
    let modules = Kernel::open(&images.kernel_tree())?.modules()?;
    let initrd = Initrd::new(busybox, POD_INIT)?
        .program("bin/udhcpc.sh", DHCP_SCRIPT)
        .modules(&modules, MODULES)?;
    Ok(initrd.finish())
}
