//! What is measured: kinds of access, each to an image of one kind.

use serde::{Deserialize, Serialize};

/// Bytes of the disks.
pub const DISK: u64 = 1 << 30;
/// Bytes of those that are compressed.
pub const PACKED_DISK: u64 = 256 << 20;

/// An image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Image {
    /// Raw, with all its blocks there.
    Raw,
    /// qcow2, with all its clusters there.
    Qcow2,
    /// Raw and sparse, made anew for each run.
    NewRaw,
    /// qcow2 without a cluster of data, made anew for each run.
    NewQcow2,
    /// qcow2, compressed by zlib.
    Zlib,
    /// qcow2, compressed by Zstandard.
    Zstd,
}

impl Image {
    /// Its format, as QEMU calls it.
    #[must_use]
    pub fn format(self) -> &'static str {
        match self {
            Self::Raw | Self::NewRaw => "raw",
            _ => "qcow2",
        }
    }

    /// Its size as a disk, in bytes.
    #[must_use]
    pub fn size(self) -> u64 {
        match self {
            Self::Zlib | Self::Zstd => PACKED_DISK,
            _ => DISK,
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::NewRaw => "sparse raw",
            Self::NewQcow2 => "new qcow2",
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        }
    }
}

/// One kind of access.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Case {
    /// To which image.
    pub image: Image,
    /// Without the page cache.
    pub direct: bool,
    /// Writing, not reading.
    pub write: bool,
    /// All over the disk, not one block after the other.
    pub random: bool,
    /// Bytes of a request.
    pub block: u32,
    /// Requests under way at a time.
    pub depth: usize,
    /// Requests of a run.
    pub count: usize,
}

impl Case {
    /// Bytes from one request's offset to the next one's, as `qemu-img bench` does it. Around the
    /// end of a disk of `size` bytes, all blocks have their turn in an order that no cache foresees.
    #[must_use]
    pub fn step(&self, size: u64) -> u64 {
        let block = u64::from(self.block);
        if !self.random {
            return block;
        }
        // The golden section of the disk, as an odd number of blocks.
        let blocks = size / block * 618_034 / 1_000_000;
        (blocks | 1) * block
    }

    /// What the tables call it, without how it is cached.
    #[must_use]
    pub fn title(&self) -> String {
        format!("{}, {}", self.image.title(), self.access())
    }

    /// What is done, whatever the image is.
    #[must_use]
    pub fn access(&self) -> String {
        let order = if self.random { "random" } else { "sequential" };
        let what = if self.write { "write" } else { "read" };
        let block = self.block >> 10;
        format!("{block}k {order} {what}, depth {}", self.depth)
    }

    /// What its causes in `benches/disks.json` are found by.
    #[must_use]
    pub fn key(&self) -> String {
        let cache = if self.direct { "direct" } else { "cached" };
        format!("{cache}: {}", self.title())
    }

    /// The table that it belongs to.
    #[must_use]
    pub fn section(&self) -> Section {
        match (self.image, self.direct) {
            (Image::Raw | Image::Qcow2, true) => Section::Direct,
            (Image::Raw | Image::Qcow2, false) => Section::Cached,
            (Image::NewRaw | Image::NewQcow2, _) => Section::Allocating,
            (Image::Zlib | Image::Zstd, _) => Section::Compressed,
        }
    }
}

/// A table of the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Section {
    /// Without the page cache.
    Direct,
    /// With it.
    Cached,
    /// Writes to where nothing was.
    Allocating,
    /// Reads of compressed data.
    Compressed,
}

impl Section {
    /// All of them, in order.
    pub const ALL: [Self; 4] = [
        Self::Direct,
        Self::Cached,
        Self::Allocating,
        Self::Compressed,
    ];

    /// Its headline.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Self::Direct => "Without the page cache",
            Self::Cached => "In the page cache",
            Self::Allocating => "Allocating writes",
            Self::Compressed => "Compressed reads",
        }
    }

    /// What its picture is called.
    #[must_use]
    pub fn file(self) -> &'static str {
        match self {
            Self::Direct => "disks-direct.svg",
            Self::Cached => "disks-cached.svg",
            Self::Allocating => "disks-allocating.svg",
            Self::Compressed => "disks-compressed.svg",
        }
    }
}

/// All cases of this host.
#[must_use]
pub fn native() -> Vec<Case> {
    let mut cases = Vec::new();
    for direct in [true, false] {
        for image in [Image::Raw, Image::Qcow2] {
            for access in IN_PLACE {
                cases.push(access.on(image, direct));
            }
        }
        for image in [Image::NewRaw, Image::NewQcow2] {
            for access in ALLOCATING {
                cases.push(access.on(image, direct));
            }
        }
        for image in [Image::Zlib, Image::Zstd] {
            for access in PACKED {
                cases.push(access.on(image, direct));
            }
        }
    }
    cases
}

/// The cases that a guest does, on a disk that is all there.
#[must_use]
pub fn of_guest() -> Vec<Case> {
    IN_GUEST
        .iter()
        .map(|access| access.on(Image::Raw, true))
        .collect()
}

/// An access without its image: writing, random, KiB of a request, depth, requests without the page
/// cache.
struct Access(bool, bool, u32, usize, usize);

impl Access {
    fn on(&self, image: Image, direct: bool) -> Case {
        let Self(write, random, kib, depth, count) = *self;
        // In place is done soon, and what only copies memory at once: too soon to be measured.
        let times = match image {
            Image::Raw | Image::Qcow2 if !direct && !write => 16,
            Image::Raw | Image::Qcow2 => 3,
            _ => 1,
        };
        Case {
            image,
            direct,
            write,
            random,
            block: kib << 10,
            depth,
            count: times * count,
        }
    }
}

const IN_PLACE: [Access; 8] = [
    Access(false, true, 4, 1, 2000),
    Access(false, true, 4, 16, 8000),
    Access(true, true, 4, 1, 2000),
    Access(true, true, 4, 16, 6000),
    Access(false, false, 64, 1, 1000),
    Access(false, false, 64, 16, 3000),
    Access(true, false, 64, 1, 1000),
    Access(true, false, 64, 16, 2000),
];

const ALLOCATING: [Access; 4] = [
    Access(true, true, 4, 1, 1000),
    Access(true, true, 4, 16, 2000),
    Access(true, false, 64, 1, 1000),
    Access(true, false, 64, 16, 2000),
];

const PACKED: [Access; 4] = [
    Access(false, true, 4, 1, 750),
    Access(false, true, 4, 16, 1500),
    Access(false, false, 64, 1, 1000),
    Access(false, false, 64, 16, 2000),
];

const IN_GUEST: [Access; 6] = [
    Access(false, true, 4, 1, 600),
    Access(false, true, 4, 16, 3000),
    Access(true, true, 4, 1, 600),
    Access(true, true, 4, 16, 3000),
    Access(false, false, 64, 16, 1500),
    Access(true, false, 64, 16, 1500),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_access_visits_a_whole_disk() {
        for case in native().iter().filter(|case| case.random) {
            let block = u64::from(case.block);
            let blocks = case.image.size() / block;
            let step = case.step(case.image.size()) / block;
            assert!(step < blocks && step % 2 == 1 && blocks.is_power_of_two());
        }
    }

    #[test]
    fn keys_differ() {
        let mut keys: Vec<_> = native().iter().map(Case::key).collect();
        let count = keys.len();
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), count);
    }
}
