//! Looking for damage, and mending it.
//!
//! Finds what `qemu-img check` finds: references that point nowhere, refcounts that are not the
//! number of references, and flags that contradict them; and metadata that shares its place with
//! something else. What points nowhere is told, not mended: nobody can know what was there.
//!
//! A repair gives what shares a place one of its own. Then it first makes refcounts high enough,
//! then flags right, then refcounts low enough, and at last takes the marks off the header, so that
//! an interrupted one does no harm.

mod compare;
mod counts;
mod flags;
mod rebuild;
mod sharing;
mod walk;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::sync::Arc;

use compare::Fix;
use counts::Counts;
use sharing::Owners;
use walk::Root;

use super::damage::ImageFile;
use super::entry::OFFSET_MASK;
use super::header::{CORRUPT, DIRTY, Header, bad_image, u32_at, u64_at};
use super::layout::Layout;
use super::missing::Missing;
use super::open::{Memory, read_head, read_table};
use super::refcounts::Refcounts;
use crate::BlockError;
use crate::host::{HostFile, lock};

/// Most bytes of metadata that are looked at before a disk can be used: more than 100 TiB of it have.
/// An image made to do harm can have any number of snapshots that share their tables.
const MAX_MENDED_BYTES: u64 = 16 << 30;
/// Findings that are told in words.
const MAX_MESSAGES: usize = 100;

/// What a check may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Nothing.
    No,
    /// Give back clusters that are in use by nothing.
    Leaks,
    /// Whatever can be mended.
    All,
}

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Damage: what it says of the disk's data is wrong, or will be once somebody writes.
    pub corruptions: u64,
    /// Clusters that nothing uses and that are not free either.
    pub leaks: u64,
    /// How many corruptions of those found are mended now.
    pub corruptions_fixed: u64,
    /// How many leaks of those found are mended now.
    pub leaks_fixed: u64,
    /// Clusters of the disk.
    pub total_clusters: u64,
    /// How many of them have data in the image.
    pub allocated_clusters: u64,
    /// How many of those are compressed.
    pub compressed_clusters: u64,
    /// How many of those do not follow the one before in the file.
    pub fragmented_clusters: u64,
    /// Where the image ends in its file, in bytes.
    pub image_end: u64,
    /// The first findings in words; not all if there are many.
    pub messages: Vec<String>,
}

impl CheckReport {
    /// Whether nothing is wrong with the image (any more).
    pub fn is_clean(&self) -> bool {
        self.corruptions == self.corruptions_fixed && self.leaks == self.leaks_fixed
    }
}

