//! Checks of a qcow2 image's refcounts when it is opened for writing.
//!
//! A cluster of metadata that another table uses too, or whose refcount says it is free, would be
//! overwritten by the first writes. Such an image is refused before it loses more.
//!
//! One case would even end this process. To add a refcount block, imago looks for a free cluster
//! from the first one on that may be free, and stops where the new block's own range begins; if
//! there is none, the block goes there, as the first cluster it counts. For the first range of all
//! that is cluster 0, but offset 0 in the refcount table means that there is no block. So the block
//! stays missing, and the search for its place, which now begins behind the stop, needs the same
//! block again, and so on until the stack ends. As the header must be in use, the first block must
//! exist. Any other range gets its block, at another offset than 0, before the search passes its
//! first cluster; so no search ever begins inside a range that has none.

use std::collections::HashSet;

use super::header::Header;
use super::tables::{check_cluster, entries, read_table};
use crate::storage::ImageFile;

/// Where a refcount table entry points: all but the reserved bits, as imago has it.
const REFBLOCK_MASK: u64 = !0x1ff;
/// Bytes of refcount blocks looked through: those of 256 GiB of file with the usual clusters.
const BUDGET: u64 = 8 << 20;
/// What to do about an image that is not safe to write to.
pub const REMEDY: &str =
    "try `qemu-img check -r all`, or open it read-only or as a snapshot to save what is left";

/// A cluster of metadata: its offset, and what it holds.
type Cluster = (u64, &'static str);

/// Checks the refcount table and the refcounts of all metadata; the error says what is wrong.
pub fn check(
    file: &ImageFile,
    header: &Header,
    l2_tables: &HashSet<u64>,
    file_len: u64,
) -> Result<(), String> {
    let table = read_table(file, header.refcount_offset, header.refcount_entries)?;
    let blocks: Vec<u64> = entries(&table).map(|entry| entry & REFBLOCK_MASK).collect();
    let mut metadata = top_clusters(header);
    for &offset in blocks.iter().filter(|&&offset| offset != 0) {
        check_cluster("refcount block", offset, header.cluster_size(), file_len)?;
        metadata.push((offset, "refcount block"));
    }
    check_overlap(&metadata, l2_tables)?;
    metadata.extend(l2_tables.iter().map(|&offset| (offset, "L2 table")));
    metadata.sort_unstable();
    check_in_use(file, header, &blocks, &metadata)
}

/// The clusters of the header and of the tables it points to.
fn top_clusters(header: &Header) -> Vec<Cluster> {
    let mut clusters = vec![(0, "header")];
    for (start, entries, what) in [
        (header.l1_offset, header.l1_entries, "L1 table"),
        (
            header.refcount_offset,
            header.refcount_entries,
            "refcount table",
        ),
    ] {
        let end = start.saturating_add(u64::from(entries) * 8);
        let step = usize::try_from(header.cluster_size()).unwrap_or(usize::MAX);
        clusters.extend((start..end).step_by(step).map(|offset| (offset, what)));
    }
    clusters
}

fn check_overlap(metadata: &[Cluster], l2_tables: &HashSet<u64>) -> Result<(), String> {
    let mut seen = HashSet::with_capacity(metadata.len());
    for &(offset, what) in metadata {
        if l2_tables.contains(&offset) || !seen.insert(offset) {
            return Err(format!(
                "its {what} at offset {offset} is used as another table too; {REMEDY}"
            ));
        }
    }
    Ok(())
}

/// Checks that no refcount of `metadata`, which is sorted, is zero, as far as the budget goes.
fn check_in_use(
    file: &ImageFile,
    header: &Header,
    blocks: &[u64],
    metadata: &[Cluster],
) -> Result<(), String> {
    let cluster = header.cluster_size();
    let per_block = cluster * 8 / u64::from(header.refcount_bits);
    let mut block = vec![0; usize::try_from(cluster).map_err(|err| err.to_string())?];
    let mut budget = BUDGET;
    let mut same_block =
        |a: &Cluster, b: &Cluster| a.0 / cluster / per_block == b.0 / cluster / per_block;
    for group in metadata.chunk_by(&mut same_block) {
        let Some(&first) = group.first() else {
            continue;
        };
        let index = usize::try_from(first.0 / cluster / per_block).unwrap_or(usize::MAX);
        let at = match blocks.get(index) {
            None | Some(0) => return Err(free(first)),
            Some(&at) => at,
        };
        let Some(rest) = budget.checked_sub(cluster) else {
            return Ok(());
        };
        budget = rest;
        file.read_exact(&mut block, at)
            .map_err(|err| err.to_string())?;
        for &entry in group {
            if is_zero(&block, entry.0 / cluster % per_block, header.refcount_bits) {
                return Err(free(entry));
            }
        }
    }
    Ok(())
}

fn free((offset, what): Cluster) -> String {
    format!(
        "its refcounts say that its {what} at offset {offset} is free, so that writes would \
         destroy it; {REMEDY}"
    )
}

/// Whether the refcount number `index` in `block` is zero; refcounts of less than a byte begin at
/// its lowest bit.
fn is_zero(block: &[u8], index: u64, bits: u32) -> bool {
    let first_bit = index * u64::from(bits);
    let at = usize::try_from(first_bit / 8).unwrap_or(usize::MAX);
    let Some(bytes) = block.get(at..) else {
        return true;
    };
    if bits < 8 {
        let mask = ((1u8 << bits) - 1) << (first_bit % 8);
        bytes.first().is_none_or(|byte| byte & mask == 0)
    } else {
        bytes.iter().take(bits as usize / 8).all(|&byte| byte == 0)
    }
}
