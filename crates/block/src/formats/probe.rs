//! Telling image formats apart by content; a file's name says nothing.

use std::fmt;
use std::fs::File;
use std::io;

use crate::BlockError;
use crate::host::HostFile;
use crate::storage::ImageFile;

/// How the bytes of an image file make up a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ImageFormat {
    /// The file's bytes are the disk's bytes.
    Raw,
    /// QEMU copy-on-write, versions 2 and 3.
    Qcow2,
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        })
    }
}

/// Bytes looked at; the last magic ends at byte 68.
const HEAD_LEN: usize = 512;

const CONVERT: &str = "convert it with `qemu-img convert -O qcow2`, or give format=raw if these \
                       bytes are the disk itself";
const UNPACK: &str = "unpack it first, or give format=raw if these bytes are the disk itself";

/// Formats recognised only to be refused: offset and bytes of the magic, the name, what to do.
const UNSUPPORTED: &[(usize, &[u8], &str, &str)] = &[
    (0, b"QFI\xfb\0\0\0\x01", "a qcow version 1 image", CONVERT),
    (0, b"KDMV", "a VMDK image", CONVERT),
    (0, b"COWD", "a VMDK image", CONVERT),
    (0, b"# Disk DescriptorFile", "a VMDK descriptor", CONVERT),
    (0, b"conectix", "a VHD image", CONVERT),
    (0, b"vhdxfile", "a VHDX image", CONVERT),
    (64, b"\x7f\x10\xda\xbe", "a VDI image", CONVERT),
    (0, b"QED\0", "a QED image", CONVERT),
    (0, b"LUKS\xba\xbe", "a LUKS-encrypted image", CONVERT),
    (0, b"\x1f\x8b\x08", "compressed with gzip", UNPACK),
    (0, b"\xfd7zXZ\0", "compressed with xz", UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd", UNPACK),
    (0, b"BZh", "compressed with bzip2", UNPACK),
];

/// Tells an image's format by its content.
///
/// A guest decides what its raw disk begins with, so the answer for a disk that a guest may have
/// written can be chosen by that guest. Nothing outside the image follows from it, since no file
/// an image names is ever opened.
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
    probe_file(&ImageFile::new(file))
}

/// [`probe`], with the image's name in its errors.
pub fn probe_file(file: &ImageFile) -> Result<ImageFormat, BlockError> {
    let failed = |source: io::Error| BlockError::File {
        op: "read",
        path: file.host().name().into(),
        source,
    };
    let len = file.host().len().map_err(failed)?;
    if len == 0 {
        return Err(BlockError::Empty {
            path: file.host().name().into(),
        });
    }
    let mut head = [0; HEAD_LEN];
    let present = usize::try_from(len).unwrap_or(HEAD_LEN).min(HEAD_LEN);
    file.read_exact(&mut head[..present], 0).map_err(failed)?;
    probe_head(&head).map_err(|(format, hint)| BlockError::UnsupportedFormat {
        path: file.host().name().into(),
        format,
        hint,
    })
}

fn probe_head(head: &[u8; HEAD_LEN]) -> Result<ImageFormat, (&'static str, &'static str)> {
    for &(at, magic, name, hint) in UNSUPPORTED {
        if head[at..].starts_with(magic) {
            return Err((name, hint));
        }
    }
    if head.starts_with(b"QFI\xfb") {
        return Ok(ImageFormat::Qcow2);
    }
    Ok(ImageFormat::Raw)
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
    fn takes_anything_else_for_raw() {
        assert_eq!(
            probe_head(&head(0, b"QFI\xfb\0\0\0\x03")),
            Ok(ImageFormat::Qcow2)
        );
        assert_eq!(
            probe_head(&head(1, b"QFI\xfb\0\0\0\x03")),
            Ok(ImageFormat::Raw)
        );
        assert_eq!(probe_head(&head(510, b"\x55\xaa")), Ok(ImageFormat::Raw));
    }
}
