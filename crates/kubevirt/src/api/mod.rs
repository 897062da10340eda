//! The objects, as users write them. Fields are those that mean something here, and those that ask
//! for what is there anyway; any other is refused by name, see [`crate::checks`].

pub mod disks;
pub mod domain;
pub mod instance;
pub mod machine;
pub mod network;

pub use instance::{Condition, InstanceSpec, InstanceStatus, Phase, VirtualMachineInstance};
pub use machine::{MachineSpec, MachineStatus, RunStrategy, VirtualMachine};
