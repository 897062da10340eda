//! One small disk in every format that people have: booted by firmware, and written. And writes
//! that are kept over a base from run to run.

use anyhow::{Context, Result, ensure};
use edgevmm_e2e::{Command, Guest, Host, Image, Limit, SMALL, as_root, image, on_host};

/// A format: what `qemu-img convert` of `mini.raw` needs to make `disk`, and what `run --disk` does.
struct Format {
    /// Script for making it; `$CONVERT` converts the raw image.
    make: &'static str,
    /// The value of `--disk`.
    disk: &'static str,
    /// It is only read, so that an overlay is made beside it.
    overlay: bool,
}

const fn written(make: &'static str, disk: &'static str) -> Format {
    Format {
        make,
        disk,
        overlay: false,
    }
}

const fn read(make: &'static str, disk: &'static str) -> Format {
    Format {
        make,
        disk,
        overlay: true,
    }
}

const QCOW2: [Format; 7] = [
    written(
        "$CONVERT -O qcow2 -o compat=0.10 mini.raw d.qcow2",
        "d.qcow2",
    ),
    written("$CONVERT -c -O qcow2 mini.raw d.qcow2", "d.qcow2"),
    written(
        "$CONVERT -c -O qcow2 -o compression_type=zstd,cluster_size=2M mini.raw d.qcow2",
        "d.qcow2",
    ),
    written(
        "$CONVERT -O qcow2 -o extended_l2=on,cluster_size=128k,lazy_refcounts=on mini.raw d.qcow2",
        "d.qcow2",
    ),
    written(
        "$CONVERT -O qcow2 -o data_file=d.data mini.raw d.qcow2",
        "d.qcow2,data_file=d.data",
    ),
    written(
        "$CONVERT -c -O qcow2 mini.raw a.qcow2; \
         qemu-img create -q -f qcow2 -b a.qcow2 -F qcow2 b.qcow2; \
         qemu-img create -q -f qcow2 -b b.qcow2 -F qcow2 d.qcow2",
        "d.qcow2,backing=b.qcow2,backing=a.qcow2",
    ),
    written("cp --sparse=always mini.raw d.raw", "d.raw"),
];

const FOREIGN: [Format; 9] = [
    read(
        "$CONVERT -O vmdk -o subformat=monolithicSparse mini.raw d.vmdk",
        "d.vmdk",
    ),
    read(
        "$CONVERT -O vmdk -o subformat=streamOptimized mini.raw d.vmdk",
        "d.vmdk",
    ),
    read(
        "$CONVERT -O vmdk -o subformat=monolithicFlat mini.raw d.vmdk",
        "d.vmdk",
    ),
    read(
        "$CONVERT -O vmdk -o subformat=twoGbMaxExtentSparse mini.raw d.vmdk",
        "d.vmdk",
    ),
    read(
        "$CONVERT -O vmdk -o subformat=streamOptimized mini.raw m.vmdk; \
         echo '<Envelope/>' > m.ovf; tar -cf d.ova m.ovf m.vmdk",
        "d.ova",
    ),
    read("$CONVERT -O vhdx mini.raw d.vhdx", "d.vhdx"),
    read(
        "$CONVERT -O vpc -o subformat=dynamic mini.raw d.vhd",
        "d.vhd",
    ),
    read(
        "$CONVERT -O vpc -o subformat=fixed,force_size=on mini.raw d.vhd",
        "d.vhd,format=vhd",
    ),
    read("$CONVERT -O vdi mini.raw d.vdi", "d.vdi"),
];

fn start<'h>(host: &'h Host, arguments: &[&str]) -> Result<Guest<'h>> {
    Guest::start(host, ["run"].iter().chain(&SMALL).chain(arguments).copied())
}

fn power_off(guest: Guest<'_>) -> Result<()> {
    guest.type_in("sync; poweroff -f\n")?;
    guest.end(Limit::Boot)?.expect_code(0)?;
    Ok(())
}

