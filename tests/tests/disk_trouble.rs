//! Disks of a running machine that run full, fail, hang, are cut, grow, and are served without
//! io_uring.

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
        for (disk, size, code, word) in [
            ("disk0", "32M", 1, "smaller"),
            ("disk1", "32M", 1, "smaller"),
            ("disk2", "64M", 1, "read-only"),
            ("disk3", "64M", 2, "disk0, disk1, disk2"),
        ] {
            let refused = host.run(&host.edgevmm(["resize-disk", "vm", disk, size]))?;
            ensure!(
                refused.code == code && refused.stderr.contains(word),
                "{refused:?}"
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

/// A block device of 32 MiB that can be made to fail or to hang.
struct Faulty<'h> {
    host: &'h Host,
    name: &'static str,
}

impl<'h> Faulty<'h> {
    fn new(host: &'h Host, name: &'static str) -> Result<Self> {
        host.ok(&Command::script(format!(
            "modprobe -q dm_mod || true; truncate -s 32M {name}.store; \
             losetup -f --show {name}.store > {name}.loop; \
             echo 0 65536 linear $(cat {name}.loop) 0 | \
             dmsetup --noudevsync --noudevrules create {name}; dmsetup mknodes {name}"
        )))?;
        Ok(Self { host, name })
    }

    fn path(&self) -> String {
        format!("/dev/mapper/{}", self.name)
    }

    fn set_failing(&self, failing: bool) -> Result<()> {
        let name = self.name;
        let table = if failing {
            "echo 0 65536 error".to_owned()
        } else {
            format!("echo 0 65536 linear $(cat {name}.loop) 0")
        };
        self.set_hanging(true)?;
        let load = format!("{table} | dmsetup load {name}");
        self.host.ok(&Command::script(load))?;
        self.set_hanging(false)
    }

    fn set_hanging(&self, hanging: bool) -> Result<()> {
        let how = if hanging {
            "suspend --noflush --nolockfs"
        } else {
            "resume"
        };
        let script = format!("dmsetup --noudevsync --noudevrules {how} {}", self.name);
        self.host.ok(&Command::script(script)).map(drop)
    }
}

impl Drop for Faulty<'_> {
    fn drop(&mut self) {
        let name = self.name;
        let script = format!(
            "set +e; dmsetup resume {name}; dmsetup --noudevsync remove --force {name}; \
             losetup -d $(cat {name}.loop)"
        );
        let _ = self.host.run(&Command::script(script));
    }
}

/// Writes records one after another, each on disk before it says so.
const RECORDS: u32 = 80;
const WRITER: &str = "i=1; while [ $i -le 80 ]; do \
    yes record-$i- | head -c 4096 | \
    dd of=/dev/vda bs=4096 seek=$i conv=notrunc,fsync 2>/dev/null || echo FAILED'-'$i; \
    echo ACK'-'$i'-'; i=$((i + 1)); done; echo ALL'-'WRITTEN\n";

/// Storage fails under a guest that writes: the machine waits, and goes on when that is mended;
/// nothing that the guest knew to be on disk is lost.
#[test]
fn a_machine_waits_while_its_storage_fails() -> Result<()> {
    as_root(|host| {
        let faulty = Faulty::new(host, "direct")?;
        let mut guest = start(host, &[&format!("{},direct", faulty.path())])?;
        guest.type_in(WRITER)?;
        guest.expect("ACK-20-", Limit::Boot)?;
        faulty.set_failing(true)?;
        let reason = wait_paused(host)?;
        ensure!(reason.contains("Input/output error"), "{reason}");
        host.ok(&host.edgevmm(["resume", "vm"]))?;
        wait_paused(host)?;
        ensure!(guest.is_silent("ACK-", Duration::from_secs(2)));
        faulty.set_failing(false)?;
        host.ok(&host.edgevmm(["resume", "vm"]))?;
        guest.expect("ALL-WRITTEN", Limit::Boot)?;
        ensure!(!guest.output().contains("FAILED-"), "{}", guest.output());
        kill(host)?;
        let lost = host.ok(&Command::script(format!(
            "for i in $(seq {RECORDS}); do \
             record=$(dd if={} bs=4096 skip=$i count=1 2>/dev/null); \
             [ \"$record\" = \"$(yes record-$i- | head -c 4096)\" ] || echo lost $i; done",
            faulty.path()
        )))?;
        ensure!(lost.is_empty(), "{lost}");
        Ok(())
    })
}

