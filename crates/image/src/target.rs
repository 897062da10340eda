//! Images that are being made, with their content.

use std::path::PathBuf;

use edgevmm_block::qcow2::{self, CreateOptions};
use edgevmm_block::{DiskOptions, Existing, ImageFormat, NewFile};

use crate::ImageError;
use crate::disk::Disk;
use crate::zero::first_run;

/// What a raw image leaves out where it is zeroes: the block of most filesystems.
const RAW_GRANULE: u64 = 4 << 10;
/// Parts of a cluster with extended L2 entries.
const SUBCLUSTERS: u64 = 32;

/// An image to be made.
#[derive(Clone, Debug)]
pub struct Target {
    /// Where.
    pub path: PathBuf,
    /// What becomes of a file that is there already.
    pub existing: Existing,
    /// As what.
    pub format: TargetFormat,
}

/// What a new image is to be like. Sizes in it count for nothing.
#[derive(Clone, Debug)]
pub enum TargetFormat {
    /// Raw, with holes where there are zeroes.
    Raw,
    /// qcow2.
    Qcow2 {
        /// Everything that can be chosen.
        options: Box<CreateOptions>,
        /// Compress the data.
        compress: bool,
    },
}

impl TargetFormat {
    /// qcow2 as `qemu-img` makes it.
    #[must_use]
    pub fn qcow2() -> Self {
        Self::Qcow2 {
            options: Box::default(),
            compress: false,
        }
    }
}

/// A new image, open for its content. Dropped, it is gone.
#[derive(Debug)]
pub struct NewImage {
    // Before `new`: it is to be closed when the file gets its name.
    disk: Disk,
    new: NewFile,
    granule: usize,
    compress: bool,
}

impl NewImage {
    /// Begins an image for a disk of `size` bytes, a multiple of 512.
    pub fn create(target: &Target, size: u64) -> Result<Self, ImageError> {
        let new = NewFile::create(&target.path, target.existing)?;
        Self::begin(new, &target.format, size)
    }

    pub fn begin(new: NewFile, format: &TargetFormat, size: u64) -> Result<Self, ImageError> {
        let name = new.path().display().to_string();
        let (format, granule, compress) = match format {
            TargetFormat::Raw => {
                new.set_len(size)?;
                (ImageFormat::Raw, RAW_GRANULE, false)
            }
            TargetFormat::Qcow2 { options, compress } => {
                let options = CreateOptions {
                    size,
                    ..(**options).clone()
                };
                qcow2::create(new.clone_file()?, &name, None, &options)?;
                // Compressed data is always a whole cluster.
                let granule = if options.extended_l2 && !compress {
                    options.cluster_size / SUBCLUSTERS
                } else {
                    options.cluster_size
                };
                (ImageFormat::Qcow2, granule, *compress)
            }
        };
        let disk = Disk::open(DiskOptions {
            format: Some(format),
            alone: true,
            ..DiskOptions::new(new.clone_file()?, name)
        })?;
        Ok(Self {
            disk,
            new,
            // At most a cluster, which fits.
            granule: usize::try_from(granule).unwrap_or(usize::MAX),
            compress,
        })
    }

    /// The disk in it.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// Writes a piece of the disk that has not been written before; `offset` is a multiple of the
    /// cluster size.
    pub fn put(&self, mut data: &mut [u8], mut offset: u64) -> Result<(), ImageError> {
        while !data.is_empty() {
            let (len, zero) = first_run(data, self.granule);
            let (run, rest) = data.split_at_mut(len);
            if !zero && self.compress {
                for (cluster, number) in run.chunks(self.granule).zip(0..) {
                    let at = offset + number * self.granule as u64;
                    self.disk.write_compressed(cluster, at)?;
                }
            } else if !zero {
                self.disk.write(run, offset)?;
            }
            offset += len as u64;
            data = rest;
        }
        Ok(())
    }

    /// Makes everything durable and gives the image its name.
    pub fn finish(self) -> Result<(), ImageError> {
        let Self { disk, new, .. } = self;
        disk.flush()?;
        drop(disk);
        Ok(new.finish()?)
    }
}