/// Boots a disk in one format, writes to it, and looks from outside for what was written.
fn boot_and_write(host: &Host, format: &Format) -> Result<()> {
    let make = format!(
        "rm -f d.* a.qcow2 b.qcow2 m.* merged.raw; CONVERT='qemu-img convert -q -f raw'; {}",
        format.make
    );
    host.ok(&Command::script(make))?;
    let (file, _) = format.disk.split_once(',').unwrap_or((format.disk, ""));
    let before = host.sha256(file)?;
    let mut guest = start(host, &["--disk", format.disk])?;
    let report = guest.expect_mini()?;
    ensure!(
        report.contains("boots=1 ") && report.contains("fw=bios"),
        "{report}"
    );
    let hash = guest.sh("head -c 1000000 /dev/urandom > /root/data && sha256sum < /root/data")?;
    power_off(guest)?;

    let overlay = format!("{file}.overlay.qcow2");
    let source = if format.overlay {
        ensure!(
            host.sha256(file)? == before,
            "An image that is only read has changed"
        );
        host.ok(&host.edgevmm(["image", "check", &overlay]))?;
        format!(
            "{overlay},backing={}",
            format.disk.replace(",format=vhd", "")
        )
    } else {
        if file.ends_with(".qcow2") {
            host.ok(&Command::new("qemu-img").args(["check", file]))?;
        }
        format.disk.to_owned()
    };
    let convert = ["image", "convert", "--to", "raw", &source, "merged.raw"];
    host.ok(&host.edgevmm(convert))?;
    // The partition begins after the first MiB.
    let read = "debugfs -R 'cat /root/data' 'merged.raw?offset=1048576' | sha256sum";
    let found = host.ok(&Command::script(read))?;
    ensure!(found == hash, "The disk does not have what the guest wrote");
    Ok(())
}

fn boot_all(formats: &[Format]) -> Result<()> {
    let images = image(Image::Mini)?;
    on_host(|host| {
        host.copy(&images.mini_raw(), "mini.raw")?;
        formats
            .iter()
            .try_for_each(|format| boot_and_write(host, format).with_context(|| format.make))
    })
}

#[test]
fn qcow2_with_each_option_boots_and_is_written() -> Result<()> {
    boot_all(&QCOW2)
}

#[test]
fn disks_of_other_hypervisors_boot_and_are_written() -> Result<()> {
    boot_all(&FOREIGN)
}

/// A whole distribution from a disk of another hypervisor, whose writes are there the next time.
#[test]
fn a_distribution_runs_from_a_vmdk() -> Result<()> {
    let images = image(Image::Debian12)?;
    on_host(|host| {
        host.copy(&images.debian12(), "debian.qcow2")?;
        let make = "qemu-img convert -O vmdk -o subformat=streamOptimized debian.qcow2 debian.vmdk; \
                    rm debian.qcow2";
        host.run_for(&Command::script(make), Limit::Distribution)?
            .expect_code(0)?;
        let before = host.sha256("debian.vmdk")?;
        let arguments = [
            "run",
            "--cpus",
            "2",
            "--memory",
            "768M",
            "--net",
            "none",
            "debian.vmdk",
        ];
        let mut hash = String::new();
        for boot in 1..=2 {
            let mut guest = Guest::start(host, arguments)?;
            guest.expect("D12-READY", Limit::Distribution)?;
            guest.type_in("\n")?;
            guest.log_in("root", "root")?;
            guest.sh("dmesg -n 1")?;
            if boot == 1 {
                let write = "head -c 8M /dev/urandom > /var/kept && sync && sha256sum < /var/kept";
                hash = guest.sh(write)?;
            } else {
                ensure!(
                    guest.sh("sha256sum < /var/kept")? == hash,
                    "Other data at the next boot"
                );
            }
            guest.type_in("systemctl poweroff\n")?;
            guest.end(Limit::Distribution)?.expect_code(0)?;
        }
        ensure!(
            host.sha256("debian.vmdk")? == before,
            "The VMDK has changed"
        );
        host.ok(&host.edgevmm(["image", "check", "debian.vmdk.overlay.qcow2"]))?;
        Ok(())
    })
}

