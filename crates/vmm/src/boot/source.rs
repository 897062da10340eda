//! A file of the host that is loaded into the guest at every reset.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::BootError;

/// An open file, and what to call it in messages.
#[derive(Debug)]
pub(super) struct Source {
    pub what: &'static str,
    pub path: PathBuf,
    pub file: File,
}

impl Source {
    /// Opens a regular file. A pipe in its place is refused and not waited for.
    pub fn open(what: &'static str, path: &Path) -> Result<Source, BootError> {
        let file = open_regular(path).map_err(|source| BootError::Read {
            what,
            path: path.to_path_buf(),
            source,
        })?;
        let path = path.to_path_buf();
        Ok(Source { what, path, file })
    }

    /// Opens a file of `package`; says which that is when the file is missing.
    pub fn open_firmware(
        what: &'static str,
        path: &Path,
        package: &'static str,
    ) -> Result<Source, BootError> {
        Self::open(what, path).map_err(|error| match error {
            BootError::Read { source, path, .. } if source.kind() == io::ErrorKind::NotFound => {
                BootError::NoFirmware {
                    what,
                    path,
                    package,
                }
            }
            error => error,
        })
    }

    /// What became of reading it.
    pub fn error(&self, source: io::Error) -> BootError {
        BootError::Read {
            what: self.what,
            path: self.path.clone(),
            source,
        }
    }

    /// Goes to its begin.
    pub fn rewind(&mut self) -> Result<(), BootError> {
        self.file.rewind().map_err(|e| self.error(e))
    }

    /// Its length in bytes.
    pub fn len(&self) -> Result<u64, BootError> {
        let metadata = self.file.metadata().map_err(|e| self.error(e))?;
        Ok(metadata.len())
    }

    /// Its length and its first bytes; what it has not is zero.
    pub fn head<const N: usize>(&mut self) -> Result<(u64, [u8; N]), BootError> {
        self.rewind()?;
        let mut head = Vec::new();
        let mut file = (&self.file).take(N as u64);
        file.read_to_end(&mut head).map_err(|e| self.error(e))?;
        head.resize(N, 0);
        Ok((self.len()?, head.try_into().unwrap_or([0; N])))
    }
}

fn open_regular(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_file() {
        Ok(file)
    } else if kind.is_dir() {
        Err(io::ErrorKind::IsADirectory.into())
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is not a regular file",
        ))
    }
}
