//! Tests of the engine as a whole.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod faults;
mod power_cut;
mod repair;
mod replay;
mod setup;
mod threads;
