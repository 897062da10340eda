//! Guests without virtio drivers: on SATA disks, and from CD-ROM drives.

use anyhow::{Result, ensure};
use edgevmm_e2e::{Command, Guest, Host, Image, Limit, SMALL, image, on_host};

fn power_off(guest: Guest<'_>) -> Result<()> {
    guest.type_in("sync; poweroff -f\n")?;
    guest.end(Limit::Boot)?.expect_code(0)?;
    Ok(())
}

fn words(text: &str) -> impl Iterator<Item = String> {
    text.split(' ').map(str::to_owned)
}

/// SeaBIOS, GRUB, a stock kernel whose initial RAM disk has no virtio drivers, and a shell, all
/// from a SATA disk. What is written there is there afterwards.
#[test]
fn a_stock_kernel_boots_from_a_sata_disk() -> Result<()> {
    let images = image(Image::Sata)?;
    on_host(|host| {
        let disk = host.copy(&images.sata("sata.raw"), "sata.raw")?;
        let arguments = ["run".to_owned(), "--disk".to_owned()].into_iter();
        let arguments = arguments.chain([format!("{disk},bus=sata,serial=legacy-1")]);
        let mut guest = Guest::start(host, arguments.chain(SMALL.map(String::from)))?;
        let report = guest.expect_mini()?;
        ensure!(
            report.contains("boots=1 ") && report.contains("root=/dev/sda1"),
            "{report}"
        );
        ensure!(
            guest
                .sh("ls /sys/bus/virtio/drivers 2>&-; true")?
                .is_empty()
        );
        ensure!(guest.sh("cat /sys/block/sda/device/queue_depth")? == "32");
        let link = guest.sh("dmesg | grep -c 'SATA link up 3.0 Gbps'")?;
        ensure!(link == "1", "{link}");
        let write = "dd if=/dev/urandom of=/root/data bs=1M count=8 2>&- && sync && \
                     echo 3 > /proc/sys/vm/drop_caches && sha256sum < /root/data";
        let hash = guest.sh(write)?;
        let errors = guest.sh("dmesg | grep -cE 'exception|failed command|I/O error'; true")?;
        ensure!(errors == "0", "{}", guest.sh("dmesg | grep ata")?);
        guest.type_in("sync; reboot -f\n")?;
        let report = guest.expect_mini()?;
        ensure!(report.contains("boots=2 "), "{report}");
        guest.sh("mount -o remount,ro /")?;
        power_off(guest)?;
        let root = format!("{disk}?offset=1048576");
        host.ok(&Command::script(format!("e2fsck -fn '{root}'")))?;
        let read = format!("debugfs -R 'cat /root/data' '{root}' | sha256sum");
        ensure!(host.ok(&Command::script(read))? == hash, "Other data");
        Ok(())
    })
}

fn media(host: &Host, rest: &str) -> Command {
    host.edgevmm(words("media vm cdrom0").chain(words(rest)))
}

/// A disc is read as it is; another takes its place while the guest runs; what the guest uses is
/// not taken from it but by force.
#[test]
fn discs_are_read_and_changed() -> Result<()> {
    let images = image(Image::Sata)?;
    on_host(|host| {
        host.ok(&Command::script(
            "head -c 9M /dev/urandom > a.iso; head -c 3M /dev/urandom > b.iso",
        ))?;
        let hashes = [host.sha256("a.iso")?, host.sha256("b.iso")?];
        let arguments = words("run --name vm --kernel").chain([
            host.shared(&images.sata("vmlinuz"))?,
            "--initrd".to_owned(),
            host.shared(&images.sata("initrd"))?,
            "--cmdline".to_owned(),
            "console=ttyS0 quiet edgevmm.shell".to_owned(),
        ]);
        let arguments = arguments.chain(words("--cdrom a.iso --cdrom none"));
        let mut guest = Guest::start(host, arguments.chain(SMALL.map(String::from)))?;
        guest.expect_shell()?;
        let read = "sha256sum < /dev/sr0";
        ensure!(guest.sh(read)?.starts_with(&hashes[0]), "Other data");
        let (code, said) = guest.run("dd if=/dev/sr1 count=1")?;
        ensure!(code != 0 && said.contains("No medium"), "{said}");

        host.ok(&media(host, "b.iso"))?;
        ensure!(guest.sh(read)?.starts_with(&hashes[1]), "Other data");
        ensure!(guest.sh("blockdev --getsize64 /dev/sr0")? == "3145728");

        // Whoever has it open keeps it.
        guest.sh("exec 3< /dev/sr0")?;
        let refused = host.run(&media(host, "--eject"))?;
        ensure!(
            refused.code != 0 && refused.stderr.contains("the guest has locked the drive"),
            "{refused:?}"
        );
        host.ok(&media(host, "a.iso --force"))?;
        guest.sh("exec 3<&-")?;
        ensure!(guest.sh(read)?.starts_with(&hashes[0]), "Other data");

        host.ok(&media(host, "--eject"))?;
        let (code, said) = guest.run("dd if=/dev/sr0 count=1")?;
        ensure!(code != 0 && said.contains("No medium"), "{said}");
        host.ok(&media(host, "a.iso"))?;
        ensure!(guest.sh(read)?.starts_with(&hashes[0]), "Other data");

        let missing = host.run(&media(host, "missing.iso"))?;
        ensure!(missing.stderr.contains("does not exist"), "{missing:?}");
        power_off(guest)
    })
}

/// GRUB's rescue disc, by El Torito.
#[test]
fn a_rescue_disc_shows_its_menu() -> Result<()> {
    let images = image(Image::Sata)?;
    on_host(|host| {
        let disc = host.shared(&images.sata("grub-rescue.iso"))?;
        let arguments = words("run --firmware bios --cdrom").chain([disc]);
        let mut guest = Guest::start(host, arguments.chain(SMALL.map(String::from)))?;
        guest.expect("GNU GRUB", Limit::Boot)?;
        guest.expect("executed automatically", Limit::Boot)?;
        Ok(())
    })
}

/// The distribution's installer, as a network would start it.
#[test]
fn an_installer_asks_its_first_question() -> Result<()> {
    let images = image(Image::Sata)?;
    on_host(|host| {
        let disk = host.shared(&images.sata("installer.raw"))?;
        let read = |file: &str| format!("debugfs -R 'dump /{file} {file}' '{disk}?offset=1048576'");
        host.ok(&Command::script(read("linux")))?;
        host.ok(&Command::script(read("initrd.gz")))?;
        let arguments = words("run --cpus 1 --memory 1G --net none --kernel linux");
        let arguments = arguments.chain(words("--initrd initrd.gz --cmdline"));
        let cmdline = "console=ttyS0 quiet TERM=vt102".to_owned();
        let mut guest = Guest::start(host, arguments.chain([cmdline]))?;
        guest.expect("Select a language", Limit::Distribution)?;
        Ok(())
    })
}
