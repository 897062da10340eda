//! Which firmware starts the guest, where the config leaves that to its disks and its host.

use std::path::Path;

use edgevmm_config::{BootConfig, ConsoleDevice, DiskConfig, FirmwareChoice, VmConfig};

use super::BuildError;
use super::disks::OpenDisk;
use super::firmware_data::{self, Description};
use super::storage::StorageError;
use crate::boot::cloudhv::{CloudHv, DEFAULT_CLOUDHV};
use crate::boot::fast::Fast;
use crate::boot::firmware::Firmware;
use crate::boot::kernel::Kernel;
use crate::boot::ovmf::{DEFAULT_CODE, Ovmf};
use crate::boot::partitions::{BootStyle, boot_style};
use crate::boot::{Boot, BootError, BootPlan};

/// What starts the guest, open but not loaded, and what the user is told of the choice.
pub(super) fn open(
    config: &VmConfig,
    disks: &[OpenDisk],
    description: &Description,
) -> Result<(BootPlan, Option<String>), BuildError> {
    let boot = &config.boot;
    if let Some(kernel) = &boot.kernel {
        let (initrd, line) = (boot.initrd.as_deref(), command_line(config));
        let tables = firmware_data::placed(description, false)?;
        let kernel = Kernel::open(kernel, initrd, line, tables)?;
        return Ok((BootPlan::new(Boot::Kernel(kernel), Vec::new()), None));
    }
    let (firmware, note) = match boot.firmware {
        FirmwareChoice::Auto if boot.uefi.is_some() || boot.uefi_vars.is_some() => {
            (FirmwareChoice::Uefi, None)
        }
        FirmwareChoice::Auto if boot.bios.is_none() => choose(disks)?,
        firmware => (firmware, None),
    };
    if firmware == FirmwareChoice::Fast {
        let fast = Boot::Fast(Fast::open(firmware_data::placed(description, false)?)?);
        let (next, _) = choose(disks)?;
        // It may do alone: what it leaves to others fails when it comes to that.
        let next = open_firmware(next, config, description);
        let next = next.inspect_err(|error| tracing::debug!(%error, "No other firmware"));
        return Ok((BootPlan::new(fast, next.into_iter().collect()), note));
    }
    let first = open_firmware(firmware, config, description)?;
    Ok((BootPlan::new(first, Vec::new()), note))
}

/// Firmware that starts a boot loader.
fn open_firmware(
    firmware: FirmwareChoice,
    config: &VmConfig,
    description: &Description,
) -> Result<Boot, BuildError> {
    let boot = &config.boot;
    if firmware == FirmwareChoice::Uefi {
        let net = config.nets.iter().any(|net| net.bootindex.is_some());
        return uefi(boot, net, disks_have_order(&config.disks), description);
    }
    Ok(Boot::Bios(Firmware::open(boot.bios.as_deref())?))
}

/// Whether it was said which of several disks comes first.
fn disks_have_order(disks: &[DiskConfig]) -> bool {
    disks.len() > 1 && disks.iter().any(|disk| disk.bootindex.is_some())
}

/// The UEFI that was asked for: OVMF where variables are to last, a network is booted from or disks have
/// an order, else the one that needs less of the machine, or whichever is installed.
fn uefi(
    boot: &BootConfig,
    net: bool,
    order: bool,
    description: &Description,
) -> Result<Boot, BuildError> {
    let (file, vars) = (boot.uefi.as_deref(), boot.uefi_vars.as_deref());
    let installed = |path: &str| Path::new(path).exists();
    let ovmf = match file {
        Some(file) => !CloudHv::is_one(file)?,
        // Where there is neither, the one that every release has is asked for.
        None if order && installed(DEFAULT_CODE) => true,
        None => vars.is_some() || net || !installed(DEFAULT_CLOUDHV),
    };
    match (file, vars) {
        _ if ovmf => Ok(Boot::Ovmf(Ovmf::open(file, vars)?)),
        (Some(file), Some(_)) => Err(BootError::KeepsNoVars(file.to_owned()))?,
        (Some(file), None) if net => Err(BootError::NoNetBoot(file.to_owned()))?,
        _ => {
            let tables = firmware_data::placed(description, true)?;
            Ok(Boot::CloudHv(CloudHv::open(file, tables)?))
        }
    }
}

/// What the first disk to boot from was made for.
fn choose(disks: &[OpenDisk]) -> Result<(FirmwareChoice, Option<String>), StorageError> {
    let bootable = disks.iter().filter(|disk| disk.boot_order.is_some());
    let Some(first) = bootable.min_by_key(|disk| disk.boot_order) else {
        return Ok((FirmwareChoice::Bios, None));
    };
    // A disc may boot both ways, and SeaBIOS boots any.
    let Some(image) = first.backend() else {
        return Ok((FirmwareChoice::Bios, None));
    };
    let style =
        boot_style(image).map_err(|source| StorageError::disk(Path::new(first.name()), source))?;
    let (firmware, reason) = match style {
        BootStyle::Bios(reason) => (FirmwareChoice::Bios, reason),
        BootStyle::Uefi(reason) => (FirmwareChoice::Uefi, reason),
    };
    let note = format!(
        "booting {} by {firmware}, as {reason} (--firmware chooses)",
        first.name()
    );
    Ok((firmware, Some(note)))
}

/// The user's command line, or one that puts the kernel's messages on the console.
fn command_line(config: &VmConfig) -> String {
    let console = match config.console.device {
        ConsoleDevice::Serial => "console=ttyS0",
        ConsoleDevice::Virtio => "console=hvc0",
    };
    config
        .boot
        .cmdline
        .clone()
        .unwrap_or_else(|| console.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_disk_is_first_whatever_is_said() {
        let disk = |bootindex| DiskConfig {
            bootindex,
            ..DiskConfig::new("d")
        };
        assert!(disks_have_order(&[disk(None), disk(Some(1))]));
        assert!(!disks_have_order(&[disk(Some(1))]));
        assert!(!disks_have_order(&[disk(None), disk(None)]));
    }
}
