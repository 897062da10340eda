//! The folders in which machines are found.
//!
//! ```text
//! $EDGEVMM_RUNTIME_DIR, else $XDG_RUNTIME_DIR/edgevmm, else /run/edgevmm (root)
//! └── NAME/         0700
//!     ├── lock      locked by a living VMM, whose process ID it holds
//!     ├── api.sock  the API
//!     ├── config.json
//!     ├── log       messages of a detached VMM
//!     └── exit.json how the guest ended
//! ```
//!
//! The lock, which the kernel drops with the process, tells a living machine from what a dead one
//! left behind. It is handed from the command that starts a detached machine to its VMM as an
//! inherited file descriptor, so that the name is never free in between.

mod error;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use edgevmm_config::check_name;
use nix::libc::O_NOFOLLOW;

pub use error::RuntimeDirError;
use error::{io_error, is_any};

use crate::{ExitRecord, lock};

/// Environment variable with the folder of all machines.
const DIR_VARIABLE: &str = "EDGEVMM_RUNTIME_DIR";
/// Longest path of a Unix socket, in bytes.
const MAX_SOCKET_PATH: usize = 107;
/// Largest file read back from a machine's folder, in bytes.
const MAX_FILE: u64 = 1 << 20;
/// Times a claim is tried again when somebody removes the folder at the same time.
const CLAIM_ATTEMPTS: u32 = 16;

/// The folder of all machines of a user.
#[derive(Debug, Clone)]
pub struct RuntimeDir {
    path: PathBuf,
}

impl RuntimeDir {
    /// The folder for this user, from the environment.
    ///
    /// # Errors
    ///
    /// When the environment tells none and the user isn't root.
    pub fn from_env() -> Result<Self, RuntimeDirError> {
        let set = |variable| std::env::var_os(variable).filter(|value| !value.is_empty());
        if let Some(path) = set(DIR_VARIABLE) {
            return Ok(Self::new(path));
        }
        if nix::unistd::geteuid().is_root() {
            return Ok(Self::new("/run/edgevmm"));
        }
        match set("XDG_RUNTIME_DIR") {
            Some(path) => Ok(Self::new(Path::new(&path).join("edgevmm"))),
            None => Err(RuntimeDirError::NoPlace),
        }
    }

    /// The folder at `path`.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Path of the folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes `name` for a machine of this process, and empties the folder that a dead machine of
    /// that name left.
    ///
    /// # Errors
    ///
    /// When a living machine has the name, or the folder can't be made safely.
    pub fn claim(&self, name: &str) -> Result<MachineClaim, RuntimeDirError> {
        let dir = self.machine(name)?;
        dir.check_socket_path()?;
        create_private_dir(&self.path, true)?;
        for _ in 0..CLAIM_ATTEMPTS {
            match create_private_dir(&dir.path, false) {
                // Somebody removed it before it could be looked at.
                Err(RuntimeDirError::Io { source, .. })
                    if is_any(&source, &[ErrorKind::NotFound]) =>
                {
                    continue;
                }
                result => result?,
            }
            if let Some(lock) = dir.try_lock()? {
                dir.remove_files()?;
                let claim = MachineClaim { dir, lock };
                claim.write_pid(std::process::id())?;
                return Ok(claim);
            }
        }
        Err(RuntimeDirError::NameInUse {
            name: name.to_owned(),
        })
    }

    /// Takes the first one of `base`, `base-2`, `base-3` and so on that no living machine has.
    ///
    /// # Errors
    ///
    /// When a folder can't be made safely.
    pub fn claim_unique(&self, base: &str) -> Result<MachineClaim, RuntimeDirError> {
        for number in 1..=u32::MAX {
            match self.claim(&numbered(base, number)) {
                Err(RuntimeDirError::NameInUse { .. }) => {}
                result => return result,
            }
        }
        Err(RuntimeDirError::NameInUse {
            name: base.to_owned(),
        })
    }

