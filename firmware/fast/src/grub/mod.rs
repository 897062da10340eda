//! GRUB's configuration, as far as it leads to the default entry's `linux` command (GRUB 2.12
//! manual, chapters 6 "Writing your own configuration file" and 17 "Available commands").
//!
//! A script runs as in GRUB, with the commands that `grub-mkconfig` of the distributions writes.
//! A command that is unknown is a decline where it is reached, and no matter elsewhere. What GRUB
//! would do besides booting the default entry is a decline too: wait for a choice or a password,
//! or change its environment block in a way that matters. Left out: loops, menus, anything drawn.

mod commands;
mod condition;
mod environment;
mod lexer;
mod menu;
mod parser;
mod script;
#[cfg(test)]
mod tests;

use alloc::string::String;
use alloc::vec::Vec;

use crate::decline::Decline;

/// More than any configuration has; a generated one has 10 to 100 KiB.
pub const FILE_MAX: usize = 1 << 20;

/// What a path leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file of so many bytes.
    File(u64),
    /// A directory.
    Directory,
}

/// What to look for a file system by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// A file on it.
    File,
    /// Its label.
    Label,
    /// Its UUID.
    Uuid,
}

/// The disks, as a script sees them. Devices are named as in GRUB: `hd0,gpt2`.
pub trait Devices {
    /// Reads a file of at most [`FILE_MAX`] bytes; `None` when there is none.
    ///
    /// # Errors
    /// It can't be read.
    fn read(&self, device: &str, path: &str) -> Result<Option<Vec<u8>>, Decline>;

    /// What `path` leads to; `None` when there is nothing.
    ///
    /// # Errors
    /// It can't be read.
    fn kind(&self, device: &str, path: &str) -> Result<Option<Kind>, Decline>;

    /// The names in a directory.
    ///
    /// # Errors
    /// It can't be read.
    fn names(&self, device: &str, path: &str) -> Result<Vec<String>, Decline>;

    /// The first file system that fits.
    ///
    /// # Errors
    /// One can't be read.
    fn search(&self, by: By, value: &str) -> Result<Option<String>, Decline>;
}

/// A file on a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// GRUB's name of the device.
    pub device: String,
    /// The path from the root of its file system.
    pub path: String,
}

/// What the default entry starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Linux {
    /// The kernel.
    pub kernel: Place,
    /// Its initial RAM disks, one after the other.
    pub initrds: Vec<Place>,
    /// Its command line.
    pub command_line: String,
}

/// Runs the configuration at `path` of `device` and then its default entry.
///
/// # Errors
/// Something on the way is not understood, or GRUB would not boot by itself.
pub fn run(devices: &dyn Devices, device: &str, path: &str) -> Result<Linux, Decline> {
    script::Script::new(devices, device, path).run(device, path)
}
