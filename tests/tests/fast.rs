//! The project's own boot firmware: what the guest's disk says now is what boots, and what it does
//! not understand is left to SeaBIOS.

use anyhow::{Result, ensure};
use edgevmm_e2e::{Command, Guest, Host, Image, Limit, SMALL, as_root, image, on_host};

/// SIGINT and SIGTERM.
const INTERRUPT: i32 = 2;
const TERMINATE: i32 = 15;

/// Makes the shell of the mini disk go back to its start.
const REBOOT: &str = "sync; reboot -f\n";

/// The most that the firmware may take of a package.
const FIRMWARE_MAX: u64 = 200 << 10;

/// Boots the mini disk from a copy of its own.
fn mini<'h>(host: &'h Host, firmware: &str) -> Result<Guest<'h>> {
    let disk = host.copy(&image(Image::Mini)?.mini_raw(), "mini.raw")?;
    let arguments = ["run", "--firmware", firmware].into_iter().chain(SMALL);
    Guest::start(host, arguments.chain([disk.as_str()]))
}

/// What the kernel was started with.
fn command_line(guest: &mut Guest<'_>) -> Result<String> {
    guest.sh("cat /proc/cmdline")
}

#[test]
fn what_the_guest_has_changed_is_what_boots_next() -> Result<()> {
    on_host(|host| {
        let mut guest = mini(host, "fast")?;
        guest.expect_mini()?;
        let first = command_line(&mut guest)?;
        ensure!(
            first.starts_with("BOOT_IMAGE=/boot/vmlinuz root="),
            "{first}"
        );
        guest.sh("mv /boot/vmlinuz /boot/newer && \
             sed -i 's,/boot/vmlinuz,/boot/newer,; s,quiet,quiet newer=yes,' /boot/grub/grub.cfg")?;
        guest.type_in(REBOOT)?;
        guest.expect_mini()?;
        let second = command_line(&mut guest)?;
        ensure!(
            second.starts_with("BOOT_IMAGE=/boot/newer root="),
            "{second}"
        );
        ensure!(second.contains(" newer=yes "), "{second}");
        // Neither BIOS nor boot loader has said a word.
        let output = guest.output();
        ensure!(
            !output.contains("SeaBIOS") && !output.contains("GRUB"),
            "{output}"
        );
        guest.type_in("poweroff -f\n")?;
        guest.end(Limit::Boot)?.expect_code(0)?;
        Ok(())
    })
}

#[test]
fn what_is_not_understood_is_left_to_the_bios_until_it_is_gone() -> Result<()> {
    on_host(|host| {
        let mut guest = mini(host, "fast")?;
        guest.expect_mini()?;
        guest.sh("sed -i '1i for x in 1; do true; done' /boot/grub/grub.cfg")?;
        guest.skip();
        guest.type_in(REBOOT)?;
        let before = guest.expect("MINI-READY", Limit::Boot)?;
        ensure!(before.contains("SeaBIOS"), "{before}");
        guest.expect("# ", Limit::Command)?;
        // GRUB passes the kernel the same line.
        let by_grub = command_line(&mut guest)?;
        ensure!(
            by_grub.starts_with("BOOT_IMAGE=/boot/vmlinuz root="),
            "{by_grub}"
        );
        guest.sh("sed -i 1d /boot/grub/grub.cfg")?;
        guest.skip();
        guest.type_in(REBOOT)?;
        let before = guest.expect("MINI-READY", Limit::Boot)?;
        ensure!(!before.contains("SeaBIOS"), "{before}");
        guest.expect("# ", Limit::Command)?;
        guest.type_in("poweroff -f\n")?;
        let output = guest.end(Limit::Boot)?;
        ensure!(
            output
                .stderr
                .contains("leaves the disk to `bios`: GRUB's configuration has a loop"),
            "{}",
            output.stderr
        );
        Ok(())
    })
}

/// Exits of the only guest until its shell, by KVM's count.
fn exits(host: &Host, firmware: &str) -> Result<u64> {
    let mut guest = mini(host, firmware)?;
    guest.expect_mini()?;
    let count = host.ok(&Command::script("cat /sys/kernel/debug/kvm/*/exits"))?;
    guest.type_in("poweroff -f\n")?;
    guest.end(Limit::Boot)?.expect_code(0)?;
    Ok(count.trim().parse()?)
}

#[test]
fn it_is_small_and_takes_few_exits() -> Result<()> {
    as_root(|host| {
        let len = host.ok(&Command::new("stat").args(["-c", "%s", &host.fast_firmware()]))?;
        ensure!(len.trim().parse::<u64>()? < FIRMWARE_MAX, "{len} bytes");
        let (fast, bios) = (exits(host, "fast")?, exits(host, "bios")?);
        ensure!(fast * 10 < bios * 4, "{fast} exits, and {bios} by SeaBIOS");
        Ok(())
    })
}

#[test]
fn a_hostile_disk_is_left_to_the_bios() -> Result<()> {
    on_host(|host| {
        let mini = image(Image::Mini)?.mini_raw();
        for (name, damage, reason) in [
            // Groups of no inodes.
            (
                "ext4",
                "dd if=/dev/zero of=DISK bs=4 seek=262410 count=1 conv=notrunc",
                "superblock",
            ),
            // All that says what is where.
            (
                "blank",
                "dd if=/dev/zero of=DISK bs=1M count=2 conv=notrunc",
                "unknown",
            ),
        ] {
            let disk = host.copy(&mini, &format!("{name}.raw"))?;
            host.ok(&Command::script(damage.replace("DISK", &disk)))?;
            let arguments = ["run", "--firmware", "fast"].into_iter().chain(SMALL);
            let mut guest = Guest::start(host, arguments.chain([disk.as_str()]))?;
            guest.expect("SeaBIOS", Limit::Boot)?;
            // A button that nobody reads, then force.
            guest.signal(TERMINATE)?;
            guest.signal(INTERRUPT)?;
            let output = guest.end(Limit::Boot)?;
            ensure!(
                output.stderr.contains("leaves the disk to `bios`"),
                "{}",
                output.stderr
            );
            ensure!(output.stderr.contains(reason), "{}", output.stderr);
        }
        Ok(())
    })
}
