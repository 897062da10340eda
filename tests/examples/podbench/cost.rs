//! What the processes of pods take and do.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use xtask::bench::memory::{self, Memory};
use xtask::bench::pods::{Activity, Density};

use crate::starts::RAM_MIB;

/// How long idle pods are watched.
const WATCH: Duration = Duration::from_secs(30);
/// No process has a mapping that large.
const ALL: u64 = u64::MAX;

/// What a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Shim,
    Holder,
    Vmm,
    RuncShim,
    Program,
}

impl Kind {
    /// Those of pods that are machines.
    pub(crate) const MACHINE: &'static [Self] = &[Self::Shim, Self::Holder, Self::Vmm];
    /// Those of ordinary pods.
    pub(crate) const ORDINARY: &'static [Self] = &[Self::RuncShim, Self::Program];

    const fn name(self) -> &'static str {
        match self {
            Self::Shim => "shim",
            Self::Holder => "what holds the pod's namespaces",
            Self::Vmm => "VMM",
            Self::RuncShim => "runc's shim",
            Self::Program => "pause and program",
        }
    }

    fn of(pid: i32) -> Option<Self> {
        let program = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let has = |word: &str| {
            arguments
                .split(|byte| *byte == 0)
                .any(|it| it == word.as_bytes())
        };
        match program.file_name()?.to_str()? {
            "containerd-shim-edgevmm-v1" if has("daemon") => Some(Self::Shim),
            "containerd-shim-edgevmm-v1" => Some(Self::Holder),
            "edgevmm" => Some(Self::Vmm),
            "containerd-shim-runc-v2" => Some(Self::RuncShim),
            "busybox" => Some(Self::Program),
            _ => None,
        }
    }
}

/// Processes of these kinds.
fn processes(kinds: &[Kind]) -> Result<Vec<(i32, Kind)>> {
    let pids = fs::read_dir("/proc")?.flatten();
    Ok(pids
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid| Some((pid, Kind::of(pid)?)))
        .filter(|(_, kind)| kinds.contains(kind))
        .collect())
}

/// Memory by kind, without guests' RAM.
pub(crate) fn of_each(kinds: &[Kind]) -> Result<BTreeMap<String, Memory>> {
    let mut sums = BTreeMap::new();
    for (pid, kind) in processes(kinds)? {
        let sum: &mut Memory = sums.entry(kind.name().to_owned()).or_default();
        let memory = memory::beyond_ram(pid, RAM_MIB << 10)?;
        sum.rss += memory.rss;
        sum.pss += memory.pss;
        sum.private_dirty += memory.private_dirty;
        sum.anonymous += memory.anonymous;
    }
    Ok(sums)
}

/// What all machines' pods take, which are so many.
pub(crate) fn together(pods: usize) -> Result<Density> {
    let mut density = Density {
        pods,
        ..Density::default()
    };
    for memory in of_each(Kind::MACHINE)?.values() {
        density.pss += memory.pss;
        density.private_dirty += memory.private_dirty;
    }
    for (pid, _) in processes(&[Kind::Vmm])? {
        let all = memory::beyond_ram(pid, ALL)?.rss;
        let touched = all.saturating_sub(memory::beyond_ram(pid, RAM_MIB << 10)?.rss);
        density.touched += touched;
        density.charged += charged(pid)?.saturating_sub(touched);
    }
    Ok(density)
}

/// What the control group of the pod of a VMM is charged with, in KiB.
fn charged(pid: i32) -> Result<u64> {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let of_memory = |line: &str| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        let path = Path::new(path).parent()?.strip_prefix("/").ok()?;
        match controllers {
            "memory" => Some(Path::new("memory").join(path).join("memory.usage_in_bytes")),
            _ => None,
        }
    };
    let unified = |line: &str| {
        let path = Path::new(line.strip_prefix("0::/")?).parent()?;
        Some(path.join("memory.current"))
    };
    let found = groups.lines().find_map(of_memory);
    let found = found.or_else(|| groups.lines().find_map(unified));
    let file: PathBuf = Path::new("/sys/fs/cgroup").join(found.context("No control group")?);
    let text = fs::read_to_string(&file).with_context(|| format!("No {}", file.display()))?;
    Ok(text.trim().parse::<u64>()? >> 10)
}

/// What processes of these kinds do, a second, by kind.
pub(crate) fn activity(kinds: &[Kind]) -> Result<BTreeMap<String, Activity>> {
    let (before, started) = (counts(kinds)?, Instant::now());
    thread::sleep(WATCH);
    let (after, seconds) = (counts(kinds)?, started.elapsed().as_secs_f64());
    let mut sums: BTreeMap<String, Activity> = BTreeMap::new();
    for (thread, now) in after {
        let begun = before.get(&thread);
        let (sleeps, nanoseconds) = begun.map_or((0, 0), |it| (it.sleeps, it.nanoseconds));
        let sum = sums.entry(now.kind.name().to_owned()).or_default();
        sum.processes += usize::from(now.pid == thread);
        sum.wakeups += now.sleeps.saturating_sub(sleeps) as f64 / seconds;
        sum.cpu += now.nanoseconds.saturating_sub(nanoseconds) as f64 / seconds / 1e6;
    }
    Ok(sums)
}

/// What a thread has done since it began.
#[derive(Debug)]
struct Count {
    pid: i32,
    kind: Kind,
    sleeps: u64,
    nanoseconds: u64,
}

/// What each thread has done.
fn counts(kinds: &[Kind]) -> Result<BTreeMap<i32, Count>> {
    let mut counts = BTreeMap::new();
    for (pid, kind) in processes(kinds)? {
        for task in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
            let read = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default();
            let (status, run) = (read("status"), read("schedstat"));
            let sleeps = status
                .lines()
                .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))
                .and_then(|count| count.trim().parse().ok());
            let run = run.split(' ').next().and_then(|run| run.parse().ok());
            let thread = task.file_name().to_str().and_then(|it| it.parse().ok());
            if let (Some(thread), Some(sleeps)) = (thread, sleeps) {
                let nanoseconds = run.unwrap_or(0);
                let count = Count {
                    pid,
                    kind,
                    sleeps,
                    nanoseconds,
                };
                counts.insert(thread, count);
            }
        }
    }
    Ok(counts)
}
