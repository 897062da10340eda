//! Addresses: what is where in the guest, and where a hostile driver says that it is.

use crate::random::Random;

/// The machine's RAM in bytes, all of it in one piece from 0 on.
pub const RAM: u32 = 64 << 20;

/// Memory that devices may write to as they please.
pub const ARENA: std::ops::Range<u32> = 0x40_0000..RAM;

/// Arena for buffers; before it are the queues.
pub const BUFFERS: std::ops::Range<u32> = 0x100_0000..RAM;

/// Configuration space.
pub const ECAM: u32 = 0xb000_0000;
/// Start of the window of memory BARs.
pub const WINDOW: u32 = 0xc000_0000;
const WINDOW_END: u32 = 0xfec0_0000;

/// Addresses that are no RAM.
const NOT_RAM: [u64; 14] = [
    RAM as u64,
    RAM as u64 + 0x1000,
    ECAM as u64,
    ECAM as u64 + 0x8010,
    WINDOW as u64,
    WINDOW as u64 + 0x1000,
    WINDOW_END as u64,
    0xfee0_0000,
    0xffff_fff0,
    1 << 32,
    1 << 52,
    1 << 63,
    u64::MAX - 0xfff,
    u64::MAX,
];

/// Any address outside of RAM.
pub fn not_ram(random: &Random) -> u64 {
    let address = random.pick(&NOT_RAM);
    address.wrapping_add(u64::from(random.below(3)) * 4)
}

/// An address and a length for a buffer: now and then sound, and never with anything of the
/// payload in what is RAM of it.
pub fn buffer(random: &Random) -> (u64, u32) {
    let arena = u64::from(BUFFERS.start + random.below(BUFFERS.end - BUFFERS.start - 0x1_0000));
    match random.below(16) {
        0 => (not_ram(random), random.below(0x2000)),
        1 => (not_ram(random), random.word()),
        // Over the end of RAM by a little or by much.
        2 => (u64::from(RAM - random.below(0x1000)), 0x1001),
        3 => (
            arena,
            random.pick(&[u32::MAX, 0x8000_0000, 0x7fff_ffff, RAM]),
        ),
        4 => (arena, 0),
        5 => (u64::from(random.below(0x9_0000)), random.below(0x1000)),
        // All of RAM that devices may have.
        6 => (ARENA.start.into(), ARENA.end - ARENA.start),
        7 => (arena, 1 + random.below(16)),
        _ => (arena, random.pick(&[512, 4096, 0x8000, 0xffff, 513])),
    }
}

/// An address for a ring.
pub fn ring(random: &Random) -> u64 {
    match random.below(4) {
        0 => not_ram(random),
        1 => u64::from(RAM - random.below(0x2000)),
        2 => u64::from(random.below(0x9_0000)),
        _ => u64::from(ARENA.start + random.below(ARENA.end - ARENA.start)),
    }
}

/// A base for a BAR that no access to it can hurt the payload at.
pub fn bar(random: &Random, slots: u32) -> u32 {
    match random.below(8) {
        0 => ECAM + random.below(0x10_0000),
        1 => 0xfee0_0000,
        2 => WINDOW_END - random.pick(&[0, 0x1000, 0x4000]),
        3 => random.pick(&[0xffff_c000, u32::MAX, 0]),
        4 => ARENA.start + random.below(ARENA.end - ARENA.start),
        5 => WINDOW + random.below(WINDOW_END - WINDOW),
        _ => WINDOW + random.below(slots) * 0x4000,
    }
}
