//! Writing images anew without what they need not have.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use edgevmm_block::qcow2::{self, CreateOptions};
use edgevmm_block::{
    BlockError, DiskOptions, Existing, ImageFormat, MapKind, NewFile, lock_file, open_path,
    overlay, probe,
};
use serde::Serialize;

use crate::commit::like;
use crate::disk::Disk;
use crate::target::{NewImage, TargetFormat};
use crate::walk::{Piece, in_pieces};
use crate::zero::{first_run, is_zero};
use crate::{ImageError, Job};

/// Least zeroes that a raw image gets a hole for, in bytes.
const HOLE: usize = 64 << 10;

/// What compacting an image came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Compacted {
    /// Bytes that the image took up on its filesystem.
    pub before: u64,
    /// Bytes that it takes up now.
    pub after: u64,
}

/// Makes an image take up no more space than its content needs: without what is zeroes, and
/// without what a qcow2 has in its file and does not use. With `compress` the data of a qcow2 is
/// compressed; what is compressed already stays so in any case.
///
/// A raw image gets holes, in place. A qcow2 is written anew beside the old one, and is put in its
/// place once it is complete and durable; persistent bitmaps are lost, as they are whenever it is
/// written. An overlay stays one.
///
/// # Errors
///
/// The image is in use or can't be written anew, or has internal snapshots.
pub fn compact(path: &Path, compress: bool, job: &Job<'_>) -> Result<Compacted, ImageError> {
    let before = allocated(path)?;
    match probe(&open_path(path, false)?)? {
        ImageFormat::Qcow2 => rewrite(path, compress, job)?,
        ImageFormat::Raw if compress => {
            return Err(unfit(path, "is raw, which has no compression"));
        }
        ImageFormat::Raw => dig(path, job)?,
        other => {
            let reason = format!("is {other}, which is only read; convert it to qcow2 first");
            return Err(unfit(path, &reason));
        }
    }
    let after = allocated(path)?;
    Ok(Compacted { before, after })
}

fn unfit(path: &Path, reason: &str) -> ImageError {
    ImageError::Unfit {
        path: path.display().to_string(),
        reason: reason.to_owned(),
    }
}

fn allocated(path: &Path) -> Result<u64, ImageError> {
    let metadata = path.metadata().map_err(|source| BlockError::File {
        op: "examine",
        path: path.display().to_string(),
        source,
    })?;
    Ok(metadata.blocks().saturating_mul(512))
}

/// Gives the space of zeroes in a raw image back.
fn dig(path: &Path, job: &Job<'_>) -> Result<(), ImageError> {
    let disk = Disk::open(DiskOptions {
        place: Some(path.to_owned()),
        format: Some(ImageFormat::Raw),
        ..DiskOptions::new(open_path(path, true)?, path.display().to_string())
    })?;
    in_pieces(
        disk.size(),
        job,
        "the image has the same content as before",
        |offset, len| disk.look(offset, len),
        |piece, buffer| {
            disk.read(buffer, piece.offset)?;
            let (mut data, mut at) = (&buffer[..], piece.offset);
            while !data.is_empty() {
                let (len, zero) = first_run(data, HOLE);
                if zero {
                    disk.write_zeroes(at, len as u64)?;
                }
                at += len as u64;
                data = data.get(len..).unwrap_or_default();
            }
            Ok(())
        },
    )?;
    disk.flush()
}

