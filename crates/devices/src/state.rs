//! Taking up saved states: what the `restore` functions of all devices have in common.
//!
//! `restore` puts a state into a device that was made with the same config, also one that was in
//! use. A state may come from a file or another host and is as little trusted as the guest: each
//! device checks every field before it uses it. Where a device refuses, it says why, and it is as
//! after power-on or as it was before.

use std::io;

use crate::virtio::DriverError;

/// Why a saved state can't be taken up.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The state is of another device, or of one with another config.
    #[error(
        "The saved state is of another machine: {what} is {saved:#x} there, {expected:#x} here"
    )]
    OtherConfig {
        /// What differs.
        what: &'static str,
        /// What the state has.
        saved: u64,
        /// What this device has.
        expected: u64,
    },
    /// No device gets into this state.
    #[error("The saved state is damaged: {what} can't be {saved:#x}")]
    Impossible {
        /// What is wrong.
        what: &'static str,
        /// What the state has.
        saved: u64,
    },
    /// A queue that the device serves is not one that a driver could have set up.
    #[error("The saved state is damaged: virtio queues don't fit guest memory")]
    Queues(#[source] DriverError),
    /// The host lacks what the device needs.
    #[error("Can't restore a device")]
    Host(#[source] io::Error),
}

/// Refuses a state that differs in what the config fixes.
///
/// # Errors
/// Fails unless both are the same number.
pub fn same(
    what: &'static str,
    saved: impl TryInto<u64>,
    expected: impl TryInto<u64>,
) -> Result<(), StateError> {
    let (saved, expected) = (widen(saved), widen(expected));
    if saved == expected {
        Ok(())
    } else {
        Err(StateError::OtherConfig {
            what,
            saved,
            expected,
        })
    }
}

/// Refuses a value that is not `possible`.
///
/// # Errors
/// Fails unless it is.
pub fn ensure(
    possible: bool,
    what: &'static str,
    saved: impl TryInto<u64>,
) -> Result<(), StateError> {
    if possible {
        Ok(())
    } else {
        let saved = widen(saved);
        Err(StateError::Impossible { what, saved })
    }
}

fn widen(value: impl TryInto<u64>) -> u64 {
    value.try_into().unwrap_or(u64::MAX)
}
