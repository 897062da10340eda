//! Changes to files of the host: planned first, then made one by one, each so that a reader finds the
//! old file or the new one.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Serialize;

/// What is done to a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verb {
    /// There was none.
    Create,
    /// It was another one.
    Update,
    /// It is as it should be.
    Keep,
    /// It goes.
    Remove,
}

/// A change.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Change {
    /// What is done.
    pub verb: Verb,
    /// To which file.
    pub path: PathBuf,
    #[serde(skip)]
    content: Vec<u8>,
    #[serde(skip)]
    mode: u32,
}

impl Change {
    /// Has the file at `path` have this content and, if it is new, this mode.
    ///
    /// # Errors
    ///
    /// When the file that is there can't be read.
    pub fn write(path: &Path, content: Vec<u8>, mode: u32) -> anyhow::Result<Self> {
        let now = read(path)?;
        let verb = match &now {
            None => Verb::Create,
            Some(now) if *now == content => Verb::Keep,
            Some(_) => Verb::Update,
        };
        Ok(Self {
            verb,
            path: path.to_owned(),
            content,
            mode,
        })
    }

    /// Has no file be at `path`. `None` when there is none.
    pub fn remove(path: &Path) -> Option<Self> {
        path.symlink_metadata().is_ok().then(|| Self {
            verb: Verb::Remove,
            path: path.to_owned(),
            content: Vec::new(),
            mode: 0,
        })
    }

    /// Makes the change.
    ///
    /// # Errors
    ///
    /// When the host refuses.
    pub fn make(&self) -> anyhow::Result<()> {
        let path = self.path.display();
        match self.verb {
            Verb::Keep => Ok(()),
            Verb::Remove => fs::remove_file(&self.path).context(format!("Can't remove {path}")),
            Verb::Create | Verb::Update => self.replace().context(format!("Can't write {path}")),
        }
    }

    fn replace(&self) -> io::Result<()> {
        // The file itself is replaced, not a link to it.
        let path = match self.path.canonicalize() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.path.clone(),
            result => result?,
        };
        let mode = fs::metadata(&path).map_or(self.mode, |now| now.permissions().mode() & 0o7777);
        let folder = path.parent().unwrap_or_else(|| Path::new("/"));
        fs::create_dir_all(folder)?;
        let mut name = std::ffi::OsString::from(".");
        name.push(path.file_name().unwrap_or_default());
        name.push(".edgevmm-new");
        let new = folder.join(name);
        let written = write_whole(&new, &self.content, mode).and_then(|()| fs::rename(&new, &path));
        if written.is_err() {
            let _ = fs::remove_file(&new);
        }
        written?;
        File::open(folder)?.sync_all()
    }
}

fn write_whole(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(path)?;
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    file.write_all(content)?;
    file.sync_all()
}

/// The content of a file; `None` when there is none.
///
/// # Errors
///
/// When it can't be read.
pub fn read(path: &Path) -> anyhow::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).context(format!("Can't read {}", path.display())),
    }
}

/// As [`read`], of a text.
///
/// # Errors
///
/// When it can't be read or is no text.
pub fn read_text(path: &Path) -> anyhow::Result<Option<String>> {
    let content = read(path)?;
    let text = content.map(String::from_utf8).transpose();
    text.context(format!("{} is not UTF-8 text", path.display()))
}
