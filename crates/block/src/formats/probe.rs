//! Telling image formats apart by content; a file's name says nothing.

use std::fmt;
use std::fs::File;
use std::io;
use std::sync::Arc;

use super::range::FileRange;
use super::{ova, vdi, vhd, vhdx};
use crate::BlockError;
use crate::host::HostFile;

/// How the bytes of an image file make up a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ImageFormat {
    /// The file's bytes are the disk's bytes.
    Raw,
    /// QEMU copy-on-write, versions 2 and 3.
    Qcow2,
    /// VMware: a sparse disk, or a descriptor of a disk in other files.
    Vmdk,
    /// An OVF archive of one or more disks.
    Ova,
    /// Virtual PC and Hyper-V, first generation.
    Vhd,
    /// Hyper-V.
    Vhdx,
    /// VirtualBox.
    Vdi,
}

impl ImageFormat {
    const ALL: [Self; 7] = [
        Self::Raw,
        Self::Qcow2,
        Self::Vmdk,
        Self::Ova,
        Self::Vhd,
        Self::Vhdx,
        Self::Vdi,
    ];

    /// The name by which qcow2 images, and QEMU's tools, call it.
    #[must_use]
    pub fn qemu_name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            // QEMU reads none.
            Self::Ova => "ova",
            Self::Vhd => "vpc",
            Self::Vhdx => "vhdx",
            Self::Vdi => "vdi",
        }
    }

    /// The format that [`qemu_name`](Self::qemu_name) tells of.
    #[must_use]
    pub fn from_qemu_name(name: &str) -> Option<Self> {
        // Names of protocols, which old versions wrote for raw files and devices.
        if ["file", "host_device"].contains(&name) {
            return Some(Self::Raw);
        }
        Self::ALL
            .into_iter()
            .find(|format| format.qemu_name() == name)
    }

    /// Whether disks of it can be written; others need an image on top for that.
    #[must_use]
    pub fn is_writable(self) -> bool {
        matches!(self, Self::Raw | Self::Qcow2)
    }
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vhd => "vhd",
            other => other.qemu_name(),
        })
    }
}

/// Bytes looked at, but for archives; the last magic ends at byte 262.
pub const HEAD_LEN: usize = 512;

const CONVERT: &str = "convert it with `qemu-img convert -O qcow2`, or give format=raw if these \
                       bytes are the disk itself";
const UNPACK: &str = "unpack it first, or give format=raw if these bytes are the disk itself";

