//! What containerd's runtime shim and its tests share: containerd's messages, and the way they go.

pub mod proto;
pub mod ttrpc;
