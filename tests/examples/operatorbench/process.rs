//! What a process takes and does.

use std::fs;

use anyhow::Result;
use xtask::bench::memory::{self, Memory};

/// What the threads of a process have done since they began.
#[derive(Debug, Default)]
pub(crate) struct Work {
    pub(crate) threads: usize,
    pub(crate) sleeps: u64,
    pub(crate) nanoseconds: u64,
}

pub(crate) fn work(pid: i32) -> Result<Work> {
    let mut work = Work::default();
    for task in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        let read = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let (status, run) = (read("status"), read("schedstat"));
        let sleeps = status
            .lines()
            .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))
            .and_then(|count| count.trim().parse::<u64>().ok());
        let run = run
            .split(' ')
            .next()
            .and_then(|run| run.parse::<u64>().ok());
        work.threads += 1;
        work.sleeps += sleeps.unwrap_or(0);
        work.nanoseconds += run.unwrap_or(0);
    }
    Ok(work)
}

pub(crate) fn memory(pid: i32) -> Result<Memory> {
    memory::beyond_ram(pid, u64::MAX)
}
