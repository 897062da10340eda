//! Containers that are machines, under containerds of several releases.

use std::path::Path;

use anyhow::{Result, ensure};
use edgevmm_e2e::{Command, Containerd, Host, Image, Limit, Node, as_root, image};

const MINI: &str = "local.test/mini:1";
const KERNEL: &str = "local.test/kernel:1";
const MEMORY: [&str; 2] = ["--memory-limit", "268435456"];

/// A folder with these files of this machine.
fn folder(host: &Host, files: &[(&Path, &str)]) -> Result<String> {
    let folder = host.path("content");
    let mut script = format!("rm -rf {folder}; mkdir -p {folder}\n");
    for (from, to) in files {
        let from = host.shared(from)?;
        script += &format!("install -D {from} {folder}/{to}\n");
    }
    host.ok(&Command::script(script))?;
    Ok(folder)
}

/// Waits for text in the file that has a container's console.
fn expect_in_file(host: &Host, file: &str, text: &str) -> Result<()> {
    let script = r#"until grep -q "$2" "$1"; do sleep 0.2; done"#;
    let wait = Command::new("bash").args(["-c", script, "wait", file, text]);
    host.run_for(&wait, Limit::Boot)?.expect_code(0)?;
    Ok(())
}

fn lives_and_ends(host: &Host, which: Containerd) -> Result<()> {
    let mut node = Node::start(host, which)?;
    let disk = image(Image::Mini)?.mini_qcow2();
    node.import(&folder(host, &[(&disk, "disk/mini.qcow2")])?, MINI)?;
    let console = host.path("console");
    let log = format!("file://{console}");
    let options = ["--detach", "--log-uri", &log];
    host.ok(&node.ctr_run(&[&options[..], &MEMORY].concat(), MINI, "vm"))?;
    expect_in_file(host, &console, "MINI-READY")?;
    ensure!(node.state("vm")? == "RUNNING");
    host.ok(&node.ctr(["tasks", "pause", "vm"]))?;
    ensure!(node.state("vm")? == "PAUSED");
    host.ok(&node.ctr(["tasks", "resume", "vm"]))?;
    let metrics = host.ok(&node.ctr(["tasks", "metrics", "vm"]))?;
    ensure!(metrics.contains("memory.usage"), "Metrics: {metrics}");

    node.restart()?;
    ensure!(node.state("vm")? == "RUNNING");
    host.ok(&node.ctr(["tasks", "kill", "--signal", "SIGKILL", "vm"]))?;
    let end = node.end("vm")?;
    ensure!(end.stderr.contains("exit code 137"), "Its end: {end:?}");
    host.ok(&node.ctr(["containers", "rm", "vm"]))?;
    node.expect_clean()
}

#[test]
fn a_kernel_in_an_image_runs_and_powers_off() -> Result<()> {
    as_root(|host| {
        let node = Node::start(host, Containerd::Current)?;
        let images = image(Image::Kernel)?;
        let files = [
            (&*images.vmlinuz(), "boot/vmlinuz"),
            (&*images.initrd(), "boot/initrd"),
        ];
        node.import(&folder(host, &files)?, KERNEL)?;
        let annotations = [
            "edgevmm.io/kernel=/boot/vmlinuz",
            "edgevmm.io/initrd=/boot/initrd",
            "edgevmm.io/cmdline=console=ttyS0 quiet",
        ];
        let options = annotations.map(|it| ["--annotation", it]).concat();
        let run = node.ctr_run(&[&["--rm"], &options[..], &MEMORY].concat(), KERNEL, "vm");
        let said = host.ok(&run)?;
        ensure!(said.contains("INIT-FIRST-LINE"), "The console: {said}");
        node.expect_clean()
    })
}

#[test]
fn a_container_is_a_machine() -> Result<()> {
    as_root(|host| lives_and_ends(host, Containerd::Current))
}

#[test]
fn a_container_is_a_machine_under_older_and_newer_containerds() -> Result<()> {
    as_root(|host| {
        lives_and_ends(host, Containerd::Old)?;
        lives_and_ends(host, Containerd::New)
    })
}

#[test]
fn what_cannot_be_a_machine_is_refused_with_a_reason() -> Result<()> {
    as_root(|host| {
        let node = Node::start(host, Containerd::Current)?;
        let refused = |options: &[&str], reason: &str| {
            let output = host.run(&node.ctr_run(options, MINI, "vm"))?;
            ensure!(output.code != 0, "It is not refused");
            ensure!(
                output.stderr.contains(reason),
                "Refused as: {}",
                output.stderr
            );
            host.ok(&node.ctr(["containers", "rm", "vm"]))?;
            node.expect_clean()
        };
        let disk = image(Image::Mini)?.mini_qcow2();
        node.import(&folder(host, &[(&disk, "elsewhere/a.qcow2")])?, MINI)?;
        refused(&[], "no disk")?;
        let two = [(&*disk, "disk/a.qcow2"), (&*disk, "disk/b.qcow2")];
        node.import(&folder(host, &two)?, MINI)?;
        refused(&[], "b.qcow2")?;
        refused(
            &["--annotation", "edgevmm.io/colour=red"],
            "edgevmm.io/colour",
        )
    })
}