/// Puts a new qcow2 with the same content in the place of the one at `path`.
fn rewrite(path: &Path, compress: bool, job: &Job<'_>) -> Result<(), ImageError> {
    let name = path.display().to_string();
    let file: File = open_path(path, true)?;
    lock_file(&file, path)?;
    let old = qcow2::describe(open_path(path, false)?, &name)?;
    if !old.snapshots.is_empty() {
        return Err(unfit(
            path,
            "has internal snapshots, which would be lost; convert a copy",
        ));
    }
    if old.data_file.is_some() {
        return Err(unfit(
            path,
            "keeps its data in another file, which has to be compacted itself",
        ));
    }
    let source = Disk::open(DiskOptions {
        format: Some(ImageFormat::Qcow2),
        read_only: true,
        alone: true,
        ..DiskOptions::new(file, name)
    })?;
    let options = CreateOptions {
        backing: old.backing.clone(),
        extension: overlay::find(&old.extensions).cloned(),
        ..like(&old)
    };
    let format = TargetFormat::Qcow2 {
        options: Box::new(options),
        compress,
    };
    let new = NewFile::create(path, Existing::ReplaceLocked)?;
    let new = NewImage::begin(new, &format, source.size())?;
    let copy = Copy {
        source: &source,
        new: new.disk(),
        cluster: old.cluster_size,
        compress,
        over_base: old.backing.is_some(),
    };
    in_pieces(
        source.size(),
        job,
        "the image is as it was",
        |offset, len| {
            let entry = source.map(offset, len)?;
            Ok((copy.matters(entry.kind), entry.len))
        },
        |piece, buffer| copy.piece(piece, buffer),
    )?;
    new.finish()
}

/// How a qcow2's own content is brought to a new one.
#[derive(Debug)]
struct Copy<'a> {
    source: &'a Disk,
    new: &'a Disk,
    cluster: u64,
    compress: bool,
    /// Zeroes hide what a base has.
    over_base: bool,
}

impl Copy<'_> {
    fn matters(&self, kind: MapKind) -> bool {
        match kind {
            MapKind::Data | MapKind::Compressed => true,
            MapKind::Zero => self.over_base,
            MapKind::Unallocated => false,
        }
    }

    fn piece(&self, piece: Piece, buffer: &mut [u8]) -> Result<(), ImageError> {
        // At most a piece, which fits.
        let cluster = usize::try_from(self.cluster).unwrap_or(usize::MAX);
        for (data, number) in buffer.chunks_mut(cluster).zip(0..) {
            self.cluster(data, piece.offset + number * self.cluster)?;
        }
        Ok(())
    }

    /// Copies a cluster, `data` being a buffer for it. Of a cluster with subclusters, parts may be
    /// the base's.
    fn cluster(&self, data: &mut [u8], offset: u64) -> Result<(), ImageError> {
        let cluster = Piece {
            offset,
            len: data.len() as u64,
        };
        let (mut own, mut below, mut compressed) = (false, false, false);
        self.source.entries(cluster, |_, entry| {
            own |= self.matters(entry.kind);
            below |= self.over_base && entry.kind == MapKind::Unallocated;
            compressed |= entry.kind == MapKind::Compressed;
            Ok(())
        })?;
        if !own {
            return Ok(());
        }
        if below {
            return self.parts(data, cluster);
        }
        self.source.read(data, offset)?;
        if is_zero(data) {
            self.zero(offset, data.len() as u64)
        } else if self.compress || compressed {
            self.new.write_compressed(data, offset)
        } else {
            self.new.write(data, offset)
        }
    }

    /// Copies what a cluster has itself.
    fn parts(&self, data: &mut [u8], cluster: Piece) -> Result<(), ImageError> {
        self.source.entries(cluster, |at, entry| {
            if !self.matters(entry.kind) {
                return Ok(());
            }
            // Within the cluster, which fits.
            let len = usize::try_from(entry.len).unwrap_or(usize::MAX);
            let len = len.min(data.len());
            let part = &mut data[..len];
            self.source.read(part, at)?;
            if is_zero(part) {
                self.zero(at, entry.len)
            } else {
                self.new.write(part, at)
            }
        })
    }

    fn zero(&self, offset: u64, len: u64) -> Result<(), ImageError> {
        if self.over_base {
            self.new.write_zeroes(offset, len)
        } else {
            Ok(())
        }
    }
}
