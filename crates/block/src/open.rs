//! Opening a disk: which files it is made of, and as which format.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::chain::{Link, left_out_below, open_below, open_data_files};
use crate::formats::probe::probe_file;
use crate::formats::raw::{RawDisk, check_alone};
use crate::formats::{open_layer, qcow2};
use crate::host::{HostFile, check_kind, identity, is_read_only_device, lock};
use crate::read_only::ReadOnlyDisk;
use crate::stack::Stack;
use crate::{BlockBackend, BlockError, ImageFormat, overlay, snapshot};

/// One file below an image, always used read-only.
#[derive(Debug)]
pub struct BackingFile {
    /// The file, opened for reading.
    pub file: File,
    /// Its format; if absent, what the image above says, or else probed.
    pub format: Option<ImageFormat>,
    /// Its name as the user gave it, for messages only.
    pub path_hint: String,
    /// The other files that its data is in, in the order in which it names them.
    pub data_files: Vec<DataFile>,
    /// As [`DiskOptions::internal_snapshot`].
    pub internal_snapshot: Option<String>,
}

/// A file that an image keeps data in beside its own, opened as the image is.
#[derive(Debug)]
pub struct DataFile {
    /// The file.
    pub file: File,
    /// Its name as the user gave it, for messages only.
    pub path_hint: String,
}

/// A disk to open.
#[derive(Debug)]
pub struct DiskOptions {
    /// The image, opened for reading, and for writing unless `read_only` or `snapshot`.
    pub file: File,
    /// Its name as the user gave it, for messages only.
    pub path_hint: String,
    /// Where it was opened, if it has to be there still once it is locked: whoever replaced it
    /// meanwhile has left this one to nobody.
    pub place: Option<PathBuf>,
    /// Its format; probed if absent.
    pub format: Option<ImageFormat>,
    /// Refuse every write.
    pub read_only: bool,
    /// Bypass the host's page cache.
    pub direct: bool,
    /// The files below the image, the nearest first.
    pub backing: Vec<BackingFile>,
    /// Leave out what lies below the image, of which `backing` names nothing then: it reads as
    /// zeroes, and [`BlockBackend::map`] tells it as unallocated. For tools that move an image's
    /// own data, which must only write whole clusters.
    pub alone: bool,
    /// The other files that the image's data is in, in the order in which it names them.
    pub data_files: Vec<DataFile>,
    /// Show one of the image's internal snapshots, by ID or name, instead of its present state, or
    /// one of the disks in an archive, by name; implies `read_only`.
    pub internal_snapshot: Option<String>,
    /// Keep every write in an unnamed temporary file that dies with the disk, in the directory
    /// that the environment names as `TMPDIR` or in `/var/tmp`; the image itself is only read.
    pub snapshot: bool,
}

impl DiskOptions {
    /// A writable disk of `file`, its format probed, with no files below it.
    pub fn new(file: File, path_hint: impl Into<String>) -> Self {
        Self {
            file,
            path_hint: path_hint.into(),
            place: None,
            format: None,
            read_only: false,
            direct: false,
            backing: Vec::new(),
            alone: false,
            data_files: Vec::new(),
            internal_snapshot: None,
            snapshot: false,
        }
    }
}

/// What an image is, as told by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageInfo {
    /// Its format.
    pub format: ImageFormat,
    /// Size of the disk in bytes.
    pub size: u64,
    /// The file it asks for as its backing file; nothing has opened or looked for it.
    pub backing: Option<String>,
    /// The format it says that file has.
    pub backing_format: Option<String>,
}

/// Opens a disk and locks its files: the image for one writer, everything below it for readers.
///
/// The locks last as long as the files are open. Dropping the last reference to the disk flushes
/// it.
///
/// # Errors
///
/// Every variant of [`BlockError`] that is not about a request: the image is of no supported
/// format, breaks its format's rules, is in use, or does not fit the backing files given.
pub fn open(options: DiskOptions) -> Result<Arc<dyn BlockBackend>, BlockError> {
    let DiskOptions {
        file,
        path_hint,
        place,
        format,
        read_only,
        direct,
        backing,
        alone,
        data_files,
        internal_snapshot,
        snapshot,
    } = options;
    let read_only = read_only || (internal_snapshot.is_some() && !snapshot);
    let writable = !read_only && !snapshot;
    let file = Arc::new(HostFile::new(file, &path_hint, direct)?);
    lock::lock(&file, writable)?;
    if let Some(place) = place {
        check_place(file.file(), &place)?;
    }
    let format = format.map_or_else(|| probe_file(&file), Ok)?;
    let data_files = open_data_files(data_files, writable, direct)?;
    if format == ImageFormat::Raw && !snapshot {
        check_alone(&file, &data_files, internal_snapshot.as_deref())?;
        no_backing(&file, backing)?;
        return Ok(Arc::new(RawDisk::new(file, read_only)?));
    }
    if writable {
        return open_writable(format, file, data_files, (backing, alone), direct);
    }
    let mut files = vec![Arc::clone(&file)];
    files.extend(data_files.iter().cloned());
    let top = open_layer(format, file, data_files, internal_snapshot.as_deref())?;
    let link = Link {
        files,
        backing: top.backing,
        extensions: top.extensions,
        choice: overlay::Choice::new(internal_snapshot.as_deref(), format),
    };
    let below = if alone {
        left_out_below(&link)
    } else {
        open_below(link, backing, direct)?.0
    };
    let mut layers = vec![top.layer];
    layers.extend(below.layers().iter().cloned());
    let stack = Stack::new(layers);
    if read_only {
        Ok(Arc::new(ReadOnlyDisk::new(stack)))
    } else {
        Ok(Arc::new(snapshot::overlay(stack, &path_hint)?))
    }
}

