//! qcow2 images, read and written by imago behind the crate's own checks.
//!
//! Follows the QEMU project's qcow2 specification (`docs/interop/qcow2.rst`), versions 2 and 3,
//! with backing files, internal snapshots (kept, never made or chosen) and clusters compressed
//! with zlib. Left out, and refused by name: extended L2 entries, zstd, encryption and external
//! data files. An image marked dirty or corrupt can be read, but is not repaired here. Persistent
//! dirty bitmaps become invalid by writing, as the specification has it for those who do not
//! maintain them.

mod disk;
mod header;
mod order;
mod refcounts;
mod tables;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder};

pub use disk::{Kind, Qcow2Disk};
pub use header::Header;
pub use order::WriteOrder;

use crate::BlockError;
use crate::storage::ImageFile;

fn bad_image(file: &ImageFile, reason: impl Into<String>) -> BlockError {
    BlockError::BadImage {
        path: file.host().name().to_owned(),
        reason: reason.into(),
    }
}

/// Reads and checks the header of an image.
pub fn read_header(file: &ImageFile) -> Result<Header, BlockError> {
    let failed = |source: io::Error| BlockError::File {
        op: "read",
        path: file.host().name().to_owned(),
        source,
    };
    let file_len = file.host().len().map_err(failed)?;
    let read = |len: usize| {
        let mut head = vec![0; usize::try_from(file_len).unwrap_or(len).min(len)];
        file.read_exact(&mut head, 0).map(|()| head).map_err(failed)
    };
    // A first look, to read no more than the cluster that the header is in.
    let first = read(512)?;
    let cluster = first
        .get(20..)
        .and_then(<[u8]>::first_chunk)
        .and_then(|bits| 1usize.checked_shl(u32::from_be_bytes(*bits)))
        .map_or(512, |len| len.clamp(512, header::MAX_HEADER_LEN));
    Header::parse(&read(cluster)?, file_len).map_err(|reason| bad_image(file, reason))
}

/// Opens an image on top of `backing` for reading, after checking its tables.
pub fn open_read_only(
    mut file: ImageFile,
    header: &Header,
    backing: Option<FormatAccess<ImageFile>>,
) -> Result<FormatAccess<ImageFile>, BlockError> {
    file.hide_features(header.unsafe_to_write);
    tables::check(&file, header, false).map_err(|reason| bad_image(&file, reason))?;
    open_checked(file, backing, false)
}

/// Opens an image on top of `backing` for reading and writing, after checking its tables; its
/// writes follow the order returned.
pub fn open_writable(
    mut file: ImageFile,
    header: &Header,
    backing: Option<FormatAccess<ImageFile>>,
) -> Result<(FormatAccess<ImageFile>, Arc<WriteOrder>), BlockError> {
    check_writable(&file, header)?;
    let l2_tables =
        tables::check(&file, header, true).map_err(|reason| bad_image(&file, reason))?;
    let order = Arc::new(WriteOrder::new(Arc::clone(file.host()), header, l2_tables));
    file.set_order(Arc::clone(&order));
    Ok((open_checked(file, backing, true)?, order))
}

fn open_checked(
    file: ImageFile,
    backing: Option<FormatAccess<ImageFile>>,
    writable: bool,
) -> Result<FormatAccess<ImageFile>, BlockError> {
    let name = file.host().name().to_owned();
    Qcow2::<ImageFile>::builder(file)
        .backing(backing)
        .data_file(None)
        .write(writable)
        .open(DenyImplicitOpenGate::default())
        .map(FormatAccess::new)
        .map_err(|err| BlockError::BadImage {
            path: name,
            reason: err.to_string(),
        })
}

fn check_writable(file: &ImageFile, header: &Header) -> Result<(), BlockError> {
    if header.unsafe_to_write & header::FEATURE_CORRUPT != 0 {
        return Err(bad_image(
            file,
            "it is marked as corrupt; try `qemu-img check -r all`, or open it read-only to save \
             what is left",
        ));
    }
    if header.unsafe_to_write & header::FEATURE_DIRTY != 0 {
        return Err(bad_image(
            file,
            "it was not closed cleanly and its refcounts may be wrong; run `qemu-img check -r \
             all` once, or open it read-only",
        ));
    }
    let align = file.host().align().request as u64;
    if align > header.cluster_size() {
        return Err(bad_image(
            file,
            format!(
                "its clusters are shorter than the {align} bytes that direct I/O needs; leave \
                 direct I/O off, or convert it to clusters of 64 KiB"
            ),
        ));
    }
    Ok(())
}