/// Formats recognised only to be refused: offset and bytes of the magic, the name, what to do.
const UNSUPPORTED: &[(usize, &[u8], &str, &str)] = &[
    (0, b"QFI\xfb\0\0\0\x01", "a qcow version 1 image", CONVERT),
    (0, b"COWD", "a VMDK image of the old ESX kind", CONVERT),
    (0, b"QED\0", "a QED image", CONVERT),
    (0, b"LUKS\xba\xbe", "a LUKS-encrypted image", CONVERT),
    (0, b"\x1f\x8b\x08", "compressed with gzip", UNPACK),
    (0, b"\xfd7zXZ\0", "compressed with xz", UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd", UNPACK),
    (0, b"BZh", "compressed with bzip2", UNPACK),
];

/// Formats by offset and bytes of their magic.
///
/// A fixed VHD is not among them: it is a raw disk but for its last sector, and whoever writes to
/// a raw disk may put anything there. The copy of that sector at the start is of dynamic ones.
const SUPPORTED: &[(usize, &[u8], ImageFormat)] = &[
    (0, b"QFI\xfb", ImageFormat::Qcow2),
    (0, super::vmdk::SPARSE_MAGIC, ImageFormat::Vmdk),
    (0, super::vmdk::DESCRIPTOR_MAGIC, ImageFormat::Vmdk),
    (0, vhd::COOKIE, ImageFormat::Vhd),
    (0, vhdx::MAGIC, ImageFormat::Vhdx),
    (vdi::MAGIC_AT, &vdi::MAGIC, ImageFormat::Vdi),
];

/// Where a tar archive has its magic, and that.
const TAR: (usize, &[u8]) = (257, b"ustar");

/// Tells an image's format by its content.
///
/// A guest decides what its raw disk begins with, so the answer for a disk that a guest may have
/// written can be chosen by that guest. Nothing outside the image follows from it, since no file
/// an image names is ever opened, but for the parts of a VMDK that are named after it
/// ([`vmdk_data_files`](crate::vmdk_data_files)).
///
/// # Errors
///
/// [`BlockError::UnsupportedFormat`] for a format that is recognised but cannot be read, and
/// [`BlockError::Empty`], [`BlockError::NotADisk`] or [`BlockError::File`] for what is no image.
pub fn probe(file: &File) -> Result<ImageFormat, BlockError> {
    let failed = |source| BlockError::File {
        op: "probe",
        path: "image".into(),
        source,
    };
    let file = HostFile::new(file.try_clone().map_err(failed)?, "image", false)?;
    probe_file(&Arc::new(file))
}

/// [`probe`], with the image's name in its errors.
pub fn probe_file(file: &Arc<HostFile>) -> Result<ImageFormat, BlockError> {
    let failed = |source: io::Error| BlockError::File {
        op: "read",
        path: file.name().into(),
        source,
    };
    let range = FileRange::whole(Arc::clone(file)).map_err(failed)?;
    if range.len() == 0 {
        return Err(BlockError::Empty {
            path: file.name().into(),
        });
    }
    let mut head = [0; HEAD_LEN];
    let present = usize::try_from(range.len())
        .unwrap_or(HEAD_LEN)
        .min(HEAD_LEN);
    range.read(&mut head[..present], 0).map_err(failed)?;
    let format = probe_head(&head).map_err(|(format, hint)| BlockError::UnsupportedFormat {
        path: file.name().into(),
        format,
        hint,
    })?;
    // A tar archive of something else, or a damaged one, is as raw as any other data.
    if format == ImageFormat::Raw
        && head[TAR.0..].starts_with(TAR.1)
        && ova::is_ova(range).unwrap_or(false)
    {
        return Ok(ImageFormat::Ova);
    }
    Ok(format)
}

/// [`probe`] for an image that begins with `head` and is no archive.
pub fn probe_head(head: &[u8; HEAD_LEN]) -> Result<ImageFormat, (&'static str, &'static str)> {
    for &(at, magic, name, hint) in UNSUPPORTED {
        if head[at..].starts_with(magic) {
            return Err((name, hint));
        }
    }
    let found = SUPPORTED
        .iter()
        .find(|(at, magic, _)| head[*at..].starts_with(magic));
    Ok(found.map_or(ImageFormat::Raw, |&(_, _, format)| format))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(at: usize, magic: &[u8]) -> [u8; HEAD_LEN] {
        let mut head = [0; HEAD_LEN];
        head[at..at + magic.len()].copy_from_slice(magic);
        head
    }

    #[test]
    fn names_what_it_cannot_read() {
        for &(at, magic, name, _) in UNSUPPORTED {
            assert_eq!(
                probe_head(&head(at, magic)).map_err(|(name, _)| name),
                Err(name)
            );
        }
    }

    #[test]
    fn knows_the_others() {
        for &(at, magic, format) in SUPPORTED {
            assert_eq!(probe_head(&head(at, magic)), Ok(format));
            assert_eq!(probe_head(&head(at + 1, magic)), Ok(ImageFormat::Raw));
        }
        assert_eq!(probe_head(&head(510, b"\x55\xaa")), Ok(ImageFormat::Raw));
    }

    #[test]
    fn names_lead_back_to_formats() {
        for format in ImageFormat::ALL {
            assert_eq!(
                ImageFormat::from_qemu_name(format.qemu_name()),
                Some(format)
            );
        }
        assert_eq!(ImageFormat::from_qemu_name("vhd"), None);
    }
}
