//! What a configuration asks of the host, looked at before anything is started.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, anyhow};
use edgevmm_config::{ByteSize, MemoryConfig, VmConfig};
use edgevmm_vmm::machine::overlay_of;
use nix::libc::O_NONBLOCK;

use crate::exit::Failure;
use crate::term;

/// Checks that files can be read and that memory suffices, so that a slip is told in plain words
/// and before anything is made. What is found missing later is an error there.
///
/// # Errors
///
/// Tells the first thing that is missing.
pub fn check(vm: &VmConfig) -> Result<(), Failure> {
    check_memory(&vm.memory, &Memory::read()?)?;
    for disk in vm.disks.iter().filter(|disk| !disk.is_empty()) {
        check_file("disk image", &disk.path)?;
        disk.backing
            .iter()
            .try_for_each(|path| check_file("backing file", path))?;
        disk.data_file
            .iter()
            .try_for_each(|path| check_file("data file", path))?;
    }
    let seed = vm.cloud_init.clone().unwrap_or_default();
    for (what, path) in [
        ("kernel", &vm.boot.kernel),
        ("initrd", &vm.boot.initrd),
        ("BIOS image", &vm.boot.bios),
        ("UEFI image", &vm.boot.uefi),
        ("user-data", &seed.user_data),
        ("SSH key file", &seed.ssh_key),
        ("network configuration", &seed.network_config),
    ] {
        path.as_deref()
            .map_or(Ok(()), |path| check_file(what, path))?;
    }
    Ok(())
}

/// Tells where the guest's writes go, where the user has not said so, or for the first time.
pub fn tell_of_overlays(vm: &VmConfig) {
    for disk in vm.disks.iter().filter(|disk| !disk.is_cdrom()) {
        // What can't be looked at is told when the disk is opened.
        let Ok(Some(overlay)) = overlay_of(disk) else {
            continue;
        };
        let (image, path) = (disk.path.display(), overlay.path.display());
        let text = match (disk.ro || disk.snapshot, overlay.exists) {
            (true, _) => format!("{image} is read with what {path} changes of it"),
            (false, true) if disk.overlay.is_some() => continue,
            (false, true) => format!("writes to {image} are kept in {path}"),
            (false, false) => format!("writes to {image} are kept in {path}, which is made now"),
        };
        term::notice(&text);
    }
}

fn check_file(what: &str, path: &Path) -> Result<(), Failure> {
    let Err(error) = try_open(path) else {
        return Ok(());
    };
    let hint = match error.kind() {
        io::ErrorKind::NotFound => {
            "check the path; a relative one is taken from the current folder"
        }
        io::ErrorKind::PermissionDenied => "check the owner and mode of the file and its folders",
        _ => "give a file that can be read",
    };
    let what = format!("Can't read {what} {}", path.display());
    Err(Failure::usage(anyhow!(error).context(what)).hint(hint))
}

fn try_open(path: &Path) -> io::Result<()> {
    // A pipe that nobody writes to would wait for ever.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(O_NONBLOCK)
        .open(path)?;
    if file.metadata()?.is_dir() {
        Err(io::ErrorKind::IsADirectory.into())
    } else {
        Ok(())
    }
}

/// Memory of the host, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// All.
    pub total: u64,
    /// What can be had without swapping.
    pub available: u64,
    /// Reserved as huge pages of the default size.
    pub huge_total: u64,
    /// Of these, not in use.
    pub huge_free: u64,
}

impl Memory {
    /// Asks the kernel.
    ///
    /// # Errors
    ///
    /// When /proc isn't there.
    pub fn read() -> anyhow::Result<Self> {
        let text = fs::read_to_string("/proc/meminfo").context("Can't read /proc/meminfo")?;
        Ok(Self::parse(&text))
    }

    fn parse(text: &str) -> Self {
        let field = |name: &str| {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        let kib = |name| field(name).unwrap_or(0).saturating_mul(1024);
        let pages = |name| field(name).unwrap_or(0).saturating_mul(kib("Hugepagesize"));
        Self {
            total: kib("MemTotal"),
            available: kib("MemAvailable"),
            huge_total: pages("HugePages_Total"),
            huge_free: pages("HugePages_Free"),
        }
    }
}

fn check_memory(wanted: &MemoryConfig, host: &Memory) -> Result<(), Failure> {
    let size = wanted.size;
    if size.0 > host.total {
        let has = whole_mib(host.total);
        return Err(
            Failure::usage(anyhow!("{size} of memory is more than this host's {has}")).hint(
                format!("use less, like --memory {}", whole_mib(host.available / 2)),
            ),
        );
    }
    if wanted.hugepages && size.0 > host.huge_free {
        let free = whole_mib(host.huge_free);
        return Err(Failure::usage(anyhow!(
            "{size} of memory needs as much in huge pages, and {free} of them are free"
        ))
        .hint(format!(
            "reserve them with `sysctl vm.nr_hugepages={}`, or leave --hugepages out",
            host.huge_total
                .saturating_sub(host.huge_free)
                .saturating_add(size.0)
                >> 21
        )));
    }
    if !wanted.hugepages && size.0 > host.available {
        let available = whole_mib(host.available);
        tracing::warn!("{size} of memory is more than the {available} that are available now");
    }
    Ok(())
}

/// Rounded down for people.
fn whole_mib(bytes: u64) -> ByteSize {
    ByteSize(bytes >> 20 << 20)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const MEMINFO: &str = "MemTotal:        2048000 kB\nMemAvailable:    1024000 kB\n\
                           HugePages_Total:       4\nHugePages_Free:        3\n\
                           Hugepagesize:       2048 kB\n";

    #[test]
    fn meminfo_is_read() {
        let memory = Memory::parse(MEMINFO);
        assert_eq!(
            (memory.total, memory.available),
            (2_048_000 << 10, 1_024_000 << 10)
        );
        assert_eq!((memory.huge_total, memory.huge_free), (8 << 20, 6 << 20));
        assert_eq!(Memory::parse("MemTotal: x\n"), Memory::default());
        assert!(Memory::read().unwrap().total > 0);
    }

    #[test]
    fn memory_has_limits() {
        let host = Memory::parse(MEMINFO);
        let check = |text: &str| {
            check_memory(&text.parse().unwrap(), &host).map_err(|failure| failure.to_string())
        };
        assert_eq!(check("2000M"), Ok(()));
        assert_eq!(check("6M,hugepages"), Ok(()));
        let error = check("2001M").unwrap_err();
        assert!(
            error.contains(
                "2001M of memory is more than this host's 2000M\nhint: use less, like --memory 500M"
            ),
            "{error}"
        );
        let error = check("8M,hugepages").unwrap_err();
        assert!(error.contains("vm.nr_hugepages=5"), "{error}");
    }

    #[test]
    fn files_are_looked_at() {
        let folder = tempfile::tempdir().unwrap();
        let message = |path: &Path| check_file("kernel", path).unwrap_err().to_string();
        assert!(message(&folder.path().join("x")).contains("check the path"));
        assert!(message(folder.path()).contains("is a directory\nhint: give a file"));
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        assert_eq!(check_file("kernel", &file), Ok(()));
    }
}
