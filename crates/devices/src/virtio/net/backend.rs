//! What a network interface asks of its host end.

use std::fmt::Debug;
use std::io;
use std::os::fd::BorrowedFd;

use vm_memory::VolatileSlice;

/// Slices that a frame comes in at most.
pub const MAX_PARTS: usize = 1024;

/// What the guest takes beyond finished frames of the MTU's size.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GuestOffloads {
    /// Frames with unfinished checksums; the others come only with this one.
    pub checksum: bool,
    /// Large TCP segments over IPv4.
    pub tso4: bool,
    /// Large TCP segments over IPv6.
    pub tso6: bool,
    /// Large TCP segments with ECN bits.
    pub ecn: bool,
}

/// The host end of one pair of queues. No call blocks or allocates.
///
/// After [`NetBackend::recv`] had nothing, and after [`NetBackend::send`] or
/// [`NetBackend::flush`] had to wait, the descriptor becomes readable or writable when it is worth
/// trying again. An error of either means that the backend is gone for good.
pub trait NetBackend: Send + Debug {
    /// The descriptor to poll. Always the same.
    fn poll_fd(&self) -> BorrowedFd<'_>;

    /// Whether frames go behind the 12-byte header of virtio 1 (`virtio_net_hdr_v1`).
    ///
    /// Such a backend finishes checksums and splits large TCP segments of the guest, and heeds
    /// [`NetBackend::set_offloads`].
    fn vnet_header(&self) -> bool;

    /// Tells what the driver accepted. Called at each activation of a backend with a header.
    ///
    /// # Errors
    /// Fails when the host can't do that.
    fn set_offloads(&mut self, offloads: GuestOffloads) -> io::Result<()>;

    /// Moves the next frame, behind its header if there is one, to the front of `parts`, which
    /// are at most [`MAX_PARTS`]. Returns the length of both, or `None` when there is no frame.
    ///
    /// A frame that does not fit is lost; the length returned is then any that is greater than
    /// the room.
    ///
    /// # Errors
    /// Fails when the backend is gone.
    fn recv(&mut self, parts: &[VolatileSlice<'_>]) -> io::Result<Option<usize>>;

    /// Whether [`NetBackend::recv`] has a frame of the backend's own, of which the descriptor says
    /// nothing. Only [`NetBackend::send`] and [`NetBackend::recv`] bring one about.
    fn has_own_frame(&self) -> bool {
        false
    }

    /// Sends the frame in `parts`, behind its header if there is one. False means that it can't be
    /// taken now and must be offered again. A frame that the host refuses counts as sent.
    ///
    /// # Errors
    /// Fails when the backend is gone.
    fn send(&mut self, parts: &[VolatileSlice<'_>]) -> io::Result<bool>;

    /// Brings out what an earlier [`NetBackend::send`] left behind; true when nothing is left.
    ///
    /// # Errors
    /// Fails when the backend is gone.
    fn flush(&mut self) -> io::Result<bool> {
        Ok(true)
    }
}
