//! Has the firmware linked as one: a static ELF file with a memory layout of its own.

fn main() {
    println!("cargo::rerun-if-changed=fast.ld");
    let directory = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    for argument in [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
        "-Wl,--no-eh-frame-hdr",
        "-Wl,-z,norelro",
        "-Wl,-n",
        &format!("-Wl,-T,{directory}/fast.ld"),
    ] {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
}
