//! Accesses of any width and alignment, cut at dword boundaries.

use std::ops::Range;

/// The part of an access that falls into one aligned dword.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DwordPart {
    /// Offset of the dword, a multiple of four.
    pub(crate) dword: u64,
    /// Index of the part's first byte within the dword.
    pub(crate) lane: usize,
    /// Where the part is in the access' data.
    pub(crate) data: Range<usize>,
}

impl DwordPart {
    /// Copies this part of `value`, the dword's value, to its place in `data`.
    pub(crate) fn extract(&self, value: u32, data: &mut [u8]) {
        let bytes = value.to_le_bytes();
        let from = bytes.iter().skip(self.lane);
        if let Some(part) = data.get_mut(self.data.clone()) {
            part.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
        }
    }

    /// This part of `data` in its place within the dword, and the mask of the bits it covers.
    pub(crate) fn insert(&self, data: &[u8]) -> (u32, u32) {
        let (mut value, mut mask) = ([0; 4], [0; 4]);
        let part = data.get(self.data.clone()).unwrap_or_default();
        let lanes = value.iter_mut().zip(&mut mask).skip(self.lane);
        for ((value, mask), byte) in lanes.zip(part) {
            *value = *byte;
            *mask = 0xff;
        }
        (u32::from_le_bytes(value), u32::from_le_bytes(mask))
    }

    /// Whether the part is the whole dword.
    pub(crate) fn is_whole(&self) -> bool {
        self.data.len() == 4
    }
}

/// Cuts an access of `len` bytes at `offset` into its parts within aligned dwords.
///
/// Stops where the address space ends.
pub(crate) fn dword_parts(offset: u64, len: usize) -> impl Iterator<Item = DwordPart> {
    let mut start = 0;
    let mut at = Some(offset);
    std::iter::from_fn(move || {
        let offset = at.filter(|_| start < len)?;
        let lane = (offset & 3) as usize;
        let end = len.min(start + 4 - lane);
        let part = DwordPart {
            dword: offset & !3,
            lane,
            data: start..end,
        };
        at = (offset & !3).checked_add(4);
        start = end;
        Some(part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_are_cut_at_dwords() {
        let parts: Vec<_> = dword_parts(0x1003, 6).collect();
        let part = |dword, lane, data| DwordPart { dword, lane, data };
        let expected = [
            part(0x1000, 3, 0..1),
            part(0x1004, 0, 1..5),
            part(0x1008, 0, 5..6),
        ];
        assert_eq!(parts, expected);
        assert_eq!(dword_parts(0, 0).count(), 0);
        assert_eq!(dword_parts(u64::MAX - 1, 8).count(), 1);
    }

    #[test]
    fn parts_are_placed_by_their_lane() {
        let part = dword_parts(6, 2).next().expect("one part");
        assert_eq!(part.insert(&[0xaa, 0xbb]), (0xbbaa_0000, 0xffff_0000));
        let mut data = [0; 2];
        part.extract(0x4433_2211, &mut data);
        assert_eq!(data, [0x33, 0x44]);
        assert!(!part.is_whole());
    }
}
