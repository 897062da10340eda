//! Which firmware starts a guest, and what it keeps.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use edgevmm_e2e::{
    Command, Guest, Host, Image, Limit, SMALL, as_root, image, on_host, on_this_machine,
};

/// SIGTERM presses the power button.
const TERMINATE: i32 = 15;
/// SIGKILL is to the VMM what a power cut is to the host.
const KILL: i32 = 9;

/// Waits until everything of the distribution is started.
fn expect_ready(guest: &mut Guest<'_>) -> Result<String> {
    guest.expect("D12-READY", Limit::Distribution)?;
    guest.expect("\n", Limit::Command)
}

/// The same disk as by BIOS, with memory above 4 GiB and two vCPUs: it starts again by a reset in
/// place, through the firmware, and heeds the power button.
#[test]
fn debian_boots_by_uefi_and_again() -> Result<()> {
    let (disk, firmware) = (image(Image::Debian12)?.debian12(), image(Image::Firmware)?);
    on_host(|host| {
        let uefi = host.shared(&firmware.cloudhv())?;
        let disk = host.copy(&disk, "disk.qcow2")?;
        let machine = ["run", "--cpus", "2", "--memory", "2900M", "--net", "none"];
        let boot = [
            "--firmware",
            "uefi",
            "--uefi",
            &uefi,
            "--stop-timeout",
            "900",
        ];
        let arguments = machine.into_iter().chain(boot).chain([disk.as_str()]);
        let mut guest = Guest::start(host, arguments)?;
        let report = expect_ready(&mut guest)?;
        ensure!(
            report.contains("fw=uefi") && report.contains("cpus=2"),
            "{report}"
        );
        guest.type_in("\n")?;
        guest.log_in("root", "root")?;
        guest.sh("dmesg -n 1; grep -q '^100000000-.* : System RAM' /proc/iomem")?;
        guest.sh("cat /sys/class/dmi/id/sys_vendor | grep -qx edgevmm")?;
        guest.type_in("systemctl reboot\n")?;
        let report = expect_ready(&mut guest)?;
        ensure!(report.contains("fw=uefi"), "{report}");
        guest.signal(TERMINATE)?;
        guest.end(Limit::Distribution)?.expect_code(0)?;
        Ok(())
    })
}

/// A disk with boot code in its MBR is for BIOS, and the user is told.
#[test]
fn the_partition_table_chooses() -> Result<()> {
    let disk = image(Image::Mini)?.mini_qcow2();
    on_host(|host| {
        let disk = host.copy(&disk, "disk.qcow2")?;
        let arguments = ["run"].iter().chain(&SMALL).copied();
        let mut guest = Guest::start(host, arguments.chain([disk.as_str()]))?;
        let report = guest.expect_mini()?;
        ensure!(report.contains("fw=bios"), "{report}");
        guest.type_in("poweroff\n")?;
        let output = guest.end(Limit::Boot)?;
        output.expect_code(0)?;
        let note = "booting disk0 by bios, as its MBR has boot code";
        ensure!(output.stderr.contains(note), "{}", output.stderr);
        Ok(())
    })
}

/// The boot menu lists the disks, and boots the one that is chosen.
#[test]
fn the_boot_menu_chooses_a_disk() -> Result<()> {
    let disk = image(Image::Mini)?.mini_qcow2();
    on_host(|host| {
        let disk = host.copy(&disk, "disk.qcow2")?;
        host.ok(&Command::script("truncate -s 1M blank.raw"))?;
        let arguments = ["run", "--boot-menu", "blank.raw"].iter().chain(&SMALL);
        let mut guest = Guest::start(host, arguments.copied().chain([disk.as_str()]))?;
        guest.expect("Press ESC for boot menu", Limit::Boot)?;
        guest.type_in("\x1b")?;
        guest.expect("2. ", Limit::Boot)?;
        guest.type_in("2")?;
        guest.expect_mini()?;
        guest.type_in("poweroff\n")?;
        guest.end(Limit::Boot)?.expect_code(0)?;
        Ok(())
    })
}

/// Refusals of a disk with this firmware say all of `words` and exit with 2.
fn refused(host: &Host, arguments: &[&str], words: &[&str]) -> Result<()> {
    let run = ["run", "--net", "none"].iter().chain(arguments).copied();
    let output = host.run(&host.edgevmm(run.chain(["disk.raw"])))?;
    output.expect_code(2)?;
    let said = &output.stderr;
    for word in words {
        ensure!(said.contains(word), "No {word:?} in: {said}");
    }
    Ok(())
}

