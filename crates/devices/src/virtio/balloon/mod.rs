//! virtio-balloon (virtio 1.2, 5.5): memory that the guest can do without goes back to the host.
//!
//! Inflating and deflating by the host's wish, deflating by the guest's when it runs out of memory,
//! statistics on demand, and reporting of free pages, by which memory comes back without anybody's
//! asking. Pages that are huge pages of the host stay: they are reserved for the guest anyway, and
//! pinned. Left out: free page hints, which are for migration, and the queue's use without
//! VIRTIO_F_VERSION_1.
//!
//! Queues exist by negotiated features: that of reports comes after that of statistics, if there is
//! one, as Linux has it.

mod device;
mod discard;
mod handler;
mod stats;

#[cfg(test)]
mod tests;

pub use device::{Balloon, BalloonHandle, BalloonState, BalloonUse};
pub use stats::GuestMemoryStats;
