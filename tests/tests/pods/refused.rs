//! Pods that can be no machines: `kubectl describe` tells why.

use anyhow::{Result, ensure};
use edgevmm_e2e::{Command, in_cluster};

/// Pods, and what the reason names.
const REFUSED: [(&str, &str); 6] = [
    ("unknown-annotation", "no annotation `edgevmm.io/colour`"),
    ("no-disk", "no disk"),
    ("two-disks", "b.qcow2"),
    ("two-machines", "a machine already"),
    ("folder", "/var/log"),
    ("host-network", "edgevmm.io/network"),
];

#[test]
fn refused_pods_say_why() -> Result<()> {
    in_cluster(|cluster| {
        cluster.host.ok(&Command::script(
            "mkdir -p disks/disk; : > disks/disk/a.qcow2; : > disks/disk/b.qcow2",
        ))?;
        let disks = cluster.host.path("disks");
        cluster.node.import(&disks, "local.test/two-disks:1")?;
        cluster.apply(include_str!("refused.yaml"))?;
        for (pod, reason) in REFUSED {
            let events = format!("events?fieldSelector=involvedObject.name%3D{pod}");
            let messages = r#"[.items[].message] | join("\n")"#;
            let named = format!("{messages} | select(contains({reason:?}))");
            cluster.until(&events, &named)?;
        }
        let described = cluster.ok("describe pod unknown-annotation")?;
        ensure!(described.contains("edgevmm.io/colour"), "{described}");
        let pods = REFUSED.map(|(pod, _)| pod).join(" ");
        cluster.delete(&format!("pod --grace-period=1 {pods}"))?;
        cluster.expect_clean()
    })
}