#[test]
fn files_that_are_no_firmware_are_refused() -> Result<()> {
    let firmware = image(Image::Firmware)?;
    on_this_machine(|host| {
        let uefi = host.copy(&firmware.cloudhv(), "whole.fd")?;
        host.ok(&Command::script(
            "truncate -s 1M disk.raw; head -c 2M whole.fd > cut.fd; \
             head -c 4M /dev/urandom > garbage.fd; (cat whole.fd; head -c 64M /dev/zero) > long.fd; \
             : > empty.fd",
        ))?;
        for file in ["cut.fd", "garbage.fd", "long.fd", "empty.fd"] {
            refused(host, &["--uefi", file], &[file, "is no UEFI firmware"])?;
        }
        refused(host, &["--uefi", "absent.fd"], &["absent.fd"])?;
        let [code, _] = firmware.ovmf();
        let code = host.copy(&code, "code.fd")?;
        for vars in ["cut.fd", "garbage.fd", "empty.fd"] {
            let arguments = ["--uefi", &code, "--uefi-vars", vars];
            refused(host, &arguments, &[vars, "holds no UEFI variables"])?;
        }
        let arguments = ["--uefi", &uefi, "--uefi-vars", "new.vars"];
        refused(host, &arguments, &["whole.fd", "keeps no variables"])?;
        host.ok(&Command::script("test ! -e new.vars"))?;
        let small = ["--memory", "32M", "--uefi", &uefi];
        refused(host, &small, &["UEFI firmware", "--memory"])?;
        refused(host, &["--bios", "empty.fd"], &["empty.fd", "0 bytes"])?;
        refused(
            host,
            &["--firmware", "bios", "--uefi", &uefi],
            &["--uefi", "leave out"],
        )
    })
}

/// Where packages put firmware, hidden from the command that follows.
const HIDE: &str = "for dir in /usr/share/{seabios,OVMF,cloudhv-efi-x86-64}; do \
    test ! -d $dir || mount -t tmpfs none $dir; done; exec \"$@\"";

#[test]
fn missing_firmware_names_its_package() -> Result<()> {
    as_root(|host| {
        host.ok(&Command::script("truncate -s 1M disk.raw"))?;
        for (firmware, package) in [("bios", "seabios"), ("uefi", "ovmf")] {
            let run = ["run", "--net", "none", "--firmware", firmware, "disk.raw"];
            let hidden = Command::new("unshare").args(["-m", "bash", "-ec", HIDE, "bash"]);
            let output = host.run(&hidden.wrapping(&host.edgevmm(run)))?;
            let install = format!("install it with apt install {package}");
            ensure!(
                output.code != 0 && output.stderr.contains(&install),
                "{output:?}"
            );
        }
        Ok(())
    })
}

const VARIABLE: &str = "/sys/firmware/efi/efivars/E2e-c0ffee00-1234-4321-8765-000000000001";

/// What a guest writes to its UEFI variables is in their file when the write returns: the VMM is
/// killed right after it. The next run, by an older OVMF, finds it.
#[test]
fn variables_outlive_a_power_cut() -> Result<()> {
    let (disk, firmware) = (image(Image::Debian12)?.debian12(), image(Image::Firmware)?);
    on_host(|host| {
        let disk = host.copy(&disk, "disk.qcow2")?;
        let start = |[code, vars]: [PathBuf; 2]| {
            let code = host.copy(&code, "OVMF_CODE.fd")?;
            host.copy(&vars, "OVMF_VARS.fd")?;
            let machine = ["run", "--cpus", "2", "--memory", "768M", "--net", "none"];
            let boot = ["--uefi", &code, "--uefi-vars", "vm.vars", "--snapshot"];
            let arguments = machine.into_iter().chain(boot).chain([disk.as_str()]);
            let mut guest = Guest::start(host, arguments)?;
            let report = expect_ready(&mut guest)?;
            ensure!(
                report.contains("fw=uefi") && report.contains("cpus=2"),
                "{report}"
            );
            guest.type_in("\n")?;
            guest.log_in("root", "root")?;
            // What the firmware's tables say is all there.
            guest.sh("dmesg -n 1; test -d /sys/firmware/acpi/tables/data")?;
            guest.sh("cat /sys/class/dmi/id/sys_vendor | grep -qx edgevmm")?;
            Ok::<_, anyhow::Error>(guest)
        };
        let mut guest = start(firmware.ovmf())?;
        guest.sh(&format!("printf '\\007\\000\\000\\000kept' > {VARIABLE}"))?;
        guest.signal(KILL)?;
        drop(guest);

        let mut guest = start(firmware.old_ovmf())?;
        guest.sh(&format!("tail -c 4 {VARIABLE} | grep -qx kept"))?;
        guest.signal(TERMINATE)?;
        guest.end(Limit::Distribution)?.expect_code(0)?;
        Ok(())
    })
}
