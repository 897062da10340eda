//! Overlays that stay: qcow2 images that keep what is written over a base, from run to run.
//!
//! An overlay knows what its base was like, by a fingerprint in a header extension, which other
//! programs keep as they found it. Wherever a chain of files is opened, each overlay in it is
//! checked against what lies below it, and refused over anything else. Overlays that other programs
//! made have no such extension, and are taken as they are.
//!
//! The name of the base is recorded too, as every qcow2 has it, for people and for other programs.

use std::fs::File;
use std::path::Path;

use twox_hash::XxHash3_128;

use crate::fingerprint::{Fingerprint, RECORD_LEN, Verdict};
use crate::formats::Backing;
use crate::host::HostFile;
use crate::qcow2::{self, CreateOptions, Extension};
use crate::{
    BackingFile, BlockError, DataFile, DiskOptions, DiskPaths, ImageFormat, NewFile, SECTOR_SIZE,
    open, probe,
};

/// The extension's type: "evov".
const MAGIC: u32 = 0x6576_6f76;
/// Where the record has a byte that says whether a commit is under way, in one that a
/// [`Fingerprint`] leaves alone.
const COMMITTING_AT: usize = 2;

/// What an overlay says of its base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Record {
    base: Fingerprint,
    /// The base is being changed into what the overlay makes of it.
    committing: bool,
    /// Which of several disks in its file the base is. Old versions did not say.
    choice: Option<Choice>,
}

/// Which of several disks in a file: that of an archive, or of an internal snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// A hash of its name, or 0 if none is given.
    name: u128,
    /// A file with one disk allows to leave out the name of that.
    only_one: bool,
}

impl Choice {
    /// The disk with this name, in a file of this format.
    pub fn new(name: Option<&str>, format: ImageFormat) -> Self {
        Self {
            name: name.map_or(0, |name| XxHash3_128::oneshot(name.as_bytes()) | 1),
            only_one: format == ImageFormat::Ova,
        }
    }

    fn of(disk: &DiskOptions) -> Result<Self, BlockError> {
        let format = match disk.format {
            Some(format) => format,
            None => probe(&disk.file)?,
        };
        Ok(Self::new(disk.internal_snapshot.as_deref(), format))
    }

    fn is_same(self, now: Self) -> bool {
        self.name == now.name || (now.only_one && (self.name == 0 || now.name == 0))
    }
}

impl Record {
    fn find(extensions: &[Extension]) -> Option<Result<Self, String>> {
        let extension = find(extensions)?;
        let record = extension.data.first_chunk::<RECORD_LEN>();
        let record = record.and_then(|record| {
            let base = Fingerprint::from_record(record)?;
            let committing = record[COMMITTING_AT] != 0;
            let choice = extension.data.get(RECORD_LEN..);
            let choice = choice.and_then(<[u8]>::first_chunk).map(|name| Choice {
                name: u128::from_be_bytes(*name),
                only_one: false,
            });
            Some(Self {
                base,
                committing,
                choice,
            })
        });
        Some(record.ok_or_else(|| {
            "what it says of its base can't be read; it is damaged, or a newer edgevmm made it"
                .into()
        }))
    }

    fn to_extension(self) -> Extension {
        let mut data = self.base.to_record().to_vec();
        data[COMMITTING_AT] = self.committing.into();
        if let Some(choice) = self.choice {
            data.extend(choice.name.to_be_bytes());
        }
        Extension { magic: MAGIC, data }
    }
}

/// Makes an empty overlay of `new` over `base`; its disk is of `size` bytes, or as large as the
/// base's.
///
/// # Errors
///
/// The base can't be opened, is in use by a writer, or is larger than `size`; or the host refuses
/// to store the overlay.
pub fn create(new: NewFile, base: &DiskPaths, size: Option<u64>) -> Result<(), BlockError> {
    let name = new.path().display().to_string();
    let bad = |reason: String| BlockError::BadImage {
        format: ImageFormat::Qcow2,
        path: name.clone(),
        reason,
    };
    let options = base.open(false)?;
    let backing = backing(new.path(), base, &options)?;
    let files = files_of(&options)?;
    let choice = Choice::of(&options)?;
    // Locked from here on.
    let disk = open(options)?;
    let least = disk.size();
    let size = size.unwrap_or(least);
    if size < least {
        return Err(bad(format!(
            "an overlay of {size} bytes can't be over a base of {least}; make it as large"
        )));
    }
    let options = CreateOptions {
        size: size.next_multiple_of(SECTOR_SIZE),
        backing: Some(backing),
        extension: Some(remember_files(&files, choice)?),
        ..CreateOptions::default()
    };
    qcow2::create(new.clone_file()?, &name, None, &options)?;
    new.finish()
}

