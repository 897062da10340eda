//! Attacks on ports and on PCI configuration space.

use crate::memory::{BUFFERS, ECAM, bar, buffer};
use crate::random::Random;
use crate::script::{Kind, Script};

/// Ranges of ports that somebody answers: (first, last).
const PORTS: [(u16, u16); 13] = [
    (0x20, 0x21),
    (0x40, 0x43),
    (0x60, 0x64),
    (0x70, 0x71),
    (0x92, 0x92),
    (0xa0, 0xa1),
    (0x3f8, 0x3ff),
    (0x402, 0x402),
    (0x4d0, 0x4d1),
    (0x510, 0x51b),
    (0x600, 0x60b),
    (0xcf8, 0xcff),
    (0, 0xffff),
];

/// Reset control, and the control block of power management.
const RESET: u16 = 0xcf9;
const PM1A_CONTROL: u16 = 0x604;
const SLEEP_ENABLE: u32 = 1 << 13;

/// The event block of power management, and the byte that powers off there as firmware for Cloud
/// Hypervisor does.
const PM1A_EVENT: u16 = 0x600;
const REDUCED_S5: u32 = 0x34;

/// Accesses to ports at random, but none that resets the machine or switches it off.
pub fn ports(script: &mut Script, random: &Random) {
    for _ in 0..60 {
        let (first, last) = random.pick(&PORTS);
        let port = first + (random.next() % (u64::from(last - first) + 1)) as u16;
        match random.below(12) {
            0 => script.push(Kind::In8, port.into(), 0, 0),
            1 => script.push(Kind::In16, port.into(), 0, 0),
            2 => script.push(Kind::In32, port.into(), 0, 0),
            3 => script.push(
                Kind::InString,
                port.into(),
                BUFFERS.start,
                random.below(3000),
            ),
            4..8 => {
                let value = random.word();
                write_port(script, random, port, 1, value);
            }
            _ => {
                let width = random.pick(&[1, 2, 4]);
                let value = random.pick(&[0, 1, 0x80, 0xff, u32::MAX, random.word()]);
                write_port(script, random, port, width, value);
            }
        }
    }
    // A string of bytes that are all the same is as harmless as one of them.
    let port = random.pick(&[0x3f8, 0x402, 0x60, 0x71, 0x80]);
    script.push(
        Kind::Fill,
        BUFFERS.start,
        random.word() & 0x6f6f_6f6f,
        0x400,
    );
    script.push(Kind::OutString, port, BUFFERS.start, random.below(0x1000));
}

fn write_port(script: &mut Script, random: &Random, port: u16, width: u16, value: u32) {
    let covers = |other: u16| port <= other && other - port < width;
    // The address register of PCI is four bytes wide.
    if covers(RESET) && (port, width) != (0xcf8, 4) {
        return;
    }
    let value = match port {
        // Pulses of the reset line, and the output port that has it.
        0x64 if value & 0xff >= 0xf0 || value & 0xff == 0xd1 => 0xaa,
        0x92 => value & !1,
        _ if (port, width) == (PM1A_CONTROL, 2) => value & !SLEEP_ENABLE,
        _ if (port, width) == (PM1A_EVENT, 1) && value & 0xff == REDUCED_S5 => 0,
        _ if covers(PM1A_CONTROL) || covers(PM1A_CONTROL + 1) => return,
        _ => value,
    };
    // Wide accesses to these could be taken for several narrow ones.
    if width > 1 && (0x5d..0x65).contains(&port) || port.abs_diff(0x92) < 4 && port != 0x92 {
        return;
    }
    match width {
        1 => script.out8(port, (value & 0xff) as u8),
        2 => script.out16(port, (value & 0xffff) as u16),
        _ => script.out32(port, value),
    }
    if port == 0x70 && random.one_in(2) {
        script.out8(0x71, (random.word() & 0xff) as u8);
        script.push(Kind::In8, 0x71, 0, 0);
    }
}

/// Requests to the firmware configuration device with descriptors that lie.
pub fn fw_cfg(script: &mut Script, random: &Random) {
    for _ in 0..8 {
        let request = BUFFERS.start + random.below(0x1000);
        let key = random.pick(&[0, 1, 0x19, 0x20, 0x21, 0x22, 0x8000, random.word() & 0xffff]);
        let control = key << 16 | random.below(32);
        let (address, len) = buffer(random);
        script.write32(request, control.swap_bytes());
        script.write32(request + 4, len.swap_bytes());
        script.write64(request + 8, address.swap_bytes());
        let at = if random.one_in(5) {
            buffer(random).0
        } else {
            request.into()
        };
        script.out32(0x514, ((at >> 32) as u32).swap_bytes());
        script.out32(0x518, ((at & 0xffff_ffff) as u32).swap_bytes());
        script.out16(0x510, random.half());
        script.push(
            Kind::InString,
            0x511,
            BUFFERS.start + 0x2000,
            random.below(0x1000),
        );
        script.out8(0x511, 0x55);
    }
}

/// Configuration space at random, with BARs moved over each other and everything else.
pub fn pci(script: &mut Script, random: &Random, slots: u32) {
    for _ in 0..40 {
        let slot = random.below(slots + 2);
        let config = ECAM + (slot << 15);
        match random.below(8) {
            0..3 => {
                let base = bar(random, slots);
                script.write32(config + 0x10, base);
                if random.one_in(2) {
                    script.write16(config + 4, 6);
                    script.read32(base & !0xfff);
                }
            }
            3 => {
                // Half of a BAR is written before the other.
                let [low, _, _, high] = bar(random, slots).to_le_bytes();
                script.write8(config + 0x13, high);
                script.write8(config + 0x10, low);
            }
            4 => {
                script.write16(config + 4, random.half());
                script.read32(config + 4);
            }
            5 => window(script, random, config),
            _ => {
                let kind = random.pick(&[Kind::Write8, Kind::Write16, Kind::Write32]);
                let function = random.pick(&[0, 0, 0, 0x1000, 0x7000]);
                let register = random.pick(&[random.below(0x100), random.below(0xffc)]);
                // MSI-X stays off: its table may hold anything.
                if !(0x3d..0x44).contains(&register) {
                    script.push(kind, config + function + register, random.word(), 0);
                }
            }
        }
    }
}

/// The BAR by way of configuration space: the capability after the others.
fn window(script: &mut Script, random: &Random, config: u32) {
    for capability in (0x40..0xc0).step_by(4) {
        if random.one_in(4) && capability >= 0x50 {
            // bar, offset, length, data
            script.write8(config + capability + 4, random.pick(&[0, 0, 1, 0xff]));
            script.write32(
                config + capability + 8,
                random.pick(&[0x14, 0x100, 0x800, 0x1000, 0x3fff, random.word()]),
            );
            script.write32(
                config + capability + 12,
                random.pick(&[1, 2, 4, 3, 0, u32::MAX]),
            );
            script.write32(config + capability + 16, random.word() & 0x7f);
            script.read32(config + capability + 16);
        }
    }
}
