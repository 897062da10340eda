//! Checks of what pods need beside what machines need (`doctor --k8s`).

use super::{Check, Host, find_program};
use crate::install::{CONTAINERD, K3S, SHIM, cri_is_off, shim_in};

/// All checks for pods.
pub(super) fn checks(host: &Host) -> Vec<Check> {
    let k3s = format!("{K3S}/agent/etc/containerd/config.toml");
    let config = match host.exists(K3S) {
        true => &k3s,
        false => CONTAINERD,
    };
    let drop_in = host.read(&format!(
        "{K3S}/agent/etc/containerd/config-v3.toml.d/edgevmm.toml"
    ));
    let text = host.read(config);
    let texts: Vec<_> = text.iter().cloned().chain(drop_in).collect();
    vec![
        cri(config, text.as_deref()),
        runtime(host, config, &texts),
        runc(host),
    ]
}

fn cri(config: &str, text: Option<&str>) -> Check {
    let name = "CRI";
    match text {
        None => Check::warn(
            name,
            format!("there is no /{config}"),
            "start k3s once, or install containerd",
        ),
        Some(text) if cri_is_off(text) => Check::fail(
            name,
            format!("it is switched off in /{config}, so there are no pods"),
            "take `cri` out of `disabled_plugins`, and restart containerd",
        ),
        Some(_) => Check::ok(name, format!("/{config}")),
    }
}

fn runtime(host: &Host, config: &str, texts: &[String]) -> Check {
    let name = "runtime";
    let shim = texts.iter().find_map(|text| shim_in(text));
    let Some(shim) = shim else {
        let found = format!("/{config} has no runtime edgevmm");
        return Check::fail(
            name,
            found,
            "edgevmm install, and restart k3s or containerd",
        );
    };
    let folder = shim.rsplit_once('/').map_or("", |(folder, _)| folder);
    let missing = [SHIM, "edgevmm"].map(|program| format!("{folder}/{program}"));
    match missing.iter().find(|path| !host.exists(path)) {
        Some(path) => Check::fail(name, format!("there is no {path}"), "edgevmm install"),
        None => Check::ok(name, shim),
    }
}

/// k3s brings its own.
fn runc(host: &Host) -> Check {
    let name = "runc";
    if host.exists(K3S) {
        return Check::ok(name, "k3s'");
    }
    match find_program(name) {
        Some(path) => Check::ok(name, path.display().to_string()),
        None => Check::warn(
            name,
            "there is none, so pods have no containers beside their machine",
            "apt install runc",
        ),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;

    use super::super::Status;
    use super::*;

    #[test]
    fn what_an_installation_lacks_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let host = Host {
            root: folder.path().into(),
        };
        let put = |path: &str, text: &str| {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let all = || checks(&host).into_iter().take(2).map(|check| check.status);
        let all = || all().collect::<Vec<_>>();
        assert_eq!(all(), [Status::Warn, Status::Fail]);
        put(CONTAINERD, "version = 2\ndisabled_plugins = [\"cri\"]\n");
        assert_eq!(all(), [Status::Fail, Status::Fail]);
        let table = "[x.runtimes.edgevmm]\n  runtime_path = \"/b/containerd-shim-edgevmm-v1\"\n";
        put(CONTAINERD, table);
        assert_eq!(all(), [Status::Ok, Status::Fail]);
        put("b/edgevmm", "");
        put("b/containerd-shim-edgevmm-v1", "");
        assert_eq!(all(), [Status::Ok, Status::Ok]);
    }
}
