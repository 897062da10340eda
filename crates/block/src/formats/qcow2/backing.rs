//! Recording another backing file, and header extensions of the caller's own.

use std::fs::File;

use super::create::Extension;
use super::header::{Header, bad_image};
use crate::BlockError;
use crate::formats::Backing;
use crate::host::{HostFile, lock};

/// What a header says that is nothing to the image's own data.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderParts {
    /// What lies below the image.
    pub backing: Option<Backing>,
    /// Header extensions that this crate gives no meaning to.
    pub extensions: Vec<Extension>,
}

/// Changes parts of the header of the image in `file`, which is locked meanwhile, in one write, and
/// syncs it. What the disk reads as changes wherever a new backing file differs from the old one.
///
/// # Errors
///
/// [`BlockError::BadImage`] if the header has no room for it or the image can have no backing
/// file, [`BlockError::Locked`], or what the host says.
pub fn edit_header(
    file: File,
    path_hint: &str,
    edit: impl FnOnce(&mut HeaderParts),
) -> Result<(), BlockError> {
    let file = HostFile::new(file, path_hint, false)?;
    lock::lock(&file, true)?;
    let mut header = Header::read(&file)?;
    let mut parts = HeaderParts {
        backing: header.backing.take(),
        extensions: header.unknown_extensions().cloned().collect(),
    };
    edit(&mut parts);
    header.backing = parts.backing;
    header.set_unknown_extensions(parts.extensions);
    header.name_features();
    let head = header
        .check_fields()
        .and_then(|()| header.encode())
        .map_err(|reason| bad_image(&file, reason))?;
    file.write_buf(&head, 0)
        .and_then(|()| file.sync())
        .map_err(|source| BlockError::File {
            op: "write the header of",
            path: path_hint.to_owned(),
            source,
        })
}