    /// The folder of the machine `name`, living or dead.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn open(&self, name: &str) -> Result<MachineDir, RuntimeDirError> {
        let dir = self.machine(name)?;
        if dir.exists() {
            Ok(dir)
        } else {
            Err(RuntimeDirError::NotFound {
                name: name.to_owned(),
            })
        }
    }

    /// Folders of all machines, living and dead, by name.
    ///
    /// # Errors
    ///
    /// When the folder can't be read.
    pub fn list(&self) -> Result<Vec<MachineDir>, RuntimeDirError> {
        let entries = match fs::read_dir(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            result => result.map_err(io_error("list", &self.path))?,
        };
        let mut dirs = Vec::new();
        for entry in entries {
            let entry = entry.map_err(io_error("list", &self.path))?;
            let machine = entry
                .file_name()
                .to_str()
                .and_then(|name| self.machine(name).ok());
            dirs.extend(machine.filter(MachineDir::exists));
        }
        dirs.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(dirs)
    }

    fn machine(&self, name: &str) -> Result<MachineDir, RuntimeDirError> {
        check_name(name)?;
        Ok(MachineDir {
            name: name.to_owned(),
            path: self.path.join(name),
        })
    }
}

/// `base`, or `base` with a number behind it, shortened to what a name may be.
fn numbered(base: &str, number: u32) -> String {
    if number == 1 {
        return base.to_owned();
    }
    let suffix = format!("-{number}");
    let room = edgevmm_config::MAX_NAME_LEN.saturating_sub(suffix.len());
    let base: String = base.chars().take(room).collect();
    base + &suffix
}

/// Makes a folder for this user only, or checks that the one that is there is.
fn create_private_dir(path: &Path, recursive: bool) -> Result<(), RuntimeDirError> {
    match DirBuilder::new()
        .mode(0o700)
        .recursive(recursive)
        .create(path)
    {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        result => result.map_err(io_error("create", path))?,
    }
    let metadata = fs::symlink_metadata(path).map_err(io_error("look at", path))?;
    let ours = metadata.uid() == nix::unistd::geteuid().as_raw();
    if metadata.is_dir() && ours && metadata.mode() & 0o022 == 0 {
        Ok(())
    } else {
        Err(RuntimeDirError::Insecure {
            path: path.to_owned(),
        })
    }
}

/// The folder of a machine.
#[derive(Debug, Clone)]
pub struct MachineDir {
    name: String,
    path: PathBuf,
}

