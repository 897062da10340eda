//! virtio-blk (virtio 1.2, 5.2): a disk over a [`BlockBackend`](edgevmm_block::BlockBackend).
//!
//! Every queue has a thread with an [`Engine`](edgevmm_block::engine::Engine), which does as many
//! requests at a time as the driver makes available. Offers flush, a write cache that the driver
//! can turn off, discard, write zeroes, the topology, a serial number and several queues. Leaves
//! out what has no use on an image file: zoned storage, secure erase, lifetime, and SCSI
//! pass-through.

mod config;
mod device;
mod patience;
mod request;
mod server;
mod worker;

#[cfg(test)]
mod tests;

pub use device::{Block, BlockConfig, BlockState, QueueRequests};