/// Two machines over one base keep their writes apart, each its own from run to run and on a larger
/// disk; a base that changes is refused.
#[test]
fn overlays_keep_writes_over_a_base() -> Result<()> {
    let images = image(Image::Mini)?;
    on_host(|host| {
        let base = host.copy(&images.mini_qcow2(), "base.qcow2")?;
        let before = host.sha256(&base)?;
        let run = |name: &'static str| {
            let options = ["--overlay", "vms", "--overlay-size", "200M", "--name", name];
            start(host, &[&options[..], &[&base]].concat())
        };
        for boots in ["boots=1 ", "boots=2 "] {
            let mut one = run("one")?;
            ensure!(
                one.expect_mini()?.contains(boots),
                "The overlay was not used"
            );
            ensure!(one.sh("cat /sys/block/vda/size")? == "409600");
            one.sh("echo one > /root/who; dd if=/dev/zero of=/root/big bs=1M count=4 conv=fsync")?;
            power_off(one)?;
        }
        let mut two = run("two")?;
        ensure!(
            two.expect_mini()?.contains("boots=1 "),
            "The overlays are the same"
        );
        let (code, _) = two.run("cat /root/who")?;
        ensure!(code != 0, "The overlays are the same");

        // While a machine has it, nobody else does.
        let overlay = host.path("vms/two/base.qcow2.overlay.qcow2");
        let disk = format!("{base},overlay={overlay}");
        let refused = host.run(&host.edgevmm(["run", "--name", "three", "--disk", &disk]))?;
        ensure!(
            refused.code == 1 && refused.stderr.contains("in use by process"),
            "{refused:?}"
        );
        power_off(two)?;
        ensure!(host.sha256(&base)? == before, "The base has changed");
        host.ok(&Command::new("qemu-img").args(["check", &overlay]))?;

        // Touched it is the same; written it is not.
        host.ok(&Command::new("touch").args([&base]))?;
        let mut one = run("one")?;
        ensure!(
            one.expect_mini()?.contains("boots=3 "),
            "The overlay was not used"
        );
        ensure!(one.sh("cat /root/who")? == "one");
        power_off(one)?;
        host.ok(&Command::new("qemu-io").args(["-c", "write -P 1 1000k 512", &base]))?;
        let options = ["--overlay", "vms", "--name", "one", &base];
        let refused = host.run(&host.edgevmm(["run"].iter().chain(&options).copied()))?;
        ensure!(
            refused.code == 1 && refused.stderr.contains("another content"),
            "{refused:?}"
        );
        Ok(())
    })
}

/// Of a format that is only read, too, writes can be thrown away; then no overlay is made. One that
/// is there belongs to the disk all the same.
#[test]
fn a_snapshot_of_a_foreign_disk_needs_no_overlay() -> Result<()> {
    let images = image(Image::Mini)?;
    on_host(|host| {
        host.copy(&images.mini_qcow2(), "mini.qcow2")?;
        host.ok(&Command::script(
            "qemu-img convert -O vdi mini.qcow2 mini.vdi",
        ))?;
        let boot = |options: &[&str]| -> Result<(String, String)> {
            let mut guest = start(host, options)?;
            let report = guest.expect_mini()?;
            guest.type_in("sync; poweroff -f\n")?;
            let ended = guest.end(Limit::Boot)?;
            ended.expect_code(0)?;
            Ok((report, ended.stderr))
        };
        let files = || host.ok(&Command::script("ls mini.vdi*"));
        let (report, said) = boot(&["--snapshot", "mini.vdi"])?;
        ensure!(
            report.contains("boots=1 ") && files()? == "mini.vdi",
            "{report}"
        );
        ensure!(!said.contains("overlay"), "{said}");
        let (report, said) = boot(&["mini.vdi"])?;
        ensure!(report.contains("boots=1 "), "{report}");
        ensure!(
            said.contains("mini.vdi.overlay.qcow2, which is made now"),
            "{said}"
        );
        let (report, said) = boot(&["--snapshot", "mini.vdi"])?;
        ensure!(report.contains("boots=2 "), "{report}");
        ensure!(said.contains("is read with what"), "{said}");
        let (report, said) = boot(&["mini.vdi"])?;
        ensure!(report.contains("boots=2 "), "{report}");
        ensure!(said.contains("are kept in"), "{said}");
        Ok(())
    })
}

