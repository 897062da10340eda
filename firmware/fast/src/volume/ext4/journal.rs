//! The journal (jbd2; Linux, Documentation/filesystems/ext4/journal.rst): which blocks of the file
//! system have newer content in it after a crash.
//!
//! Transactions that were committed count, up to the first that was not. Revoked blocks don't.
//! Left out: fast commits, which leave more behind than whole blocks.

use alloc::collections::BTreeMap;
use alloc::vec;
use alloc::vec::Vec;

use super::inode::{Inode, Runs};
use super::{Ext4, damaged};
use crate::decline::{Decline, layout};

const MAGIC: u32 = 0xc03b_3998;
const DESCRIPTOR: u32 = 1;
const COMMIT: u32 = 2;
const REVOKE: u32 = 5;
const HEADER_LEN: usize = 12;

const FEATURE_REVOKE: u32 = 0x1;
const FEATURE_64BIT: u32 = 0x2;
const FEATURE_CHECKSUM_2: u32 = 0x8;
const FEATURE_CHECKSUM_3: u32 = 0x10;
const KNOWN: u32 = FEATURE_REVOKE | FEATURE_64BIT | FEATURE_CHECKSUM_2 | FEATURE_CHECKSUM_3;

const TAG_ESCAPED: u32 = 1;
const TAG_SAME_UUID: u32 = 2;
const TAG_LAST: u32 = 8;
const UUID_LEN: usize = 16;
/// More is not kept in memory; a journal of a GiB has as many.
const BLOCKS_MAX: usize = 131_072;

fn be(bytes: &[u8], at: usize) -> u32 {
    let bytes = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
    bytes.map_or(0, u32::from_be_bytes)
}

fn be_word(bytes: &[u8], at: usize) -> u32 {
    be(bytes, at) >> 16
}

struct Journal<'a> {
    fs: &'a Ext4,
    runs: Runs,
    features: u32,
    first: u32,
    end: u32,
}

/// What one transaction has.
#[derive(Default)]
struct Transaction {
    /// (Where it belongs, where it is.)
    blocks: Vec<(u64, u64)>,
    revoked: Vec<u64>,
}

/// The blocks that are newer in the journal of a file system: where they belong, and where they
/// are on the disk.
pub(super) fn newer_blocks(fs: &Ext4, inode: &Inode) -> Result<BTreeMap<u64, u64>, Decline> {
    let runs = inode.runs(fs)?;
    let mut journal = Journal {
        fs,
        runs,
        features: 0,
        first: 0,
        end: 0,
    };
    let superblock = journal.block(0)?;
    let version_2 = match (be(&superblock, 0), be(&superblock, 4)) {
        (MAGIC, 3) => false,
        (MAGIC, 4) => true,
        _ => return Err(damaged("the journal")),
    };
    journal.features = if version_2 { be(&superblock, 0x28) } else { 0 };
    if journal.features & !KNOWN != 0 {
        return Err(layout("ext4: the journal has features that are left out"));
    }
    (journal.end, journal.first) = (be(&superblock, 0x10), be(&superblock, 0x14));
    let (sequence, start) = (be(&superblock, 0x18), be(&superblock, 0x1c));
    let sane = u64::from(be(&superblock, 0x0c)) == fs.block_len
        && journal.first >= 1
        && journal.first < journal.end;
    if !sane {
        return Err(damaged("the journal"));
    }
    if start == 0 {
        return Ok(BTreeMap::new());
    }
    let transactions = journal.transactions(sequence, start)?;
    // A block is newer where a transaction has it and none from there on revokes it.
    let mut newer = BTreeMap::new();
    for transaction in transactions {
        newer.extend(transaction.blocks);
        for block in transaction.revoked {
            newer.remove(&block);
        }
    }
    Ok(newer)
}

impl Journal<'_> {
    /// Where block `index` of the journal is on the disk.
    fn place(&self, index: u32) -> Result<u64, Decline> {
        let place = self.runs.block(u64::from(index));
        place.ok_or_else(|| damaged("the journal"))
    }

    fn block(&self, index: u32) -> Result<Vec<u8>, Decline> {
        let mut block = vec![0; usize::try_from(self.fs.block_len).unwrap_or(0)];
        self.fs.read_raw(self.place(index)?, 0, &mut block)?;
        Ok(block)
    }

    fn after(&self, index: u32) -> u32 {
        let next = index.saturating_add(1);
        if next >= self.end { self.first } else { next }
    }

    /// The transactions that were committed, in order.
    fn transactions(&self, mut sequence: u32, start: u32) -> Result<Vec<Transaction>, Decline> {
        let mut found = Vec::new();
        let mut current = Transaction::default();
        let mut at = start;
        let mut total = 0;
        // The journal is a ring: nothing is longer than once around.
        let mut left = self.end;
        while left > 0 {
            left -= 1;
            let block = self.block(at)?;
            if be(&block, 0) != MAGIC || be(&block, 8) != sequence {
                break;
            }
            at = self.after(at);
            match be(&block, 4) {
                DESCRIPTOR => {
                    for (block, escaped) in self.tags(&block) {
                        if escaped {
                            // Its first bytes are not its own; such content is no metadata.
                            return Err(layout("ext4: the journal has a block that is left out"));
                        }
                        current.blocks.push((block, self.place(at)?));
                        at = self.after(at);
                        left = left.saturating_sub(1);
                        total += 1;
                    }
                }
                REVOKE => self.revoked(&block, &mut current.revoked),
                COMMIT => {
                    found.push(core::mem::take(&mut current));
                    sequence = sequence.wrapping_add(1);
                }
                _ => break,
            }
            if total + current.revoked.len() > BLOCKS_MAX {
                return Err(layout("ext4: the journal is too long"));
            }
        }
        Ok(found)
    }

    /// Block numbers of a descriptor, and whether their content is escaped.
    fn tags(&self, block: &[u8]) -> Vec<(u64, bool)> {
        let has = |feature| self.features & feature != 0;
        let tail = if has(FEATURE_CHECKSUM_2 | FEATURE_CHECKSUM_3) {
            4
        } else {
            0
        };
        let end = block.len().saturating_sub(tail);
        let len = match (has(FEATURE_CHECKSUM_3), has(FEATURE_64BIT)) {
            (true, _) => 16,
            (false, true) => 12,
            (false, false) => 8,
        };
        let mut tags = Vec::new();
        let mut at = HEADER_LEN;
        while at + len <= end {
            let (flags, high) = if has(FEATURE_CHECKSUM_3) {
                (be(block, at + 4), be(block, at + 8))
            } else {
                (be_word(block, at + 6), be(block, at + 8))
            };
            let high = if has(FEATURE_64BIT) {
                u64::from(high) << 32
            } else {
                0
            };
            let number = u64::from(be(block, at)) | high;
            tags.push((number, flags & TAG_ESCAPED != 0));
            at += len;
            if flags & TAG_SAME_UUID == 0 {
                at += UUID_LEN;
            }
            if flags & TAG_LAST != 0 {
                break;
            }
        }
        tags
    }

    fn revoked(&self, block: &[u8], into: &mut Vec<u64>) {
        let wide = self.features & FEATURE_64BIT != 0;
        let used = usize::try_from(be(block, 12)).unwrap_or(0);
        let numbers = block.get(16..used).unwrap_or_default();
        if wide {
            let numbers = numbers.chunks_exact(8);
            into.extend(numbers.map(|n| u64::from(be(n, 0)) << 32 | u64::from(be(n, 4))));
        } else {
            into.extend(numbers.chunks_exact(4).map(|n| u64::from(be(n, 0))));
        }
    }
}
