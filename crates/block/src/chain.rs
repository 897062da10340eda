//! Chains of images: which file lies below which, as which format.
//!
//! The image says that it has a backing file and of which format; only the caller says which file
//! that is. Where the two disagree the disk is refused, because a wrong guess would show the guest
//! something else than it left, and later writes would make that permanent.

use std::io;
use std::sync::Arc;

use crate::formats::probe::probe_file;
use crate::formats::qcow2::Extension;
use crate::formats::{Backing, open_layer};
use crate::host::{HostFile, lock};
use crate::layer::{Extent, Layer, Mapping};
use crate::open::DataFile;
use crate::stack::Stack;
use crate::{BackingFile, BlockError, ImageFormat, overlay};

/// An image of a chain, as far as what lies below it is concerned.
#[derive(Debug)]
pub struct Link {
    /// Its file, and then its data files.
    pub files: Vec<Arc<HostFile>>,
    /// What it wants below it.
    pub backing: Option<Backing>,
    /// What its header has that its format gives no meaning to.
    pub extensions: Vec<Extension>,
    /// Which of the disks in its file it is.
    pub choice: overlay::Choice,
}

impl Link {
    fn name(&self) -> &str {
        self.files.first().map_or("", |file| file.name())
    }
}

/// Locks and opens everything below `top`, and checks that overlays are over what they were made
/// over. Returns also what `top` should record of that anew, if it is going to be written.
pub fn open_below(
    top: Link,
    given: Vec<BackingFile>,
    direct: bool,
) -> Result<(Stack, Option<Extension>), BlockError> {
    let mut links = vec![top];
    let mut layers = Vec::with_capacity(given.len());
    for file in given {
        if let Some(above) = links.last() {
            let (link, layer) = open_link(above, file, direct)?;
            links.push(link);
            layers.push(layer);
        }
    }
    if let Some(last) = links.last()
        && let Some(wanted) = &last.backing
    {
        return Err(BlockError::BackingNotGiven {
            path: last.name().to_owned(),
            wanted: wanted.name.clone(),
        });
    }
    let mut renewed = None;
    for (at, link) in links
        .iter()
        .enumerate()
        .filter(|(_, it)| it.backing.is_some())
    {
        let below = links.iter().skip(at + 1).flat_map(|link| &link.files);
        let below: Vec<_> = below.map(|file| &**file).collect();
        let Some(base) = links.get(at + 1) else {
            continue;
        };
        let extension = overlay::verify_files(link.name(), &link.extensions, &below, base.choice)?;
        if at == 0 {
            renewed = extension;
        }
    }
    Ok((Stack::new(layers), renewed))
}

/// What stands for everything below `top` where that is left out.
pub fn left_out_below(top: &Link) -> Stack {
    let layers: Vec<Arc<dyn Layer>> = match top.backing {
        Some(_) => vec![Arc::new(LeftOut)],
        None => Vec::new(),
    };
    Stack::new(layers)
}

/// An image that is left out: it may be of any size and have anything, so that zeroes above it
/// must hide it, but it tells nothing.
#[derive(Debug)]
struct LeftOut;

impl Layer for LeftOut {
    fn size(&self) -> u64 {
        u64::MAX
    }

    fn map(&self, _: u64, len: u64) -> io::Result<Mapping<'_>> {
        Ok(Mapping {
            extent: Extent::Below,
            len,
        })
    }
}

/// Opens the other files that the data of the image `name` is in, and locks them as the image is.
pub fn open_data_files(
    given: Vec<DataFile>,
    writable: bool,
    direct: bool,
) -> Result<Vec<Arc<HostFile>>, BlockError> {
    let open = |given: DataFile| {
        let file = HostFile::new(given.file, &given.path_hint, direct)?;
        lock::lock(&file, writable)?;
        Ok(Arc::new(file))
    };
    given.into_iter().map(open).collect()
}

/// Opens the file given as the one below `above`.
fn open_link(
    above: &Link,
    given: BackingFile,
    direct: bool,
) -> Result<(Link, Arc<dyn Layer>), BlockError> {
    let Some(backing) = &above.backing else {
        return Err(BlockError::BackingNotWanted {
            path: above.name().to_owned(),
            given: given.path_hint,
        });
    };
    let file = Arc::new(HostFile::new(given.file, &given.path_hint, direct)?);
    lock::lock(&file, false)?;
    let format = backing_format(&file, backing.format.as_deref(), given.format)?;
    let mut files = vec![Arc::clone(&file)];
    let data_files = open_data_files(given.data_files, false, direct)?;
    files.extend(data_files.iter().cloned());
    let snapshot = given.internal_snapshot.as_deref();
    let choice = overlay::Choice::new(snapshot, format);
    let opened = open_layer(format, file, data_files, snapshot)?;
    let link = Link {
        files,
        backing: opened.backing,
        extensions: opened.extensions,
        choice,
    };
    Ok((link, opened.layer))
}

/// Settles the format of a backing file.
///
/// A guest may have written a qcow2 header into what was its raw disk. So content that looks like
/// an image is raw only where the image above says so, and is never one against its word.
fn backing_format(
    file: &Arc<HostFile>,
    named: Option<&str>,
    given: Option<ImageFormat>,
) -> Result<ImageFormat, BlockError> {
    let mismatch = |found, who, expected: String, hint| BlockError::BackingFormat {
        path: file.name().to_owned(),
        found,
        who,
        expected,
        hint,
    };
    let named = match named {
        None => None,
        Some(name) => match ImageFormat::from_qemu_name(name) {
            Some(format) => Some(format),
            None => {
                let found = given.map_or_else(|| probe_file(file), Ok)?;
                return Err(mismatch(
                    found,
                    "the image above it",
                    format!("{name:?}"),
                    "that format is not supported",
                ));
            }
        },
    };
    if let (Some(named), Some(given)) = (named, given)
        && named != given
    {
        return Err(mismatch(
            given,
            "the image above it",
            named.to_string(),
            "give the file the image was made for, or correct it with `edgevmm image rebase \
             --unsafe`",
        ));
    }
    if named == Some(ImageFormat::Raw) {
        return Ok(ImageFormat::Raw);
    }
    let found = probe_file(file)?;
    let (who, expected) = match (named, given) {
        (Some(named), _) => ("the image above it", named),
        (None, Some(given)) => ("its format option", given),
        (None, None) => return Ok(found),
    };
    // A fixed VHD can't be told from a raw disk by what it begins with.
    if found != expected && !(expected == ImageFormat::Vhd && found == ImageFormat::Raw) {
        return Err(mismatch(
            found,
            who,
            expected.to_string(),
            "give the file the image was made for, or record the format in the image above with \
             `edgevmm image rebase --unsafe`",
        ));
    }
    Ok(expected)
}
