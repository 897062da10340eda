//! KubeVirt's objects as machines: what `kubectl` and clients like `virtctl` do with them.

use std::time::Duration;

use anyhow::{Result, ensure};
use edgevmm_e2e::{Cluster, Command, Output, Process, example, in_cluster, operator};

/// As KubeVirt's users write it.
const MACHINE: &str = r#"
apiVersion: kubevirt.io/v1
kind: VirtualMachine
metadata: {name: legacy}
spec:
  runStrategy: Always
  template:
    metadata: {labels: {app: legacy}}
    spec:
      terminationGracePeriodSeconds: 0
      domain:
        memory: {guest: 192Mi}
        devices: {disks: [{name: root, disk: {bus: virtio}}]}
      volumes: [{name: root, containerDisk: {image: "local.test/mini:1"}}]
"#;

/// The API server finds the operator on its own machine: there is no DNS, and nobody who serves
/// addresses of services.
const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: edgevmm-operator, namespace: edgevmm}
spec: {type: ExternalName, externalName: 127.0.0.1}
";
/// Where the operator listens.
const PORT: u16 = 8443;

const INSTANCE: &str = "/apis/kubevirt.io/v1/namespaces/default/virtualmachineinstances/legacy";
const SUBRESOURCES: &str = "/apis/subresources.kubevirt.io/v1/namespaces/default";
/// How long a guest may take to answer at its console.
const ANSWER: Duration = Duration::from_secs(60);

#[test]
fn objects_are_machines() -> Result<()> {
    in_cluster(|cluster| {
        let _operator = start_operator(cluster)?;
        cluster.apply(MACHINE)?;
        cluster.until(INSTANCE, r#".status.phase == "Running""#)?;
        let pod = cluster.get("pods?labelSelector=app%3Dlegacy", ".items[].metadata.name")?;
        cluster.until_log(pod.trim(), "MINI-READY")?;
        console(cluster)?;
        pauses(cluster)?;
        cluster.ok("delete vm legacy --wait=false")?;
        for left in ["virtualmachines", "virtualmachineinstances"] {
            let list = format!("/apis/kubevirt.io/v1/namespaces/default/{left}");
            cluster.until(&list, ".items | length == 0")?;
        }
        cluster.expect_clean()
    })
}

fn start_operator<'h>(cluster: &Cluster<'h>) -> Result<Process<'h>> {
    let program = cluster.host.shared(&operator()?)?;
    let manifests = ["manifests", "--image", "local.test/unused:1"];
    let manifests = cluster.host.ok(&Command::new(&program).args(manifests))?;
    let runs_here = |object: &&str| {
        let mut lines = object.lines();
        !lines.any(|line| matches!(line, "kind: Service" | "kind: Deployment"))
    };
    let objects: Vec<_> = manifests.split("---\n").filter(runs_here).collect();
    let objects = objects.join("---\n");
    cluster.apply(&objects.replace("port: 443", &format!("port: {PORT}")))?;
    cluster.apply(SERVICE)?;
    // Its messages are kept for the reader of a failure. Neither it nor `stream` trusts just anybody.
    let run = format!(
        "sed \"s|insecure-skip-tls-verify: true|certificate-authority: $PWD/apiserver/apiserver.crt|\" \\
             secrets/admin.conf > trusting.conf
         exec {program} run --kubeconfig trusting.conf --listen 127.0.0.1:{PORT} --user admin \
             > operator.log 2>&1"
    );
    let process = cluster.host.spawn(&Command::script(run))?;
    let service = "/apis/apiregistration.k8s.io/v1/apiservices/v1.subresources.kubevirt.io";
    let serves = r#".status.conditions[]? | select(.type == "Available") | .status == "True""#;
    cluster.until(service, serves)?;
    Ok(process)
}

/// Opens a stream of the API server.
fn stream<'h>(cluster: &Cluster<'h>, part: &str) -> Result<Process<'h>> {
    let program = cluster.host.shared(&example("stream")?)?;
    let config = cluster.host.path("trusting.conf");
    let path = format!("{SUBRESOURCES}/{part}");
    cluster
        .host
        .spawn(&Command::new(program).args([config, path]))
}

/// Types at the console, is sent away from it, and reaches a port that was opened there.
fn console(cluster: &Cluster<'_>) -> Result<()> {
    let path = "virtualmachineinstances/legacy/console";
    let first = stream(cluster, path)?;
    first.write("\recho at-$((40 + 2))\r")?;
    first.wait_for_stdout("at-42", 0, ANSWER)?;
    let second = stream(cluster, path)?;
    // By no close at all clients tell that somebody else came.
    first.wait(ANSWER)?.expect_code(1)?;
    second.write("nc -l -p 8080 -e echo from-the-guest & echo at-$((40 + 3))\r")?;
    second.wait_for_stdout("at-43", 0, ANSWER)?;
    let port = stream(cluster, "virtualmachineinstances/legacy/portforward/8080")?;
    port.wait_for_stdout("from-the-guest", 0, ANSWER)?;
    port.wait(ANSWER)?.expect_code(0)?;
    second.close_stdin()?;
    second.wait(ANSWER)?.expect_code(0)?;
    let refused = stream(cluster, "virtualmachineinstances/other/console")?;
    let refused = refused.wait(ANSWER)?;
    ensure!(
        refused.code == 3 && refused.stderr.contains("404"),
        "{refused:?}"
    );
    Ok(())
}

/// Has something done to a part of an object, as `virtctl` does.
fn update(cluster: &Cluster<'_>, part: &str) -> Result<Output> {
    let body = cluster.host.write("body.json", "{}")?;
    let path = format!("{SUBRESOURCES}/{part}");
    let update = cluster.kubectl(["replace", "--raw", &path, "-f", &body]);
    cluster.host.run(&update)
}

/// Stops the machine's clock and lets it go on, asks what the guest can't tell, and starts it anew.
fn pauses(cluster: &Cluster<'_>) -> Result<()> {
    let instance = |verb: &str| format!("virtualmachineinstances/legacy/{verb}");
    update(cluster, &instance("pause"))?.expect_code(0)?;
    let paused = r#".status.conditions[] | select(.type == "Paused") | .status == "True""#;
    cluster.until(INSTANCE, paused)?;
    let again = update(cluster, &instance("pause"))?;
    ensure!(again.stderr.contains("already paused"), "{again:?}");
    update(cluster, &instance("unpause"))?.expect_code(0)?;
    let users = format!("{SUBRESOURCES}/{}", instance("userlist"));
    let users = cluster
        .host
        .run(&cluster.kubectl(["get", "--raw", &users]))?;
    ensure!(
        users.code != 0 && users.stderr.contains("agent"),
        "{users:?}"
    );
    update(cluster, &instance("reset"))?.expect_code(0)?;
    Ok(())
}