/// The disk that the overlay `top` is over `base`, as yet unopened.
pub fn over(top: DiskOptions, base: DiskOptions) -> DiskOptions {
    let below = BackingFile {
        file: base.file,
        format: base.format,
        path_hint: base.path_hint,
        data_files: base.data_files,
        internal_snapshot: base.internal_snapshot,
    };
    let mut backing = vec![below];
    backing.extend(base.backing);
    DiskOptions { backing, ..top }
}

/// The extension of an overlay over `base`, whose files nobody writes to meanwhile.
///
/// # Errors
///
/// A file of the base can't be read.
pub fn remember(base: &DiskOptions) -> Result<Extension, BlockError> {
    remember_files(&files_of(base)?, Choice::of(base)?)
}

fn remember_files(files: &[HostFile], choice: Choice) -> Result<Extension, BlockError> {
    let files: Vec<_> = files.iter().collect();
    let base = Fingerprint::take(&files).map_err(unreadable(&files))?;
    let record = Record {
        base,
        committing: false,
        choice: Some(choice),
    };
    Ok(record.to_extension())
}

/// Checks that an overlay with these header `extensions` is over `base`, whose files nobody writes
/// to meanwhile.
///
/// # Errors
///
/// [`BlockError::BaseChanged`], [`BlockError::CommitInterrupted`], or a file can't be read.
pub fn verify(
    path_hint: &str,
    extensions: &[Extension],
    base: &DiskOptions,
) -> Result<(), BlockError> {
    let files = files_of(base)?;
    let files: Vec<_> = files.iter().collect();
    verify_files(path_hint, extensions, &files, Choice::of(base)?).map(drop)
}

/// As [`verify`], for files in the order of the chain, each followed by its data files, of which
/// the first has the disk of this choice. Returns the extension with which the next look at the same files costs less, if there is one.
pub fn verify_files(
    path_hint: &str,
    extensions: &[Extension],
    files: &[&HostFile],
    choice: Choice,
) -> Result<Option<Extension>, BlockError> {
    let Some(record) = Record::find(extensions) else {
        return Ok(None);
    };
    let record = record.map_err(|reason| BlockError::BadImage {
        format: ImageFormat::Qcow2,
        path: path_hint.to_owned(),
        reason,
    })?;
    if record.committing {
        return Err(BlockError::CommitInterrupted {
            path: path_hint.to_owned(),
        });
    }
    let changed = |how| BlockError::BaseChanged {
        path: path_hint.to_owned(),
        base: files.first().map_or("nothing", |file| file.name()).into(),
        how,
    };
    if record.choice.is_some_and(|made| !made.is_same(choice)) {
        return Err(changed(
            "the overlay was made over another of the disks that are in there; give the same \
             member or internal snapshot as then",
        ));
    }
    match record.base.verify(files).map_err(unreadable(files))? {
        Verdict::Same => Ok(None),
        Verdict::SameContent(base) => Ok(Some(Record { base, ..record }.to_extension())),
        Verdict::Changed => Err(changed(
            "it has another content now; put the old one back, or make a new overlay",
        )),
        Verdict::Unsure => Err(changed(
            "it was written or replaced, and is too large to tell whether its content is still \
             the same; if you know that it is, record it anew by `edgevmm image rebase --unsafe`",
        )),
    }
}

/// Records anew in an overlay that is about to be written what its base is like: `extension`, which
/// [`verify_files`] returned.
pub fn renew(overlay: &HostFile, extension: Extension) {
    let file = overlay
        .file()
        .try_clone()
        .map_err(|source| BlockError::File {
            op: "open",
            path: overlay.name().to_owned(),
            source,
        });
    let renewed = file.and_then(|file| {
        qcow2::edit_header(file, overlay.name(), |header| {
            set(&mut header.extensions, Some(extension));
        })
    });
    if let Err(error) = renewed {
        // It only costs another look at the base.
        tracing::debug!(
            overlay = overlay.name(),
            ?error,
            "The base is not recorded anew"
        );
    }
}

