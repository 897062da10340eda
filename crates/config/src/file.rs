//! Configuration files: YAML, and JSON as a part of it.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::de;

use crate::VmConfig;
use crate::yaml;

/// Largest configuration file, in bytes.
pub const MAX_FILE_SIZE: u64 = 256 << 10;

/// Why a configuration file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigFileError {
    /// The file can't be read.
    #[error("Can't read configuration file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
    /// More than [`MAX_FILE_SIZE`].
    #[error(
        "Configuration file {} has more than {} KiB: is it the right file?",
        path.display(),
        MAX_FILE_SIZE >> 10
    )]
    Size {
        /// The file.
        path: PathBuf,
    },
    /// What is in it isn't a machine.
    #[error("Configuration file {} is wrong", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: ConfigTextError,
    },
}

/// Why a text isn't a configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {message}")]
pub struct ConfigTextError {
    /// Line, from 1; 0 when the text is wrong as a whole.
    pub line: u64,
    /// What is wrong there, and what to do.
    pub message: String,
}

impl VmConfig {
    /// Reads a YAML or JSON file. Relative paths in it are taken from the file's folder.
    ///
    /// # Errors
    ///
    /// When the file can't be read, is too large, or isn't a configuration: then with the line,
    /// and for an unknown key with the known ones.
    pub fn load(path: &Path) -> Result<Self, ConfigFileError> {
        let mut bytes = Vec::new();
        File::open(path)
            .and_then(|file| file.take(MAX_FILE_SIZE + 1).read_to_end(&mut bytes))
            .map_err(|source| ConfigFileError::Read {
                path: path.to_owned(),
                source,
            })?;
        if bytes.len() as u64 > MAX_FILE_SIZE {
            return Err(ConfigFileError::Size {
                path: path.to_owned(),
            });
        }
        let content = |source| ConfigFileError::Content {
            path: path.to_owned(),
            source,
        };
        let text = String::from_utf8(bytes).map_err(|_| {
            content(ConfigTextError {
                line: 1,
                message: "it is not text in UTF-8".into(),
            })
        })?;
        let mut config = Self::parse(&text).map_err(content)?;
        config.resolve_paths(path.parent().unwrap_or_else(|| Path::new("")));
        Ok(config)
    }

    /// Reads YAML or JSON text.
    ///
    /// # Errors
    ///
    /// When the text isn't a configuration.
    pub fn parse(text: &str) -> Result<Self, ConfigTextError> {
        yaml::parse(text)?.read()
    }

    /// Reads JSON that a `VmConfig` was written as.
    ///
    /// # Errors
    ///
    /// When it can't be read or isn't a configuration.
    pub fn from_json(json: impl Read) -> Result<Self, serde_json::Error> {
        let node: yaml::Node = serde_json::from_reader(json)?;
        node.read().map_err(de::Error::custom)
    }

    /// Writes YAML that [`VmConfig::parse`] reads.
    ///
    /// # Errors
    ///
    /// When a path isn't UTF-8.
    pub fn to_yaml(&self) -> Result<String, String> {
        yaml::to_yaml(self)
    }

    /// Takes relative paths from `base`.
    pub fn resolve_paths(&mut self, base: &Path) {
        for path in self.paths_mut() {
            // An empty path stays, for the check to find.
            if path.as_os_str() != "" {
                *path = base.join(&*path);
            }
        }
    }

    /// All paths of host files.
    fn paths_mut(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        let disks = self.disks.iter_mut();
        let disks = disks.flat_map(|disk| {
            let files = disk.backing.iter_mut().chain(&mut disk.data_file);
            files.chain(&mut disk.overlay).chain([&mut disk.path])
        });
        let boot = &mut self.boot;
        let boot = [
            &mut boot.kernel,
            &mut boot.initrd,
            &mut boot.bios,
            &mut boot.uefi,
            &mut boot.uefi_vars,
        ];
        let seed = self.cloud_init.iter_mut();
        let seed = seed.flat_map(|seed| {
            [
                &mut seed.user_data,
                &mut seed.ssh_key,
                &mut seed.network_config,
            ]
        });
        let console = match &mut self.console.output {
            crate::ConsoleOutput::File(path) => Some(path),
            _ => None,
        };
        let channels = self.channels.iter_mut().map(|channel| &mut channel.socket);
        let debugcon = self
            .debugcon
            .as_mut()
            .filter(|path| path.as_os_str() != "-");
        disks
            .chain(boot.into_iter().flatten())
            .chain(seed.flatten())
            .chain(console)
            .chain(channels)
            .chain(debugcon)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]
    use super::*;

    fn error(text: &str) -> String {
        VmConfig::parse(text).unwrap_err().to_string()
    }

