//! A writer of small ISO 9660 images (ECMA-119, interchange level 2) with Joliet names.
//!
//! The whole image is made in memory and depends on nothing but its input. Left out: Rock Ridge
//! (Linux, Windows and the BSDs read the Joliet names), boot records, files of several extents.

mod image;
mod tree;

#[cfg(test)]
mod tests;

use thiserror::Error;

use crate::datetime::DateTime;
use image::{Extent, Image, SECTOR, sectors};
use tree::{Names, Tree};

/// Sectors before the first volume descriptor, free for the system's use.
const SYSTEM_AREA: u64 = 16;
/// Primary descriptor, Joliet descriptor, terminator.
const DESCRIPTORS: u64 = 3;
/// Levels of directories, the root counted (ECMA-119 6.8.2.1).
const MAX_DEPTH: usize = 8;
/// Joliet names have at most this many UCS-2 units.
const MAX_NAME: usize = 64;
/// Joliet labels are half as long as those of the primary descriptor.
const MAX_LABEL: usize = 16;
/// Largest image: more is a disk, not a seed.
const MAX_IMAGE: u64 = 256 << 20;
/// Files and directories together.
const MAX_ENTRIES: usize = 4096;

const ROOT: usize = 0;

/// Why an image could not be made.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum IsoError {
    /// The volume label cannot be written.
    #[error("Volume label {label:?} is not 1 to {MAX_LABEL} ASCII letters, digits, '-' or '_'")]
    Label {
        /// The label as given.
        label: String,
    },
    /// A part of a path cannot be written as a Joliet name.
    #[error(
        "File name {name:?} is not 1 to {MAX_NAME} characters without controls and any of */:;?\\"
    )]
    Name {
        /// The part of the path.
        name: String,
    },
    /// A path has too many directories.
    #[error("Path {path:?} has more than {MAX_DEPTH} levels")]
    Depth {
        /// The path as given.
        path: String,
    },
    /// A path was given twice, or once as a file and once as a directory.
    #[error("Path {path:?} is there already")]
    Exists {
        /// The path as given.
        path: String,
    },
    /// There are too many files and directories.
    #[error("More than {MAX_ENTRIES} files and directories")]
    Entries,
    /// The files are too large in total.
    #[error("An image of {bytes} bytes is larger than the {MAX_IMAGE} allowed")]
    Size {
        /// Size that the image would have.
        bytes: u64,
    },
}

/// An image in the making.
#[derive(Debug)]
pub struct Iso {
    label: String,
    date: DateTime,
    directories: Vec<Directory>,
    files: Vec<Vec<u8>>,
}

#[derive(Debug, Default)]
struct Directory {
    parent: usize,
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    name: String,
    node: Node,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Node {
    Directory(usize),
    File(usize),
}

impl Iso {
    /// Starts an empty image named `label`; everything in it bears the date `timestamp`, in seconds
    /// after the Unix epoch.
    ///
    /// # Errors
    /// Fails when the label is empty, longer than 16 characters or more than letters, digits, `-`
    /// and `_`.
    pub fn new(label: &str, timestamp: u64) -> Result<Self, IsoError> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if label.is_empty() || label.len() > MAX_LABEL || !label.chars().all(allowed) {
            return Err(IsoError::Label {
                label: label.to_owned(),
            });
        }
        Ok(Self {
            label: label.to_owned(),
            date: DateTime::from_unix(timestamp),
            directories: vec![Directory::default()],
            files: Vec::new(),
        })
    }

    /// Adds a file at `path`, whose parts are separated by `/`, and the directories that lead to it.
    ///
    /// # Errors
    /// Fails when a part of the path is no valid name, when it is too deep or already there, and
    /// when the image has too many entries.
    pub fn add(&mut self, path: &str, data: Vec<u8>) -> Result<(), IsoError> {
        let parts: Vec<&str> = path.split('/').collect();
        let Some((file, directories)) = parts.split_last() else {
            return Err(IsoError::Name {
                name: path.to_owned(),
            });
        };
        if directories.len() >= MAX_DEPTH {
            return Err(IsoError::Depth {
                path: path.to_owned(),
            });
        }
        for part in &parts {
            check_name(part)?;
        }
        if self.directories.len() + self.files.len() + parts.len() > MAX_ENTRIES {
            return Err(IsoError::Entries);
        }
        let mut at = ROOT;
        for part in directories {
            at = match self.find(at, part) {
                Some(Node::Directory(index)) => index,
                Some(Node::File(_)) => {
                    return Err(IsoError::Exists {
                        path: path.to_owned(),
                    });
                }
                None => self.make_directory(at, part),
            };
        }
        if self.find(at, file).is_some() {
            return Err(IsoError::Exists {
                path: path.to_owned(),
            });
        }
        let node = Node::File(self.files.len());
        self.files.push(data);
        self.attach(at, file, node);
        Ok(())
    }

