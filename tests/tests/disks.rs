//! Small disks: booted by firmware, written, reset, and left as they are.

use anyhow::{Result, ensure};
use edgevmm_e2e::{Command, Guest, Host, Image, Limit, SMALL, image, on_host};

fn power_off(guest: Guest<'_>) -> Result<()> {
    guest.type_in("sync; poweroff -f\n")?;
    guest.end(Limit::Boot)?.expect_code(0)?;
    Ok(())
}

fn start<'h>(host: &'h Host, disks: &[&str]) -> Result<Guest<'h>> {
    Guest::start(host, ["run"].iter().chain(&SMALL).chain(disks).copied())
}

/// SeaBIOS, GRUB, the kernel and a shell from an MBR disk; a reboot inside the same process; then
/// once more with `--snapshot`, where the guest sees its writes and the image does not.
#[test]
fn writes_last_over_resets_but_not_over_snapshots() -> Result<()> {
    let images = image(Image::Mini)?;
    on_host(|host| {
        let disk = host.copy(&images.mini_qcow2(), "mini.qcow2")?;
        let mut guest = start(host, &[&disk])?;
        let report = guest.expect_mini()?;
        ensure!(
            report.contains("boots=1 ") && report.contains("fw=bios"),
            "{report}"
        );
        let hash = guest
            .sh("dd if=/dev/urandom of=/root/data bs=1M count=4 2>&- && sha256sum < /root/data")?;
        guest.type_in("sync; reboot -f\n")?;
        let report = guest.expect_mini()?;
        ensure!(report.contains("boots=2 "), "{report}");
        ensure!(
            guest.sh("sha256sum < /root/data")? == hash,
            "Other data after the reset"
        );
        power_off(guest)?;
        host.ok(&Command::new("qemu-img").args(["check", &disk]))?;

        let before = host.sha256(&disk)?;
        let mut guest = start(host, &["--snapshot", &disk])?;
        let report = guest.expect_mini()?;
        ensure!(report.contains("boots=3 "), "{report}");
        ensure!(
            guest.sh("sha256sum < /root/data")? == hash,
            "Other data in the snapshot"
        );
        guest
            .sh("dd if=/dev/urandom of=/root/data bs=1M count=8 conv=fsync && echo 3 > /proc/sys/vm/drop_caches")?;
        let changed = guest.sh("sha256sum < /root/data")?;
        ensure!(changed != hash, "The guest's write had no effect");
        power_off(guest)?;
        ensure!(
            host.sha256(&disk)? == before,
            "--snapshot changed the image"
        );
        Ok(())
    })
}

/// A second disk, raw and read-only, is found by its serial number and refuses writes; a third,
/// an overlay on a backing file that was named, takes writes and leaves its backing alone.
#[test]
fn data_disks_are_told_apart() -> Result<()> {
    let images = image(Image::Mini)?;
    on_host(|host| {
        let base = host.copy(&images.mini_raw(), "base.raw")?;
        let overlay = host.path("overlay.qcow2");
        let create = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]);
        host.ok(&create.args(["-F", "raw", "-b", &base, &overlay]))?;
        let data = host.path("data.raw");
        host.ok(&Command::script(
            "head -c 1M /dev/urandom > data.raw; truncate -s 8M data.raw",
        ))?;
        let (base_hash, data_hash) = (host.sha256(&base)?, host.sha256(&data)?);

        let disks = [
            format!("{data},ro,serial=cold-store"),
            format!("{overlay},backing={base}"),
        ];
        let arguments = Guest::shell_arguments(host, "")?.into_iter();
        let arguments = arguments.chain(SMALL.map(String::from));
        let disks = disks
            .into_iter()
            .flat_map(|disk| ["--disk".to_owned(), disk]);
        let mut guest = Guest::start(host, arguments.chain(disks))?;
        guest.expect_shell()?;
        ensure!(guest.sh("cat /sys/block/vda/serial")? == "cold-store");
        ensure!(
            guest
                .sh("cat /sys/block/vda/ro /sys/block/vdb/ro")?
                .replace('\n', "")
                == "10"
        );
        ensure!(guest.sh("sha256sum < /dev/vda")?.starts_with(&data_hash));
        ensure!(guest.sh("sha256sum < /dev/vdb")?.starts_with(&base_hash));
        let (code, said) = guest.run("dd if=/dev/zero of=/dev/vda count=1 conv=fsync")?;
        ensure!(code != 0, "A read-only disk was written: {said}");
        guest.sh("mkdir -p /mnt && mount -t ext4 /dev/vdb1 /mnt && echo new > /mnt/root/new")?;
        guest.sh("umount /mnt")?;
        power_off(guest)?;

        ensure!(host.sha256(&data)? == data_hash, "A read-only disk changed");
        ensure!(host.sha256(&base)? == base_hash, "A backing file changed");
        host.ok(&Command::new("qemu-img").args(["check", &overlay]))?;
        // The partition begins after the first MiB.
        let read = "qemu-img convert -O raw overlay.qcow2 merged.raw; \
                    debugfs -R 'cat /root/new' 'merged.raw?offset=1048576'";
        ensure!(host.ok(&Command::script(read))? == "new");
        Ok(())
    })
}
