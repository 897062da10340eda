//! Host ends of guest network interfaces: tap and passt.
//!
//! Both ends move Ethernet frames between guest memory and non-blocking descriptors that the caller
//! polls, and allocate nothing per frame. [`Tap`] puts a 12-byte virtio-net header before each frame and can
//! leave checksums and segmentation to the kernel; [`FrameSocket`], the link to [`Passt`], carries
//! bare frames and needs every checksum complete.

mod filter;
mod passt;
mod resolv;
mod socket;
mod stream;
mod tap;

pub use passt::{Forward, Passt, PasstConfig, PasstError, PasstExit, Transport};
pub use socket::FrameSocket;
pub use tap::{MAX_PARTS, Offloads, Tap, TapError, VNET_HEADER, interface_mtu};
