//! Bad input: one line that says what is wrong, a hint, an exit code other than 0, and nothing
//! made or changed.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use edgevmm_e2e::{Command, Host, Image, Output, as_root, image, on_this_machine};

/// What is in a directory: time of the last change and content of each file; directories change
/// with what is in them.
type Content = BTreeMap<String, Option<(SystemTime, Vec<u8>)>>;

fn content(dir: &Path) -> Result<Content> {
    let mut found = Content::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let metadata = fs::symlink_metadata(&path)?;
        let file = if metadata.is_dir() {
            found.extend(content(&path)?);
            None
        } else {
            Some((metadata.modified()?, fs::read(&path)?))
        };
        found.insert(path.display().to_string(), file);
    }
    Ok(found)
}

/// One line with each of `words` and a hint, either a line of its own or after a colon.
fn check(output: &Output, code: i32, words: &[&str]) -> Result<()> {
    output.expect_code(code)?;
    let said = output.stderr.trim_end();
    // Of the host and not of the input, and so on hosts with a poor KVM only.
    let warned = said.starts_with("edgevmm: warning: ");
    let mut lines = said.lines().skip(if warned { 2 } else { 0 });
    let reason = lines.next().context("No reason")?;
    ensure!(reason.starts_with("edgevmm: "), "{said}");
    for word in words {
        ensure!(
            reason.to_lowercase().contains(&word.to_lowercase()),
            "No {word:?} in: {said}"
        );
    }
    let rest: Vec<_> = lines.collect();
    let hint = rest.iter().all(|line| line.starts_with("hint: ")) && rest.len() <= 1;
    ensure!(hint, "More than a reason and a hint: {said}");
    ensure!(
        !rest.is_empty() || reason.matches(": ").count() > 1,
        "No hint in: {said}"
    );
    Ok(())
}

/// Runs `edgevmm run` with these arguments and looks whether it changed anything.
fn refused(host: &Host, arguments: &[&str], code: i32, words: &[&str]) -> Result<()> {
    let dir = host.path("");
    let before = content(Path::new(&dir))?;
    let run = host.edgevmm(["run"]).args(arguments.iter().copied());
    let output = host.run(&run)?;
    check(&output, code, words)?;
    let after = content(Path::new(&dir))?;
    ensure!(
        before.keys().eq(after.keys()),
        "Files came or went: {:?}",
        after.keys()
    );
    ensure!(before == after, "Files changed");
    Ok(())
}

fn qemu_img(host: &Host, arguments: &[&str]) -> Result<()> {
    host.ok(&Command::new("qemu-img").args(arguments.iter().copied()))?;
    Ok(())
}

#[test]
fn a_missing_disk() -> Result<()> {
    on_this_machine(|host| {
        refused(
            host,
            &["absent.qcow2"],
            2,
            &["absent.qcow2", "no such file"],
        )
    })
}

#[test]
fn a_missing_kernel() -> Result<()> {
    on_this_machine(|host| {
        refused(
            host,
            &["--kernel", "absent"],
            2,
            &["absent", "no such file"],
        )
    })
}

#[test]
fn a_truncated_qcow2() -> Result<()> {
    let images = image(Image::Mini)?;
    on_this_machine(|host| {
        host.copy(&images.mini_qcow2(), "short.qcow2")?;
        host.ok(&Command::new("truncate").args(["-s", "250000", "short.qcow2"]))?;
        refused(host, &["short.qcow2"], 1, &["short.qcow2", "truncated"])
    })
}

/// An image may name any file of the host as its backing file; it gets none that was not given.
#[test]
fn a_backing_file_that_was_not_given() -> Result<()> {
    on_this_machine(|host| {
        host.write("secret", "for other eyes\n")?;
        let secret = host.path("secret");
        let create = [
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "raw",
            "-b",
            &secret,
            "evil.qcow2",
            "1M",
        ];
        qemu_img(host, &create)?;
        refused(host, &["evil.qcow2"], 1, &["evil.qcow2", "backing"])
    })
}

/// The same by qcow2's external data file.
#[test]
fn a_data_file_that_was_not_given() -> Result<()> {
    on_this_machine(|host| {
        let options = format!("data_file={},data_file_raw=on", host.path("data"));
        qemu_img(
            host,
            &[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-o",
                &options,
                "evil.qcow2",
                "1M",
            ],
        )?;
        refused(
            host,
            &["evil.qcow2"],
            1,
            &["evil.qcow2", "in another file", "data_file="],
        )
    })
}

#[test]
fn more_memory_than_the_host_has() -> Result<()> {
    let images = image(Image::Mini)?;
    on_this_machine(|host| {
        let disk = host.copy(&images.mini_qcow2(), "disk.qcow2")?;
        refused(host, &["--memory", "900G", &disk], 2, &["900G", "memory"])
    })
}

#[test]
fn an_unknown_key_in_a_file() -> Result<()> {
    on_this_machine(|host| {
        host.write("vm.yaml", "memory:\n  sise: 1G\ndisks: []\n")?;
        refused(
            host,
            &["--config", "vm.yaml"],
            2,
            &["vm.yaml", "line 2", "sise", "size"],
        )
    })
}

#[test]
fn an_unknown_key_in_a_flag() -> Result<()> {
    on_this_machine(|host| {
        let run = host.edgevmm(["run", "--disk", "a.qcow2,sireal=x"]);
        let output = host.run(&run)?;
        output.expect_code(2)?;
        ensure!(
            output.stderr.contains("sireal") && output.stderr.contains("serial"),
            "{output:?}"
        );
        Ok(())
    })
}

/// Somebody who may not use `/dev/kvm` is told so.
#[test]
fn no_permission_for_kvm() -> Result<()> {
    let images = image(Image::Kernel)?;
    as_root(|host| {
        let kernel = host.copy(&images.vmlinux(), "vmlinux")?;
        host.ok(&Command::script(
            "chmod 755 . && mkdir theirs && chown 65534:65534 theirs",
        ))?;
        // Where everybody may use it, that is taken away, in a namespace of its own.
        let script = "mknod kvm c 10 232 && chmod 600 kvm && mount --bind kvm /dev/kvm && \
                      exec setpriv --reuid 65534 --regid 65534 --clear-groups \"$@\"";
        let run = host
            .edgevmm(["run", "--net", "none", "--kernel", &kernel])
            .env("EDGEVMM_RUNTIME_DIR", host.path("theirs/run"));
        let unshare = Command::new("unshare").args(["--mount", "bash", "-ec", script, "sh"]);
        let output = host.run(&unshare.wrapping(&run))?;
        check(&output, 1, &["/dev/kvm", "permission"])?;
        ensure!(
            host.ok(&Command::script("find theirs -mindepth 2"))?
                .is_empty()
        );
        Ok(())
    })
}
