//! What the project's tasks are made of: the nested-KVM lab, the test images, and the test of
//! whether this host's own KVM will do instead. The end-to-end tests use it as a library.

pub mod agent;
pub mod bench;
pub mod cache;
pub mod dist;
pub mod guests;
pub mod host;
pub mod images;
mod kernel;
pub mod kvm;
pub mod lab;
mod packages;
pub mod pods;
pub mod process;
pub mod progress;
