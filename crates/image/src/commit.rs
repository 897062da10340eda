//! Moving an overlay's changes into its base.

use std::fs::{self, File};
use std::path::Path;

use edgevmm_block::qcow2::{self, CreateOptions, Description};
use edgevmm_block::{
    BlockError, DiskOptions, DiskPaths, Existing, ImageFormat, MapKind, NewFile, lock_file,
    open_path, overlay,
};

use crate::disk::Disk;
use crate::overlay::describe;
use crate::walk::in_pieces;
use crate::{ImageError, Job};

/// What becomes of an overlay whose changes are in its base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Afterwards {
    /// It is empty, and over the base as that is then.
    Empty,
    /// It is removed.
    Delete,
}

/// Writes what the overlay at `path` changes of `base` into that one. Other overlays of it are void
/// by that.
///
/// The overlay keeps its changes until the base has all of them durably. If this is interrupted,
/// even by a power cut, both together have the same content as before; until it is done once more,
/// nobody else may use the overlay.
///
/// # Errors
///
/// An image can't be opened, `base` is not what the overlay was made over, or it can't be written.
pub fn commit(
    path: &Path,
    base: &DiskPaths,
    afterwards: Afterwards,
    job: &Job<'_>,
) -> Result<(), ImageError> {
    let name = path.display().to_string();
    let file = open_path(path, true)?;
    lock_file(&file, path)?;
    let description = describe(path)?;
    check_base(path, &description, base)?;
    let below = base.open(true)?;
    // Keeps the lock when the disk is closed.
    let locked = below.file.try_clone().map_err(failed("open", &base.path))?;
    let below = Disk::open(below)?;
    if !overlay::is_committing(&description.extensions) {
        overlay::verify(&name, &description.extensions, &base.open(false)?)?;
    }
    let again = file.try_clone().map_err(failed("open", path))?;
    overlay::begin_commit(again, &name, &description.extensions)?;

    let top = Disk::open(DiskOptions {
        format: Some(ImageFormat::Qcow2),
        read_only: true,
        alone: true,
        ..DiskOptions::new(file, name)
    })?;
    if below.size() < top.size() {
        below.resize(top.size())?;
    }
    copy(&top, &below, job)?;
    below.flush()?;
    // Closing writes a little more, and the overlay is to be over what the base is in the end.
    drop(below);
    match afterwards {
        Afterwards::Empty => empty(path, &description, base)?,
        Afterwards::Delete => delete(path)?,
    }
    drop(locked);
    Ok(())
}

/// Refuses a base that is no single image below the overlay, or of another format than it says.
fn check_base(path: &Path, description: &Description, base: &DiskPaths) -> Result<(), ImageError> {
    let unfit = |reason: String| ImageError::Unfit {
        path: base.hint(),
        reason,
    };
    let found = edgevmm_block::probe(&open_path(&base.path, false)?)?;
    let named = description
        .backing
        .as_ref()
        .and_then(|it| it.format.as_deref());
    let format = match named.and_then(ImageFormat::from_qemu_name) {
        // What looks like qcow2 may be what a guest wrote on its raw disk.
        Some(ImageFormat::Raw) => ImageFormat::Raw,
        Some(named) if named != found => {
            return Err(unfit(format!(
                "is {found}, but {path:?} says that its base is {named}; give that one"
            )));
        }
        _ => base.format.unwrap_or(found),
    };
    if !format.is_writable() {
        return Err(unfit(format!(
            "is {format}, which is only read; convert it with the overlay on it by `edgevmm image \
             convert`"
        )));
    }
    Ok(())
}

/// Brings all that `top` has itself to `below`.
fn copy(top: &Disk, below: &Disk, job: &Job<'_>) -> Result<(), ImageError> {
    in_pieces(
        top.size(),
        job,
        "the overlay has all of its changes still; commit it once more before it is used",
        |offset, len| {
            let entry = top.map(offset, len)?;
            Ok((entry.kind != MapKind::Unallocated, entry.len))
        },
        |piece, buffer| {
            top.entries(piece, |at, entry| match entry.kind {
                MapKind::Unallocated => Ok(()),
                MapKind::Zero => below.write_zeroes(at, entry.len),
                MapKind::Data | MapKind::Compressed => {
                    // Within the piece, which fits.
                    let len = usize::try_from(entry.len).unwrap_or(usize::MAX);
                    let len = len.min(buffer.len());
                    let data = &mut buffer[..len];
                    top.read(data, at)?;
                    below.write_or_zero(data, at)
                }
            })
        },
    )
}

/// Puts an empty overlay in the place of the one at `path`.
fn empty(path: &Path, old: &Description, base: &DiskPaths) -> Result<(), ImageError> {
    let new = NewFile::create(path, Existing::ReplaceLocked)?;
    let options = CreateOptions {
        size: old.size,
        backing: old.backing.clone(),
        extension: Some(overlay::remember(&base.open(false)?)?),
        ..like(old)
    };
    qcow2::create(
        new.clone_file()?,
        &path.display().to_string(),
        None,
        &options,
    )?;
    Ok(new.finish()?)
}

/// Options for an image like another one, but for its content.
pub fn like(other: &Description) -> CreateOptions {
    CreateOptions {
        cluster_size: other.cluster_size,
        version: other.version,
        refcount_bits: other.refcount_bits,
        extended_l2: other.extended_l2,
        lazy_refcounts: other.lazy_refcounts,
        compression: other.compression,
        ..CreateOptions::default()
    }
}

fn delete(path: &Path) -> Result<(), ImageError> {
    let dir = path.parent().filter(|dir| *dir != Path::new(""));
    fs::remove_file(path)
        .and_then(|()| File::open(dir.unwrap_or_else(|| Path::new(".")))?.sync_all())
        .map_err(|source| failed("remove", path)(source).into())
}

fn failed(op: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> BlockError {
    let path = path.display().to_string();
    move |source| BlockError::File { op, path, source }
}
