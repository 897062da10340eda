//! Checks of a qcow2 image's mapping tables when it is opened.
//!
//! They find an image that was cut short, which would otherwise read as zeroes where data is
//! missing.

use std::collections::HashSet;

use super::header::{Header, truncated};
use super::refcounts;
use crate::storage::ImageFile;

/// Where an L1 or L2 table entry points.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const L2_COMPRESSED: u64 = 1 << 62;
const L2_ZERO: u64 = 1;
/// Bytes of L2 tables looked through: those of 64 GiB of disk with the usual clusters. They are
/// what a guest's first reads need anyway; more of them would only delay its start.
const L2_BUDGET: u64 = 8 << 20;

/// Checks all tables of an image and returns where its L2 tables are; the error says what is
/// wrong.
pub fn check(file: &ImageFile, header: &Header, writable: bool) -> Result<HashSet<u64>, String> {
    let file_len = file.host().len().map_err(|err| err.to_string())?;
    let l1 = read_table(file, header.l1_offset, header.l1_entries)?;
    let l2_tables = check_l1(file, header, &l1, file_len)?;
    if writable {
        let used = entries(&l1)
            .filter(|entry| entry & OFFSET_MASK != 0)
            .count();
        if l2_tables.len() < used {
            return Err(format!(
                "its L1 table refers to an L2 table twice; {}",
                refcounts::REMEDY
            ));
        }
        refcounts::check(file, header, &l2_tables, file_len)?;
    }
    Ok(l2_tables)
}

fn check_l1(
    file: &ImageFile,
    header: &Header,
    l1: &[u8],
    file_len: u64,
) -> Result<HashSet<u64>, String> {
    let mut l2_tables = HashSet::new();
    let cluster = header.cluster_size();
    let mut budget = L2_BUDGET;
    let mut l2 = vec![0; usize::try_from(cluster).map_err(|err| err.to_string())?];
    for entry in entries(l1) {
        let offset = entry & OFFSET_MASK;
        if offset == 0 {
            continue;
        }
        check_cluster("L2 table", offset, cluster, file_len)?;
        l2_tables.insert(offset);
        let Some(rest) = budget.checked_sub(cluster) else {
            continue;
        };
        budget = rest;
        file.read_exact(&mut l2, offset)
            .map_err(|err| err.to_string())?;
        check_l2(header, &l2, file_len)?;
    }
    Ok(l2_tables)
}

/// Checks that all data an L2 table refers to begins inside the file. Its last cluster may be
/// incomplete: nobody has to write the end of a cluster.
fn check_l2(header: &Header, l2: &[u8], file_len: u64) -> Result<(), String> {
    // The sector count of compressed data takes the bits above its offset.
    let compressed_mask = (1 << (62 - (header.cluster_bits - 8))) - 1;
    for entry in entries(l2) {
        let offset = if entry & L2_COMPRESSED != 0 {
            entry & compressed_mask & (OFFSET_MASK | 0x1ff)
        } else if entry & L2_ZERO != 0 {
            continue;
        } else {
            entry & OFFSET_MASK
        };
        if offset >= file_len {
            return Err(truncated("data", offset, file_len));
        }
    }
    Ok(())
}

/// Checks that one cluster of metadata starts where clusters do and ends inside the file.
pub fn check_cluster(what: &str, offset: u64, cluster: u64, file_len: u64) -> Result<(), String> {
    if !offset.is_multiple_of(cluster) {
        return Err(format!(
            "its {what} at offset {offset} does not start at a cluster"
        ));
    }
    match offset.checked_add(cluster) {
        Some(end) if end <= file_len => Ok(()),
        _ => Err(truncated(what, offset, file_len)),
    }
}

/// Reads the `count` entries of a table.
pub fn read_table(file: &ImageFile, offset: u64, count: u32) -> Result<Vec<u8>, String> {
    // The header's check has bounded the length.
    let mut table = vec![0; count as usize * 8];
    file.read_exact(&mut table, offset)
        .map_err(|err| format!("a table cannot be read: {err}"))?;
    Ok(table)
}

/// The entries of a table.
pub fn entries(table: &[u8]) -> impl Iterator<Item = u64> {
    table
        .as_chunks()
        .0
        .iter()
        .map(|entry| u64::from_be_bytes(*entry))
}
