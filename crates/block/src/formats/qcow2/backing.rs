//! Recording another backing file, and header extensions of the caller's own.

use std::fs::File;

use super::create::Extension;
use crate::BlockError;
use crate::formats::Backing;

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
    let _ = (file, edit);
    Err(super::unfinished(path_hint))
}
