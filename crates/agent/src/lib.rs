//! The protocol of the QEMU guest agent (`qga/qapi-schema.json` of QEMU): requests as lines of
//! JSON, and what becomes of the guest's answers. Pure bytes: who sends and waits is above.
//!
//! What answers is the guest, so nothing is believed: lines have a limit ([`Framer`]), an answer is
//! what the request asks for or an error ([`answer`]), and texts for people are made harmless
//! ([`harmless`]). Leaves out the commands that change what the VMM manages (vCPUs, memory blocks,
//! suspend) and files of the guest, which [`exec`] can read and write.

mod answer;
mod commands;
mod frame;

pub use answer::{AnswerError, answer, harmless};
pub use commands::{
    AuthorizedKeys, Command, Disk, Empty, ExecResult, ExecStarted, FileSystem, FreezeStatus,
    HostName, Info, Interface, IpAddress, OsInfo, PowerMode, SupportedCommand, TimeZone, User,
    exec, sync,
};
pub use frame::{Framer, LineTooLong, SENTINEL};
