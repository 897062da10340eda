//! New images.

use std::fs::File;
use std::io;
use std::sync::Arc;

use super::header::{Header, bad_image};
use super::layout::CLUSTER_BITS;
use super::open::{failed, open_disk};
use super::refcounts;
use crate::formats::Backing;
use crate::host::{HostFile, lock};
use crate::stack::Stack;
use crate::{BlockError, SECTOR_SIZE};

/// How clusters are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Deflate, which every reader of qcow2 knows.
    #[default]
    Zlib,
    /// Zstandard, which QEMU reads from version 5.1 on.
    Zstd,
}

/// A header extension that this crate gives no meaning to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// What it is.
    pub magic: u32,
    /// Its content.
    pub data: Vec<u8>,
}

/// The external data file that an image is to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFileName {
    /// The name that is recorded.
    pub name: String,
    /// Keep the file readable as a raw image by itself.
    pub raw: bool,
}

/// What a new image is to be like. The default is what `qemu-img create` makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Size of the disk in bytes, a multiple of 512.
    pub size: u64,
    /// Bytes in a cluster: a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// 2 or 3.
    pub version: u32,
    /// Bits in a refcount: a power of two up to 64; 16 in version 2.
    pub refcount_bits: u32,
    /// Divide clusters of at least 16 KiB into 32 subclusters each.
    pub extended_l2: bool,
    /// Allow QEMU to leave refcounts behind until the image is closed.
    pub lazy_refcounts: bool,
    /// How clusters are compressed where they are.
    pub compression: Compression,
    /// What lies below the image.
    pub backing: Option<Backing>,
    /// Where the data goes, if not into the image.
    pub data_file: Option<DataFileName>,
    /// A header extension of the caller's own.
    pub extension: Option<Extension>,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            size: 0,
            cluster_size: 64 << 10,
            version: 3,
            refcount_bits: 16,
            extended_l2: false,
            lazy_refcounts: false,
            compression: Compression::Zlib,
            backing: None,
            data_file: None,
            extension: None,
        }
    }
}

/// Makes an empty image of `file`, whatever it held, and syncs it.
///
/// `path_hint` names the file in messages. `data_file` is given if, and only if, the options name
/// one; it is cut or grown to the disk's size.
///
/// # Errors
///
/// [`BlockError::BadImage`] for options that the format does not allow, [`BlockError::Locked`] if
/// somebody uses the file, else what the host says.
pub fn create(
    file: File,
    path_hint: &str,
    data_file: Option<File>,
    options: &CreateOptions,
) -> Result<(), BlockError> {
    let file = Arc::new(HostFile::new(file, path_hint, false)?);
    lock::lock(&file, true)?;
    if data_file.is_some() != options.data_file.is_some() {
        return Err(bad_image(
            &file,
            "it needs a data file if, and only if, it is to name one",
        ));
    }
    let data_file = match (data_file, &options.data_file) {
        (Some(data), Some(name)) => {
            let data = HostFile::new(data, &name.name, false)?;
            lock::lock(&data, true)?;
            let cut = || {
                data.file().set_len(0)?;
                data.grow(options.size)
            };
            if !data.is_device() {
                cut().map_err(failed(&data))?;
            }
            Some(Arc::new(data))
        }
        _ => None,
    };
    create_in(&file, options)?;
    if options.data_file.as_ref().is_some_and(|data| data.raw) {
        // Whatever the data file holds is to show.
        let disk = open_disk(
            Arc::clone(&file),
            data_file.into_iter().collect(),
            Stack::default(),
        )?;
        disk.preallocate(0, options.size)
            .and_then(|()| disk.image.flush())
            .map_err(failed(&file))?;
    }
    Ok(())
}

/// [`create`] in a file that is locked already.
///
/// # Errors
/// As [`create`].
pub fn create_in(file: &HostFile, options: &CreateOptions) -> Result<(), BlockError> {
    let plan = Plan::new(options).map_err(|reason| bad_image(file, reason))?;
    let head = plan
        .header
        .encode()
        .map_err(|reason| bad_image(file, reason))?;
    plan.write(file, &head).map_err(|source| BlockError::File {
        op: "create",
        path: file.name().to_owned(),
        source,
    })
}

/// Where everything goes: the header, the refcount table, its blocks and the L1 table, one behind
/// the other.
struct Plan {
    header: Header,
    blocks: u64,
    clusters: u64,
}

