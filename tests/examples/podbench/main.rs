//! Measures pods on this host for `cargo xtask bench pods`, which starts it in namespaces of its
//! own and gives it a plan as JSON.

mod cost;
mod starts;

use std::time::Duration;

use anyhow::{Context, Result};
use edgevmm_e2e::{Cluster, Command, Host, on_this_machine};
use xtask::bench::pods::{Measured, PROGRESS, Plan, RESULT, Then, elf};

use cost::Kind;
use starts::{PAYLOAD, Pod};

/// Machines that are started at a time to see what they cost together.
const BATCH: usize = 10;
/// How long pods are left alone before they count as idle.
const SETTLE: Duration = Duration::from_secs(15);

fn main() -> Result<()> {
    let plan = std::env::args().nth(1).context("There is no plan")?;
    let plan: Plan = serde_json::from_str(&plan)?;
    on_this_machine(|host| {
        let mut measured = Measured::default();
        progress("starting Kubernetes");
        let Some(cluster) = Cluster::start(host)? else {
            anyhow::bail!("This distribution has no sources of Kubernetes");
        };
        prepare(host, &cluster, &mut measured)?;
        measure(host, &cluster, &plan, &mut measured)?;
        println!("{RESULT}{}", serde_json::to_string(&measured)?);
        Ok(())
    })
}

fn progress(text: &str) {
    println!("{PROGRESS}{text}");
}

/// Makes the images and the true RuntimeClass.
fn prepare(host: &Host, cluster: &Cluster<'_>, measured: &mut Measured) -> Result<()> {
    std::fs::create_dir_all(host.path("payload/boot"))?;
    std::fs::write(host.path("payload/boot/payload"), elf(Then::Halt))?;
    cluster.node.import(&host.path("payload"), PAYLOAD)?;
    let class = host.ok(&host.edgevmm(["install", "--runtime-class"]))?;
    host.ok(&cluster.kubectl(["delete", "runtimeclass", "edgevmm"]))?;
    cluster.apply(&class)?;
    let path = "jsonpath={.overhead.podFixed.memory}, {.overhead.podFixed.cpu}";
    let get = cluster.kubectl(["get", "runtimeclass", "edgevmm", "-o", path]);
    measured.declared = host.ok(&get)?;
    let kubernetes = host.ok(&cluster.kubectl(["version", "--short"]))?;
    let client = kubernetes.lines().find(|line| line.starts_with("Client"));
    let containerd = host.ok(&cluster.node.ctr(["version"]))?;
    let containerd = containerd.lines().rfind(|line| line.contains("Version:"));
    let runc = host.ok(&Command::new("runc").args(["--version"]))?;
    for (name, version) in [
        ("Kubernetes", client),
        ("containerd", containerd),
        ("runc", runc.lines().next()),
    ] {
        let version = version.and_then(|line| line.split_whitespace().last());
        let version = version.unwrap_or("of unknown version");
        measured.versions.push(format!("{name} {version}"));
    }
    Ok(())
}

fn measure(host: &Host, cluster: &Cluster<'_>, plan: &Plan, measured: &mut Measured) -> Result<()> {
    progress("containers by ctr");
    let by_ctr = starts::by_ctr(host, cluster, plan.rounds)?;
    progress("pods by kubectl");
    let mut by_kubectl = starts::named("kubectl apply");
    for round in 0..plan.rounds {
        // Each kind is the first one every other time.
        let first = round % 2 == 0;
        for machine in [first, !first] {
            let name = format!("{}-{round}", if machine { "vm" } else { "runc" });
            let time = Pod { name, machine }.start(host, cluster)?;
            if machine {
                by_kubectl.machines.push(time);
            } else {
                by_kubectl.ordinary.push(time);
            }
        }
        if round == 0 {
            std::thread::sleep(SETTLE);
            measured.alone = cost::of_each(Kind::MACHINE)?;
            measured.alone_ordinary = cost::of_each(Kind::ORDINARY)?;
        }
    }
    measured.starts = vec![by_kubectl, by_ctr];
    let mut pods = plan.rounds;
    measured.density.push(cost::together(pods)?);
    while pods < plan.pods {
        let more = BATCH.min(plan.pods - pods);
        progress(&format!("{} pods side by side", pods + more));
        let names = (pods..pods + more).map(|number| format!("vm-{number}"));
        let pods_to_start: Vec<_> = names
            .map(|name| Pod {
                name,
                machine: true,
            })
            .collect();
        starts::start_all(host, cluster, &pods_to_start)?;
        pods += more;
        measured.density.push(cost::together(pods)?);
    }
    std::thread::sleep(SETTLE);
    progress("idle pods");
    measured.idle = cost::activity(Kind::MACHINE)?;
    Ok(())
}
