//! virtio-net (virtio 1.2, 5.1): a network interface over a [`NetBackend`].
//!
//! Frames move between guest memory and the host's descriptor in one system call each, with the
//! virtio-net header in front of them where the backend knows it (a tap), so that checksums and
//! segmentation may be left to the host or the guest. Several queue pairs are offered when there
//! are several backends. All runs on the shared device thread; a pair of queues is one handler
//! that knows nothing of the others.
//!
//! Leaves out: receive filters and VLAN filters (the host's bridge does that), setting the MAC,
//! announcements, RSS, UFO and USO, and notification coalescing.

mod backend;
mod control;
mod device;
mod pair;
mod rx;
mod tx;

#[cfg(test)]
pub(crate) mod tests;

pub use backend::{GuestOffloads, MAX_PARTS, NetBackend};
pub use device::{Net, NetConfig, NetState, NetStats};
