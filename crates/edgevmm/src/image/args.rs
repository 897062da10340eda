//! The verbs of `image` and their flags.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use edgevmm_config::{ByteSize, ImageConfig};

use crate::cli::JsonArg;

/// What `image` takes.
#[derive(Debug, Args)]
#[command(after_help = IMAGES)]
pub struct ImageArgs {
    #[command(subcommand)]
    pub verb: Verb,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Tell what an image is: format, sizes, features, what lies below it
    #[command(after_help = "Example:\n  edgevmm image info --json debian-12.qcow2")]
    Info(OneImage),
    /// Make an empty image
    #[command(after_help = "Example:\n  edgevmm image create data.qcow2 20G")]
    Create(CreateArgs),
    /// Make an image of another one's content, whatever its format
    #[command(after_help = CONVERT_EXAMPLES)]
    Convert(ConvertArgs),
    /// Look for damage, and mend it
    #[command(after_help = CHECK_EXAMPLES)]
    Check(CheckArgs),
    /// Make a disk larger
    #[command(
        after_help = "Examples:\n  edgevmm image resize debian-12.qcow2 20G\n  \
                            edgevmm image resize debian-12.qcow2 +5G\n\
                            The guest's partitions and filesystems stay as they are."
    )]
    Resize(ResizeArgs),
    /// Make an image that keeps changes to another one, which stays as it is
    #[command(after_help = OVERLAY_EXAMPLES)]
    Overlay(OverlayArgs),
    /// Move an overlay's changes into the image below it
    #[command(
        after_help = "Example:\n  edgevmm image commit web.qcow2 debian-12.qcow2\n\
                            The overlay is empty then. Other overlays of the same base are void."
    )]
    Commit(CommitArgs),
    /// Put an overlay on another base
    #[command(after_help = REBASE_EXAMPLES)]
    Rebase(RebaseArgs),
    /// Tell which parts of a disk are where
    #[command(after_help = "Example:\n  edgevmm image map --json debian-12.qcow2")]
    Map(OneImage),
    /// Write an image anew without what is zeroes or unused
    #[command(after_help = "Example:\n  edgevmm image compact debian-12.qcow2\n\
                            Has the guest discard unused blocks first (fstrim), so that they count \
                            as unused.")]
    Compact(CompactArgs),
    /// Tell whether two images have the same content
    #[command(
        after_help = "Example:\n  edgevmm image compare legacy.vmdk legacy.qcow2\n\
                            Exit code 5 tells that they differ."
    )]
    Compare(CompareArgs),
    /// List an image's internal snapshots
    #[command(
        after_help = "Examples:\n  edgevmm image snapshots debian-12.qcow2\n  \
                            edgevmm run --disk debian-12.qcow2,internal_snapshot=before,snapshot"
    )]
    Snapshots(OneImage),
}

/// An image to look at.
#[derive(Debug, Args)]
pub struct OneImage {
    /// The image
    #[arg(value_name = IMAGE)]
    pub image: ImageConfig,
    #[command(flatten)]
    pub json: JsonArg,
}

/// What `create` takes.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// File to make
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Size of the disk, like 20G
    pub size: ByteSize,
    #[command(flatten)]
    pub format: FormatArgs,
    #[command(flatten)]
    pub force: ForceArg,
}

/// What `convert` takes.
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// The image to read
    #[arg(value_name = IMAGE)]
    pub image: ImageConfig,
    /// File to make
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Compress the data
    #[arg(short, long)]
    pub compress: bool,
    #[command(flatten)]
    pub format: FormatArgs,
    #[command(flatten)]
    pub force: ForceArg,
}

/// The format of a new image.
#[derive(Debug, Args)]
#[command(next_help_heading = "Format")]
pub struct FormatArgs {
    /// Format of the new image
    #[arg(long, value_name = "FORMAT", default_value = "qcow2")]
    pub to: NewFormat,
    /// Size of a qcow2's clusters, from 512 to 2M [default: 64K]
    #[arg(long, value_name = "SIZE")]
    pub cluster_size: Option<ByteSize>,
    /// Divide a qcow2's clusters into 32 subclusters each
    #[arg(long)]
    pub extended_l2: bool,
    /// How a qcow2's data is compressed where it is [default: zlib]
    #[arg(long, value_name = "TYPE")]
    pub compression: Option<NewCompression>,
    /// Bits of a qcow2's refcounts, from 1 to 64 [default: 16]
    #[arg(long, value_name = "BITS")]
    pub refcount_bits: Option<u32>,
    /// Let QEMU leave a qcow2's refcounts behind until it is closed
    #[arg(long)]
    pub lazy_refcounts: bool,
    /// Version of qcow2: 2 can be read by QEMU before 1.1 [default: 3]
    #[arg(long, value_name = "VERSION")]
    pub qcow2_version: Option<u32>,
}

/// Formats that are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum NewFormat {
    /// The disk's bytes as they are
    Raw,
    /// QEMU copy-on-write
    Qcow2,
}

/// Ways to compress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum NewCompression {
    /// Deflate
    Zlib,
    /// Zstandard
    Zstd,
}

/// Whether to replace what is there.
#[derive(Debug, Args)]
pub struct ForceArg {
    /// Replace a file that is there already, once the new one is complete
    #[arg(short, long)]
    pub force: bool,
}

/// What `check` takes.
#[derive(Debug, Args)]
pub struct CheckArgs {
    #[command(flatten)]
    pub image: OneImage,
    /// Mend what is found: all of it, or only leaks, which is always safe
    #[arg(
        long,
        value_name = "WHAT",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "all"
    )]
    pub repair: Option<RepairArg>,
}

