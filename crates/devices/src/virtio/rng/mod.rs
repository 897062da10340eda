//! virtio-rng (virtio 1.2, 5.4): random bytes of the host's kernel.
//!
//! The device has no config space, no features and no state of its own. A request gets 64 KiB at
//! most; a guest that wants more asks again, after the other devices had their turn.

mod device;

#[cfg(test)]
mod tests;

pub use device::Rng;
