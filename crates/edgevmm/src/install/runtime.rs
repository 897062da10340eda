//! Edits containerd's configuration: a block between two marks, so that it can be taken out again and
//! nothing else is touched.
//!
//! containerd 2 merges a drop-in of version 3 with the rest. Versions 1 replace all settings of the
//! CRI plugin by those of the drop-in, so it is no use to them.

use std::path::{Path, PathBuf};

const BEGIN: &str = "# BEGIN edgevmm: written by `edgevmm install`, removed by `edgevmm uninstall`";
const END: &str = "# END edgevmm";
/// How all our first marks begin.
const BEGIN_START: &str = "# BEGIN edgevmm";
/// What k3s puts its own settings in place of.
const BASE: &str = "{{ template \"base\" . }}\n";

/// Version of a configuration file, which decides what the plugin is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// Read by all.
    V2,
    /// Read by containerd 2 and newer.
    V3,
}

/// Why a file is left alone.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EditError {
    /// The last mark is gone.
    #[error(
        "The block that begins with `{BEGIN_START}` has no end: remove it, or add a line `{END}`"
    )]
    Unclosed,
    /// Somebody has written the same by hand.
    #[error("It has lines for `edgevmm` already that are not between our marks: remove them first")]
    Foreign,
}

impl Version {
    /// That of a configuration; the first one is unlikely to be met, and has none of its own here.
    pub fn of(text: &str) -> Option<Self> {
        match top_level(text, "version")? {
            "2" => Some(Self::V2),
            "3" => Some(Self::V3),
            _ => None,
        }
    }

    fn plugin(self) -> &'static str {
        match self {
            Self::V2 => "io.containerd.grpc.v1.cri",
            Self::V3 => "io.containerd.cri.v1.runtime",
        }
    }
}

/// The table that makes the runtime known, started from `shim`.
pub fn table(version: Version, shim: &Path) -> String {
    let plugin = version.plugin();
    let shim = shim.display();
    format!(
        "[plugins.\"{plugin}\".containerd.runtimes.edgevmm]\n  \
         runtime_type = \"io.containerd.edgevmm.v1\"\n  \
         runtime_path = \"{shim}\"\n  \
         pod_annotations = [\"edgevmm.io/*\"]\n  \
         container_annotations = [\"edgevmm.io/*\"]\n  \
         privileged_without_host_devices = true\n"
    )
}

/// The default runtime of containerd, as it is where no configuration names any.
///
/// containerd 1.x replaces its default map of runtimes by that of a configuration, rather than merging
/// them: where ours were the only one named there would be no `runc`, and the CRI plugin does not
/// start without its default runtime.
fn default_runtime() -> String {
    let plugin = Version::V2.plugin();
    format!(
        "[plugins.\"{plugin}\".containerd.runtimes.runc]\n  \
         runtime_type = \"io.containerd.runc.v2\"\n"
    )
}

/// A drop-in, in place of the `text` of an older one.
///
/// # Errors
///
/// When there is more in the text than we write, or half a block.
pub fn drop_in(text: &str, shim: &Path) -> Result<String, EditError> {
    if !without_block(text)?.trim().is_empty() {
        return Err(EditError::Foreign);
    }
    let table = table(Version::V3, shim);
    Ok(format!("{BEGIN}\nversion = 3\n{table}{END}\n"))
}

/// A template for k3s.
pub fn template(version: Version, shim: &Path) -> Result<String, EditError> {
    with_block(BASE, version, shim)
}

/// What is left of a configuration or a template that has no block any more, if it is anything that we
/// did not write.
pub fn rest(text: &str) -> Option<&str> {
    let own = [BASE, "version = 2\n", ""];
    (!own.contains(&text)).then_some(text)
}

/// A configuration that containerd reads as it is, with our block at its end.
///
/// # Errors
///
/// As [`with_block`].
pub fn configuration(text: &str, version: Version, shim: &Path) -> Result<String, EditError> {
    let names_some = without_block(text)?.lines().any(is_among_runtimes);
    let mut tables = table(version, shim);
    if version == Version::V2 && !names_some {
        tables += &default_runtime();
    }
    with_tables(text, &tables)
}

