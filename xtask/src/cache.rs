//! Directories made by a recipe: built once, rebuilt when the recipe changes, never seen half done.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};

/// The name of the file in a built directory that holds the hash of the recipe it was made by.
const STAMP: &str = ".recipe";

/// Where the lab lives: `$EDGEVMM_LAB`, or `edgevmm/lab` in the user's cache directory.
#[must_use]
pub fn lab_dir() -> PathBuf {
    absolute(std::env::var_os("EDGEVMM_LAB").map_or_else(|| user_cache().join("lab"), Into::into))
}

/// Where test images live: `$EDGEVMM_IMAGES`, or `edgevmm/images` in the user's cache directory.
#[must_use]
pub fn images_dir() -> PathBuf {
    absolute(
        std::env::var_os("EDGEVMM_IMAGES").map_or_else(|| user_cache().join("images"), Into::into),
    )
}

/// Where container runtimes for tests live: `$EDGEVMM_PODS`, or `edgevmm/pods` in the user's cache
/// directory.
#[must_use]
pub fn pods_dir() -> PathBuf {
    absolute(std::env::var_os("EDGEVMM_PODS").map_or_else(|| user_cache().join("pods"), Into::into))
}

fn absolute(path: PathBuf) -> PathBuf {
    std::path::absolute(&path).unwrap_or(path)
}

/// `edgevmm` in `$XDG_CACHE_HOME` or `~/.cache`.
#[must_use]
pub fn user_cache() -> PathBuf {
    let base = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")));
    base.unwrap_or_else(std::env::temp_dir).join("edgevmm")
}

/// Everything a built directory depends on, as one number.
///
/// The hash need not be the same across compiler versions: a difference costs one rebuild.
#[must_use]
pub fn recipe(parts: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    parts.hash(&mut hasher);
    hasher.finish()
}

/// A lock held by whoever changes (exclusive) or opens (shared) the things below a directory.
#[derive(Debug)]
pub struct DirLock(#[expect(dead_code, reason = "held for its Drop")] Flock<File>);

impl DirLock {
    /// Waits until nobody else builds or opens things in `dir`, which is made if missing.
    ///
    /// # Errors
    /// `dir` cannot be made or its lock file not be opened.
    pub fn exclusive(dir: &Path) -> Result<Self> {
        Self::take(
            dir,
            FlockArg::LockExclusiveNonblock,
            FlockArg::LockExclusive,
        )
    }

    /// Waits until nobody builds things in `dir`; several may hold this lock at once.
    ///
    /// # Errors
    /// `dir` cannot be made or its lock file not be opened.
    pub fn shared(dir: &Path) -> Result<Self> {
        Self::take(dir, FlockArg::LockSharedNonblock, FlockArg::LockShared)
    }

    fn take(dir: &Path, attempt: FlockArg, wait: FlockArg) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("Cannot make {}", dir.display()))?;
        let path = dir.join("lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .with_context(|| format!("Cannot open the lock file {}", path.display()))?;
        match Flock::lock(file, attempt) {
            Ok(lock) => Ok(Self(lock)),
            Err((file, _)) => {
                crate::progress::note(&format!(
                    "waiting for another xtask using {}",
                    dir.display()
                ));
                Flock::lock(file, wait)
                    .map(Self)
                    .map_err(|(_, errno)| errno)
                    .with_context(|| format!("Cannot lock {}", path.display()))
            }
        }
    }
}

/// Tells whether `dir` was built by this very recipe.
#[must_use]
pub fn is_fresh(dir: &Path, recipe: u64) -> bool {
    fs::read_to_string(dir.join(STAMP)).is_ok_and(|stamp| stamp == format!("{recipe:016x}"))
}

/// The recipe of the built directory that `path` is in, for what is made of it.
#[must_use]
pub fn stamp(path: &Path) -> Option<String> {
    let dirs = path.ancestors().map(|dir| dir.join(STAMP));
    dirs.into_iter()
        .find_map(|file| fs::read_to_string(file).ok())
}

/// Makes sure `dir` was built by `recipe`: when it was not, `build` fills a new directory that then
/// takes its place. The caller holds the exclusive lock.
///
/// Returns whether something was built.
///
/// # Errors
/// What `build` returns, or a file-system error. `dir` is then as it was before.
pub fn ensure(dir: &Path, recipe: u64, build: impl FnOnce(&Path) -> Result<()>) -> Result<bool> {
    if is_fresh(dir, recipe) {
        return Ok(false);
    }
    let mut name = dir.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let fresh = dir.with_file_name(name);
    remove(&fresh)?;
    fs::create_dir_all(&fresh).with_context(|| format!("Cannot make {}", fresh.display()))?;
    build(&fresh)?;
    fs::write(fresh.join(STAMP), format!("{recipe:016x}"))?;
    remove(dir)?;
    fs::rename(&fresh, dir).with_context(|| format!("Cannot move {} in place", dir.display()))?;
    Ok(true)
}

fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("Cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn rebuilds_only_when_the_recipe_changes() {
        let base = tempfile::tempdir().unwrap();
        let dir = base.path().join("thing");
        let build = |text: &'static str| move |path: &Path| Ok(fs::write(path.join("made"), text)?);
        assert!(ensure(&dir, 1, build("one")).unwrap());
        assert!(!ensure(&dir, 1, build("again")).unwrap());
        assert_eq!(fs::read_to_string(dir.join("made")).unwrap(), "one");
        assert!(ensure(&dir, 2, build("two")).unwrap());
        assert_eq!(fs::read_to_string(dir.join("made")).unwrap(), "two");
    }

    #[test]
    fn a_failed_build_leaves_the_old_directory() {
        let base = tempfile::tempdir().unwrap();
        let dir = base.path().join("thing");
        ensure(&dir, 1, |path| Ok(fs::write(path.join("made"), "one")?)).unwrap();
        assert!(ensure(&dir, 2, |_| anyhow::bail!("no")).is_err());
        assert!(is_fresh(&dir, 1));
    }
}
