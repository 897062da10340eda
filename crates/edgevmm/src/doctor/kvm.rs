//! Checks of KVM: its device, and whether hardware stands behind it.

use edgevmm_vmm::kvm::{self, KvmError};

use super::{Check, Host};
use crate::term;

/// What does the work behind /dev/kvm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Backend {
    /// VT-x.
    Intel,
    /// AMD-V.
    Amd,
    /// Guests' page tables and privileged instructions are emulated by the host.
    Software(&'static str),
    /// No module that is known.
    Unknown,
}

/// Modules of KVM that do without the CPU's virtualisation.
const SOFTWARE_MODULES: [&str; 1] = ["kvm_pvm"];

impl Backend {
    fn of(host: &Host) -> Self {
        let loaded = |module: &str| host.exists(&format!("/sys/module/{module}"));
        if let Some(module) = SOFTWARE_MODULES.into_iter().find(|module| loaded(module)) {
            Self::Software(module)
        } else if loaded("kvm_intel") {
            Self::Intel
        } else if loaded("kvm_amd") {
            Self::Amd
        } else {
            Self::Unknown
        }
    }
}

/// Says what a software backend means, and what to do.
const SOFTWARE_FIX: &str = "use a host with VT-x or AMD-V (for a VM: with nested virtualisation), \
                            or the nested-KVM lab of the source tree: cargo xtask lab";

/// Warns before a machine is run where ordinary kernels can't run.
pub fn warn_of_software_backend() {
    if let Backend::Software(module) = Backend::of(&Host::this()) {
        term::tell(format_args!(
            "edgevmm: warning: KVM is emulated by {module} here, on which ordinary kernels do not \
             start\nhint: {SOFTWARE_FIX}"
        ));
    }
}

/// All checks of KVM.
pub(super) fn checks(host: &Host) -> Vec<Check> {
    let backend = Backend::of(host);
    let mut checks = vec![device(kvm::open().map(drop)), check_backend(host, backend)];
    checks.extend(check_paging(host, backend));
    checks.extend(check_nested(host, backend));
    checks
}

fn device(opened: Result<(), KvmError>) -> Check {
    let name = "kvm device";
    match opened {
        Ok(()) => Check::ok(
            name,
            format!("{} opens and has all that is needed", kvm::KVM_DEVICE),
        ),
        // The message of each of these says what to do after a colon.
        Err(error) => {
            let text = format!("{:#}", anyhow::Error::from(error));
            match text.split_once(": ") {
                Some((found, fix)) => Check::fail(name, found, fix),
                None => Check::fail(
                    name,
                    text,
                    "look at the kernel's messages: dmesg | grep kvm",
                ),
            }
        }
    }
}

fn check_backend(host: &Host, backend: Backend) -> Check {
    let name = "kvm backend";
    let cpuinfo = host.read("/proc/cpuinfo").unwrap_or_default();
    let flags = cpuinfo
        .lines()
        .find(|line| line.starts_with("flags"))
        .unwrap_or_default();
    let has = |flag: &str| flags.split_whitespace().any(|word| word == flag);
    match backend {
        Backend::Intel => Check::ok(name, "kvm_intel (VT-x)"),
        Backend::Amd => Check::ok(name, "kvm_amd (AMD-V)"),
        Backend::Software(module) => Check::fail(
            name,
            format!(
                "{module}: guests run without the CPU's virtualisation, by emulation of what is \
                 privileged, so ordinary kernels and firmware do not start or crawl"
            ),
            SOFTWARE_FIX,
        ),
        Backend::Unknown if has("vmx") => Check::fail(
            name,
            "the CPU has VT-x, but no module uses it",
            "modprobe kvm_intel",
        ),
        Backend::Unknown if has("svm") => Check::fail(
            name,
            "the CPU has AMD-V, but no module uses it",
            "modprobe kvm_amd",
        ),
        Backend::Unknown if has("hypervisor") => Check::fail(
            name,
            "this host is a virtual machine without virtualisation of its own",
            "switch nested virtualisation on where this machine is hosted",
        ),
        Backend::Unknown => Check::fail(
            name,
            "the CPU shows neither VT-x nor AMD-V",
            "switch virtualisation on in the firmware setup of this host",
        ),
    }
}

