//! Generates the messages of `proto/containerd`, without a protoc.

use std::error::Error;
use std::path::Path;

fn main() -> Result<(), Box<dyn Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proto");
    let files = ["task", "ttrpc", "events", "bootstrap", "metrics"]
        .map(|name| format!("containerd/{name}.proto"));
    println!(
        "cargo::rerun-if-changed={}",
        root.join("containerd").display()
    );
    let descriptors = protox::compile(files, [root])?;
    tonic_prost_build::configure()
        .build_client(false)
        .build_server(false)
        .compile_fds(descriptors)?;
    Ok(())
}
