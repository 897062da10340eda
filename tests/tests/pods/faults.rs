//! What becomes of machines when programs of the node die.

use anyhow::{Context, Result, ensure};
use edgevmm_e2e::{Cluster, Command, in_cluster};

const PODS: &str = include_str!("faults.yaml");

/// Kills the shim whose child, or a child's child, has a process ID.
const KILL_SHIM: &str = r#"
pid=$0
until tr '\0' ' ' < "/proc/$pid/cmdline" | grep -q containerd-shim; do
    pid=$(sed -n 's/^PPid:\s*//p' "/proc/$pid/status")
done
kill -9 "$pid"
"#;

/// The container of a pod's machine, as containerd knows it.
fn container(cluster: &Cluster<'_>, pod: &str) -> Result<String> {
    let id = cluster.get(
        &format!("pods/{pod}"),
        ".status.containerStatuses[0].containerID",
    )?;
    let id = id.rsplit_once('/').context("The container has no ID")?.1;
    Ok(id.to_owned())
}

/// The last number that a machine told.
fn tick(cluster: &Cluster<'_>, pod: &str) -> Result<u32> {
    let log = cluster.ok(&format!("logs --tail=1 {pod}"))?;
    let number = log.trim().trim_end_matches('.').rsplit(' ').next();
    number
        .context("The log is empty")?
        .parse()
        .with_context(|| log.clone())
}

/// Waits until a machine has told some more numbers, and no other one began to count.
fn goes_on(cluster: &Cluster<'_>, pod: &str, tick: u32) -> Result<()> {
    cluster.until_log(pod, &format!("TICK {}\\.", tick + 3))?;
    let restarts = cluster.get(
        &format!("pods/{pod}"),
        ".status.containerStatuses[0].restartCount",
    )?;
    ensure!(restarts == "0", "{pod} was restarted");
    Ok(())
}

/// Waits until the machine was started anew and counts.
fn is_restarted(cluster: &Cluster<'_>, pod: &str) -> Result<()> {
    let count = ".status.containerStatuses[0].restartCount == 1";
    cluster.until(&format!("pods/{pod}"), count)?;
    cluster.until_log(pod, "TICK 1\\.").map(drop)
}

fn survive_kubelet_and_containerd(cluster: &Cluster<'_>) -> Result<()> {
    let (again, once) = (container(cluster, "again")?, container(cluster, "once")?);
    let (pid, tick) = (cluster.node.pid(&again)?, tick(cluster, "again")?);
    cluster.kill_kubelet()?;
    cluster.node.kill()?;
    // As an upgrade does it: another file of that name.
    let shim = format!("{}/containerd-shim-edgevmm-v1", cluster.host.programs());
    let replace = format!("cp {shim} {shim}.new; mv {shim}.new {shim}");
    cluster.host.ok(&Command::script(replace))?;
    cluster.node.run()?;
    cluster.start_kubelet()?;
    goes_on(cluster, "again", tick)?;
    goes_on(cluster, "once", tick)?;
    ensure!(cluster.node.pid(&again)? == pid);
    let machine = cluster.ok("exec again -- edgevmm-ctl inspect --json")?;
    ensure!(machine.contains("\"running\""), "It is {machine}");
    ensure!(cluster.node.state(&once)? == "RUNNING");
    Ok(())
}

fn kill(cluster: &Cluster<'_>, pid: &str) -> Result<()> {
    cluster
        .host
        .ok(&Command::new("kill").args(["-9", pid]))
        .map(drop)
}

#[test]
fn machines_survive_or_end_clearly() -> Result<()> {
    in_cluster(|cluster| {
        cluster.apply(PODS)?;
        cluster.until_log("again", "TICK 1\\.")?;
        cluster.until_log("once", "TICK 1\\.")?;
        survive_kubelet_and_containerd(cluster)?;

        let vmm = cluster.node.pid(&container(cluster, "once")?)?;
        kill(cluster, &vmm)?;
        cluster.until_phase("once", "Failed")?;
        let end = cluster.get(
            "pods/once",
            ".status.containerStatuses[0].state.terminated.exitCode",
        )?;
        ensure!(end == "137", "It ended with {end}");
        cluster.delete("pod once")?;

        let vmm = cluster.node.pid(&container(cluster, "again")?)?;
        let kill_shim = Command::new("bash").args(["-ec", KILL_SHIM, &vmm]);
        cluster.host.ok(&kill_shim)?;
        is_restarted(cluster, "again")?;

        cluster.delete("pod again")?;
        cluster.expect_clean()
    })
}
