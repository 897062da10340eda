//! The container image: the programs with the libraries they need and nothing else, for an init
//! container that puts them onto its node. It is an archive with an OCI image layout (image-layout.md
//! 1.0), as containerd, skopeo and others read it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::tree::Tree;
use super::{PROGRAMS, Release, sha256sums};
use crate::process;

/// What the image is called, before its version.
pub const NAME: &str = "localhost/edgevmm";
/// Where the programs are in it: not where a node has them, as folders of the node cover those.
const FOLDER: &str = "opt/edgevmm";
/// Packages of the libraries, for their licences.
const LIBRARIES: [&str; 2] = ["libc6", "libgcc-s1"];

pub(super) fn make(release: &Release, out: &Path) -> Result<PathBuf> {
    let tree = Tree::new()?;
    let layer = tree.path("layer.tar");
    root(release)?.tar(&["."], release.epoch, &layer)?;
    let (diff, _) = digest(&layer)?;
    process::output(Command::new("gzip").arg("-9n").arg(&layer))?;
    let layer = blob(&tree, "layer.tar.gz")?;
    let created = process::output(
        Command::new("date")
            .args(["--utc", "+%FT%TZ"])
            .arg(format!("--date=@{}", release.epoch)),
    )?;
    let created = created.trim();
    let about = json!({
        "org.opencontainers.image.title": "edgevmm",
        "org.opencontainers.image.description": "Programs that run pods as virtual machines, to be put onto nodes",
        "org.opencontainers.image.version": release.version,
        "org.opencontainers.image.licenses": "Apache-2.0",
        "org.opencontainers.image.source": env!("CARGO_PKG_REPOSITORY"),
        "org.opencontainers.image.created": created,
    });
    let config = json!({
        "architecture": "amd64", "os": "linux", "created": created,
        "config": {
            "Entrypoint": [format!("/{FOLDER}/edgevmm")],
            "Cmd": ["install", "--root", "/host"],
            "Labels": about,
        },
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{diff}")]},
        "history": [{"created": created, "created_by": "cargo xtask dist"}],
    });
    let config = document(&tree, "config", &config)?;
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": described(&config, "application/vnd.oci.image.config.v1+json"),
        "layers": [described(&layer, "application/vnd.oci.image.layer.v1.tar+gzip")],
        "annotations": about,
    });
    let manifest = document(&tree, "manifest", &manifest)?;
    let mut entry = described(&manifest, "application/vnd.oci.image.manifest.v1+json");
    // A tag has no tilde.
    let tag = release.version.replace('~', "-");
    entry["platform"] = json!({"architecture": "amd64", "os": "linux"});
    entry["annotations"] = json!({
        "io.containerd.image.name": format!("{NAME}:{tag}"),
        "org.opencontainers.image.ref.name": tag,
    });
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [entry],
    });
    tree.write("index.json", index.to_string(), 0o644)?;
    tree.write("oci-layout", r#"{"imageLayoutVersion":"1.0.0"}"#, 0o644)?;
    let file = out.join(format!("edgevmm-{}-image.tar", release.version));
    let names = ["oci-layout", "index.json", "blobs"];
    tree.tar(&names, release.epoch, &file)?;
    Ok(file)
}

/// The image's files.
fn root(release: &Release) -> Result<Tree> {
    let tree = Tree::new()?;
    for name in PROGRAMS {
        tree.copy(&release.program(name), &format!("{FOLDER}/{name}"), 0o755)?;
    }
    for library in libraries(&release.program("edgevmm"))? {
        let name = library.strip_prefix("/").unwrap_or(&library);
        let name = name.to_str().context("A library without a name")?;
        tree.copy(&library, name, 0o755)?;
    }
    let licence = release.workspace.join("LICENSE");
    tree.copy(&licence, "usr/share/doc/edgevmm/copyright", 0o644)?;
    for package in LIBRARIES {
        let file = format!("usr/share/doc/{package}/copyright");
        let from = Path::new("/").join(&file);
        if from.exists() {
            tree.copy(&from, &file, 0o644)?;
        }
    }
    Ok(tree)
}

/// The shared libraries of a program, and who loads them, as this system has them.
fn libraries(program: &Path) -> Result<BTreeSet<PathBuf>> {
    let text = process::output(Command::new("ldd").arg(program))?;
    ensure!(
        !text.contains("not found"),
        "Libraries of {} are missing:\n{text}",
        program.display()
    );
    let paths = text.lines().filter_map(|line| {
        let line = line.split_once("=> ").map_or(line, |(_, path)| path);
        line.trim().split(' ').next()
    });
    Ok(paths
        .filter(|path| path.starts_with('/'))
        .map(PathBuf::from)
        .collect())
}

/// A file's hash and size.
fn digest(file: &Path) -> Result<(String, u64)> {
    let sums = sha256sums(Path::new("/"), &[file])?;
    let hash = sums.split(' ').next().context("sha256sum says nothing")?;
    Ok((hash.to_owned(), fs::metadata(file)?.len()))
}

/// Makes a file of the tree a blob, and returns its hash and size.
fn blob(tree: &Tree, name: &str) -> Result<(String, u64)> {
    let file = tree.path(name);
    let (hash, size) = digest(&file)?;
    tree.copy(&file, &format!("blobs/sha256/{hash}"), 0o644)?;
    fs::remove_file(file)?;
    Ok((hash, size))
}

fn document(tree: &Tree, name: &str, content: &Value) -> Result<(String, u64)> {
    tree.write(name, content.to_string(), 0o644)?;
    blob(tree, name)
}

fn described((hash, size): &(String, u64), kind: &str) -> Value {
    json!({"mediaType": kind, "digest": format!("sha256:{hash}"), "size": size})
}
