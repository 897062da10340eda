//! Which of a pod's containers is its machine.

use std::path::Path;

use crate::annotations::Annotations;
use crate::image::{Image, ImageError};
use crate::spec::Spec;

/// Whether a container is the machine: the one that an annotation names, else one whose image has a
/// disk or the kernel. Outside of pods all are.
pub fn is_machine(spec: &Spec, annotations: &Annotations, root: &Path) -> bool {
    if spec.sandbox_id().is_none() {
        return true;
    }
    if let Some(name) = &annotations.container {
        return spec.container_name() == Some(name.as_str());
    }
    let image = Image::new(root);
    let kernel = annotations.kernel.as_deref();
    let has_kernel = kernel.is_some_and(|kernel| image.file(kernel).is_ok());
    // One whose disks make no sense is to be told so, rather than run as something else.
    let has_disk = match image.disk(annotations.disk.as_deref(), &[]) {
        Ok(disk) => disk.is_some(),
        Err(ImageError::NoDisk) => false,
        Err(_) => true,
    };
    has_kernel || has_disk
}

/// What an ordinary container of a pod can't have beside a machine.
///
/// # Errors
///
/// Says what it is.
pub fn check(spec: &Spec, terminal: bool) -> Result<(), &'static str> {
    if terminal {
        return Err(
            "An ordinary container beside a machine can't have a terminal: leave out `tty`",
        );
    }
    if spec.namespace("pid").is_some_and(|pid| pid.path.is_some()) {
        return Err(
            "Containers beside a machine can't share processes with the pod: leave out \
             `shareProcessNamespace`",
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;

    use super::*;

    fn spec(name: &str) -> Spec {
        let text = format!(
            r#"{{"annotations": {{"io.kubernetes.cri.sandbox-id": "s",
            "io.kubernetes.cri.container-name": "{name}"}}}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn images_and_names_decide() {
        let root = tempfile::tempdir().unwrap();
        let mut annotations = Annotations::default();
        let decide = |name: &str, annotations: &Annotations| {
            is_machine(&spec(name), annotations, root.path())
        };
        assert!(!decide("web", &annotations));
        assert!(is_machine(&Spec::default(), &annotations, root.path()));
        annotations.kernel = Some("/boot/vmlinuz".to_owned());
        assert!(!decide("web", &annotations));
        fs::create_dir(root.path().join("boot")).unwrap();
        fs::write(root.path().join("boot/vmlinuz"), "x").unwrap();
        assert!(decide("web", &annotations));
        annotations.kernel = None;
        fs::create_dir(root.path().join("disk")).unwrap();
        assert!(!decide("web", &annotations));
        fs::write(root.path().join("disk/a.qcow2"), "x").unwrap();
        assert!(decide("web", &annotations));
        fs::write(root.path().join("disk/b.qcow2"), "x").unwrap();
        assert!(decide("web", &annotations));
        annotations.container = Some("vm".to_owned());
        assert!(decide("vm", &annotations) && !decide("web", &annotations));
    }

    #[test]
    fn what_would_join_the_host_is_refused() {
        let mut spec = spec("web");
        check(&spec, false).unwrap();
        check(&spec, true).unwrap_err();
        let own = crate::spec::Namespace {
            kind: "pid".to_owned(),
            path: None,
        };
        spec.linux.namespaces = vec![own];
        check(&spec, false).unwrap();
        spec.linux.namespaces[0].path = Some("/proc/7/ns/pid".into());
        let error = check(&spec, false).unwrap_err();
        assert!(error.contains("shareProcessNamespace"), "{error}");
    }
}