/// What a check may mend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RepairArg {
    /// Give back space that nothing uses
    Leaks,
    /// Whatever can be mended
    All,
}

/// What `resize` takes.
#[derive(Debug, Args)]
pub struct ResizeArgs {
    /// The image
    #[arg(value_name = IMAGE)]
    pub image: ImageConfig,
    /// New size of the disk, like 20G, or how much is to be added, like +5G
    #[arg(value_name = "[+]SIZE")]
    pub size: NewSize,
    /// Cut off the end of a raw image, and what is in it
    #[arg(long)]
    pub shrink: bool,
}

/// A size, or a difference to one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NewSize {
    /// So large.
    To(ByteSize),
    /// So much larger.
    By(ByteSize),
}

impl std::str::FromStr for NewSize {
    type Err = edgevmm_config::ByteSizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix('+') {
            Some(more) => more.parse().map(Self::By),
            None => text.parse().map(Self::To),
        }
    }
}

/// What `overlay` takes.
#[derive(Debug, Args)]
pub struct OverlayArgs {
    /// The image below, which stays as it is
    #[arg(value_name = "BASE[,KEY=VALUE...]")]
    pub base: ImageConfig,
    /// File to make
    #[arg(value_name = "OVERLAY")]
    pub overlay: PathBuf,
    /// Size of the disk, not less than that of the base [default: that of the base]
    #[arg(long)]
    pub size: Option<ByteSize>,
    #[command(flatten)]
    pub force: ForceArg,
}

/// What `commit` takes.
#[derive(Debug, Args)]
pub struct CommitArgs {
    /// The overlay
    #[arg(value_name = "OVERLAY")]
    pub overlay: PathBuf,
    /// The image right below it
    #[arg(value_name = "BASE[,KEY=VALUE...]")]
    pub base: ImageConfig,
    /// Remove the overlay in place of emptying it
    #[arg(long)]
    pub delete: bool,
}

/// What `rebase` takes.
#[derive(Debug, Args)]
pub struct RebaseArgs {
    /// The overlay
    #[arg(value_name = "OVERLAY")]
    pub overlay: PathBuf,
    /// The image that it is to be over
    #[arg(
        long,
        value_name = "BASE[,KEY=VALUE...]",
        required_unless_present = "flatten"
    )]
    pub onto: Option<ImageConfig>,
    /// The image that it is over now
    #[arg(
        long,
        value_name = "BASE[,KEY=VALUE...]",
        required_unless_present = "unsafe"
    )]
    pub from: Option<ImageConfig>,
    /// Take everything over into the overlay, which then needs no base
    #[arg(long, conflicts_with = "onto")]
    pub flatten: bool,
    /// Only record the new base, which you know to have the content that the old one had
    #[arg(long = "unsafe", id = "unsafe", conflicts_with_all = ["from", "flatten"])]
    pub name_only: bool,
}

/// What `compact` takes.
#[derive(Debug, Args)]
pub struct CompactArgs {
    /// The image
    #[arg(value_name = "IMAGE")]
    pub image: PathBuf,
    /// Compress all data; data that is compressed already stays so in any case
    #[arg(short, long)]
    pub compress: bool,
}

/// What `compare` takes.
#[derive(Debug, Args)]
pub struct CompareArgs {
    /// An image
    #[arg(value_name = IMAGE)]
    pub image: ImageConfig,
    /// Another one
    #[arg(value_name = "OTHER[,KEY=VALUE...]")]
    pub other: ImageConfig,
    #[command(flatten)]
    pub json: JsonArg,
}

const IMAGE: &str = "IMAGE[,KEY=VALUE...]";

const IMAGES: &str = "\
An image is a file or block device of any format that `run` takes: qcow2, raw, VMDK, OVA, VHD, VHDX
or VDI, told by its content. What it is made of beside that file has to be said, as for
`run --disk`: backing=FILE for each image below, data_file=FILE for files with its data,
internal_snapshot=NAME, member=NAME of an OVA, format=. A comma in a path is written twice.

New images appear under their name once they are complete, and are gone when it fails before.";

const CONVERT_EXAMPLES: &str = "\
Examples:
  A disk of another hypervisor:
    edgevmm image convert legacy.vmdk legacy.qcow2
  An image to hand on, small:
    edgevmm image convert --compress --compression zstd web.qcow2 web-small.qcow2
  An overlay and its base as one image:
    edgevmm image convert web.qcow2,backing=debian-12.qcow2 web-whole.qcow2
  The bytes of the disk:
    edgevmm image convert --to raw debian-12.qcow2 debian-12.raw
  The same on a block device, in place of what is there:
    edgevmm image convert --to raw --force debian-12.qcow2 /dev/vg0/debian";

const CHECK_EXAMPLES: &str = "\
Examples:
  edgevmm image check debian-12.qcow2
  edgevmm image check --repair debian-12.qcow2
Exit codes: 0 sound, 5 damaged, 6 sound but for space that nothing uses.";

const OVERLAY_EXAMPLES: &str = "\
Examples:
  edgevmm image overlay debian-12.qcow2 web.qcow2
  edgevmm image overlay --size 20G debian-12.qcow2 web.qcow2
  edgevmm run --disk web.qcow2,backing=debian-12.qcow2
The overlay records what the base is like and is void once that changes.";

const REBASE_EXAMPLES: &str = "\
Examples:
  What differs between the bases goes into the overlay, so that its content stays:
    edgevmm image rebase web.qcow2 --from debian-12.0.qcow2 --onto debian-12.1.qcow2
  The base was moved or copied:
    edgevmm image rebase --unsafe web.qcow2 --onto /srv/debian-12.qcow2
  No base any more:
    edgevmm image rebase --flatten web.qcow2 --from debian-12.qcow2";