/// Notes durably in an overlay with these header `extensions` that its base is being changed into
/// what the overlay makes of it, so that nobody takes the two for sound together if that is
/// interrupted. Emptying the overlay takes the note away.
///
/// # Errors
///
/// As [`qcow2::edit_header`].
pub fn begin_commit(
    file: File,
    path_hint: &str,
    extensions: &[Extension],
) -> Result<(), BlockError> {
    match Record::find(extensions) {
        Some(Ok(record)) if !record.committing => {
            let record = Record {
                committing: true,
                ..record
            };
            qcow2::edit_header(file, path_hint, |header| {
                set(&mut header.extensions, Some(record.to_extension()));
            })
        }
        // Nobody looks at the base, or somebody began already.
        _ => Ok(()),
    }
}

/// Has the overlay in `file`, which is at `path`, say that it is over `base`, and what that is like
/// now; or that it is over nothing. Nobody writes to the base meanwhile.
///
/// # Errors
///
/// As [`qcow2::edit_header`], or the base can't be read.
pub fn set_base(file: File, path: &Path, base: Option<&DiskPaths>) -> Result<(), BlockError> {
    let (backing, extension) = match base {
        None => (None, None),
        Some(base) => {
            let options = base.open(false)?;
            let backing = backing(path, base, &options)?;
            (Some(backing), Some(remember(&options)?))
        }
    };
    qcow2::edit_header(file, &path.display().to_string(), |header| {
        header.backing = backing;
        set(&mut header.extensions, extension);
    })
}

fn set(extensions: &mut Vec<Extension>, own: Option<Extension>) {
    extensions.retain(|extension| extension.magic != MAGIC);
    extensions.extend(own);
}

/// What an overlay at `path` says of a base.
fn backing(path: &Path, base: &DiskPaths, options: &DiskOptions) -> Result<Backing, BlockError> {
    let format = match options.format {
        Some(format) => format,
        None => probe(&options.file)?,
    };
    Ok(Backing {
        name: name_from(path, &base.path)?,
        format: Some(format.qemu_name().into()),
    })
}

/// The one of an image's header extensions that says what its base is like.
pub fn find(extensions: &[Extension]) -> Option<&Extension> {
    extensions.iter().find(|extension| extension.magic == MAGIC)
}

/// Whether an overlay with these header `extensions` is in the middle of a commit.
pub fn is_committing(extensions: &[Extension]) -> bool {
    matches!(Record::find(extensions), Some(Ok(record)) if record.committing)
}

/// The name under which a new overlay records its base: what is beside or below it by a relative
/// name, so that both can be moved together, everything else by an absolute one.
fn name_from(overlay: &Path, base: &Path) -> Result<String, BlockError> {
    let absolute = |path: &Path| {
        path.canonicalize().map_err(|source| BlockError::File {
            op: "find",
            path: path.display().to_string(),
            source,
        })
    };
    let dir = overlay.parent().filter(|dir| *dir != Path::new(""));
    let dir = absolute(dir.unwrap_or_else(|| Path::new(".")))?;
    let base = absolute(base)?;
    let name = base.strip_prefix(&dir).unwrap_or(&base);
    let text = name.to_str().ok_or_else(|| BlockError::BadImage {
        format: ImageFormat::Qcow2,
        path: overlay.display().to_string(),
        reason: format!("the name of its base {base:?} is not UTF-8; rename it"),
    })?;
    Ok(text.to_owned())
}

fn unreadable<'a>(files: &'a [&HostFile]) -> impl FnOnce(std::io::Error) -> BlockError + 'a {
    move |source| BlockError::File {
        op: "read",
        path: files.first().map_or("base", |file| file.name()).to_owned(),
        source,
    }
}

fn named(data: &DataFile) -> (&File, &String) {
    (&data.file, &data.path_hint)
}

/// The files of a disk in the order of the chain, each followed by its data files.
fn files_of(disk: &DiskOptions) -> Result<Vec<HostFile>, BlockError> {
    let mut files = vec![(&disk.file, &disk.path_hint)];
    files.extend(disk.data_files.iter().map(named));
    for below in &disk.backing {
        files.push((&below.file, &below.path_hint));
        files.extend(below.data_files.iter().map(named));
    }
    let again = |(file, name): (&File, &String)| {
        let file = file.try_clone().map_err(|source| BlockError::File {
            op: "open",
            path: name.clone(),
            source,
        })?;
        HostFile::new(file, name, false)
    };
    files.into_iter().map(again).collect()
}
