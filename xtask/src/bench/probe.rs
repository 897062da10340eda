//! Measurements of one VMM, made on the machine where it runs: in the lab's L1 or on this host.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::counters::{self, Histogram, reason_name};
use super::guest::{Guest, Launch};
use super::memory::{self, Memory};
use super::payload::FIRST_BYTE;
use crate::guests::Trial;

/// The first thing the initial RAM disk says.
const FIRST_LINE: &[u8] = b"INIT-FIRST-LINE";
/// The last, after which it waits for input.
const LAST_LINE: &[u8] = b"INITRD-SHELL";

/// A boot under emulation on a busy host takes a minute.
const BOOT_TIMEOUT: Duration = Duration::from_secs(300);
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// How long a guest is left alone before it counts as idle.
const SETTLE: Duration = Duration::from_secs(5);
/// How long wakeups of an idle guest are counted.
const WATCH: Duration = Duration::from_secs(10);

/// What is to be measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Job {
    /// A boot to init's first line, and if asked for the idle system after it.
    Boot {
        /// The VMM with a kernel and an initial RAM disk.
        launch: Launch,
        /// The guest's RAM in KiB.
        ram_kib: u64,
        /// Whether to measure the idle system too.
        idle: bool,
    },
    /// A payload that halts after its first byte.
    Halted {
        /// The VMM with the payload.
        launch: Launch,
        /// The guest's RAM in KiB.
        ram_kib: u64,
    },
    /// The time to a payload's first byte.
    Start(Launch),
    /// The time in which a program that does nothing comes and goes.
    Nothing,
    /// What a guest's loads on its disk give.
    Loads {
        /// The VMM with a guest that does them.
        launch: Launch,
        /// Their number.
        loads: usize,
    },
    /// A guest of the matrix, from its start to its power-off.
    Trial(Trial),
    /// What the first line of a program's output says, such as its version.
    FirstLine(Launch),
    /// What machine this is.
    Machine,
}

/// A boot.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Boot {
    /// From exec to init's first line, in seconds.
    pub seconds: f64,
    /// CPU time of the VMM and its guest in that time, in seconds.
    pub cpu_seconds: f64,
    /// Exits of the guest.
    pub exits: Option<u64>,
    /// Returns of KVM_RUN to the VMM.
    pub userspace_exits: Option<u64>,
    /// Exits by reason.
    pub reasons: BTreeMap<String, u64>,
    /// The idle system.
    pub idle: Option<Idle>,
}

/// A VMM whose guest has nothing to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Idle {
    /// Its memory beyond the guest's RAM.
    pub memory: Memory,
    /// Its threads' number.
    pub threads: usize,
    /// Size of its shared libraries in bytes.
    pub libraries: u64,
    /// How often a second each thread went to sleep, which is how often it was woken.
    pub wakeups: BTreeMap<String, f64>,
}

/// A machine that measurements are made on.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Machine {
    /// The CPU's name.
    pub cpu: String,
    /// CPUs online.
    pub cpus: usize,
    /// The kernel's release.
    pub kernel: String,
    /// The modules behind `/dev/kvm`.
    pub kvm: String,
}

/// Does `job` here.
///
/// # Errors
/// The VMM does not start, or its guest does not get as far as it should.
pub fn perform(job: &Job) -> Result<serde_json::Value> {
    let value = match job {
        Job::Boot {
            launch,
            ram_kib,
            idle,
        } => serde_json::to_value(boot(launch, *ram_kib, *idle)?),
        Job::Halted { launch, ram_kib } => {
            let mut guest = Guest::start(launch)?;
            guest.wait_for(&[FIRST_BYTE], START_TIMEOUT)?;
            serde_json::to_value(idle(&guest, *ram_kib, Duration::from_secs(1))?)
        }
        Job::Start(launch) => {
            let mut guest = Guest::start(launch)?;
            serde_json::to_value(guest.wait_for(&[FIRST_BYTE], START_TIMEOUT)?.as_secs_f64())
        }
        Job::Nothing => {
            let started = Instant::now();
            Command::new("true").status().context("Cannot run true")?;
            serde_json::to_value(started.elapsed().as_secs_f64())
        }
        Job::Loads { launch, loads } => {
            serde_json::to_value(super::disks::guest::loads(launch, *loads)?)
        }
        Job::Trial(trial) => serde_json::to_value(trial.perform()?),
        Job::FirstLine(launch) => serde_json::to_value(first_line(launch)?),
        Job::Machine => serde_json::to_value(machine()),
    };
    value.context("Cannot write a result")
}

