//! Checks of what surrounds KVM: files, programs and settings.

use std::fs::OpenOptions;
use std::io;
use std::process::{Command, Stdio};

use edgevmm_vmm::boot::cloudhv::DEFAULT_CLOUDHV;
use edgevmm_vmm::boot::firmware::DEFAULT_BIOS;
use edgevmm_vmm::boot::ovmf::DEFAULT_CODE;

use super::{Check, Host, find_program};
use crate::host::Memory;

/// All checks around KVM.
pub(super) fn checks(host: &Host) -> Vec<Check> {
    let memory = Memory::read().unwrap_or_default();
    vec![
        firmware(host),
        uefi(host),
        passt(),
        tun(host),
        huge_pages(&memory),
        cgroups(host),
        io_uring(host),
        sandbox(),
        containerd(),
    ]
}

fn firmware(host: &Host) -> Check {
    if host.exists(DEFAULT_BIOS) {
        Check::ok("firmware", DEFAULT_BIOS)
    } else {
        Check::fail(
            "firmware",
            format!("there is no {DEFAULT_BIOS}, so disks don't boot; kernels do"),
            "apt install seabios, or give an image with --bios",
        )
    }
}

fn uefi(host: &Host) -> Check {
    let name = "UEFI";
    match (host.exists(DEFAULT_CLOUDHV), host.exists(DEFAULT_CODE)) {
        (true, true) => Check::ok(name, format!("{DEFAULT_CLOUDHV}, {DEFAULT_CODE}")),
        (true, false) => Check::warn(
            name,
            format!("there is no {DEFAULT_CODE}, so --uefi-vars doesn't work"),
            "apt install ovmf",
        ),
        (false, true) => Check::ok(name, DEFAULT_CODE),
        (false, false) => Check::warn(
            name,
            "there is none, so disks that need it don't boot",
            "apt install ovmf, or give an image with --uefi",
        ),
    }
}

fn passt() -> Check {
    match find_program("passt") {
        Some(path) => Check::ok("user network", path.display().to_string()),
        None => Check::fail(
            "user network",
            "there is no passt, so --net user, the default, doesn't work",
            "apt install passt, or use --net tap=NAME or --net none",
        ),
    }
}

fn tun(host: &Host) -> Check {
    let name = "tap devices";
    let path = "/dev/net/tun";
    match OpenOptions::new()
        .read(true)
        .write(true)
        .open(host.path(path))
    {
        Ok(_) => Check::ok(name, format!("{path} opens")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Check::warn(
            name,
            format!("there is no {path}, so --net tap doesn't work"),
            "modprobe tun",
        ),
        Err(error) => Check::warn(
            name,
            format!("{path} doesn't open, so --net tap doesn't work: {error}"),
            format!("chmod 0666 {path}; each tap still says who may use it"),
        ),
    }
}

fn huge_pages(memory: &Memory) -> Check {
    let name = "huge pages";
    let mib = |bytes: u64| bytes >> 20;
    if memory.huge_total == 0 {
        Check::ok(
            name,
            "none are reserved; --hugepages needs some: sysctl vm.nr_hugepages=N",
        )
    } else {
        let (free, total) = (mib(memory.huge_free), mib(memory.huge_total));
        Check::ok(name, format!("{free} MiB of {total} MiB are free"))
    }
}

fn cgroups(host: &Host) -> Check {
    match host.read("/sys/fs/cgroup/cgroup.controllers") {
        Some(controllers) => Check::ok("cgroups", format!("version 2: {controllers}")),
        None => Check::warn(
            "cgroups",
            "version 2 is not mounted at /sys/fs/cgroup, so machines can't be limited as containers",
            "boot with systemd.unified_cgroup_hierarchy=1",
        ),
    }
}

fn io_uring(host: &Host) -> Check {
    let name = "io_uring";
    match host.read("/proc/sys/kernel/io_uring_disabled").as_deref() {
        // The switch came after the calls themselves.
        None | Some("0") => Check::ok(name, "allowed"),
        Some(_) => Check::ok(name, "not allowed; disks use plain reads and writes"),
    }
}

fn sandbox() -> Check {
    let name = "sandbox";
    let layers = edgevmm_sandbox::host_layers();
    if layers.missing().is_empty() {
        return Check::ok(name, layers.to_string());
    }
    Check::warn(
        name,
        layers.to_string(),
        "a VMM that a guest took over is held by the other layers; Linux 5.13 or newer with \
         CONFIG_SECURITY_LANDLOCK and unprivileged user namespaces, or root, has all",
    )
}

fn containerd() -> Check {
    let name = "containerd";
    let none = || {
        Check::ok(
            name,
            "not installed; only machines in containers' place need it, `run` doesn't",
        )
    };
    let Some(path) = find_program("containerd") else {
        return none();
    };
    let output = Command::new(path)
        .arg("--version")
        .stdin(Stdio::null())
        .output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    match text.ok().as_deref().and_then(containerd_version) {
        Some((major, minor)) if (major, minor) >= (1, 6) => {
            Check::ok(name, format!("{major}.{minor}"))
        }
        Some((major, minor)) => Check::warn(
            name,
            format!("{major}.{minor} is older than what is tested"),
            "update to 1.6 or newer to run machines in containers' place",
        ),
        None => Check::warn(
            name,
            "its version can't be told",
            "run containerd --version",
        ),
    }
}

/// Major and minor version from `containerd github.com/containerd/containerd v2.1.9 ...`.
fn containerd_version(text: &str) -> Option<(u32, u32)> {
    let is_version = |word: &&str| {
        word.trim_start_matches('v')
            .starts_with(|letter: char| letter.is_ascii_digit())
    };
    let word = text.split_whitespace().find(is_version)?;
    let mut numbers = word.trim_start_matches('v').split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::Status;
    use super::*;

    #[test]
    fn versions_are_read() {
        let debian = "containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+b1";
        assert_eq!(containerd_version(debian), Some((1, 6)));
        let upstream = "containerd github.com/containerd/containerd/v2 v2.1.9 abc123";
        assert_eq!(containerd_version(upstream), Some((2, 1)));
        assert_eq!(containerd_version("containerd"), None);
    }

    #[test]
    fn a_bare_host_gets_its_fixes() {
        let folder = tempfile::tempdir().unwrap();
        let host = Host {
            root: folder.path().into(),
        };
        assert!(firmware(&host).fix.unwrap().contains("seabios"));
        assert!(uefi(&host).fix.unwrap().contains("ovmf"));
        assert_eq!(tun(&host).fix.unwrap(), "modprobe tun");
        assert_eq!(cgroups(&host).status, Status::Warn);
        assert_eq!(io_uring(&host).status, Status::Ok);
    }
}