/// The text with our block at its end, in place of an older one.
///
/// # Errors
///
/// When the text has such a runtime already, or half a block.
pub fn with_block(text: &str, version: Version, shim: &Path) -> Result<String, EditError> {
    with_tables(text, &table(version, shim))
}

fn with_tables(text: &str, tables: &str) -> Result<String, EditError> {
    let mut text = without_block(text)?;
    let foreign = text.lines().any(|line| is_runtime(line.trim()));
    if foreign {
        return Err(EditError::Foreign);
    }
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    Ok(format!("{text}{BEGIN}\n{tables}{END}\n"))
}

/// The text without our block.
///
/// # Errors
///
/// When it has half a block.
pub fn without_block(text: &str) -> Result<String, EditError> {
    let mut left = String::new();
    let mut inside = false;
    for line in text.split_inclusive('\n') {
        let plain = line.trim();
        if inside {
            inside = plain != END;
        } else if plain.starts_with(BEGIN_START) {
            inside = true;
        } else {
            left.push_str(line);
        }
    }
    if inside {
        Err(EditError::Unclosed)
    } else {
        Ok(left)
    }
}

/// Folder of drop-ins that a configuration of version 3 imports all files `*.toml` of.
pub fn drop_ins(text: &str) -> Option<PathBuf> {
    if Version::of(text) != Some(Version::V3) {
        return None;
    }
    let list = top_level(text, "imports")?
        .strip_prefix('[')?
        .strip_suffix(']')?;
    let mut paths = list
        .split(',')
        .map(|path| path.trim().trim_matches(['"', '\'']));
    let folder = paths.find_map(|path| path.strip_suffix("/*.toml"))?;
    Some(folder.into()).filter(|folder: &PathBuf| folder.is_absolute())
}

/// Whether the CRI plugin is switched off, as in the configuration that Docker brings.
pub fn cri_is_off(text: &str) -> bool {
    top_level(text, "disabled_plugins").is_some_and(|list| {
        let mut names = list.trim_matches(['[', ']']).split(',');
        names.any(|name| {
            let name = name.trim().trim_matches(['"', '\'']);
            name == "cri" || name.starts_with("io.containerd.grpc.v1.cri")
        })
    })
}

/// The shim that our runtime is started by in a configuration; `None` where there is no such runtime.
pub fn shim_in(text: &str) -> Option<&str> {
    let mut lines = text.lines().map(str::trim);
    lines.find(|line| is_runtime(line))?;
    let mut lines = lines.take_while(|line| !line.starts_with('['));
    let value = lines.find_map(|line| {
        let (name, value) = line.split_once('=')?;
        (name.trim() == "runtime_path").then(|| value.trim())
    });
    value.map(|value| value.trim_matches(['"', '\'']))
}

/// Whether a line begins the table of our runtime.
fn is_runtime(line: &str) -> bool {
    let ends = [
        "runtimes.edgevmm]",
        "runtimes.\"edgevmm\"]",
        "runtimes.'edgevmm']",
    ];
    line.starts_with('[') && ends.iter().any(|end| line.ends_with(end))
}

/// Whether a line begins the table of any runtime, or that of all of them.
fn is_among_runtimes(line: &str) -> bool {
    let line = line.trim();
    let table = line.strip_prefix('[').and_then(|line| line.split_once(']'));
    table.is_some_and(|(name, _)| {
        let name = name.trim();
        name.contains(".containerd.runtimes.") || name.ends_with(".containerd.runtimes")
    })
}

