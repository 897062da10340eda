//! What must hold of what starts the guest.

use super::{ConfigError, check_path};
use crate::{BootConfig, FirmwareChoice};

/// Longest command line of an x86 Linux kernel, in bytes.
pub const MAX_CMDLINE: usize = 2047;

/// Checks what starts a guest, which has devices to boot from or not, a network among them or not.
pub fn check_boot(boot: &BootConfig, devices: bool, net: bool) -> Result<(), ConfigError> {
    for (what, path) in [
        ("kernel", &boot.kernel),
        ("initrd", &boot.initrd),
        ("BIOS", &boot.bios),
        ("UEFI", &boot.uefi),
        ("UEFI variables", &boot.uefi_vars),
        ("network boot ROM", &boot.net_rom),
    ] {
        path.as_deref()
            .map_or(Ok(()), |path| check_path(what, path))?;
    }
    if boot.net_rom.is_some() && !net {
        return Err(ConfigError::UnusedNetRom);
    }
    if boot.kernel.is_none() {
        check_firmware(boot, devices)
    } else if net {
        Err(ConfigError::KernelAndNetBoot)
    } else {
        check_kernel(boot)
    }
}

/// Files for firmware, and which that is.
fn files(boot: &BootConfig) -> [(&'static str, FirmwareChoice, bool); 3] {
    [
        ("--bios", FirmwareChoice::Bios, boot.bios.is_some()),
        ("--uefi", FirmwareChoice::Uefi, boot.uefi.is_some()),
        (
            "--uefi-vars",
            FirmwareChoice::Uefi,
            boot.uefi_vars.is_some(),
        ),
    ]
}

fn check_kernel(boot: &BootConfig) -> Result<(), ConfigError> {
    if let Some((what, ..)) = files(boot).into_iter().find(|(.., given)| *given) {
        return Err(ConfigError::KernelAndFile(what));
    }
    match boot.firmware {
        _ if boot.menu => Err(ConfigError::KernelAndMenu),
        FirmwareChoice::Auto | FirmwareChoice::None => {
            boot.cmdline.as_deref().map_or(Ok(()), check_cmdline)
        }
        firmware => Err(ConfigError::KernelAndFirmware(firmware)),
    }
}

fn check_firmware(boot: &BootConfig, devices: bool) -> Result<(), ConfigError> {
    let firmware = boot.firmware;
    // What `fast` falls back to may be given.
    let chosen = matches!(firmware, FirmwareChoice::Bios | FirmwareChoice::Uefi);
    let mut others = files(boot).into_iter();
    let other = others.find(|(_, of, given)| *given && chosen && *of != firmware);
    match firmware {
        _ if boot.initrd.is_some() => Err(ConfigError::NoKernel("initrd")),
        _ if boot.cmdline.is_some() => Err(ConfigError::NoKernel("cmdline")),
        FirmwareChoice::None => Err(ConfigError::NeitherKernelNorFirmware),
        _ if boot.bios.is_some() && (boot.uefi.is_some() || boot.uefi_vars.is_some()) => {
            Err(ConfigError::BiosAndUefi)
        }
        _ if !devices => Err(ConfigError::NothingToBoot),
        _ => other.map_or(Ok(()), |(what, ..)| {
            Err(ConfigError::OtherFirmware { what, firmware })
        }),
    }
}

fn check_cmdline(cmdline: &str) -> Result<(), ConfigError> {
    if cmdline.len() > MAX_CMDLINE {
        return Err(ConfigError::Cmdline(format!("{} bytes", cmdline.len())));
    }
    match cmdline.chars().find(|letter| letter.is_control()) {
        Some(letter) => Err(ConfigError::Cmdline(format!("the character {letter:?}"))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use crate::{FirmwareChoice, VmConfig};

    fn check(yaml: &str) -> Result<(), String> {
        VmConfig::parse(yaml)
            .unwrap()
            .validate()
            .map_err(|error| error.to_string())
    }

    #[test]
    fn every_firmware_has_its_name() {
        for firmware in FirmwareChoice::ALL {
            let kernel = ["", "kernel: k"][usize::from(firmware == FirmwareChoice::None)];
            let yaml =
                format!("{{disks: [{{path: a}}], boot: {{firmware: {firmware}, {kernel}}}}}");
            assert_eq!(VmConfig::parse(&yaml).unwrap().boot.firmware, firmware);
            assert_eq!(check(&yaml), Ok(()), "{yaml}");
        }
        let error = VmConfig::parse("boot: {firmware: eufi}").unwrap_err();
        assert!(error.to_string().contains("uefi"), "{error}");
    }

    #[test]
    fn contradictions_are_refused() {
        for (boot, expected) in [
            (
                "firmware: uefi, kernel: k",
                "leave out --kernel, or --firmware uefi",
            ),
            (
                "firmware: bios, kernel: k",
                "leave out --kernel, or --firmware bios",
            ),
            (
                "firmware: fast, kernel: k",
                "leave out --kernel, or --firmware fast",
            ),
            ("firmware: none", "give a kernel with --kernel"),
            ("firmware: none, bios: b", "give a kernel with --kernel"),
            (
                "firmware: uefi, bios: b",
                "`--bios` is of no use to --firmware uefi",
            ),
            (
                "firmware: bios, uefi: u",
                "`--uefi` is of no use to --firmware bios",
            ),
            ("firmware: bios, uefi_vars: v", "`--uefi-vars` is of no use"),
            ("bios: b, uefi: u", "are for different firmware"),
            ("bios: b, uefi_vars: v", "are for different firmware"),
            ("uefi_vars: ''", "path of the UEFI variables is empty"),
            ("kernel: k, menu: true", "leave out --kernel or --boot-menu"),
            ("kernel: k, bios: b", "leave out --kernel or `--bios`"),
            ("kernel: k, uefi: u", "leave out --kernel or `--uefi`"),
            ("firmware: uefi, initrd: i", "`initrd` needs a kernel"),
        ] {
            let error = check(&format!("{{disks: [{{path: a}}], boot: {{{boot}}}}}")).unwrap_err();
            assert!(error.contains(expected), "{boot}: {error}");
        }
        assert!(
            check("boot: {firmware: uefi}")
                .unwrap_err()
                .contains("nothing to boot")
        );
    }
}
