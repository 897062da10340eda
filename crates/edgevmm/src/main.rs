//! Boots disk images as virtual machines on KVM.
fn main() {}
