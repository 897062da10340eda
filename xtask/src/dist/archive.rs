//! The archive for nodes without a network: programs, the RuntimeClass, documents and a script that
//! installs them.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::tree::Tree;
use super::{PROGRAMS, Release, sha256sums};

/// Checks what was copied here, and installs it.
const INSTALL: &str = r#"#!/bin/sh
# Installs edgevmm on this node: for k3s, or as the arguments say, such as
#   ./install.sh --containerd
#   ./install.sh --k3s --dry-run
# `./edgevmm install --help` lists them all. No network is needed.
set -eu
cd "$(dirname "$0")"
sha256sum -c SHA256SUMS > /dev/null || {
    echo "Files of this archive are damaged: copy it anew" >&2
    exit 1
}
[ $# -gt 0 ] || set -- --k3s
exec ./edgevmm install "$@"
"#;

pub(super) fn make(release: &Release, out: &Path) -> Result<PathBuf> {
    let tree = Tree::new()?;
    let folder = format!("edgevmm-{}", release.version);
    let inside = |name: &str| format!("{folder}/{name}");
    for name in PROGRAMS {
        tree.copy(&release.program(name), &inside(name), 0o755)?;
    }
    tree.write(&inside("install.sh"), INSTALL, 0o755)?;
    let class = release.says(&["install", "--runtime-class"])?;
    tree.write(&inside("runtimeclass.yaml"), class, 0o644)?;
    release.documents(&tree, &folder)?;
    let mut names = PROGRAMS.to_vec();
    names.extend(["install.sh", "runtimeclass.yaml"]);
    let sums = sha256sums(&tree.path(&folder), &names)?;
    tree.write(&inside("SHA256SUMS"), sums, 0o644)?;
    let file = out.join(format!("{folder}-linux-amd64.tar.gz"));
    tree.tar(&[&folder], release.epoch, &file)?;
    Ok(file)
}
