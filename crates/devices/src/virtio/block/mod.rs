//! virtio-blk (virtio 1.2, 5.2): a disk over a [`BlockBackend`](edgevmm_block::BlockBackend).
//!
//! Every queue has a thread that serves it request by request: one disk image is mostly one
//! file in the page cache, where a plain `preadv` into guest memory is the shortest way.
//! Offers flush, a write cache that the driver can turn off, discard, write zeroes, the topology,
//! a serial number and several queues. Leaves out what has no use on an image file: zoned
//! storage, secure erase, lifetime, and SCSI pass-through.

mod config;
mod device;
mod request;
mod worker;

#[cfg(test)]
mod tests;

pub use device::{Block, BlockConfig, BlockState};