impl MachineDir {
    /// Name of the machine.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Path of the folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Path of the API's socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.path.join("api.sock")
    }

    /// Path of the socket for files; see [`files`](crate::files).
    #[must_use]
    pub fn files_socket(&self) -> PathBuf {
        // No longer than the other's, whose length is checked.
        self.path.join("fds.sock")
    }

    /// Path of the file for messages of a detached VMM.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.path.join("log")
    }

    /// Whether a VMM has the machine.
    ///
    /// # Errors
    ///
    /// When the lock can't be looked at.
    pub fn is_alive(&self) -> Result<bool, RuntimeDirError> {
        match self.open_lock(false)? {
            Some(file) => lock::is_locked(&file).map_err(io_error("look at", &self.lock())),
            None => Ok(false),
        }
    }

    /// Process ID of the living VMM; `None` when there is none.
    ///
    /// # Errors
    ///
    /// When the lock can't be looked at.
    pub fn pid(&self) -> Result<Option<i32>, RuntimeDirError> {
        if !self.is_alive()? {
            return Ok(None);
        }
        let text = self.read_file("lock")?.unwrap_or_default();
        Ok(text.trim().parse().ok().filter(|pid| *pid > 1))
    }

    /// The configuration as the VMM left it there; `None` when it didn't come that far.
    ///
    /// # Errors
    ///
    /// When the file can't be read.
    pub fn config_json(&self) -> Result<Option<String>, RuntimeDirError> {
        self.read_file("config.json")
    }

    /// How the guest ended; `None` while it runs, and when its VMM was killed.
    ///
    /// # Errors
    ///
    /// When the file can't be read.
    pub fn exit(&self) -> Result<Option<ExitRecord>, RuntimeDirError> {
        let text = self.read_file("exit.json")?;
        Ok(text.and_then(|text| serde_json::from_str(&text).ok()))
    }

    /// Removes the folder of a dead machine.
    ///
    /// # Errors
    ///
    /// When the machine lives or files can't be removed.
    pub fn remove(self) -> Result<(), RuntimeDirError> {
        match self.try_lock() {
            Ok(Some(lock)) => MachineClaim { dir: self, lock }.remove(),
            Ok(None) => Err(RuntimeDirError::NotFound { name: self.name }),
            Err(RuntimeDirError::NameInUse { name }) => Err(RuntimeDirError::Alive { name }),
            Err(error) => Err(error),
        }
    }

    fn lock(&self) -> PathBuf {
        self.path.join("lock")
    }

    fn exists(&self) -> bool {
        fs::symlink_metadata(&self.path).is_ok_and(|metadata| metadata.is_dir())
    }

    fn check_socket_path(&self) -> Result<(), RuntimeDirError> {
        let path = self.socket();
        match path.as_os_str().len().checked_sub(MAX_SOCKET_PATH) {
            None | Some(0) => Ok(()),
            Some(excess) => Err(RuntimeDirError::SocketPath { path, excess }),
        }
    }

    /// Opens the lock. `None` when it, or the folder, isn't there.
    fn open_lock(&self, create: bool) -> Result<Option<File>, RuntimeDirError> {
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .create(create)
            .mode(0o600)
            .custom_flags(O_NOFOLLOW);
        match options.open(self.lock()) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            result => result.map(Some).map_err(io_error("open", &self.lock())),
        }
    }

    /// Locks the folder. `None` when somebody removed it meanwhile.
    fn try_lock(&self) -> Result<Option<File>, RuntimeDirError> {
        let Some(lock) = self.open_lock(true)? else {
            return Ok(None);
        };
        if !lock::try_lock(&lock).map_err(io_error("lock", &self.lock()))? {
            return Err(RuntimeDirError::NameInUse {
                name: self.name.clone(),
            });
        }
        Ok(self.holds(&lock)?.then_some(lock))
    }

    /// Whether `lock` is the lock that is in the folder now.
    fn holds(&self, lock: &File) -> Result<bool, RuntimeDirError> {
        let opened = lock.metadata().map_err(io_error("look at", &self.lock()))?;
        Ok(fs::symlink_metadata(self.lock())
            .is_ok_and(|found| (found.dev(), found.ino()) == (opened.dev(), opened.ino())))
    }

    /// Removes everything but the lock.
    fn remove_files(&self) -> Result<(), RuntimeDirError> {
        for entry in fs::read_dir(&self.path).map_err(io_error("list", &self.path))? {
            let entry = entry.map_err(io_error("list", &self.path))?;
            if entry.file_name() == "lock" {
                continue;
            }
            let path = entry.path();
            let is_dir = entry
                .file_type()
                .map_err(io_error("look at", &path))?
                .is_dir();
            let removed = if is_dir {
                fs::remove_dir_all(&path)
            } else {
                fs::remove_file(&path)
            };
            removed.map_err(io_error("remove", &path))?;
        }
        Ok(())
    }

    fn read_file(&self, file: &str) -> Result<Option<String>, RuntimeDirError> {
        let path = self.path.join(file);
        let opened = match OpenOptions::new()
            .read(true)
            .custom_flags(O_NOFOLLOW)
            .open(&path)
        {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            result => result.map_err(io_error("open", &path))?,
        };
        let mut text = String::new();
        opened
            .take(MAX_FILE)
            .read_to_string(&mut text)
            .map_err(io_error("read", &path))?;
        Ok(Some(text))
    }

    /// Writes a file so that readers find all of it or nothing.
    fn write_file(&self, file: &str, text: &str) -> Result<(), RuntimeDirError> {
        let temporary = self.path.join(format!("{file}.new"));
        let path = self.path.join(file);
        let write = || {
            let mut options = OpenOptions::new();
            options
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .custom_flags(O_NOFOLLOW);
            options.open(&temporary)?.write_all(text.as_bytes())?;
            fs::rename(&temporary, &path)
        };
        write().map_err(io_error("write", &path))
    }
}

