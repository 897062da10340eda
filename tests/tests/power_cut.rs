//! A VMM that dies in the middle of its guest's writes: what the guest knew to be on disk is there.

use anyhow::{Context, Result, ensure};
use edgevmm_e2e::{Command, Guest, Host, Limit, SMALL, on_host};

/// SIGKILL.
const KILL: i32 = 9;

/// Writes 4 KiB records all over the disk, each on disk before the next; now and then frees a range
/// that no record is in.
const WRITER: &str = "i=1; while :; do \
    yes record-$i- | head -c 4096 | \
    dd of=/dev/vda bs=4096 seek=$((i * 3511 % 32768)) conv=notrunc,fsync 2>/dev/null && echo ACK'-'$i'-'; \
    [ $((i % 8)) = 0 ] && dd if=/dev/urandom of=/dev/vda bs=1M seek=$((128 + i % 64)) count=1 2>/dev/null \
    && blkdiscard -o $(((128 + i % 64) << 20)) -l 1M /dev/vda; \
    i=$((i + 1)); done\n";

/// Fails unless every record up to `last` is in the image.
fn check(host: &Host, image: &str, last: u32) -> Result<()> {
    host.ok(&Command::new("qemu-img").args(["convert", "-O", "raw", image, "flat.raw"]))?;
    let read = format!(
        "for i in $(seq {last}); do \
         record=$(dd if=flat.raw bs=4096 skip=$((i * 3511 % 32768)) count=1 2>/dev/null); \
         [ \"$record\" = \"$(yes record-$i- | head -c 4096)\" ] || echo lost $i; done"
    );
    let lost = host.ok(&Command::script(read))?;
    ensure!(lost.is_empty(), "{image}, after {last} records: {lost}");
    // Leaks (3) are allowed after a power cut, errors (2) are not.
    let check = host.run(&Command::new("qemu-img").args(["check", image]))?;
    ensure!([0, 3].contains(&check.code), "{}", check.stdout);
    Ok(())
}

/// The number of the newest record that the guest knows to be on disk.
fn newest(console: &str) -> Option<u32> {
    let (_, after) = console.rsplit_once("ACK-")?;
    after.split_once('-')?.0.parse().ok()
}

#[test]
fn nothing_flushed_is_lost_when_the_vmm_is_killed() -> Result<()> {
    on_host(|host| {
        for (round, options) in [
            "compat=0.10",
            "compat=1.1",
            "cluster_size=4096,refcount_bits=1",
            "lazy_refcounts=on,cluster_size=2M",
        ]
        .into_iter()
        .enumerate()
        {
            let image = host.path(&format!("{round}.qcow2"));
            let create = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", "-o"]);
            host.ok(&create.args([options, &*image, "256M"]))?;
            // Twice over the same image: the second life begins with what the first one left.
            for records in [11, 23] {
                let mut arguments = Guest::shell_arguments(host, "")?;
                arguments.extend(SMALL.map(String::from));
                arguments.extend(["--disk".to_owned(), image.clone()]);
                let mut guest = Guest::start(host, arguments)?;
                guest.expect_shell()?;
                guest.type_in(WRITER)?;
                guest.expect(&format!("ACK-{}-", records + 3 * round), Limit::Boot)?;
                guest.signal(KILL)?;
                let console = guest.end(Limit::Command)?.stdout;
                let last = newest(&console).context("The guest wrote nothing")?;
                check(host, &image, last)?;
            }
        }
        Ok(())
    })
}
