//! KubeVirt's objects and what they mean.
//!
//! Pure: nothing here talks to a cluster.

pub mod api;
pub mod checks;
pub mod conditions;
pub mod crds;
pub mod defaults;
pub mod guarded;
pub mod machine;
pub mod pod;
pub mod quantity;
mod seed;
pub mod shape;
pub mod status;
