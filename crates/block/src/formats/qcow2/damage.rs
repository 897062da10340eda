//! What is wrong with an image's metadata, as an error that requests fail with.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::host::HostFile;

/// Metadata that makes no sense.
#[derive(Debug, thiserror::Error)]
#[error("The image is damaged: {what}; check it and repair it, or save what is left of it")]
pub struct Damage {
    what: String,
}

/// An error that says what is damaged.
pub fn damage(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, Damage { what: what.into() })
}

/// What is damaged, if that is what an error says.
pub fn damage_of(error: &io::Error) -> Option<&str> {
    let damage: &Damage = error.get_ref()?.downcast_ref()?;
    Some(&damage.what)
}

/// The file of an image, and how long it is known to be.
#[derive(Debug)]
pub struct ImageFile {
    host: Arc<HostFile>,
    len: AtomicU64,
}

impl ImageFile {
    /// Takes a file and asks for its length.
    pub fn new(host: Arc<HostFile>) -> io::Result<Self> {
        let len = host.len()?;
        host.expect_len(len);
        Ok(Self {
            host,
            len: AtomicU64::new(len),
        })
    }

    /// The file.
    pub fn host(&self) -> &Arc<HostFile> {
        &self.host
    }

    /// Checks that a cluster which the image refers to begins within the file. Its end need not:
    /// nobody has to write the end of a cluster.
    ///
    /// # Errors
    /// It does not, or the host does not tell.
    pub fn check(&self, what: &str, offset: u64) -> io::Result<()> {
        if offset < self.len.load(Ordering::Relaxed) {
            return Ok(());
        }
        let len = self.host.len()?;
        self.len.store(len, Ordering::Relaxed);
        if offset < len {
            self.host.expect_len(len);
            return Ok(());
        }
        Err(damage(format!(
            "it is truncated, as its {what} at offset {offset} is past the end of the file at {len}"
        )))
    }
}
