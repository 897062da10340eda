//! The devices of a legacy PC.
