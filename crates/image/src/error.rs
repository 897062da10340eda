//! The one error type of the crate.

use edgevmm_block::BlockError;

/// Why something could not be done to an image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// An image can't be opened, made, or used as it is.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// A request to an image that is in use failed.
    #[error("Cannot {op} {path:?}")]
    Io {
        /// What was tried: "read" or "write".
        op: &'static str,
        /// The image as the user named it.
        path: String,
        /// Why.
        #[source]
        source: Box<BlockError>,
    },
    /// Whoever asked for it wants it no more.
    #[error("Interrupted; {left}")]
    Cancelled {
        /// What it leaves behind.
        left: &'static str,
    },
    /// The choice of something for this image makes no sense.
    #[error("{path:?} {reason}")]
    Unfit {
        /// The image as the user named it.
        path: String,
        /// Why, and what to do.
        reason: String,
    },
}

impl ImageError {
    /// A request to the image at `path` failed.
    pub(crate) fn io(op: &'static str, path: &str) -> impl FnOnce(BlockError) -> Self {
        move |source| Self::Io {
            op,
            path: path.to_owned(),
            source: Box::new(source),
        }
    }

    /// Whether the host has no room for what was to be written.
    #[must_use]
    pub fn is_out_of_space(&self) -> bool {
        let mut error: Option<&dyn std::error::Error> = Some(self);
        while let Some(cause) = error {
            if let Some(io) = cause.downcast_ref::<std::io::Error>() {
                use std::io::ErrorKind::{QuotaExceeded, StorageFull};
                return matches!(io.kind(), StorageFull | QuotaExceeded);
            }
            error = cause.source();
        }
        false
    }
}
