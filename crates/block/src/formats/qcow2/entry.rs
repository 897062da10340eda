//! Entries of L1 and L2 tables, as numbers and as what they mean.

use super::layout::Layout;

/// Where an entry of an L1 or L2 table points.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// The refcount of what the entry points at is exactly one.
pub const COPIED: u64 = 1 << 63;
/// An entry of an L2 table points at compressed data.
pub const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
const SECTOR: u64 = 512;

/// Where an image has the data of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Nowhere.
    None,
    /// In a cluster of the file.
    At {
        /// Where that begins, in bytes.
        offset: u64,
        /// Nothing else uses it, so it may be written.
        own: bool,
    },
    /// In the file, compressed.
    Packed(Packed),
}

/// Where compressed data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Packed {
    /// Where it begins, in bytes.
    pub offset: u64,
    /// Most bytes that it takes up; it ends in the last 512 of them.
    pub len: u64,
}

/// What an L2 table says of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where its data is.
    pub place: Place,
    /// The subclusters that have data there; the cluster as a whole is the only one where there
    /// are none. Meaningless for compressed data.
    pub data: u32,
    /// The subclusters that read as zeroes.
    pub zero: u32,
}

impl Entry {
    /// Nothing is here; the layers below decide.
    pub const ABSENT: Self = Self {
        place: Place::None,
        data: 0,
        zero: 0,
    };

    /// What the words of an entry mean. The second is 0 without subclusters.
    ///
    /// Reserved bits are ignored, as QEMU does.
    ///
    /// # Errors
    /// Why the entry makes no sense.
    pub fn decode(layout: Layout, words: [u64; 2]) -> Result<Self, &'static str> {
        let [word, bitmap] = words;
        if word & COMPRESSED != 0 {
            return if layout.external {
                Err("has compressed data in spite of its external data file")
            } else {
                Ok(Self {
                    place: Place::Packed(Packed::decode(layout, word)),
                    data: 0,
                    zero: 0,
                })
            };
        }
        let offset = word & OFFSET_MASK;
        if layout.within_cluster(offset) != 0 {
            return Err("points into the middle of a cluster");
        }
        let own = word & COPIED != 0;
        let place = if offset != 0 || (own && layout.external) {
            Place::At { offset, own }
        } else {
            Place::None
        };
        let (data, zero) = if layout.extended {
            halves(bitmap)
        } else if word & ZERO != 0 {
            if layout.version < 3 {
                return Err("has a zero flag, which version 2 does not know");
            }
            (0, 1)
        } else {
            (u32::from(place != Place::None), 0)
        };
        if data & zero != 0 {
            return Err("calls a subcluster both data and zero");
        }
        if data != 0 && place == Place::None {
            return Err("has subclusters of data, but no place for them");
        }
        Ok(Self { place, data, zero })
    }

    /// The words of an entry.
    pub fn encode(self, layout: Layout) -> [u64; 2] {
        let word = match self.place {
            Place::None => 0,
            Place::At { offset, own } => offset | if own { COPIED } else { 0 },
            Place::Packed(packed) => return [packed.encode(layout), 0],
        };
        if layout.extended {
            [word, u64::from(self.zero) << 32 | u64::from(self.data)]
        } else {
            [word | (u64::from(self.zero & 1) * ZERO), 0]
        }
    }

    /// Whether the layers below decide for all of the subclusters in `mask`.
    pub fn is_absent(self, mask: u32) -> bool {
        (self.data | self.zero) & mask == 0 && !matches!(self.place, Place::Packed(_))
    }
}

impl Packed {
    fn decode(layout: Layout, word: u64) -> Self {
        let bits = 62 - (layout.cluster_bits - 8);
        let offset = word & ((1 << bits) - 1);
        let sectors = ((word & (COMPRESSED - 1)) >> bits) + 1;
        Self {
            offset,
            len: sectors * SECTOR - offset % SECTOR,
        }
    }

    fn encode(self, layout: Layout) -> u64 {
        let bits = 62 - (layout.cluster_bits - 8);
        let sectors = (self.offset % SECTOR + self.len).div_ceil(SECTOR);
        COMPRESSED | sectors.saturating_sub(1) << bits | self.offset
    }

    /// Whether an entry can say that `len` compressed bytes are at `offset`.
    pub fn fits(layout: Layout, offset: u64, len: u64) -> bool {
        let bits = 62 - (layout.cluster_bits - 8);
        let end = offset.saturating_add(len);
        end >> bits.min(56) == 0 && len <= layout.cluster_size()
    }

