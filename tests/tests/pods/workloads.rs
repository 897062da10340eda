//! Machines of a job and of a stateful set.

use anyhow::{Result, ensure};
use edgevmm_e2e::{Limit, in_cluster};

const WORKLOADS: &str = include_str!("workloads.yaml");

#[test]
fn a_job_ends_and_a_stateful_set_keeps_its_data() -> Result<()> {
    in_cluster(|cluster| {
        cluster.apply(WORKLOADS)?;
        cluster.until_log("store-0", "STORED boots=1")?;
        let before = cluster.get("pods/store-0", ".metadata.uid")?;
        cluster.until(
            "/apis/batch/v1/namespaces/default/jobs/job",
            ".status.succeeded == 1",
        )?;
        let pods = "pods?labelSelector=job-name%3Djob";
        ensure!(cluster.get(pods, ".items[].status.phase")? == "Succeeded");
        let log = cluster.ok("logs job/job")?;
        ensure!(log.contains("JOB-IS-DONE"), "It says {log}");

        let log = cluster
            .host
            .spawn(&cluster.kubectl(["logs", "-f", "store-0"]))?;
        log.wait_for_stdout("STORED", 0, cluster.host.limit(Limit::Command))?;
        cluster.delete("pod store-0")?;
        log.wait_for_stdout("POWER-BUTTON", 0, cluster.host.limit(Limit::Command))?;
        cluster.until("pods/store-0", &format!(".metadata.uid != {before:?}"))?;
        cluster.until_log("store-0", "STORED boots=2")?;
        cluster.delete("job/job statefulset/store")?;
        cluster.expect_clean()
    })
}