/// With the page cache, Linux forgets data that it could not write. A guest that waits for it is
/// never told that it is safe. Another one asked to be told.
#[test]
fn a_machine_is_never_told_that_lost_data_is_safe() -> Result<()> {
    as_root(|host| {
        let (cached, told) = (Faulty::new(host, "cached")?, Faulty::new(host, "told")?);
        let report = format!("{},error_policy=report", told.path());
        let mut guest = start(host, &[&cached.path(), &report])?;
        let write = |disk| format!("dd if=/dev/zero of=/dev/{disk} bs=64k count=8 conv=fsync");
        told.set_failing(true)?;
        let (code, said) = guest.run(&write("vdb"))?;
        ensure!(code != 0, "The guest was not told: {said}");
        ensure!(inspect(host)?["state"] == "running");
        cached.set_failing(true)?;
        guest.type_in(&format!("{} && echo SAFE-$((1+1))\n", write("vda")))?;
        let reason = wait_paused(host)?;
        ensure!(reason.contains("Input/output error"), "{reason}");
        cached.set_failing(false)?;
        host.ok(&host.edgevmm(["resume", "vm"]))?;
        let reason = wait_paused(host)?;
        ensure!(reason.contains("earlier flush failed"), "{reason}");
        ensure!(guest.is_silent("SAFE-2", Duration::from_secs(1)));
        kill(host)
    })
}

/// While storage hangs, the machine answers, and is gone once it can be.
#[test]
fn a_machine_answers_while_its_storage_hangs() -> Result<()> {
    as_root(|host| {
        let faulty = Faulty::new(host, "slow")?;
        let guest = start(host, &[&format!("{},direct", faulty.path())])?;
        faulty.set_hanging(true)?;
        guest.type_in("dd if=/dev/zero of=/dev/vda bs=64k count=8 conv=fsync; echo D'-'E\n")?;
        ensure!(guest.is_silent("D-E", Duration::from_secs(3)));
        ensure!(inspect(host)?["state"] == "running");
        // The guest's other devices go on.
        guest.type_in("\n")?;
        let kill = host.spawn(&host.edgevmm(["kill", "vm"]))?;
        let stopping = Command::script("until \"$@\" | grep stopping; do sleep 0.1; done");
        let ps = stopping.args(["sh"]).wrapping(&host.edgevmm(["ps"]));
        host.ok(&ps)?;
        ensure!(inspect(host)?["state"] == "stopping");
        faulty.set_hanging(false)?;
        kill.wait(host.limit(Limit::Command))?.expect_code(0)?;
        Ok(())
    })
}

/// Somebody cuts the files of a running machine: it waits rather than read zeroes, until what is
/// missing is put back.
#[test]
fn a_machine_waits_while_its_images_are_cut() -> Result<()> {
    on_host(|host| {
        host.ok(&Command::script(
            "head -c 16M /dev/urandom > raw; qemu-img convert -f raw -O qcow2 raw qcow2; \
             sha256sum raw > sum; cp raw raw.copy; cp qcow2 qcow2.copy",
        ))?;
        let disks = [
            format!("{},format=raw", host.path("raw")),
            host.path("qcow2"),
        ];
        let mut guest = start(host, &disks.each_ref().map(String::as_str))?;
        for (disk, name) in [("vda", "raw"), ("vdb", "qcow2")] {
            let cut = format!("truncate -s 9M {name}");
            host.ok(&Command::script(cut))?;
            guest.sh(&format!("head -c 8388608 /dev/{disk} > /dev/null"))?;
            guest.type_in(&format!("sha256sum < /dev/{disk}; echo READ-$((1+1))\n"))?;
            let reason = wait_paused(host)?;
            ensure!(reason.contains("was cut to 9437184 bytes"), "{reason}");
            host.ok(&host.edgevmm(["resume", "vm"]))?;
            wait_paused(host)?;
            host.ok(&Command::script(format!("cp {name}.copy {name}")))?;
            host.ok(&host.edgevmm(["resume", "vm"]))?;
            let said = guest.expect("READ-2", Limit::Boot)?;
            let sum = host.ok(&Command::script("cut -d ' ' -f 1 sum"))?;
            ensure!(said.contains(sum.trim()), "{said}");
        }
        kill(host)
    })
}

