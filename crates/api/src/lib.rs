//! The gRPC API of a running machine and the places where machines are found.
//!
//! A machine serves [`v1::machine_server::Machine`] and [`v1::agent_server::Agent`] on a Unix socket in its folder below the
//! [`RuntimeDir`]. Clients find the folder by the machine's name and [`connect`] to it.

mod client;
mod exit;
pub mod files;
mod lock;
mod runtime;
mod server;

pub use client::{Agent, Client, ConnectError, Connection, connect, connect_agent};
pub use exit::{ExitReason, ExitRecord};
pub use runtime::{ExitFile, MachineClaim, MachineDir, RuntimeDir, RuntimeDirError};
pub use server::serve;

/// Messages, client and server of version 1, generated from `proto/edgevmm/v1`.
#[allow(
    missing_docs,
    unused_qualifications,
    reason = "generated; the .proto files document it"
)]
pub mod v1 {
    tonic::include_proto!("edgevmm.v1");
}
