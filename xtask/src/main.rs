//! Project tasks: the lab, test images, benchmarks.
fn main() {}