/// When the filesystem is full, what was there is there still, nothing unfinished is, and the user
/// hears why. Once there is room it is done.
#[test]
fn a_full_filesystem_leaves_everything_right() -> Result<()> {
    as_root(|host| {
        let prepare = "mkdir small; mount -t tmpfs -o size=20M tmpfs small; cd small; \
                       head -c 8M /dev/urandom > disk.raw; \
                       qemu-img convert -O qcow2 disk.raw disk.qcow2; \
                       qemu-img create -q -f raw base 12M";
        host.ok(&Command::script(prepare))?;
        host.ok(&host.edgevmm(["image", "overlay", "small/base", "over.qcow2"]))?;
        let fill = "qemu-img convert -n -f raw -O qcow2 small/disk.raw over.qcow2; \
                    sha256sum small/disk.qcow2 over.qcow2";
        host.ok(&Command::script(fill))?;
        let before = host.ok(&Command::script("ls -A small; sha256sum small/disk.qcow2"))?;
        for arguments in [
            &["image", "convert", "small/disk.raw", "small/new.qcow2"][..],
            &[
                "image",
                "convert",
                "--to",
                "raw",
                "small/disk.qcow2",
                "small/new.raw",
            ],
            &["image", "compact", "small/disk.qcow2"],
            &["image", "commit", "over.qcow2", "small/base"],
        ] {
            let full = host.run(&host.edgevmm(arguments.iter().copied()))?;
            ensure!(full.code == 1, "{full:?}");
            ensure!(
                full.stderr.contains("No space left on device"),
                "{}",
                full.stderr
            );
            ensure!(full.stderr.contains("hint: make room"), "{}", full.stderr);
            let after = host.ok(&Command::script("ls -A small; sha256sum small/disk.qcow2"))?;
            ensure!(after == before, "Something has changed: {after}");
        }
        // The overlay has all that was to be committed, whatever the base has got of it.
        let same = ["compare", "-q", "-f", "raw", "small/disk.raw", "over.qcow2"];
        host.ok(&Command::new("qemu-img").args(same))?;
        host.ok(&Command::script("mount -o remount,size=60M small"))?;
        host.ok(&host.edgevmm(["image", "commit", "over.qcow2", "small/base"]))?;
        host.ok(&host.edgevmm(["image", "compact", "small/disk.qcow2"]))?;
        let same = "cd small; qemu-img compare -q -f raw -F raw disk.raw base; \
                    qemu-img compare -q -f raw disk.raw disk.qcow2; qemu-img check -q disk.qcow2";
        host.ok(&Command::script(same))?;
        host.ok(&Command::script("umount small"))?;
        Ok(())
    })
}

/// A block device is converted to, booted from, and the base of an overlay.
#[test]
fn block_devices_are_images_too() -> Result<()> {
    let images = image(Image::Mini)?;
    as_root(|host| {
        host.copy(&images.mini_qcow2(), "mini.qcow2")?;
        let make = "modprobe loop || true; head -c 80M /dev/urandom > store; \
                    losetup --find --show store";
        let device = host.ok(&Command::script(make))?;
        let boot = || -> Result<()> {
            let convert = ["image", "convert", "--to", "raw", "mini.qcow2", &device];
            let refused = host.run(&host.edgevmm(convert))?;
            ensure!(
                refused.code == 2 && refused.stderr.contains("--force"),
                "{refused:?}"
            );
            host.ok(&host.edgevmm(convert).args(["--force"]))?;
            let same =
                "qemu-img convert -O raw mini.qcow2 mini.raw; cmp -n 67108864 mini.raw store";
            host.ok(&Command::script(same))?;

            let before = host.sha256("store")?;
            let overlay = format!("{device},overlay=over.qcow2");
            let mut guest = start(host, &["--disk", &overlay])?;
            guest.expect_mini()?;
            power_off(guest)?;
            ensure!(host.sha256("store")? == before, "The device was written");
            let mut guest = start(host, &[&device])?;
            ensure!(
                guest.expect_mini()?.contains("boots=1 "),
                "The device was written"
            );
            power_off(guest)?;
            let refused = host.run(&host.edgevmm(["run", "--disk", &overlay]))?;
            ensure!(refused.stderr.contains("another content"), "{refused:?}");
            Ok(())
        };
        let done = boot();
        host.ok(&Command::new("losetup").args(["--detach", &device]))?;
        done
    })
}
