//! Checks of processors, memory and firmware.

use super::Report;
use crate::api::domain::{Domain, Firmware};
use crate::api::instance::Topology;
use crate::shape;

/// Most vCPUs of a machine.
const MAX_VCPUS: u32 = 254;
/// Largest ID of a vCPU's local APIC.
const MAX_APIC: u32 = 254;
/// Least memory of a guest, in bytes.
const MIN_MEMORY: u64 = 16 << 20;

pub(super) fn check(domain: &Domain, report: &mut Report<'_>) {
    let topology = shape::topology(domain);
    let vcpus = topology.vcpus();
    if !(1..=MAX_VCPUS).contains(&vcpus) {
        report.refuse("cpu", format!("{vcpus} vCPUs: ask for 1 to {MAX_VCPUS}"));
    } else if last_apic(topology) > MAX_APIC {
        report.refuse(
            "cpu",
            "so many sockets need numbers of cores and threads that are powers of two",
        );
    }
    let model = domain.cpu.as_ref().and_then(|cpu| cpu.model.as_deref());
    report.expect_one_of("cpu.model", model, &["", "host-model", "host-passthrough"]);
    match shape::guest_memory(domain) {
        None => report.refuse(
            "memory.guest",
            "write how much memory the guest has, here or in resources.requests.memory",
        ),
        Some(bytes) if bytes < MIN_MEMORY => {
            report.refuse(
                "memory.guest",
                "too little for a guest: ask for 16Mi or more",
            );
        }
        Some(_) => {}
    }
    if let Some(kind) = domain
        .machine
        .as_ref()
        .and_then(|machine| machine.kind.as_deref())
        && !(kind.is_empty() || kind == "q35" || kind.starts_with("pc-q35-"))
    {
        report.expect_one_of("machine.type", Some(kind), &["q35"]);
    }
    if let Some(firmware) = &domain.firmware {
        self::firmware(firmware, &mut report.below("firmware"));
    }
    if let Some(features) = &domain.features {
        for (field, part) in [("acpi", &features.acpi), ("apic", &features.apic)] {
            if part
                .as_ref()
                .is_some_and(|part| part.enabled == Some(false))
            {
                report.refuse(&format!("features.{field}.enabled"), "it can't be left out");
            }
        }
    }
    let hpet = domain
        .clock
        .as_ref()
        .and_then(|clock| clock.timer.as_ref()?.hpet.as_ref());
    if hpet.is_some_and(|hpet| hpet.present != Some(false)) {
        report.refuse("clock.timer.hpet", "there is none: set `present: false`");
    }
    let timers = domain.clock.as_ref().and_then(|clock| clock.timer.clone());
    let timers = timers.unwrap_or_default();
    for (field, timer) in [
        ("kvm", timers.kvm),
        ("pit", timers.pit),
        ("rtc", timers.rtc),
    ] {
        if timer.is_some_and(|timer| timer.present == Some(false)) {
            report.refuse(&format!("clock.timer.{field}"), "it can't be left out");
        }
    }
    let guest = shape::guest_memory(domain);
    super::resources::check(&domain.resources, guest, &mut report.below("resources"));
    if domain.resources.overcommit_guest_overhead == Some(true) {
        report.refuse(
            "resources.overcommitGuestOverhead",
            "not supported by edgevmm",
        );
    }
    report.expect_one_of(
        "ioThreadsPolicy",
        domain.io_threads_policy.as_deref(),
        &["", "auto", "shared"],
    );
}

/// ID of the last vCPU's local APIC: socket, core and thread, the latter two each in whole bits.
fn last_apic(topology: Topology) -> u32 {
    let bits = |count: u32| u32::BITS - (count - 1).leading_zeros();
    let (of_core, of_thread) = (bits(topology.cores), bits(topology.threads));
    let socket = (topology.sockets - 1) << (of_core + of_thread);
    socket | (topology.cores - 1) << of_thread | (topology.threads - 1)
}

fn firmware(firmware: &Firmware, report: &mut Report<'_>) {
    if let Some(loader) = &firmware.bootloader {
        if loader.bios.is_some() && loader.efi.is_some() {
            report.refuse("bootloader", "write bios or efi, not both");
        }
        if let Some(efi) = &loader.efi {
            if efi.secure_boot != Some(false) {
                report.refuse(
                    "bootloader.efi.secureBoot",
                    "Secure Boot is not supported: set `secureBoot: false`",
                );
            }
            if efi.persistent == Some(true) {
                report.refuse("bootloader.efi.persistent", "not supported by edgevmm");
            }
        }
    }
    if let Some(kernel) = &firmware.kernel_boot {
        let Some(container) = &kernel.container else {
            return report.refuse("kernelBoot.container", "write the image with the kernel");
        };
        let paths = [
            ("kernelPath", &container.kernel_path, true),
            ("initrdPath", &container.initrd_path, false),
        ];
        for (field, path, needed) in paths {
            let good = path.as_ref().map_or(!needed, |path| path.starts_with('/'));
            if !good {
                let field = format!("kernelBoot.container.{field}");
                report.refuse(&field, "write the absolute path of a file in the image");
            }
        }
    }
    let wrong = |uuid: &String| uuid.parse::<uuid::Uuid>().is_err();
    if firmware.uuid.as_ref().is_some_and(wrong) {
        report.refuse("uuid", "no UUID");
    }
    if firmware
        .serial
        .as_ref()
        .is_some_and(|serial| !is_serial(serial))
    {
        report.refuse("serial", "write letters, digits, _, ., + or -");
    }
}

/// Whether it can be a serial number.
fn is_serial(serial: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.+-".contains(&byte);
    serial.len() <= 64 && serial.bytes().all(plain)
}
