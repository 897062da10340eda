//! File systems, read-only: what a path leads to, and its bytes.

mod ext4;
mod fat;
#[cfg(test)]
mod tests;

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use crate::decline::{Decline, Reason, layout};
use crate::disk::Disk;

/// Longer paths are nobody's.
const PATH_MAX: usize = 4096;
/// More files in a directory are no boot loader's entries.
pub const NAMES_MAX: usize = 1024;

/// A file system.
#[derive(Debug)]
pub enum Volume {
    /// ext2, ext3 or ext4.
    Ext4(ext4::Ext4Volume),
    /// FAT12, FAT16 or FAT32.
    Fat(fat::FatVolume),
}

/// A file, open.
#[derive(Debug)]
pub struct File {
    len: u64,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Ext4(ext4::Ext4File),
    Fat(fat::FatFile),
}

/// What a path leads to.
#[derive(Debug)]
pub enum Node {
    /// A regular file.
    File(File),
    /// A directory.
    Directory,
}

impl Volume {
    /// The file system on `disk`.
    ///
    /// # Errors
    /// There is none that can be read; the text names it where it is known.
    pub fn open(disk: &Disk) -> Result<Self, Decline> {
        if ext4::is_ext4(disk)? {
            return ext4::Ext4Volume::open(disk).map(Self::Ext4);
        }
        if let Some(fat) = fat::FatVolume::open(disk)? {
            return Ok(Self::Fat(fat));
        }
        Err(layout(foreign(disk)?))
    }

    /// The UUID as `blkid` and GRUB write it.
    #[must_use]
    pub fn uuid(&self) -> String {
        match self {
            Self::Ext4(volume) => volume.uuid(),
            Self::Fat(volume) => volume.uuid(),
        }
    }

    /// The label.
    #[must_use]
    pub fn label(&self) -> String {
        match self {
            Self::Ext4(volume) => volume.label(),
            Self::Fat(volume) => volume.label(),
        }
    }

    /// What `path` leads to; `None` when there is nothing.
    ///
    /// # Errors
    /// The file system is damaged, or what is there is neither file nor directory.
    pub fn find(&self, path: &str) -> Result<Option<Node>, Decline> {
        let path = normalized(path)?;
        match self {
            Self::Ext4(volume) => volume.find(&path),
            Self::Fat(volume) => volume.find(&path),
        }
    }

    /// Opens a file; `None` when there is none.
    ///
    /// # Errors
    /// As for [`Volume::find`].
    pub fn open_file(&self, path: &str) -> Result<Option<File>, Decline> {
        Ok(match self.find(path)? {
            Some(Node::File(file)) => Some(file),
            Some(Node::Directory) | None => None,
        })
    }

    /// Reads a file of at most `max` bytes; `None` when there is none.
    ///
    /// # Errors
    /// It is longer, or can't be read.
    pub fn read(&self, path: &str, max: usize) -> Result<Option<Vec<u8>>, Decline> {
        let Some(mut file) = self.open_file(path)? else {
            return Ok(None);
        };
        let len = usize::try_from(file.len()).ok().filter(|len| *len <= max);
        let Some(len) = len else {
            return Err(Decline::new(Reason::Config, format!("{path} is too long")));
        };
        let mut bytes = vec![0; len];
        file.read_at(0, &mut bytes)?;
        Ok(Some(bytes))
    }

    /// Names of what is in a directory; none when there is no such directory.
    ///
    /// # Errors
    /// It can't be read, or has more than [`NAMES_MAX`].
    pub fn names(&self, path: &str) -> Result<Vec<String>, Decline> {
        if !matches!(self.find(path)?, Some(Node::Directory)) {
            return Ok(Vec::new());
        }
        let path = normalized(path)?;
        match self {
            Self::Ext4(volume) => volume.names(&path),
            Self::Fat(volume) => volume.names(&path),
        }
    }
}

impl File {
    /// Its length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Fills `into` with its bytes from `offset` on. Rising offsets are fast.
    ///
    /// # Errors
    /// It ends before, or can't be read.
    pub fn read_at(&mut self, offset: u64, into: &mut [u8]) -> Result<(), Decline> {
        let end = offset.checked_add(into.len() as u64);
        if end.is_none_or(|end| end > self.len) {
            return Err(layout("a file is shorter than it says"));
        }
        match &mut self.content {
            Content::Ext4(file) => file.read_at(offset, into),
            Content::Fat(file) => file.read_at(offset, into),
        }
    }
}

/// One slash between names, one at the front, none at the end.
fn normalized(path: &str) -> Result<String, Decline> {
    if path.len() > PATH_MAX || path.contains('\0') {
        return Err(Decline::new(Reason::Config, "a path is too long"));
    }
    let mut normal = String::new();
    for name in path.split('/').filter(|name| !matches!(*name, "" | ".")) {
        normal.push('/');
        normal.push_str(name);
    }
    if normal.is_empty() {
        normal.push('/');
    }
    Ok(normal)
}

/// Said of a place with none of the signs that are known, such as a BIOS boot partition.
pub(crate) const UNKNOWN: &str = "the file system is unknown";

/// What a file system that is left out is called.
fn foreign(disk: &Disk) -> Result<&'static str, Decline> {
    const SIGNS: [(u64, &[u8], &str); 8] = [
        (0, b"XFSB", "XFS is left out"),
        (0x1_0040, b"_BHRfS_M", "btrfs is left out"),
        (0, b"LUKS\xba\xbe", "encrypted disks (LUKS) are left out"),
        (512, b"LABELONE", "LVM is left out"),
        (4096, b"\xfc\x4e\x2b\xa9", "software RAID is left out"),
        (1024, b"\x10\x20\xf5\xf2", "F2FS is left out"),
        (0, b"hsqs", "SquashFS is left out"),
        (3, b"NTFS    ", "NTFS is left out"),
    ];
    for (offset, sign, name) in SIGNS {
        let mut found = [0; 8];
        let found = found.get_mut(..sign.len()).unwrap_or_default();
        if offset + found.len() as u64 <= disk.len() {
            disk.read(offset, found)?;
            if found == sign {
                return Ok(name);
            }
        }
    }
    Ok(UNKNOWN)
}