/// The value of a key that stands on one line before all tables.
fn top_level<'t>(text: &'t str, key: &str) -> Option<&'t str> {
    let lines = text.lines().map(str::trim);
    let mut lines = lines.take_while(|line| !line.starts_with('['));
    lines.find_map(|line| {
        let (name, value) = line.split_once('=')?;
        (name.trim() == key).then(|| value.trim())
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const SHIM: &str = "/usr/local/bin/containerd-shim-edgevmm-v1";

    #[test]
    fn a_block_comes_and_goes_and_nothing_else_changes() {
        let own = "version = 2\n[plugins.x]\n  a = 1 # keep";
        let with = with_block(own, Version::V2, Path::new(SHIM)).unwrap();
        assert!(
            with.contains("[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.edgevmm]")
        );
        assert_eq!(
            with_block(&with, Version::V2, Path::new(SHIM)).unwrap(),
            with
        );
        let moved = with_block(&with, Version::V2, Path::new("/opt/shim")).unwrap();
        assert!(moved.contains("/opt/shim") && !moved.contains(SHIM));
        assert_eq!(shim_in(&with), Some(SHIM));
        assert_eq!(
            (
                shim_in(own),
                shim_in("[runtimes.edgevmm]\n[a]\nruntime_path = 1")
            ),
            (None, None)
        );
        assert_eq!(without_block(&with).unwrap(), format!("{own}\n"));
        let drop_in = drop_in("", Path::new(SHIM)).unwrap();
        assert_eq!(without_block(&drop_in).unwrap(), "");
    }

    #[test]
    fn the_default_runtime_stays_one() {
        let runc = "containerd.runtimes.runc]\n  runtime_type = \"io.containerd.runc.v2\"";
        let has_runc = |text: &str, version| {
            let with = configuration(text, version, Path::new(SHIM)).unwrap();
            assert_eq!(shim_in(&with), Some(SHIM));
            let again = configuration(&with, version, Path::new(SHIM));
            assert_eq!(again.as_ref(), Ok(&with));
            with.contains(runc)
        };
        let cri = "[plugins.\"io.containerd.grpc.v1.cri\"";
        for none in [
            "version = 2\n",
            &format!("{cri}.cni]\n  bin_dir = \"/usr/lib/cni\"\n"),
            &format!("# {cri}.containerd.runtimes.runc]\n"),
        ] {
            assert!(has_runc(none, Version::V2), "{none}");
            assert!(!has_runc(none, Version::V3), "{none}");
        }
        for some in [
            format!("{cri}.containerd.runtimes]\n"),
            format!("  {cri}.containerd.runtimes.runc] # mine\n"),
            "[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.nvidia.options]".to_owned(),
        ] {
            assert!(!has_runc(&some, Version::V2), "{some}");
        }
        let template = template(Version::V2, Path::new(SHIM)).unwrap();
        assert!(!template.contains(runc));
    }

    #[test]
    fn what_somebody_wrote_is_left_alone() {
        for table in [
            "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.'edgevmm']",
            "  [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.edgevmm]  ",
        ] {
            let result = with_block(table, Version::V3, Path::new(SHIM));
            assert_eq!(result, Err(EditError::Foreign));
        }
        let own = drop_in("", Path::new(SHIM)).unwrap();
        assert_eq!(drop_in(&own, Path::new(SHIM)).as_ref(), Ok(&own));
        let more = format!("{own}[debug]\n");
        assert_eq!(drop_in(&more, Path::new(SHIM)), Err(EditError::Foreign));
        let half = "# BEGIN edgevmm\n[a]\n";
        assert_eq!(without_block(half), Err(EditError::Unclosed));
        assert_eq!(rest("version = 2\n"), None);
        assert_eq!(rest("root = \"/x\"\n"), Some("root = \"/x\"\n"));
    }

    #[test]
    fn versions_and_drop_ins_are_found_before_the_tables() {
        let text = "version = 3\nimports = ['/a/config-v3.toml.d/*.toml']\n[x]\nversion = 2\n";
        assert_eq!(Version::of(text), Some(Version::V3));
        assert_eq!(drop_ins(text), Some("/a/config-v3.toml.d".into()));
        assert_eq!(drop_ins(&text.replace("version = 3", "version = 2")), None);
        assert_eq!(Version::of("[x]\nversion = 2"), None);
        assert!(cri_is_off("disabled_plugins = [\"cri\"]\n"));
        assert!(!cri_is_off("disabled_plugins = []\n"));
    }
}