/// Second level paging, without which guests are slow.
fn check_paging(host: &Host, backend: Backend) -> Option<Check> {
    let (path, feature, module) = match backend {
        Backend::Intel => (
            "/sys/module/kvm_intel/parameters/ept",
            "EPT",
            "kvm_intel ept=1",
        ),
        Backend::Amd => ("/sys/module/kvm_amd/parameters/npt", "NPT", "kvm_amd npt=1"),
        Backend::Software(_) | Backend::Unknown => return None,
    };
    Some(match is_on(host, path) {
        Some(true) => Check::ok("nested paging", format!("{feature} is on")),
        Some(false) => Check::warn(
            "nested paging",
            format!("{feature} is off, so guests are slow"),
            format!("reload the module with it: options {module}"),
        ),
        None => return None,
    })
}

/// Virtualisation inside guests; nothing here needs it, but users ask.
fn check_nested(host: &Host, backend: Backend) -> Option<Check> {
    let path = match backend {
        Backend::Intel => "/sys/module/kvm_intel/parameters/nested",
        Backend::Amd => "/sys/module/kvm_amd/parameters/nested",
        Backend::Software(_) | Backend::Unknown => return None,
    };
    let on = is_on(host, path)?;
    let found = if on {
        "guests can run guests"
    } else {
        "off; only guests that run guests need it"
    };
    Some(Check::ok("nested guests", found))
}

fn is_on(host: &Host, path: &str) -> Option<bool> {
    host.read(path)
        .map(|text| matches!(text.as_str(), "Y" | "1"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;

    use super::super::Status;
    use super::*;

    /// A host with these files.
    fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, Host) {
        let folder = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let host = Host {
            root: folder.path().into(),
        };
        (folder, host)
    }

    #[test]
    fn backends_are_told_apart() {
        for (file, backend) in [
            ("sys/module/kvm_intel/parameters/ept", Backend::Intel),
            ("sys/module/kvm_amd/parameters/npt", Backend::Amd),
            ("sys/module/kvm_pvm/refcnt", Backend::Software("kvm_pvm")),
            ("sys/module/kvm/refcnt", Backend::Unknown),
        ] {
            let (_folder, host) = host(&[(file, "Y\n")]);
            assert_eq!(Backend::of(&host), backend);
        }
        let (_folder, both) = host(&[("sys/module/kvm_pvm/x", ""), ("sys/module/kvm_intel/x", "")]);
        assert_eq!(Backend::of(&both), Backend::Software("kvm_pvm"));
    }

    #[test]
    fn what_is_missing_decides_the_fix() {
        for (flags, fix) in [
            ("fpu vmx", "modprobe kvm_intel"),
            ("fpu svm", "modprobe kvm_amd"),
            ("fpu hypervisor", "switch nested virtualisation on"),
            ("fpu", "firmware setup"),
        ] {
            let text = format!("processor\t: 0\nflags\t\t: {flags}\n");
            let (_folder, host) = host(&[("proc/cpuinfo", &text)]);
            let check = check_backend(&host, Backend::Unknown);
            assert_eq!(check.status, Status::Fail);
            assert!(check.fix.unwrap().contains(fix), "{flags}");
        }
        let (_folder, host) = host(&[]);
        let check = check_backend(&host, Backend::Software("kvm_pvm"));
        assert!(check.status == Status::Fail && check.found.contains("emulation"));
    }

    #[test]
    fn paging_that_is_off_is_told() {
        let (_folder, host) = host(&[("sys/module/kvm_amd/parameters/npt", "0\n")]);
        assert_eq!(
            check_paging(&host, Backend::Amd).unwrap().status,
            Status::Warn
        );
        assert_eq!(check_paging(&host, Backend::Intel), None);
    }

    #[test]
    fn errors_of_the_device_come_with_their_fix() {
        let check = device(Err(KvmError::Permission));
        assert!(check.found.starts_with("No permission"));
        assert!(check.fix.unwrap().contains("group kvm"));
    }
}