    /// Writes the image: whole sectors of 2048 bytes.
    ///
    /// # Errors
    /// Fails when the image would be larger than 256 MiB.
    pub fn build(&self) -> Result<Vec<u8>, IsoError> {
        let mut end = SYSTEM_AREA + DESCRIPTORS;
        let mut trees = [Names::Primary, Names::Joliet].map(|names| Tree::new(self, names));
        for tree in &mut trees {
            end = tree.place(end);
        }
        let mut extents = Vec::with_capacity(self.files.len());
        for data in &self.files {
            let extent = Extent {
                start: end,
                bytes: data.len() as u64,
            };
            end += sectors(extent.bytes);
            extents.push(extent);
        }
        let bytes = end * SECTOR as u64;
        if bytes > MAX_IMAGE {
            return Err(IsoError::Size { bytes });
        }

        let mut image = Image::with_sectors(end);
        image.zeroes(SYSTEM_AREA * SECTOR as u64);
        for tree in &trees {
            self.write_descriptor(&mut image, tree, end);
        }
        image.bytes(b"\xffCD001\x01");
        image.fill_sector();
        for tree in &trees {
            tree.write(&mut image, self, &extents);
        }
        for data in &self.files {
            image.bytes(data);
            image.fill_sector();
        }
        Ok(image.into_bytes())
    }

    fn find(&self, directory: usize, name: &str) -> Option<Node> {
        let entries = &self.directories.get(directory)?.entries;
        entries
            .iter()
            .find(|entry| entry.name == name)
            .map(|entry| entry.node)
    }

    fn make_directory(&mut self, parent: usize, name: &str) -> usize {
        let index = self.directories.len();
        self.directories.push(Directory {
            parent,
            entries: Vec::new(),
        });
        self.attach(parent, name, Node::Directory(index));
        index
    }

    fn attach(&mut self, directory: usize, name: &str, node: Node) {
        if let Some(directory) = self.directories.get_mut(directory) {
            directory.entries.push(Entry {
                name: name.to_owned(),
                node,
            });
        }
    }

    /// Writes a primary or Joliet volume descriptor (ECMA-119 8.4 and 8.5).
    fn write_descriptor(&self, image: &mut Image, tree: &Tree, volume_sectors: u64) {
        let joliet = tree.names() == Names::Joliet;
        let [little, big] = tree.tables();
        image.bytes(if joliet {
            b"\x02CD001\x01\0"
        } else {
            b"\x01CD001\x01\0"
        });
        image.text(joliet, "", 32);
        image.text(joliet, &self.label, 32);
        image.zeroes(8);
        image.both32(volume_sectors);
        // Readers know Joliet by this escape sequence, which announces UCS-2 level 3.
        image.bytes(if joliet { b"%/E" } else { &[0; 3] });
        image.zeroes(29);
        image.both16(1);
        image.both16(1);
        image.both16(2048);
        image.both32(tree.table_bytes());
        image.little32(little);
        image.zeroes(4);
        image.big32(big);
        image.zeroes(4);
        image.record(&[0], tree.extent(ROOT), true, self.date);
        for width in [128, 128, 128, 128, 37, 37, 37] {
            image.text(joliet, "", width);
        }
        image.bytes(&self.date.long());
        image.bytes(&self.date.long());
        image.bytes(&DateTime::unset());
        image.bytes(&DateTime::unset());
        image.bytes(&[1]);
        image.fill_sector();
    }
}

fn check_name(name: &str) -> Result<(), IsoError> {
    let forbidden = |c: char| c.is_control() || matches!(c, '*' | '/' | ':' | ';' | '?' | '\\');
    let fits = name.chars().all(|c| c.len_utf16() == 1) && name.chars().count() <= MAX_NAME;
    if matches!(name, "" | "." | "..") || !fits || name.chars().any(forbidden) {
        return Err(IsoError::Name {
            name: name.to_owned(),
        });
    }
    Ok(())
}
