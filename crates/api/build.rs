//! Generates the Rust side of `proto/edgevmm/v1`, without a protoc.

use std::error::Error;
use std::path::Path;

fn main() -> Result<(), Box<dyn Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proto");
    println!("cargo::rerun-if-changed={}", root.display());
    let descriptors = protox::compile(
        ["edgevmm/v1/machine.proto", "edgevmm/v1/agent.proto"],
        [root],
    )?;
    // The way to a machine is client.rs.
    tonic_prost_build::configure()
        .build_transport(false)
        .compile_fds(descriptors)?;
    Ok(())
}
