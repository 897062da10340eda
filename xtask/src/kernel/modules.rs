//! Selects kernel modules by name, with what they depend on, and unpacks them: decompressing at
//! load time would be paid for inside the emulated machine.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The modules of one kernel.
#[derive(Debug)]
pub struct Modules {
    dir: PathBuf,
    /// Module path below `dir` to the paths of all it needs, in `modules.dep`'s order.
    dependencies: HashMap<String, Vec<String>>,
    /// Module name (`-` and `_` alike) to its path below `dir`.
    paths: HashMap<String, String>,
}

impl Modules {
    pub(super) fn open(dir: &Path) -> Result<Self> {
        let text = fs::read_to_string(dir.join("modules.dep")).context("No modules.dep")?;
        Ok(Self::parse(dir, &text))
    }

    fn parse(dir: &Path, modules_dep: &str) -> Self {
        let lines = modules_dep.lines().filter_map(|line| line.split_once(':'));
        let dependencies: HashMap<String, Vec<String>> = lines
            .map(|(path, needs)| {
                (
                    path.to_owned(),
                    needs.split_whitespace().map(str::to_owned).collect(),
                )
            })
            .collect();
        let paths = dependencies
            .keys()
            .map(|path| (name_of(path), path.clone()))
            .collect();
        Self {
            dir: dir.to_owned(),
            dependencies,
            paths,
        }
    }

    /// The directory of the modules (`…/lib/modules/RELEASE`).
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The paths of `names` and all they depend on, in an order in which they can be loaded.
    /// A name the kernel has built in, or does not have, is passed over.
    #[must_use]
    pub fn closure(&self, names: &[&str]) -> Vec<String> {
        let mut seen = HashSet::new();
        let mut order = Vec::new();
        for path in names
            .iter()
            .filter_map(|name| self.paths.get(&canonical(name)))
        {
            self.visit(path, &mut seen, &mut order);
        }
        order
    }

    /// The paths of all modules below the directory `prefix`, with what they depend on.
    #[must_use]
    pub fn below(&self, prefix: &str) -> Vec<String> {
        let mut seen = HashSet::new();
        let mut order = Vec::new();
        for path in self
            .dependencies
            .keys()
            .filter(|path| path.starts_with(prefix))
        {
            self.visit(path, &mut seen, &mut order);
        }
        order
    }

    fn visit(&self, path: &str, seen: &mut HashSet<String>, order: &mut Vec<String>) {
        if !seen.insert(path.to_owned()) {
            return;
        }
        // modules.dep lists what must be loaded first at the end.
        for needed in self.dependencies.get(path).into_iter().flatten().rev() {
            self.visit(needed, seen, order);
        }
        order.push(path.to_owned());
    }

    /// Reads a module, unpacked.
    ///
    /// # Errors
    /// The file cannot be read or unpacked.
    pub fn read(&self, path: &str) -> Result<Vec<u8>> {
        let packed = fs::read(self.dir.join(path)).with_context(|| format!("No module {path}"))?;
        let mut module = Vec::new();
        match path.rsplit('.').next() {
            Some("xz") => {
                liblzma::copy_decode(packed.as_slice(), &mut module)
                    .with_context(|| format!("Cannot unpack {path}"))?;
            }
            Some("zst") => {
                let mut decoder = ruzstd::decoding::StreamingDecoder::new(packed.as_slice())
                    .with_context(|| format!("Cannot unpack {path}"))?;
                std::io::copy(&mut decoder, &mut module)?;
            }
            Some("ko") => module = packed,
            _ => bail!("Cannot unpack {path}: unknown compression"),
        }
        Ok(module)
    }
}

/// A module's path without the ending of its compression.
#[must_use]
pub fn unpacked_path(path: &str) -> &str {
    path.strip_suffix(".xz")
        .or_else(|| path.strip_suffix(".zst"))
        .unwrap_or(path)
}

fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    canonical(file.split('.').next().unwrap_or(file))
}

fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_modules_for_loading() {
        let modules = Modules::parse(
            Path::new("/nowhere"),
            "kernel/a-b.ko.xz: kernel/c.ko.xz kernel/d.ko.xz\n\
             kernel/c.ko.xz: kernel/d.ko.xz\nkernel/d.ko.xz:\nkernel/e.ko.xz:\n",
        );
        let order = modules.closure(&["a_b", "d", "missing"]);
        assert_eq!(
            order,
            ["kernel/d.ko.xz", "kernel/c.ko.xz", "kernel/a-b.ko.xz"]
        );
        assert_eq!(unpacked_path("kernel/d.ko.xz"), "kernel/d.ko");
    }
}