/// Storage that can't be written: a machine that wants to is refused at its start, and nothing has
/// changed.
#[test]
fn disks_that_cannot_be_written_are_refused() -> Result<()> {
    as_root(|host| {
        host.ok(&Command::script(
            "mkdir ro; mount -t tmpfs none ro; truncate -s 16M ro/raw; \
             qemu-img create -q -f qcow2 ro/qcow2 16M; mount -o remount,ro ro; \
             truncate -s 16M store; losetup -r -f --show store > loop; sha256sum ro/* store > sums",
        ))?;
        let device = host.ok(&Command::script("cat loop"))?;
        for disk in [&host.path("ro/raw"), &host.path("ro/qcow2"), device.trim()] {
            let mut arguments = Guest::shell_arguments(host, "")?;
            arguments.extend(["--disk".to_owned(), disk.to_owned()]);
            let refused = host.run(&host.edgevmm(arguments))?;
            ensure!(
                refused.code == 1
                    && refused.stderr.contains(disk)
                    && refused.stderr.contains("open it read-only"),
                "{}",
                refused.stderr
            );
        }
        let disks = [host.path("ro/raw"), host.path("ro/qcow2")].map(|it| format!("{it},ro"));
        let mut guest = start(host, &disks.each_ref().map(String::as_str))?;
        guest.sh("cmp -n 16777216 /dev/vda /dev/zero; cmp -n 16777216 /dev/vdb /dev/zero")?;
        kill(host)?;
        let script = "sha256sum -c --quiet sums; losetup -d $(cat loop); umount ro";
        host.ok(&Command::script(script)).map(drop)
    })
}

/// A guest sees the large sectors that a disk was made with, and finds and writes its partitions.
#[test]
fn a_disk_of_large_sectors_keeps_them() -> Result<()> {
    on_host(|host| {
        // QEMU makes none; the item "logical sector size" is told by its GUID.
        host.ok(&Command::script(
            r"truncate -s 32M raw; printf record | dd of=raw bs=4096 seek=7 conv=notrunc 2>/dev/null; \
             qemu-img convert -O vhdx raw disk.vhdx; \
             find() { LC_ALL=C grep -obUaP -m1 $1 disk.vhdx | head -n 1 | cut -d : -f 1; }; \
             region=$(find metadata); item=$(find '\x1d\xbf\x41\x81\x6f\xa9\x09\x47'); \
             at=$(od -An -tu4 -j $((item + 16)) -N 4 disk.vhdx | tr -d ' '); \
             printf '\0\20\0\0' | dd of=disk.vhdx bs=1 seek=$((region + at)) conv=notrunc",
        ))?;
        let overlay = host.path("overlay.qcow2");
        let disk = format!("{},overlay={overlay}", host.path("disk.vhdx"));
        let mut guest = start(host, &[&disk])?;
        let size = guest.sh("cat /sys/block/vda/queue/logical_block_size")?;
        ensure!(size == "4096", "{size}");
        guest.sh(
            "[ \"$(dd if=/dev/vda bs=4096 skip=7 count=1 | head -c 6)\" = record ]; \
             head -c 1048576 /dev/urandom > /data; dd if=/data of=/dev/vda bs=64k seek=9 conv=fsync; \
             echo 3 > /proc/sys/vm/drop_caches; \
             dd if=/dev/vda bs=64k skip=9 count=16 | cmp - /data",
        )?;
        kill(host)
    })
}