/// A machine's folder in the hands of its VMM. Dropping it leaves the folder, unlocked.
#[derive(Debug)]
pub struct MachineClaim {
    dir: MachineDir,
    lock: File,
}

/// Where word is left of how a guest ended, by a process that may open no files any more.
#[derive(Debug)]
pub struct ExitFile {
    file: File,
    path: PathBuf,
}

impl ExitFile {
    /// Leaves word.
    ///
    /// # Errors
    ///
    /// When the file can't be written.
    pub fn write(&self, exit: &ExitRecord) -> Result<(), RuntimeDirError> {
        let json = serde_json::to_vec(exit).map_err(io::Error::from);
        let written = json.and_then(|json| (&self.file).write_all(&json));
        written.map_err(io_error("write", &self.path))
    }
}

impl MachineClaim {
    /// The folder.
    #[must_use]
    pub const fn dir(&self) -> &MachineDir {
        &self.dir
    }

    /// The lock, to be inherited by another process which then calls [`MachineClaim::inherit`].
    #[must_use]
    pub const fn lock(&self) -> &File {
        &self.lock
    }

    /// Takes over a claim of the folder at `path` from another process by its lock, for the process
    /// that others know as `pid`.
    ///
    /// # Errors
    ///
    /// When `lock` isn't the lock of that folder.
    pub fn inherit(path: &Path, lock: OwnedFd, pid: u32) -> Result<Self, RuntimeDirError> {
        let insecure = || RuntimeDirError::Insecure {
            path: path.to_owned(),
        };
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .ok_or_else(insecure)?;
        let base = path.parent().ok_or_else(insecure)?;
        let dir = RuntimeDir::new(base).machine(name)?;
        let lock = File::from(lock);
        if !dir.holds(&lock)? {
            return Err(insecure());
        }
        let claim = Self { dir, lock };
        claim.write_pid(pid)?;
        Ok(claim)
    }

    /// Leaves the configuration for others to see.
    ///
    /// # Errors
    ///
    /// When the file can't be written.
    pub fn write_config(&self, json: &str) -> Result<(), RuntimeDirError> {
        self.dir.write_file("config.json", json)
    }

    /// Makes the file in which word is left of how the guest ended. An empty one tells nothing.
    ///
    /// # Errors
    ///
    /// When the file can't be made.
    pub fn open_exit(&self) -> Result<ExitFile, RuntimeDirError> {
        let path = self.dir.path.join("exit.json");
        let mut options = OpenOptions::new();
        options
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(O_NOFOLLOW);
        let file = options.open(&path).map_err(io_error("write", &path))?;
        Ok(ExitFile { file, path })
    }

    /// Removes the folder and gives the name free.
    ///
    /// # Errors
    ///
    /// When files can't be removed.
    pub fn remove(self) -> Result<(), RuntimeDirError> {
        // Another process that shares the lock may have removed the folder, and then the name may
        // be somebody else's by now.
        if !self.dir.holds(&self.lock)? {
            return Ok(());
        }
        self.dir.remove_files()?;
        let lock = self.dir.lock();
        fs::remove_file(&lock).map_err(io_error("remove", &lock))?;
        match fs::remove_dir(&self.dir.path) {
            // Somebody took the name, or even gave it free again, as soon as the lock was gone.
            Err(error) if is_any(&error, &[ErrorKind::DirectoryNotEmpty, ErrorKind::NotFound]) => {
                Ok(())
            }
            result => result.map_err(io_error("remove", &self.dir.path)),
        }
    }

    fn write_pid(&self, pid: u32) -> Result<(), RuntimeDirError> {
        let text = format!("{pid}\n");
        let write = || {
            self.lock.set_len(0)?;
            std::os::unix::fs::FileExt::write_all_at(&self.lock, text.as_bytes(), 0)
        };
        write().map_err(io_error("write", &self.dir.lock()))
    }
}

#[cfg(test)]
mod tests;
