//! Where a container's control group is, from `linux.cgroupsPath`: a path as the cgroupfs driver
//! writes it, or `SLICE:PREFIX:NAME` as the systemd driver does.

use std::path::{Component, Path, PathBuf};

/// Why a path can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no path of a control group")]
pub struct PathError(String);

/// The group's path below the mount. Without any the container gets a group of its own at the top.
///
/// # Errors
///
/// When it leads elsewhere.
pub fn relative(cgroups_path: &str, namespace: &str, id: &str) -> Result<PathBuf, PathError> {
    if cgroups_path.is_empty() {
        return Ok(Path::new("edgevmm").join(namespace).join(id));
    }
    let wrong = || PathError(cgroups_path.escape_debug().to_string());
    let parts: Vec<&str> = cgroups_path.split(':').collect();
    let path = match parts.as_slice() {
        [path] => PathBuf::from(path.trim_start_matches('/')),
        [slice, prefix, name] => {
            let unit = match *prefix {
                "" => format!("{name}.scope"),
                prefix => format!("{prefix}-{name}.scope"),
            };
            if unit.contains('/') || name.is_empty() {
                return Err(wrong());
            }
            slice_path(slice).ok_or_else(wrong)?.join(unit)
        }
        _ => return Err(wrong()),
    };
    let plain = path
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    if plain && path.components().next().is_some() && !cgroups_path.contains('\0') {
        Ok(path)
    } else {
        Err(wrong())
    }
}

/// The folder of a slice: `a-b.slice` is within `a.slice`.
fn slice_path(slice: &str) -> Option<PathBuf> {
    if slice.is_empty() {
        return Some("system.slice".into());
    }
    let name = slice.strip_suffix(".slice")?;
    if name == "-" {
        return Some(PathBuf::new());
    }
    let mut path = PathBuf::new();
    let mut unit = String::new();
    for part in name.split('-') {
        if part.is_empty() || part.contains('/') {
            return None;
        }
        if !unit.is_empty() {
            unit.push('-');
        }
        unit.push_str(part);
        path.push(format!("{unit}.slice"));
    }
    Some(path)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    fn path(text: &str) -> Option<String> {
        let path = relative(text, "ns", "id").ok()?;
        Some(path.to_str().unwrap().to_owned())
    }

    #[test]
    fn both_drivers_forms_lead_to_the_group() {
        let cases = [
            ("/kubepods/burstable/podX/c1", "kubepods/burstable/podX/c1"),
            ("default/c1", "default/c1"),
            ("", "edgevmm/ns/id"),
            (
                "kubepods-burstable-pod1_2.slice:cri-containerd:c1",
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice/cri-containerd-c1.scope",
            ),
            (":docker:c1", "system.slice/docker-c1.scope"),
            ("-.slice::c1", "c1.scope"),
        ];
        for (text, expected) in cases {
            assert_eq!(path(text).as_deref(), Some(expected), "{text}");
        }
    }

    #[test]
    fn paths_that_lead_elsewhere_are_refused() {
        for text in [
            "/",
            "/../a",
            "a/../b",
            "a:b",
            "a:b:c",
            "x--y.slice:p:n",
            "s.slice:../x:n",
            "s.slice:p:",
        ] {
            assert_eq!(path(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_path_leaves_the_mount(text: String) {
            if let Ok(path) = relative(&text, "ns", "id") {
                prop_assert!(path.components().all(|part| matches!(part, Component::Normal(_))));
            }
        }
    }
}
