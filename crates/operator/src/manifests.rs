//! What a cluster needs for the operator, ready for `kubectl apply -f -` or k3s' folder of manifests.

use anyhow::{Result, ensure};
use clap::Args;
use edgevmm_kubevirt::crds;

/// All but the definitions.
const TEMPLATE: &str = include_str!("manifests.yaml");

/// What is filled in.
#[derive(Debug, Args)]
pub struct ManifestsArgs {
    /// The operator's image, with `/edgevmm-operator` in it
    #[arg(long)]
    image: String,
    /// The operator's namespace
    #[arg(long, default_value = "edgevmm")]
    namespace: String,
}

/// The manifests, as one stream of YAML.
///
/// # Errors
/// A word is none that a manifest could have.
pub fn manifests(args: &ManifestsArgs) -> Result<String> {
    let ManifestsArgs { image, namespace } = args;
    let plain = |text: &str, more: &str| {
        let known = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || more.contains(c);
        !text.is_empty() && text.chars().all(known)
    };
    ensure!(plain(namespace, "-"), "{namespace:?} is no namespace");
    ensure!(
        plain(&image.to_ascii_lowercase(), "-._/:@"),
        "{image:?} is no image"
    );
    // What begins like JSON kubectl takes for nothing else. JSON is YAML.
    let mut all = "---\n".to_owned();
    for definition in crds::all()? {
        all.push_str(&serde_json::to_string(&definition)?);
        all.push_str("\n---\n");
    }
    let rest = TEMPLATE.split_inclusive('\n');
    let rest: String = rest.skip_while(|line| line.starts_with('#')).collect();
    all.push_str(
        &rest
            .replace("@NAMESPACE@", namespace)
            .replace("@IMAGE@", image),
    );
    Ok(all)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn args(image: &str, namespace: &str) -> ManifestsArgs {
        ManifestsArgs {
            image: image.to_owned(),
            namespace: namespace.to_owned(),
        }
    }

    #[test]
    fn everything_is_filled_in() {
        let all = manifests(&args("local.test/edgevmm-operator:1", "machines")).unwrap();
        assert!(!all.contains("@NAMESPACE@") && !all.contains("@IMAGE@"));
        assert!(all.contains("image: 'local.test/edgevmm-operator:1'"));
        assert!(all.contains("--namespace=machines"));
        assert!(all.contains("kind: Deployment"));
        assert!(!all.starts_with('{'), "kubectl would take it for JSON");
    }

    #[test]
    fn words_stay_words() {
        for (image, namespace) in [("a'\nb: c", "x"), ("", "x"), ("a", "x'y"), ("a", "")] {
            manifests(&args(image, namespace)).unwrap_err();
        }
    }
}
