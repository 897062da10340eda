//! Disks of a running machine that run full, fail, grow, and are served without io_uring.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use edgevmm_e2e::{Command, Guest, Host, Limit, SMALL, as_root, on_host};
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// Starts a machine in the background, with a shell and these disks.
fn start<'h>(host: &'h Host, disks: &[&str]) -> Result<Guest<'h>> {
    let arguments = Guest::shell_arguments(host, "")?.into_iter();
    let arguments = arguments.chain(SMALL.map(String::from));
    let arguments = arguments.chain(["--detach", "--name", "vm"].map(String::from));
    let disks = disks
        .iter()
        .flat_map(|disk| ["--disk".to_owned(), (*disk).to_owned()]);
    host.ok(&host.edgevmm(arguments.chain(disks)))?;
    let mut guest = Guest::start(host, ["console", "vm"])?;
    guest.expect_shell()?;
    Ok(guest)
}

fn inspect(host: &Host) -> Result<Value> {
    let said = host.ok(&host.edgevmm(["inspect", "--json", "vm"]))?;
    Ok(serde_json::from_str(&said)?)
}

/// Waits until the machine is paused, and gives the reason.
fn wait_paused(host: &Host) -> Result<String> {
    for _ in 0..600 {
        let machine = inspect(host)?;
        if machine["state"] == "paused" {
            let reason = machine["reason"].as_str();
            return Ok(reason.context("It is paused for no reason")?.to_owned());
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    anyhow::bail!("The machine was not paused")
}

fn kill(host: &Host) -> Result<()> {
    host.ok(&host.edgevmm(["kill", "vm"]))?;
    host.ok(&host.edgevmm(["rm", "vm"])).map(drop)
}

/// The host's storage runs full amid a guest's writes: the machine waits, tells why, waits again
/// when nothing was mended, and goes on once there is space. Nothing is lost on the way.
#[test]
fn a_machine_waits_while_the_hosts_storage_is_full() -> Result<()> {
    as_root(|host| {
        host.ok(&Command::script(
            "mkdir full; mount -t tmpfs -o size=12M none full; truncate -s 64M full/raw; \
             qemu-img create -q -f qcow2 full/qcow2 64M",
        ))?;
        let disks = ["raw", "qcow2"].map(|name| host.path(&format!("full/{name}")));
        let mut guest = start(host, &disks.each_ref().map(String::as_str))?;
        for disk in ["vda", "vdb"] {
            guest.sh("head -c 16777216 /dev/urandom > /data")?;
            guest.type_in(&format!(
                "dd if=/data of=/dev/{disk} bs=64k conv=fsync && echo WRITTEN-$((1+1))\n"
            ))?;
            let reason = wait_paused(host)?;
            ensure!(reason.contains("No space left on device"), "{reason}");
            let list = host.ok(&host.edgevmm(["ps"]))?;
            ensure!(list.contains("No space left on device"), "{list}");
            // Nothing was mended yet.
            host.ok(&host.edgevmm(["resume", "vm"]))?;
            wait_paused(host)?;
            ensure!(
                guest.is_silent("WRITTEN-2", Duration::from_secs(2)),
                "A guest was told that its data is written, and it is not"
            );
            guest.skip();
            let size = if disk == "vda" { 24 } else { 80 };
            let remount = format!("mount -o remount,size={size}M full");
            host.ok(&Command::script(remount))?;
            host.ok(&host.edgevmm(["resume", "vm"]))?;
            guest.expect("WRITTEN-2", Limit::Boot)?;
            ensure!(inspect(host)?["reason"].is_null());
            guest.sh(&format!(
                "echo 3 > /proc/sys/vm/drop_caches; head -c 16777216 /dev/{disk} | cmp - /data"
            ))?;
        }
        kill(host)?;
        host.ok(&Command::new("qemu-img").args(["check", &disks[1]]))?;
        host.ok(&Command::script("umount full")).map(drop)
    })
}

/// Other policies: the guest is told, or told that all is well.
#[test]
fn other_policies_leave_the_machine_running() -> Result<()> {
    as_root(|host| {
        host.ok(&Command::script(
            "mkdir full; mount -t tmpfs -o size=4M none full; truncate -s 32M full/a full/b",
        ))?;
        let disks = [("a", "report"), ("b", "ignore")].map(|(name, policy)| {
            format!(
                "{},error_policy={policy}",
                host.path(&format!("full/{name}"))
            )
        });
        let mut guest = start(host, &disks.each_ref().map(String::as_str))?;
        let write = |disk| format!("dd if=/dev/zero of=/dev/{disk} bs=64k count=128 conv=fsync");
        let (code, said) = guest.run(&write("vda"))?;
        ensure!(code != 0, "The guest was not told: {said}");
        guest.sh(&write("vdb"))?;
        ensure!(inspect(host)?["state"] == "running");
        kill(host)?;
        host.ok(&Command::script("umount full")).map(drop)
    })
}

/// Disks of both formats grow under a running guest, which sees it and uses the new part.
#[test]
fn disks_grow_under_a_running_guest() -> Result<()> {
    on_host(|host| {
        host.ok(&Command::script(
            "truncate -s 8M raw; qemu-img create -q -f qcow2 qcow2 8M; truncate -s 8M fixed",
        ))?;
        let path = |name: &str| host.path(name);
        let fixed = format!("{},ro", path("fixed"));
        let mut guest = start(host, &[&path("raw"), &path("qcow2"), &fixed])?;
        for (disk, name) in [("disk0", "vda"), ("disk1", "vdb")] {
            host.ok(&host.edgevmm(["resize-disk", "vm", disk, "64M"]))?;
            // The guest's driver takes note when it comes to it.
            guest.sh(&format!(
                "until [ $(cat /sys/block/{name}/size) = {} ]; do usleep 100000; done",
                64 * MIB / 512
            ))?;
            guest.sh(&format!(
                "head -c 1048576 /dev/urandom > /data; dd if=/data of=/dev/{name} bs=1M seek=63 \
                 conv=fsync; echo 3 > /proc/sys/vm/drop_caches; \
                 dd if=/dev/{name} bs=1M skip=63 | cmp - /data"
            ))?;
        }
        for (disk, size, word) in [
            ("disk0", "32M", "smaller"),
            ("disk1", "32M", "smaller"),
            ("disk2", "64M", "read-only"),
            ("disk3", "64M", "disk0, disk1, disk2"),
        ] {
            let refused = host.run(&host.edgevmm(["resize-disk", "vm", disk, size]))?;
            ensure!(
                refused.code == 1 && refused.stderr.contains(word),
                "{}",
                refused.stderr
            );
        }
        kill(host)?;
        let sizes = "stat -c %s raw; qemu-img check -q qcow2; \
                     qemu-img info --output=json qcow2 | grep virtual-size";
        let said = host.ok(&Command::script(sizes))?;
        ensure!(said.matches(&(64 * MIB).to_string()).count() == 2, "{said}");
        Ok(())
    })
}

/// Where the host forbids io_uring, disks do without, unless it was asked for.
#[test]
fn disks_do_without_io_uring() -> Result<()> {
    as_root(|host| {
        host.ok(&Command::script("truncate -s 16M raw"))?;
        let forbid = |value: u8| {
            let script = format!("echo {value} > /proc/sys/kernel/io_uring_disabled");
            host.ok(&Command::script(script)).map(drop)
        };
        forbid(2)?;
        let raw = host.path("raw");
        let asked = format!("{raw},aio=io_uring");
        let arguments = ["run", "--dry-run", "--disk", &asked];
        ensure!(host.run(&host.edgevmm(arguments))?.code == 0);
        let mut arguments = Guest::shell_arguments(host, "")?;
        arguments.extend(["--disk".to_owned(), asked]);
        let refused = host.run(&host.edgevmm(arguments))?;
        ensure!(
            refused.code == 1 && refused.stderr.contains("io_uring_disabled"),
            "{}",
            refused.stderr
        );
        let mut guest = start(host, &[&format!("{raw},direct")])?;
        guest.sh(
            "head -c 8388608 /dev/urandom > /data; dd if=/data of=/dev/vda bs=64k conv=fsync; \
             echo 3 > /proc/sys/vm/drop_caches; head -c 8388608 /dev/vda | cmp - /data",
        )?;
        let log = host.ok(&host.edgevmm(["logs", "vm"]))?;
        ensure!(log.contains("io_uring"), "{log}");
        kill(host)?;
        forbid(0)
    })
}
