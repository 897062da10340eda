//! KubeVirt's objects and what they mean.
//!
//! Pure: nothing here talks to a cluster.

pub mod api;
pub mod crds;
