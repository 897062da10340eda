//! Kernels booted without firmware: the stock kernel of a distribution in both of its forms.

use anyhow::{Context, Result, ensure};
use edgevmm_e2e::{Guest, Image, Limit, SMALL, image, on_big_host, on_host};

/// Boots to the first line of init, after which the guest powers off.
fn boots(kernel: &std::path::Path) -> Result<()> {
    let images = image(Image::Kernel)?;
    on_host(|host| {
        let kernel = host.shared(kernel)?;
        let initrd = host.shared(&images.initrd())?;
        let run = host
            .edgevmm(["run", "--kernel", &kernel, "--initrd", &initrd])
            .args(["--cmdline", "console=ttyS0 quiet"])
            .args(SMALL);
        let output = host.run(&run)?;
        let console = output.expect_code(0)?;
        ensure!(console.contains("INIT-FIRST-LINE"), "{console}");
        Ok(())
    })
}

#[test]
fn vmlinux_boots_by_pvh() -> Result<()> {
    boots(&image(Image::Kernel)?.vmlinux())
}

#[test]
fn bzimage_boots() -> Result<()> {
    boots(&image(Image::Kernel)?.vmlinuz())
}

/// The guest has memory on both sides of the hole below 4 GiB, and disks work with buffers there.
#[test]
fn memory_reaches_above_the_pci_hole() -> Result<()> {
    let images = image(Image::Mini)?;
    on_big_host(7168, |host| {
        let disk = host.copy(&images.mini_raw(), "data.raw")?;
        let arguments = Guest::shell_arguments(host, "")?;
        let machine =
            ["--memory", "5G", "--cpus", "2", "--net", "none", "--disk"].map(String::from);
        let arguments = [arguments, machine.into(), vec![format!("{disk},ro")]].concat();
        let mut guest = Guest::start(host, arguments)?;
        let report = guest.expect_shell()?;
        ensure!(report.contains("cpus=2"), "{report}");
        let total = guest.sh("awk '/MemTotal/ {print $2}' /proc/meminfo")?;
        let total: u64 = total
            .parse()
            .with_context(|| format!("MemTotal {total:?}"))?;
        ensure!(
            total > 4_800_000 && total < 5 << 20,
            "{total} KiB of memory"
        );
        let map = guest.sh("grep 'System RAM' /proc/iomem")?;
        ensure!(map.contains("100000000-"), "No memory at 4 GiB:\n{map}");
        // More than fits below the hole is free, so the kernel takes pages from above first.
        let hash = guest.sh("sha256sum < /dev/vda")?;
        let expected = host.sha256(&disk)?;
        ensure!(hash.starts_with(&expected), "{hash} in place of {expected}");
        guest.type_in("poweroff -f\n")?;
        guest.end(Limit::Boot)?.expect_code(0)?;
        Ok(())
    })
}
