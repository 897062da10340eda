//! Why the firmware leaves a disk to another one.

use alloc::string::String;
use core::fmt;

/// What kind of thing stands in the way. The numbers are part of the control port's contract.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Reason {
    /// There is no disk, or it can't be read.
    Disk = 1,
    /// The partition table or a file system is unknown, damaged or of a kind that is left out.
    Layout = 2,
    /// No boot loader's configuration was found, or several.
    Nothing = 3,
    /// The configuration has something on the way to the default entry that is not understood.
    Config = 4,
    /// The kernel is missing or can't be started this way.
    Kernel = 5,
    /// Things don't fit into memory.
    Memory = 6,
    /// The firmware itself failed.
    Crash = 7,
    /// It took too long.
    Time = 8,
}

/// The firmware does not boot this disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decline {
    /// The kind of obstacle.
    pub reason: Reason,
    /// The obstacle in words, a part of a sentence. May hold text of the disk.
    pub text: String,
}

impl Decline {
    /// An obstacle in these words.
    pub fn new(reason: Reason, text: impl Into<String>) -> Self {
        Self {
            reason,
            text: text.into(),
        }
    }
}

impl fmt::Display for Decline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// A [`Decline`] for what the configuration asks.
pub(crate) fn config(text: impl Into<String>) -> Decline {
    Decline::new(Reason::Config, text)
}

/// A [`Decline`] for what the disk's layout is like.
pub(crate) fn layout(text: impl Into<String>) -> Decline {
    Decline::new(Reason::Layout, text)
}
