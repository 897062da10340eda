//! What a machine is given beside its image, and what kubectl does with it.

use anyhow::{Result, ensure};
use edgevmm_e2e::{Cluster, Command, Limit, in_cluster};

const POD: &str = include_str!("volumes.yaml");

/// What the guest says of its volumes.
const SAID: [&str; 4] = [
    "PREPARED by-init-",
    "SCRATCH 8192",
    "SECRET open-sesame",
    "SEED hostname: seeded",
];

fn wget(cluster: &Cluster<'_>, address: &str) -> Result<String> {
    let get = ["wget", "-T", "20", "-q", "-O", "-", address];
    cluster.host.ok(&Command::new("busybox").args(get))
}

/// `kubectl port-forward` and `kubectl attach`.
fn is_reached_by_kubectl(cluster: &Cluster<'_>) -> Result<()> {
    let forward = cluster.kubectl(["port-forward", "pod/vm", "8080:80"]);
    let forward = cluster.host.spawn(&forward)?;
    forward.wait_for_stdout("Forwarding", 0, cluster.host.limit(Limit::Command))?;
    let page = wget(cluster, "http://127.0.0.1:8080/")?;
    ensure!(page == "page of 10.0.2.2", "It is {page}");
    drop(forward);

    let attach = cluster.kubectl(["attach", "-it", "vm", "-c", "vm"]);
    let attach = cluster.host.spawn(&attach.on_terminal())?;
    attach.write("hello\n")?;
    attach.wait_for_stdout("TYPED hello", 0, cluster.host.limit(Limit::Command))?;
    Ok(())
}

/// What `kubectl top` and the autoscaler are told.
fn is_measured(cluster: &Cluster<'_>) -> Result<()> {
    let of_machine =
        r#".pods[] | select(.podRef.name == "vm") | .containers[] | select(.name == "vm")"#;
    let measured = format!(
        "{of_machine} | .memory.workingSetBytes > 30000000 and .cpu.usageCoreNanoSeconds > 1000000000"
    );
    cluster.until("/api/v1/nodes/node1/proxy/stats/summary", &measured)?;
    Ok(())
}

#[test]
fn a_machine_has_volumes_and_company() -> Result<()> {
    in_cluster(|cluster| {
        cluster.apply(POD)?;
        cluster.until_log("vm/log?container=vm", "CHECKED")?;
        let log = cluster.ok("logs vm -c vm")?;
        for line in SAID {
            ensure!(log.contains(line), "No {line} in {log}");
        }
        ensure!(cluster.ok("logs vm -c prepare")?.contains("is-prepared"));
        cluster.until_log("vm/log?container=sidecar", "page of 10.0.2.2")?;
        cluster.until_ready("vm")?;
        let page = wget(cluster, &format!("http://{}/", cluster.address("vm")?))?;
        ensure!(page == "page of 10.0.2.2", "It is {page}");
        ensure!(cluster.ok("exec vm -c sidecar -- echo in sidecar")? == "in sidecar");
        let file = cluster.host.write("copied", "copied there and back")?;
        cluster.ok(&format!("cp {file} vm:/tmp/copied -c sidecar"))?;
        cluster.ok(&format!("cp vm:/tmp/copied {file}.back -c sidecar"))?;
        cluster
            .host
            .ok(&Command::new("cmp").args([&file, &format!("{file}.back")]))?;
        is_reached_by_kubectl(cluster)?;
        is_measured(cluster)?;
        cluster.delete("pod vm")?;
        cluster.expect_clean()
    })
}
