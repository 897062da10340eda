//! The part of the lab that runs inside L1: its first process, and the agent that starts commands
//! on behalf of the host.

mod command;
mod init;
mod serve;

pub use init::run as init;
pub use serve::run as serve;

/// The sources a saved L1 has inside: when one changes, the snapshot is made again.
pub(crate) const SOURCES: &[&str] = &[
    include_str!("command.rs"),
    include_str!("init.rs"),
    include_str!("serve.rs"),
    include_str!("../lab/protocol.rs"),
];
