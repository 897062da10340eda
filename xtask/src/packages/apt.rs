//! A private apt: its own sources, lists and (empty) package status, so that it neither needs root
//! nor sees or changes what is installed on this system. Proxies and the like still come from the
//! system's apt configuration.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::sources::Mirror;
use crate::process;

/// A private apt for one release of a distribution.
#[derive(Debug)]
pub struct Apt {
    dir: PathBuf,
}

impl Apt {
    /// Opens (and the first time downloads) the package lists of `suite`, kept in `dir/SUITE`.
    ///
    /// # Errors
    /// No apt, no network, or the mirror does not have `suite`.
    pub fn open(dir: &Path, mirror: &Mirror, suite: &str) -> Result<Self> {
        Self::with(dir.join(suite), &mirror.source_line(suite))
    }

    /// As [`Apt::open`], with the lists of what packages are made of, kept in `dir/SUITE-sources`.
    ///
    /// # Errors
    /// As [`Apt::open`].
    pub fn open_sources(dir: &Path, mirror: &Mirror, suite: &str) -> Result<Self> {
        let dir = dir.join(format!("{suite}-sources"));
        Self::with(dir, &mirror.sources_line(suite))
    }

    fn with(dir: PathBuf, line: &str) -> Result<Self> {
        let apt = Self { dir };
        for sub in ["lists/partial", "cache/archives/partial", "none/partial"] {
            let path = apt.dir.join(sub);
            fs::create_dir_all(&path).with_context(|| format!("Cannot make {}", path.display()))?;
        }
        fs::write(apt.dir.join("status"), "")?;
        let list = apt.dir.join("sources.list");
        let updated = apt.dir.join("updated");
        if fs::read_to_string(&updated).ok().as_deref() != Some(line) {
            fs::write(&list, format!("{line}\n"))?;
            process::output(apt.command("apt-get").args(["--error-on=any", "update"]))
                .with_context(|| format!("Cannot read the package lists of `{line}`"))?;
            fs::write(&updated, line)?;
        }
        Ok(apt)
    }

    /// Downloads `packages` with all they depend on, keeping those whose file name `wanted` accepts.
    /// Lists that have gone stale (a package was superseded on the mirror) are refreshed once.
    ///
    /// # Errors
    /// A package does not exist or cannot be downloaded.
    pub fn download(&self, packages: &[&str], wanted: fn(&str) -> bool) -> Result<Vec<PathBuf>> {
        self.try_download(packages, wanted).or_else(|_| {
            process::output(self.command("apt-get").args(["--error-on=any", "update"]))?;
            self.try_download(packages, wanted)
        })
    }

    /// Downloads what `package` is made of, and gives the archive of its authors.
    ///
    /// # Errors
    /// There is no such package, or it cannot be downloaded.
    pub fn source(&self, package: &str) -> Result<PathBuf> {
        let mut command = self.command("apt-get");
        command
            .current_dir(self.archive_dir())
            .args(["-qq", "source", "--download-only", package]);
        process::output(&mut command)?;
        let begin = format!("{package}_");
        let files = fs::read_dir(self.archive_dir())?.flatten();
        let mut names = files.filter_map(|file| file.file_name().into_string().ok());
        let original = names.find(|name| name.starts_with(&begin) && name.contains(".orig.tar."));
        let original = original.with_context(|| format!("{package} has no original archive"))?;
        Ok(self.archive_dir().join(original))
    }

    fn try_download(&self, packages: &[&str], wanted: fn(&str) -> bool) -> Result<Vec<PathBuf>> {
        let install = ["--no-install-recommends", "--yes", "-qq", "install"];
        // What was downloaded before is left out of the list, unless it is hidden.
        let hidden = format!("-oDir::Cache::archives={}", self.dir.join("none").display());
        let mut list = self.command("apt-get");
        list.args([&hidden, "--print-uris"])
            .args(install)
            .args(packages);
        let uris = process::output(&mut list)?;
        let closure = archives(&uris);
        let files: Vec<&String> = closure.iter().filter(|file| wanted(file)).collect();
        if files.len() == closure.len() {
            let download = ["--download-only"];
            process::output(
                self.command("apt-get")
                    .args(download)
                    .args(install)
                    .args(packages),
            )?;
        } else {
            let names = files.iter().filter_map(|file| file.split('_').next());
            let mut command = self.command("apt-get");
            command
                .current_dir(self.archive_dir())
                .args(["-qq", "download"])
                .args(names);
            process::output(&mut command)?;
        }
        Ok(files
            .iter()
            .map(|file| self.archive_dir().join(file))
            .collect())
    }

    fn archive_dir(&self) -> PathBuf {
        self.dir.join("cache/archives")
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .env("LC_ALL", "C.UTF-8")
            .env("DEBIAN_FRONTEND", "noninteractive");
        for (option, path) in [
            ("Dir::Etc::SourceList", self.dir.join("sources.list")),
            ("Dir::Etc::SourceParts", "/dev/null".into()),
            ("Dir::State", self.dir.clone()),
            ("Dir::State::Lists", self.dir.join("lists")),
            ("Dir::State::status", self.dir.join("status")),
            ("Dir::Cache", self.dir.join("cache")),
        ] {
            command.arg(format!("-o{option}={}", path.display()));
        }
        // apt's own download user cannot read below a private home directory.
        command.args(["-oAPT::Sandbox::User=root", "-oAPT::Architecture=amd64"]);
        command.arg("-oAPT::Keep-Downloaded-Packages=true");
        command
    }
}

/// The file names in the output of `apt-get --print-uris install`: `'URI' FILE SIZE HASH` each.
fn archives(uris: &str) -> Vec<String> {
    uris.lines()
        .filter(|line| line.starts_with('\''))
        .filter_map(|line| line.split_whitespace().nth(1))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_archive_names() {
        let uris = "Reading lists...\n\
                    'http://m.test/pool/q_1%3a10_amd64.deb' q_1%3a10_amd64.deb 10 SHA256:0\n";
        assert_eq!(archives(uris), ["q_1%3a10_amd64.deb"]);
    }
}