/// Checks an image, locking it meanwhile; `file` is writable unless `repair` is [`Repair::No`].
///
/// `progress` is told now and then how many bytes of metadata are checked, and of how many.
///
/// # Errors
///
/// [`BlockError::BadImage`] if the header is beyond use, [`BlockError::Locked`], or what the host
/// says. Damage found is no error.
pub fn check(
    file: File,
    path_hint: &str,
    repair: Repair,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<CheckReport, BlockError> {
    let file = Arc::new(HostFile::new(file, path_hint, false)?);
    lock::lock(&file, repair != Repair::No)?;
    if repair == Repair::No {
        return check_in(&file, repair, progress, None);
    }
    let mut first = |done, all: u64| progress(done, all.saturating_mul(2));
    let mut report = check_in(&file, repair, &mut first, None)?;
    // What is mended, a second look tells.
    let mut second =
        |done: u64, all: u64| progress(done.saturating_add(all), all.saturating_mul(2));
    let after = check_in(&file, Repair::No, &mut second, None)?;
    report.corruptions = report.corruptions.max(after.corruptions);
    report.corruptions_fixed = report.corruptions.saturating_sub(after.corruptions);
    report.leaks_fixed = report.leaks.saturating_sub(after.leaks);
    report.image_end = after.image_end;
    if repair == Repair::All && after.corruptions == 0 {
        clear_feature(&file, CORRUPT).map_err(|source| BlockError::File {
            op: "repair",
            path: path_hint.to_owned(),
            source,
        })?;
    }
    Ok(report)
}

/// Makes the refcounts of an image right that was not closed cleanly.
///
/// # Errors
/// As [`check`].
pub fn mend_refcounts(file: &Arc<HostFile>) -> Result<(), BlockError> {
    tracing::info!(
        disk = file.name(),
        "The image was not closed cleanly; its refcounts are counted anew"
    );
    check_in(file, Repair::All, &mut |_, _| {}, Some(MAX_MENDED_BYTES)).map(drop)
}

/// [`check`] of an image that is locked already. If there is a `limit`, its tables have up to so
/// many bytes, everything stays where it is, and all of its data must be there.
fn check_in(
    file: &Arc<HostFile>,
    repair: Repair,
    progress: &mut dyn FnMut(u64, u64),
    limit: Option<u64>,
) -> Result<CheckReport, BlockError> {
    let failed = |source| BlockError::File {
        op: if repair == Repair::No {
            "check"
        } else {
            "repair"
        },
        path: file.name().to_owned(),
        source,
    };
    let header = Header::read(file)?;
    let file_len = file.len().map_err(failed)?;
    let mut checker = Checker {
        file,
        layout: header.layout(),
        header,
        file_len,
        repair,
        progress,
        counts: Counts::default(),
        dangling: BTreeSet::new(),
        missing: Missing::default(),
        report: CheckReport::default(),
        table: Vec::new(),
        stored: None,
        table_unusable: false,
        refcounts_unusable: false,
        lost: false,
        end: 0,
        steps: (0, 0),
        limit,
        roots: Vec::new(),
        owners: BTreeMap::new(),
        copied: 0,
    };
    checker.run().map_err(failed)?;
    if limit.is_some() && checker.missing.clusters > 0 {
        let reason = checker.missing.reason(checker.layout, file_len);
        return Err(bad_image(file, reason));
    }
    Ok(checker.report)
}

/// A check under way.
struct Checker<'a> {
    file: &'a Arc<HostFile>,
    layout: Layout,
    header: Header,
    file_len: u64,
    repair: Repair,
    progress: &'a mut dyn FnMut(u64, u64),
    counts: Counts,
    /// Clusters past the end of the file to which there are references.
    dangling: BTreeSet<u64>,
    /// What of the disk's data is there.
    missing: Missing,
    report: CheckReport,
    /// The refcount table, without what of it cannot be used.
    table: Vec<u64>,
    /// The refcounts as the file has them.
    stored: Option<Refcounts>,
    /// The refcount table can't be where the header says.
    table_unusable: bool,
    /// Only new refcounts can mend what was found.
    refcounts_unusable: bool,
    /// There are tables of which nobody knows where they are, and so not what they refer to. No
    /// cluster in use is called free then.
    lost: bool,
    /// The first cluster behind all that are in use.
    end: u64,
    /// Tables and blocks looked at, and how many there are.
    steps: (u64, u64),
    /// Most bytes of tables and blocks to look at, if it is not for as long as it takes.
    limit: Option<u64>,
    /// All L1 tables that could be read.
    roots: Vec<Root>,
    /// What metadata there is in which clusters.
    owners: BTreeMap<u64, Owners>,
    /// Clusters that were taken for what had to move.
    copied: u64,
}

