//! Measures the operator for `cargo xtask bench operator`, which gives it a plan as JSON.

mod load;
mod process;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use edgevmm_e2e::ApiServer;
use xtask::bench::operator::{Idle, Measured, PROGRESS, Plan, RESULT, Step};

use load::Load;

/// How many there are after each step in which many are made at once.
const STEPS: [usize; 4] = [100, 250, 500, 1000];
/// How long the operator is left alone before it counts as idle.
const SETTLE: Duration = Duration::from_secs(10);

fn main() -> Result<()> {
    let plan = std::env::args().nth(1).context("There is no plan")?;
    let plan: Plan = serde_json::from_str(&plan)?;
    progress("starting Kubernetes");
    let Some(mut server) = ApiServer::start()? else {
        bail!("This distribution has no sources of Kubernetes");
    };
    server.install_operator()?;
    let measured = measure(&server, &plan)?;
    println!("{RESULT}{}", serde_json::to_string(&measured)?);
    Ok(())
}

fn progress(text: &str) {
    println!("{PROGRESS}{text}");
}

fn measure(server: &ApiServer, plan: &Plan) -> Result<Measured> {
    let mut measured = Measured {
        nodes: plan.nodes,
        ..Measured::default()
    };
    let load = Load::start(&server.kubeconfig(), plan.nodes)?;
    measured.idle.push(idle(server, plan, 0)?);
    let mut instances = 0;
    let singly = plan.singly.min(plan.instances);
    let at_once = STEPS.into_iter().chain([plan.instances]);
    let steps = [(true, singly)]
        .into_iter()
        .chain(at_once.map(|goal| (false, goal.min(plan.instances))));
    for (is_singly, goal) in steps {
        if goal <= instances {
            continue;
        }
        progress(&format!("{goal} instances"));
        let before = counted(server)?;
        let begun = Instant::now();
        let times = load.make(instances..goal, is_singly)?;
        measured.steps.push(Step {
            singly: is_singly,
            added: goal - instances,
            instances: goal,
            seconds: begun.elapsed().as_secs_f64(),
            pod: times.iter().map(|it| it.pod).collect(),
            running: times.iter().map(|it| it.running).collect(),
            requests: since(&before, counted(server)?),
        });
        instances = goal;
        measured.idle.push(idle(server, plan, instances)?);
    }
    Ok(measured)
}

/// What the operator does when nothing changes.
fn idle(server: &ApiServer, plan: &Plan, instances: usize) -> Result<Idle> {
    progress(&format!("idle with {instances} instances"));
    let pid = server.operator_pid()?;
    std::thread::sleep(SETTLE);
    let (before, begun) = (process::work(pid)?, Instant::now());
    let asked = counted(server)?;
    std::thread::sleep(Duration::from_secs(plan.idle));
    let (after, seconds) = (process::work(pid)?, begun.elapsed().as_secs_f64());
    Ok(Idle {
        instances,
        seconds,
        memory: process::memory(pid)?,
        threads: after.threads,
        wakeups: after.sleeps.saturating_sub(before.sleeps) as f64 / seconds,
        cpu: after.nanoseconds.saturating_sub(before.nanoseconds) as f64 / seconds / 1e6,
        requests: since(&asked, counted(server)?),
    })
}

/// What the operator has asked so far, by verb and resource.
fn counted(server: &ApiServer) -> Result<BTreeMap<String, u64>> {
    let mut counts = BTreeMap::new();
    for request in server.operator_requests()? {
        let kind = format!("{} {}", request.verb, request.resource);
        *counts.entry(kind).or_default() += 1;
    }
    Ok(counts)
}

fn since(before: &BTreeMap<String, u64>, mut now: BTreeMap<String, u64>) -> BTreeMap<String, u64> {
    for (kind, count) in &mut now {
        *count = count.saturating_sub(before.get(kind).copied().unwrap_or(0));
    }
    now.retain(|_, count| *count > 0);
    now
}
