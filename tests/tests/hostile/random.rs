//! Random numbers from a seed, the same on every machine.

use std::cell::Cell;

/// SplitMix64.
#[derive(Debug)]
pub struct Random(Cell<u64>);

impl Random {
    pub const fn new(seed: u64) -> Self {
        Self(Cell::new(seed))
    }

    pub fn next(&self) -> u64 {
        let mut z = self.0.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.0.set(z);
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// The low 32 bits of the next number.
    pub fn word(&self) -> u32 {
        (self.next() & 0xffff_ffff) as u32
    }

    /// The low 16 bits of the next number.
    pub fn half(&self) -> u16 {
        (self.next() & 0xffff) as u16
    }

    /// A number below `end`.
    pub fn below(&self, end: u32) -> u32 {
        self.word() % end
    }

    /// True once in `count` times.
    pub fn one_in(&self, count: u32) -> bool {
        self.below(count) == 0
    }

    /// One of `choices`, of which there is at least one.
    pub fn pick<T: Copy>(&self, choices: &[T]) -> T {
        choices[self.next() as usize % choices.len()]
    }
}