impl Checker<'_> {
    fn run(&mut self) -> io::Result<()> {
        self.report.total_clusters = self.layout.clusters(self.header.size);
        self.walk()?;
        self.compare(Fix::None)?;
        match self.repair {
            Repair::No => self.compare_flags(false)?,
            Repair::Leaks => {
                self.lower()?;
                self.compare_flags(false)?;
            }
            Repair::All => {
                if self.limit.is_none() {
                    self.separate()?;
                }
                if self.refcounts_unusable {
                    self.rebuild()?;
                } else {
                    self.compare(Fix::Raise)?;
                }
                self.file.sync()?;
                self.compare_flags(true)?;
                self.file.sync()?;
                self.lower()?;
                clear_feature(self.file, DIRTY)?;
            }
        }
        self.report.image_end = self.end << self.layout.cluster_bits;
        Ok(())
    }

    /// Forgets what was counted.
    fn forget(&mut self) {
        self.counts = Counts::default();
        self.dangling.clear();
        self.missing = Missing::default();
        self.roots.clear();
        self.owners.clear();
        self.table.clear();
        self.stored = None;
        self.table_unusable = false;
        self.refcounts_unusable = false;
        self.lost = false;
        self.end = 0;
    }

    /// Makes refcounts low enough, unless it is unknown what is in use.
    fn lower(&mut self) -> io::Result<()> {
        if self.lost {
            let what = "Space that seems lost is kept, as some tables can't be found";
            self.say(what.into());
            return Ok(());
        }
        self.compare(Fix::Lower)?;
        self.file.sync()
    }

    /// The refcount of a cluster after the repair.
    fn final_refcount(&mut self, cluster: u64) -> io::Result<u64> {
        if self.repair == Repair::All {
            return Ok(self.counts.get(cluster));
        }
        if self.stored.is_none() {
            let file = Arc::new(ImageFile::new(Arc::clone(self.file))?);
            let offset = self.header.refcount_offset;
            let table = self.table.clone();
            self.stored = Some(Refcounts::new(
                file,
                self.layout,
                table,
                offset,
                Memory::DEFAULT.refcounts,
            ));
        }
        match &mut self.stored {
            Some(stored) => stored.get(cluster),
            None => Ok(0),
        }
    }

    fn corrupt(&mut self, what: String) {
        self.report.corruptions += 1;
        self.say(what);
    }

    fn say(&mut self, what: String) {
        if self.report.messages.len() < MAX_MESSAGES {
            self.report.messages.push(what);
        }
    }

    /// Finds out how much there is to look at, given how many L1 tables there are.
    fn plan(&mut self, roots: usize) -> io::Result<()> {
        let offset = self.header.l1_offset;
        let tables = if offset < self.file_len {
            let l1 = read_table(self.file, offset, self.header.l1_entries.into())?;
            l1.iter().filter(|entry| **entry & OFFSET_MASK != 0).count()
        } else {
            0
        };
        let blocks = self
            .layout
            .clusters(self.file_len)
            .div_ceil(self.layout.block_refcounts());
        self.steps.1 = (tables as u64).saturating_mul(roots as u64) + blocks;
        Ok(())
    }

    /// Tells that another table or block was looked at.
    fn advance(&mut self) -> io::Result<()> {
        self.steps.0 += 1;
        let (done, all) = self.steps;
        let len = self.layout.cluster_size();
        (self.progress)(done.min(all) * len, all * len);
        if self.limit.is_some_and(|limit| done * len > limit) {
            return Err(io::Error::other(
                "there is too much metadata to do that now; do it by `edgevmm image check --repair`",
            ));
        }
        Ok(())
    }
}

/// Clears an incompatible feature, if it is set, durably.
fn clear_feature(file: &HostFile, bit: u64) -> io::Result<()> {
    let head = read_head(file)?;
    let bits = u64_at(&head, 72).map_err(io::Error::other)?;
    let version = u32_at(&head, 4).map_err(io::Error::other)?;
    if version < 3 || bits & bit == 0 {
        return Ok(());
    }
    patch_header(file, &[(72, &(bits & !bit).to_be_bytes())])
}

/// Changes fields of the header, durably.
fn patch_header(file: &HostFile, fields: &[(usize, &[u8])]) -> io::Result<()> {
    let mut head = read_head(file)?;
    for (at, bytes) in fields {
        for (to, from) in head.iter_mut().skip(*at).zip(*bytes) {
            *to = *from;
        }
    }
    file.write_buf(&head, 0)?;
    file.sync()
}
