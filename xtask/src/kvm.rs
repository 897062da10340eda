//! Whether this host's KVM can run stock kernels, told without booting one.

use std::fmt;
use std::fs::{self, File};
use std::path::Path;

use serde::Serialize;

/// What can be expected of this host's `/dev/kvm`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "verdict", content = "reason")]
pub enum KvmVerdict {
    /// Hardware virtualisation with nested paging.
    Usable,
    /// There is none, or it cannot be opened.
    Missing(String),
    /// It works, but not well enough for the kernel of a distribution.
    CannotRunStockKernels(String),
}

impl fmt::Display for KvmVerdict {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usable => formatter.write_str("this host's KVM runs stock kernels"),
            Self::Missing(why) => write!(formatter, "this host has no usable KVM: {why}"),
            Self::CannotRunStockKernels(why) => {
                write!(formatter, "this host's KVM cannot run stock kernels: {why}")
            }
        }
    }
}

/// Looks at `/dev/kvm` and at what drives it. Setting `EDGEVMM_FORCE_LAB` to anything makes the
/// answer "missing", to try the lab on a host that does not need it.
#[must_use]
pub fn host_kvm_runs_stock_kernels() -> KvmVerdict {
    if std::env::var_os("EDGEVMM_FORCE_LAB").is_some() {
        return KvmVerdict::Missing("EDGEVMM_FORCE_LAB is set".to_owned());
    }
    if let Err(error) = File::options().read(true).write(true).open("/dev/kvm") {
        return KvmVerdict::Missing(format!("cannot open /dev/kvm: {error}"));
    }
    judge(Path::new("/sys/module"))
}

fn judge(modules: &Path) -> KvmVerdict {
    if modules.join("kvm_pvm").exists() {
        return KvmVerdict::CannotRunStockKernels(
            "it is kvm_pvm, which runs kernels without hardware support and only those made for \
             it"
            .to_owned(),
        );
    }
    for (module, parameter, name) in [("kvm_intel", "ept", "EPT"), ("kvm_amd", "npt", "NPT")] {
        let Ok(value) = fs::read_to_string(modules.join(module).join("parameters").join(parameter))
        else {
            continue;
        };
        return if matches!(value.trim(), "Y" | "1") {
            KvmVerdict::Usable
        } else {
            KvmVerdict::CannotRunStockKernels(format!("{module} runs without {name}"))
        };
    }
    KvmVerdict::CannotRunStockKernels("neither kvm_intel nor kvm_amd drives it".to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn with(files: &[(&str, &str)]) -> KvmVerdict {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        judge(dir.path())
    }

    #[test]
    fn wants_nested_paging_of_a_hardware_module() {
        assert_eq!(
            with(&[("kvm_intel/parameters/ept", "Y\n")]),
            KvmVerdict::Usable
        );
        assert_eq!(
            with(&[("kvm_amd/parameters/npt", "1\n")]),
            KvmVerdict::Usable
        );
        for bad in [
            [("kvm_intel/parameters/ept", "N\n"), ("kvm/x", "")],
            [("kvm/parameters/x", ""), ("kvm/y", "")],
            [
                ("kvm_pvm/parameters/x", ""),
                ("kvm_amd/parameters/npt", "1"),
            ],
        ] {
            assert!(
                matches!(with(&bad), KvmVerdict::CannotRunStockKernels(_)),
                "{bad:?}"
            );
        }
    }
}
