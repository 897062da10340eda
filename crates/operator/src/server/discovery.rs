//! Documents that are the same for everyone: what there is, and which version of it.

use hyper::StatusCode;
use serde_json::{Value, json};

use super::answer::{Answer, json_answer, typed};
use super::path::Kind;
use super::{GROUP, VERSION};

/// KubeVirt's version whose API this is, as its clients compare their own with it.
const KUBEVIRT: (u8, u8) = (1, 8);

/// Parts of machines, with what they take.
const MACHINE_PARTS: [(&str, &str); 5] = [
    ("start", "update"),
    ("stop", "update"),
    ("restart", "update"),
    ("expand-spec", "get"),
    ("portforward", "get"),
];

/// Parts of instances, with what they take.
const INSTANCE_PARTS: [(&str, &str); 11] = [
    ("console", "get"),
    ("portforward", "get"),
    ("pause", "update"),
    ("unpause", "update"),
    ("reset", "update"),
    ("softreboot", "update"),
    ("freeze", "update"),
    ("unfreeze", "update"),
    ("guestosinfo", "get"),
    ("userlist", "get"),
    ("filesystemlist", "get"),
];

/// The document at a path.
pub fn document(path: &str) -> Option<Answer> {
    let base = format!("/apis/{GROUP}/{VERSION}");
    let ok = |value: &Value| Some(json_answer(StatusCode::OK, value));
    match path {
        "" => ok(&json!({ "paths": ["/apis", "/healthz", "/openapi/v2", base] })),
        "/apis" => ok(&json!({ "kind": "APIGroupList", "apiVersion": "v1", "groups": [group()] })),
        "/healthz" => Some(typed(StatusCode::OK, "text/plain", "ok")),
        "/openapi/v2" => ok(&json!({
            "swagger": "2.0",
            "info": { "title": "KubeVirt's subresources", "version": VERSION },
            "paths": {},
        })),
        "/openapi/v3" => ok(&json!({ "paths": {} })),
        _ => match path.strip_prefix("/apis/")?.strip_prefix(GROUP)? {
            "" => ok(&group()),
            rest => match rest.strip_prefix('/')?.strip_prefix(VERSION)? {
                "" => ok(&resources()),
                "/version" => ok(&version()),
                "/healthz" => ok(&json!({ "apiserver": { "connectivity": "ok" } })),
                // There is no image of ours for `virtctl guestfs`, which takes one by `--image`.
                "/guestfs" => ok(&json!({
                    "registry": "", "tag": "", "imagePrefix": "", "digest": "", "gsImage": "",
                })),
                _ => None,
            },
        },
    }
}

fn group() -> Value {
    let version = json!({ "groupVersion": format!("{GROUP}/{VERSION}"), "version": VERSION });
    json!({
        "kind": "APIGroup",
        "apiVersion": "v1",
        "name": GROUP,
        "versions": [version],
        "preferredVersion": version,
    })
}

fn resources() -> Value {
    let part = |name: String, verb: &str| {
        json!({
            "name": name, "singularName": "", "namespaced": true, "kind": "", "verbs": [verb],
        })
    };
    let parts = |kind: Kind, parts: &'static [(&str, &str)]| {
        let plural = kind.plural();
        parts
            .iter()
            .map(move |(name, verb)| part(format!("{plural}/{name}"), verb))
    };
    let machines = parts(Kind::Machine, &MACHINE_PARTS);
    let instances = parts(Kind::Instance, &INSTANCE_PARTS);
    let expand = part("expand-vm-spec".to_owned(), "update");
    let all = machines.chain(instances).chain([expand]);
    json!({
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": format!("{GROUP}/{VERSION}"),
        "resources": all.collect::<Vec<_>>(),
    })
}

fn version() -> Value {
    let (major, minor) = KUBEVIRT;
    let own = env!("CARGO_PKG_VERSION");
    json!({
        "major": major.to_string(),
        "minor": minor.to_string(),
        "gitVersion": format!("v{major}.{minor}.0+edgevmm.{own}"),
        "gitCommit": "",
        "gitTreeState": "clean",
        "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": "",
        "compiler": "rustc",
        "platform": "linux/amd64",
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn clients_find_what_there_is() {
        for path in [
            "",
            "/apis",
            "/healthz",
            "/openapi/v2",
            "/openapi/v3",
            "/apis/subresources.kubevirt.io",
            "/apis/subresources.kubevirt.io/v1",
            "/apis/subresources.kubevirt.io/v1/version",
            "/apis/subresources.kubevirt.io/v1/healthz",
            "/apis/subresources.kubevirt.io/v1/guestfs",
        ] {
            assert_eq!(document(path).unwrap().status(), 200, "{path}");
        }
        for path in [
            "/apis/kubevirt.io",
            "/apis/subresources.kubevirt.io1",
            "/apis/subresources.kubevirt.io/v1x",
            "/metrics",
        ] {
            assert!(document(path).is_none(), "{path}");
        }
    }

    #[test]
    fn the_version_is_semantic() {
        let version = version();
        let text = version["gitVersion"].as_str().unwrap();
        assert!(text.starts_with("v1.8.0+"), "{text}");
    }
}
