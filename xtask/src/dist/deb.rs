//! The Debian package. It needs no systemd and starts nothing: `edgevmm install` tells containerd.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::tree::Tree;
use super::{DOCUMENTS, FIRMWARE, Release};
use crate::process;

/// Where documents go.
const DOC: &str = "usr/share/doc/edgevmm";

pub(super) fn make(release: &Release, out: &Path) -> Result<PathBuf> {
    let tree = Tree::new()?;
    for name in ["edgevmm", super::PROGRAMS[0]] {
        let to = format!("usr/bin/{name}");
        tree.copy(&release.program(name), &to, 0o755)?;
    }
    let firmware = format!("usr/lib/edgevmm/{FIRMWARE}");
    tree.copy(&release.program(FIRMWARE), &firmware, 0o644)?;
    for document in DOCUMENTS.into_iter().filter(|name| *name != "LICENSE") {
        let to = format!("{DOC}/{document}");
        tree.copy(&release.workspace.join(document), &to, 0o644)?;
    }
    tree.write(&format!("{DOC}/copyright"), copyright(release)?, 0o644)?;
    tree.copy(
        &release.workspace.join("CHANGELOG.md"),
        &format!("{DOC}/changelog"),
        0o644,
    )?;
    process::output(
        Command::new("gzip")
            .arg("-9n")
            .arg(tree.path(&format!("{DOC}/changelog"))),
    )?;
    let size = installed_size(tree.root())?;
    tree.write("DEBIAN/control", control(release, size)?, 0o644)?;
    let file = out.join(format!("edgevmm_{}_amd64.deb", release.version));
    let mut build = Command::new("dpkg-deb");
    build.args(["--root-owner-group", "-Zxz", "--build"]);
    build.env("SOURCE_DATE_EPOCH", release.epoch.to_string());
    // One thread: more cut the data up by their number.
    build.env("DPKG_DEB_THREADS_MAX", "1");
    process::output(build.arg(tree.root()).arg(&file))
        .context("dpkg-deb is in the package dpkg")?;
    Ok(file)
}

fn control(release: &Release, size: u64) -> Result<String> {
    let programs = [
        release.program("edgevmm"),
        release.program(super::PROGRAMS[0]),
    ];
    let libc = libc_version(&programs)?;
    Ok(format!(
        "Package: edgevmm\nVersion: {}\nArchitecture: amd64\n\
         Maintainer: edgevmm maintainers <maintainers@edgevmm.invalid>\n\
         Installed-Size: {size}\nSection: admin\nPriority: optional\n\
         Homepage: {}\n\
         Depends: libc6 (>= {libc}), libgcc-s1\nRecommends: seabios\n\
         Suggests: containerd, runc, ovmf, ipxe-qemu, passt, nftables\n\
         Description: virtual machines straight on KVM, by themselves or as pods\n \
         Runs disk images of legacy systems, and kernels, with little memory of its own.\n \
         With containerd or k3s pods can be machines: `edgevmm install --bin-dir /usr/bin`\n \
         tells containerd so. Nothing is started or changed by this package itself.\n",
        release.version,
        env!("CARGO_PKG_REPOSITORY"),
    ))
}

/// The newest version of the C library that programs ask for, as `2.36`.
fn libc_version(programs: &[PathBuf]) -> Result<String> {
    const MARK: &[u8] = b"GLIBC_2.";
    let mut newest = 0;
    for program in programs {
        let bytes =
            fs::read(program).with_context(|| format!("There is no {}", program.display()))?;
        for (at, _) in bytes
            .windows(MARK.len())
            .enumerate()
            .filter(|(_, it)| *it == MARK)
        {
            let digits = bytes.iter().skip(at + MARK.len()).take(3);
            let minor = digits
                .take_while(|byte| byte.is_ascii_digit())
                .fold(0, |sum, byte| sum * 10 + u32::from(byte - b'0'));
            newest = newest.max(minor);
        }
    }
    Ok(format!("2.{newest}"))
}

/// The size of all files in KiB.
fn installed_size(folder: &Path) -> Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let file = entry.metadata()?;
        sum += if file.is_dir() {
            1 + installed_size(&entry.path())?
        } else {
            file.len().div_ceil(1024)
        };
    }
    Ok(sum)
}

fn copyright(release: &Release) -> Result<String> {
    let licence = fs::read_to_string(release.workspace.join("LICENSE"))?;
    Ok(format!(
        "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n\
         Upstream-Name: edgevmm\nSource: {}\n\n\
         Files: *\nCopyright: the authors of edgevmm\nLicense: Apache-2.0\n\n\
         License: Apache-2.0\n{}",
        env!("CARGO_PKG_REPOSITORY"),
        indented(&licence),
    ))
}

/// Text as a field has it: each line behind a space, empty ones as a dot.
fn indented(text: &str) -> String {
    let line = |line: &str| match line.trim_end() {
        "" => " .\n".to_owned(),
        line => format!(" {line}\n"),
    };
    text.trim().lines().map(line).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_newest_library_that_is_asked_for_counts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("program");
        fs::write(&path, b"xGLIBC_2.4\0GLIBC_2.34\0GLIBC_2.17\0GLIBC_PRIVATE").unwrap();
        assert_eq!(libc_version(&[path]).unwrap(), "2.34");
    }

    #[test]
    fn text_is_a_field() {
        assert_eq!(indented("a\n\n  b\n"), " a\n .\n   b\n");
    }
}
