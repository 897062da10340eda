//! Why machines' folders can't be used.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use edgevmm_config::NameError;

use super::DIR_VARIABLE;

/// Why machines' folders can't be used.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeDirError {
    /// No environment variable tells the place.
    #[error(
        "There is no place for machines' sockets as XDG_RUNTIME_DIR is not set: set \
         {DIR_VARIABLE} to a folder of yours"
    )]
    NoPlace,
    /// Somebody else could change what is in the folder.
    #[error(
        "{} is not a folder that only you can write to: remove it, or set {DIR_VARIABLE} to \
         another folder",
        path.display()
    )]
    Insecure {
        /// The folder.
        path: PathBuf,
    },
    /// The path of a socket would be too long.
    #[error(
        "{} is too long for a socket by {excess} bytes: choose a shorter name, or set \
         {DIR_VARIABLE} to a shorter path",
        path.display()
    )]
    SocketPath {
        /// The socket.
        path: PathBuf,
        /// Bytes beyond the limit.
        excess: usize,
    },
    /// The name can't be one.
    #[error(transparent)]
    Name(#[from] NameError),
    /// A living machine has the name.
    #[error(
        "A machine named {name} is running: choose another name with --name, or end it with \
         `edgevmm stop {name}`"
    )]
    NameInUse {
        /// The name.
        name: String,
    },
    /// No machine has the name.
    #[error("There is no machine named {name}: `edgevmm ps -a` lists all")]
    NotFound {
        /// The name.
        name: String,
    },
    /// The machine lives, so its folder must stay.
    #[error(
        "Machine {name} is running: end it with `edgevmm stop {name}` or `edgevmm kill {name}`"
    )]
    Alive {
        /// The name.
        name: String,
    },
    /// A file operation failed.
    #[error("Can't {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
}

/// Makes an I/O error of an action on a path.
pub(super) fn io_error(
    action: &'static str,
    path: &Path,
) -> impl FnOnce(io::Error) -> RuntimeDirError {
    let path = path.to_owned();
    move |source| RuntimeDirError::Io {
        action,
        path,
        source,
    }
}

pub(super) fn is_any(error: &io::Error, kinds: &[ErrorKind]) -> bool {
    kinds.contains(&error.kind())
}