    #[test]
    fn errors_tell_the_line_and_what_to_do() {
        for (text, expected) in [
            (
                "cpus:\n  cuont: 4",
                "line 2: unknown key `cuont`: did you mean `count`?",
            ),
            (
                "nets: [{type: usr}]",
                "line 1: unknown value `usr`: did you mean `user`?",
            ),
            (
                "name: a\nname: b",
                "line 2: the key `name` stands twice: remove one",
            ),
            (
                "cpus:\n  count: 300",
                "line 2: write a whole number from 0 to 255",
            ),
            (
                "stop_timeout: soon",
                "line 1: write a whole number from 0 to 4294967295",
            ),
            ("disks: [{ro: yes, path: a}]", "line 1: write true or false"),
            ("disks:\n- ro: true", "line 2: the key `path` is missing"),
            (
                "disks: a",
                "line 1: a list is needed here, with `- ` before each item",
            ),
            (
                "- a",
                "line 1: keys with values are needed here, like `count: 2`",
            ),
            ("name: {a: b}", "line 1: a text is needed here"),
            (
                "--- {}\n--- {}",
                "line 2: a second document begins: remove it",
            ),
            (
                "memory: {size: 5X}",
                "line 1: `5X` is not a size: write a whole number and K, M, G or T, like 512M",
            ),
            (
                "nets: [{type: user, forwards: [22]}]",
                "line 1: `22` is not a port forward: write [tcp|udp:][ADDRESS:]HOST:GUEST, like 2222:22",
            ),
        ] {
            assert_eq!(error(text), expected, "{text}");
        }
        assert!(error("disk: []").contains("did you mean `disks`?"));
    }

    #[test]
    fn yaml_and_json_give_the_same() {
        let yaml = "name: a\nmemory: {size: 2G}\ndisks:\n- path: x.qcow2\n  format: qcow2\n\
                    console:\n  output:\n    file: out\n";
        let json = r#"{"name": "a", "memory": {"size": 2147483648},
            "disks": [{"path": "x.qcow2", "format": "qcow2"}],
            "console": {"output": {"file": "out"}}}"#;
        let config = VmConfig::parse(yaml).unwrap();
        assert_eq!(VmConfig::parse(json).unwrap(), config);
        assert_eq!(config.nets, VmConfig::default().nets);
        assert_eq!(VmConfig::parse(&config.to_yaml().unwrap()).unwrap(), config);
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(VmConfig::parse(&json).unwrap(), config);
    }

    #[test]
    fn bombs_and_large_files_are_refused() {
        let bomb = format!(
            "a0: &a0 [x]\n{}",
            (1..50).fold(String::new(), |text, i| {
                let last = i - 1;
                text + &format!("a{i}: &a{i} [*a{last}, *a{last}, *a{last}]\n")
            })
        );
        assert!(VmConfig::parse(&bomb).is_err());
        assert!(VmConfig::parse(&"[".repeat(100_000)).is_err());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("large.yaml");
        std::fs::write(&path, vec![b'#'; MAX_FILE_SIZE as usize + 1]).unwrap();
        assert!(matches!(
            VmConfig::load(&path),
            Err(ConfigFileError::Size { .. })
        ));
        assert!(matches!(
            VmConfig::load(Path::new("/dev/zero")),
            Err(ConfigFileError::Size { .. })
        ));
        std::fs::write(&path, b"name: \xff").unwrap();
        assert!(matches!(
            VmConfig::load(&path),
            Err(ConfigFileError::Content { .. })
        ));
    }

    #[test]
    fn paths_are_taken_from_the_folder_of_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm.yaml");
        let text = "disks: [{path: a, backing: [b, /c]}, {path: ''}]\nboot: {kernel: k}\n\
                    cloud_init: {user_data: u}\nconsole: {output: {file: o}}\ndebugcon: '-'\n";
        std::fs::write(&path, text).unwrap();
        let config = VmConfig::load(&path).unwrap();
        let inside = |name| folder.path().join(name);
        assert_eq!(config.disks[0].path, inside("a"));
        assert_eq!(config.disks[0].backing, [inside("b"), "/c".into()]);
        assert_eq!(config.disks[1].path, Path::new(""));
        assert_eq!(config.boot.kernel, Some(inside("k")));
        assert_eq!(config.cloud_init.unwrap().user_data, Some(inside("u")));
        assert_eq!(
            config.console.output,
            crate::ConsoleOutput::File(inside("o"))
        );
        assert_eq!(config.debugcon, Some("-".into()));
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(text: String) {
            let _ = VmConfig::parse(&text);
        }

        #[test]
        fn no_yaml_panics(text in "[a-z0-9:{}\\[\\], &*!|>'\"\n-]*") {
            let _ = VmConfig::parse(&text);
        }
    }
}