/// Opens a disk that can be written, and whose format is not raw.
fn open_writable(
    format: ImageFormat,
    file: Arc<HostFile>,
    data_files: Vec<Arc<HostFile>>,
    (backing, alone): (Vec<BackingFile>, bool),
    direct: bool,
) -> Result<Arc<dyn BlockBackend>, BlockError> {
    if format != ImageFormat::Qcow2 {
        return Err(BlockError::OnlyRead {
            path: file.name().to_owned(),
            format,
        });
    }
    let header = qcow2::Header::read(&file)?;
    let mut files = vec![Arc::clone(&file)];
    files.extend(data_files.iter().cloned());
    let link = Link {
        files,
        extensions: header.unknown_extensions().cloned().collect(),
        backing: header.backing,
        choice: overlay::Choice::new(None, format),
    };
    let below = if alone {
        left_out_below(&link)
    } else {
        let (below, renewed) = open_below(link, backing, direct)?;
        if let Some(extension) = renewed {
            overlay::renew(&file, extension);
        }
        below
    };
    Ok(Arc::new(qcow2::open_disk(file, data_files, below)?))
}

/// Refuses files below an image that can have none.
fn no_backing(file: &HostFile, given: Vec<BackingFile>) -> Result<(), BlockError> {
    match given.into_iter().next() {
        None => Ok(()),
        Some(given) => Err(BlockError::BackingNotWanted {
            path: file.name().to_owned(),
            given: given.path_hint,
        }),
    }
}

/// Tells what an image is, without locking it or opening anything else.
///
/// # Errors
///
/// As [`open()`], as far as the image's header decides.
pub fn info(file: File, path_hint: &str) -> Result<ImageInfo, BlockError> {
    let file = Arc::new(HostFile::new(file, path_hint, false)?);
    let format = probe_file(&file)?;
    let (size, backing) = if format == ImageFormat::Qcow2 {
        let header = qcow2::Header::read(&file)?;
        (header.size, header.backing)
    } else {
        let opened = open_layer(format, file, Vec::new(), None)?;
        (opened.layer.size(), opened.backing)
    };
    let (backing, backing_format) = backing.map_or((None, None), |it| (Some(it.name), it.format));
    Ok(ImageInfo {
        format,
        size,
        backing,
        backing_format,
    })
}

/// Opens a file or block device by name, for use in [`DiskOptions`].
///
/// # Errors
///
/// [`BlockError::Missing`], [`BlockError::Permission`], [`BlockError::NotADisk`],
/// [`BlockError::Empty`], or [`BlockError::File`] for whatever else the host says.
pub fn open_path(path: &Path, writable: bool) -> Result<File, BlockError> {
    let name = path.display().to_string();
    // Without O_NONBLOCK, opening a pipe would wait for its other end; files and disks ignore it.
    let opened = OpenOptions::new()
        .read(true)
        .write(writable)
        .custom_flags(libc::O_NONBLOCK)
        .open(path);
    let file = match opened {
        Ok(file) => file,
        Err(err) => return Err(open_error(path, name, writable, err)),
    };
    check_opened(&file, path, writable)?;
    Ok(file)
}

/// Checks that `file`, which was opened at `path`, is one that data can be in.
///
/// # Errors
///
/// As [`open_path`].
pub fn check_opened(file: &File, path: &Path, writable: bool) -> Result<(), BlockError> {
    let name = path.display().to_string();
    let failed = |source| BlockError::File {
        op: "examine",
        path: name.clone(),
        source,
    };
    let metadata = file.metadata().map_err(failed)?;
    check_kind(&metadata, &name)?;
    if metadata.is_file() && metadata.len() == 0 {
        return Err(BlockError::Empty { path: name });
    }
    if writable
        && metadata.file_type().is_block_device()
        && is_read_only_device(file).map_err(failed)?
    {
        return Err(not_permitted(name, writable));
    }
    Ok(())
}

/// Checks that a file, which is locked now, is still the one at `path`.
///
/// # Errors
///
/// [`BlockError::Replaced`], or what the host says.
pub fn check_place(file: &File, path: &Path) -> Result<(), BlockError> {
    let name = || path.display().to_string();
    let own = file.metadata().map_err(|source| BlockError::File {
        op: "examine",
        path: name(),
        source,
    })?;
    match std::fs::metadata(path) {
        Ok(there) if identity(&there) == identity(&own) => Ok(()),
        _ => Err(BlockError::Replaced { path: name() }),
    }
}

fn not_permitted(path: String, writable: bool) -> BlockError {
    let (access, hint) = if writable {
        ("read and write", ", or open it read-only or as a snapshot")
    } else {
        ("read", "")
    };
    BlockError::Permission { path, access, hint }
}

/// Explains why a path could not be opened.
pub fn open_error(path: &Path, name: String, writable: bool, err: io::Error) -> BlockError {
    match err.kind() {
        io::ErrorKind::NotFound => BlockError::Missing { path: name },
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            not_permitted(name, writable)
        }
        // A directory opened for writing, or a socket, fails to open before its kind is known.
        _ => match std::fs::metadata(path).map(|metadata| check_kind(&metadata, &name)) {
            Ok(Err(kind)) => kind,
            _ => BlockError::File {
                op: "open",
                path: name,
                source: err,
            },
        },
    }
}