impl Plan {
    fn new(options: &CreateOptions) -> Result<Self, String> {
        let mut header = header(options)?;
        let layout = header.layout();
        let entries = layout.l1_entries(options.size).max(1);
        let l1 = layout.clusters(entries * 8);
        let (mut blocks, mut table) = (1, 1);
        let clusters = loop {
            let clusters = 1 + table + blocks + l1;
            let needed = clusters.div_ceil(layout.block_refcounts());
            let needed_table = layout.clusters(needed * 8);
            if needed <= blocks && needed_table <= table {
                break clusters;
            }
            (blocks, table) = (needed.max(blocks), needed_table.max(table));
        };
        let bits = layout.cluster_bits;
        header.refcount_offset = 1 << bits;
        header.refcount_clusters = u32::try_from(table).map_err(|error| error.to_string())?;
        header.l1_offset = (1 + table + blocks) << bits;
        // What is too much is refused by the check of the header.
        header.l1_entries = u32::try_from(entries).unwrap_or(u32::MAX);
        header.check_fields()?;
        Ok(Self {
            header,
            blocks,
            clusters,
        })
    }

    fn write(&self, file: &HostFile, head: &[u8]) -> io::Result<()> {
        let layout = self.header.layout();
        let bits = layout.cluster_bits;
        let len = self.clusters << bits;
        if file.is_device() {
            file.write_zeroes(0, len, false)?;
        } else {
            file.file().set_len(0)?;
            file.grow(len)?;
        }
        let first = 1 + u64::from(self.header.refcount_clusters);
        let table = (first..first + self.blocks).flat_map(|block| (block << bits).to_be_bytes());
        file.write_buf(&table.collect::<Vec<_>>(), 1 << bits)?;
        let mut block = vec![0; layout.cluster_len()];
        for number in 0..self.blocks {
            let refcounts = layout.block_refcounts();
            let used = self
                .clusters
                .saturating_sub(number * refcounts)
                .min(refcounts);
            block.fill(0);
            for at in 0..usize::try_from(used).unwrap_or(0) {
                refcounts::set(&mut block, layout.refcount_order, at, 1);
            }
            file.write_buf(&block, (first + number) << bits)?;
        }
        // Nothing is an image before it is a whole one.
        file.sync()?;
        file.write_buf(head, 0)?;
        file.sync()
    }
}

/// Checks what the format asks of options; returns the binary logarithm of the cluster size.
fn check(options: &CreateOptions) -> Result<u32, String> {
    let CreateOptions {
        size,
        cluster_size,
        version,
        refcount_bits,
        ..
    } = *options;
    let cluster_bits = cluster_size.trailing_zeros();
    if !cluster_size.is_power_of_two() || !CLUSTER_BITS.contains(&cluster_bits) {
        return Err(format!(
            "clusters of {cluster_size} bytes are not possible, only powers of two from 512 to 2 MiB"
        ));
    }
    if !refcount_bits.is_power_of_two() || refcount_bits > 64 {
        return Err(format!(
            "refcounts of {refcount_bits} bits are not possible, only powers of two up to 64"
        ));
    }
    if !size.is_multiple_of(SECTOR_SIZE) {
        return Err(format!("a size of {size} bytes is no multiple of 512"));
    }
    let newer = options.extended_l2
        || options.lazy_refcounts
        || options.compression != Compression::Zlib
        || options.data_file.is_some()
        || refcount_bits != 16;
    match version {
        3 => {}
        2 if !newer => {}
        2 => return Err("version 2 of the format has none of these features".into()),
        _ => return Err(format!("there is no version {version} of the format")),
    }
    Ok(cluster_bits)
}

fn header(options: &CreateOptions) -> Result<Header, String> {
    let cluster_bits = check(options)?;
    let mut header = Header {
        version: options.version,
        cluster_bits,
        size: options.size,
        crypt_method: 0,
        l1_offset: 0,
        l1_entries: 0,
        refcount_offset: 0,
        refcount_clusters: 0,
        snapshots: 0,
        snapshots_offset: 0,
        incompatible: 0,
        compatible: 0,
        autoclear: 0,
        refcount_order: options.refcount_bits.trailing_zeros(),
        compression: options.compression,
        more_fields: Vec::new(),
        backing: options.backing.clone(),
        data_file: options.data_file.as_ref().map(|data| data.name.clone()),
        extensions: options.extension.iter().cloned().collect(),
    };
    header.set_features(
        options.extended_l2,
        options.data_file.is_some(),
        options.data_file.as_ref().is_some_and(|data| data.raw),
        options.lazy_refcounts,
    );
    header.name_features();
    Ok(header)
}