/// The agent's side of a measurement: a [`Job`] as JSON on stdin, its result on stdout.
///
/// # Errors
/// As [`perform`], or there is no job.
pub fn serve() -> Result<()> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text)?;
    let job = serde_json::from_str(&text).context("Cannot read the job")?;
    println!("{}", perform(&job)?);
    Ok(())
}

fn boot(launch: &Launch, ram_kib: u64, with_idle: bool) -> Result<Boot> {
    // Without root there are no counters, and the times are still worth having.
    let reasons = Histogram::start("kvm_exit", "exit_reason").ok();
    let userspace = Histogram::start("kvm_userspace_exit", "reason").ok();
    let mut guest = Guest::start(launch)?;
    let seconds = guest.wait_for(FIRST_LINE, BOOT_TIMEOUT)?.as_secs_f64();
    let pid = guest.pid();
    let mut boot = guest.frozen(|| {
        Ok(Boot {
            seconds,
            cpu_seconds: guest.cpu_time()?.as_secs_f64(),
            exits: counters::exits(pid),
            userspace_exits: match &userspace {
                Some(histogram) => Some(histogram.read(pid)?.values().sum()),
                None => None,
            },
            reasons: match &reasons {
                Some(histogram) => named(&histogram.read(pid)?),
                None => BTreeMap::new(),
            },
            idle: None,
        })
    })?;
    if with_idle {
        guest.wait_for(LAST_LINE, BOOT_TIMEOUT)?;
        boot.idle = Some(idle(&guest, ram_kib, WATCH)?);
    }
    Ok(boot)
}

fn named(reasons: &BTreeMap<u64, u64>) -> BTreeMap<String, u64> {
    let mut named = BTreeMap::new();
    for (reason, count) in reasons {
        *named.entry(reason_name(*reason)).or_default() += count;
    }
    named
}

fn idle(guest: &Guest, ram_kib: u64, watch: Duration) -> Result<Idle> {
    let pid = guest.pid();
    thread::sleep(SETTLE);
    let before = sleeps(pid)?;
    let started = Instant::now();
    thread::sleep(watch);
    let (after, seconds) = (sleeps(pid)?, started.elapsed().as_secs_f64());
    let mut wakeups = BTreeMap::new();
    for (thread, (name, count)) in &after {
        let begun = before.get(thread).map_or(0, |(_, count)| *count);
        *wakeups.entry(name.clone()).or_default() += (count - begun) as f64 / seconds;
    }
    Ok(Idle {
        memory: memory::beyond_ram(pid, ram_kib)?,
        threads: after.len(),
        libraries: memory::libraries(pid)?,
        wakeups,
    })
}

/// The name of each thread and how often it went to sleep.
fn sleeps(pid: i32) -> Result<BTreeMap<String, (String, u64)>> {
    let mut sleeps = BTreeMap::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        let Ok(status) = fs::read_to_string(task.path().join("status")) else {
            continue;
        };
        let field = |name| {
            let mut lines = status.lines();
            lines.find_map(|line| Some(line.strip_prefix(name)?.trim()))
        };
        let count = field("voluntary_ctxt_switches:").and_then(|count| count.parse().ok());
        let name = field("Name:").unwrap_or("?").to_owned();
        let thread = task.file_name().to_string_lossy().into_owned();
        sleeps.insert(thread, (name, count.unwrap_or(0)));
    }
    Ok(sleeps)
}

fn first_line(launch: &Launch) -> Result<String> {
    let output = Command::new(&launch.program)
        .args(&launch.arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("Cannot start {}", launch.program))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}

fn machine() -> Machine {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo.lines().find(|line| line.starts_with("model name"));
    let cpu = model.and_then(|line| line.split_once(": "));
    let modules = ["kvm_intel", "kvm_amd", "kvm_pvm"];
    let loaded = |module: &&str| Path::new("/sys/module").join(module).exists();
    Machine {
        cpu: cpu.map_or_else(|| "unknown".to_owned(), |(_, name)| name.trim().to_owned()),
        cpus: thread::available_parallelism().map_or(1, usize::from),
        kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        kvm: modules
            .into_iter()
            .filter(|module| loaded(module))
            .collect::<Vec<_>>()
            .join(", "),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn counts_the_sleeps_of_this_very_thread() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let thread = nix::unistd::gettid().to_string();
        let count = || sleeps(pid).unwrap()[&thread].1;
        let before = count();
        for _ in 0..20 {
            thread::sleep(Duration::from_millis(1));
        }
        assert!(count() >= before + 20);
    }

    #[test]
    fn a_job_survives_its_way_into_the_lab() {
        let job = Job::Nothing;
        let text = serde_json::to_string(&job).unwrap();
        let seconds = perform(&serde_json::from_str(&text).unwrap()).unwrap();
        assert!(seconds.as_f64().unwrap() > 0.0);
    }
}