    /// The clusters of the file that it touches.
    pub fn clusters(self, layout: Layout) -> std::ops::Range<u64> {
        let end = self.offset.saturating_add(self.len);
        layout.cluster_of(self.offset)..layout.clusters(end)
    }
}

/// The words of the entry at `at` of a table, or a part of one.
pub fn words(layout: Layout, table: &[u8], at: usize) -> [u64; 2] {
    let word = |at: usize| {
        let bytes = table.get(at..).and_then(<[u8]>::first_chunk);
        bytes.map_or(0, |bytes| u64::from_be_bytes(*bytes))
    };
    let at = at * layout.entry_len();
    [word(at), if layout.extended { word(at + 8) } else { 0 }]
}

/// The lower half of a number, and the upper one.
fn halves(number: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = number.to_le_bytes();
    (
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    )
}

/// The subclusters that bytes `start` to `end` of a cluster touch; `start` is below `end`.
pub fn touched(layout: Layout, start: u64, end: u64) -> u32 {
    let size = layout.subcluster_size();
    mask(start / size, end.div_ceil(size))
}

fn mask(first: u64, end: u64) -> u32 {
    let from = |count: u64| {
        u32::MAX
            .checked_shl(u32::try_from(count).unwrap_or(32))
            .unwrap_or(0)
    };
    from(first) & !from(end)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    const PLAIN: Layout = Layout {
        version: 3,
        cluster_bits: 16,
        refcount_order: 4,
        extended: false,
        external: false,
    };
    const EXTENDED: Layout = Layout {
        extended: true,
        ..PLAIN
    };

    #[test]
    fn masks() {
        assert_eq!(touched(PLAIN, 0, 1), 1);
        assert_eq!(touched(PLAIN, 5000, 65536), 1);
        assert_eq!(touched(EXTENDED, 0, 65536), u32::MAX);
        assert_eq!(touched(EXTENDED, 2047, 2049), 0b11);
    }

    #[test]
    fn what_makes_no_sense() {
        let refused = |layout, words| Entry::decode(layout, words).unwrap_err();
        assert!(refused(PLAIN, [0x1_0200, 0]).contains("middle"));
        assert!(
            refused(
                Layout {
                    version: 2,
                    ..PLAIN
                },
                [1, 0]
            )
            .contains("version 2")
        );
        assert!(refused(EXTENDED, [0x1_0000, 1 << 32 | 1]).contains("both"));
        assert!(refused(EXTENDED, [0, 1]).contains("no place"));
        let external = Layout {
            external: true,
            ..PLAIN
        };
        assert!(refused(external, [COMPRESSED, 0]).contains("external"));
        let first = Entry::decode(external, [COPIED, 0]).unwrap();
        assert_eq!(
            first.place,
            Place::At {
                offset: 0,
                own: true
            }
        );
        assert_eq!(Entry::decode(PLAIN, [COPIED, 0]).unwrap(), Entry::ABSENT);
    }

    proptest! {
        #[test]
        fn entries_that_decode_encode_to_what_decodes_to_the_same(
            word: u64, bitmap: u64, cluster_bits in 9..=21_u32, extended: bool, aligned: bool,
        ) {
            let layout = Layout { cluster_bits, extended, ..PLAIN };
            let word = if aligned { word & !0x1f_fffe } else { word };
            let bitmap = if extended { bitmap } else { 0 };
            if let Ok(entry) = Entry::decode(layout, [word, bitmap]) {
                prop_assert_eq!(Entry::decode(layout, entry.encode(layout)).unwrap(), entry);
            }
        }

        #[test]
        fn compressed_data_stays_where_it_is(
            cluster_bits in 9..=21_u32, offset in 0..1_u64 << 48, len in 1..1_u64 << 9,
        ) {
            let layout = Layout { cluster_bits, ..PLAIN };
            prop_assume!(Packed::fits(layout, offset, len));
            let entry = Entry { place: Place::Packed(Packed { offset, len }), data: 0, zero: 0 };
            let Place::Packed(back) = Entry::decode(layout, entry.encode(layout)).unwrap().place
            else { panic!() };
            prop_assert_eq!(back.offset, offset);
            prop_assert!(back.len >= len && back.len < len + 512);
        }
    }
}
