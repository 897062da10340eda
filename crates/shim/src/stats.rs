//! What a container uses, in the messages of containerd's cgroups library.

use prost_types::Any;

use crate::cgroup::{Cgroup, Version};
use crate::proto::any;
use crate::proto::metrics::{
    CpuV1, CpuV2, MemoryEntryV1, MemoryEventsV2, MemoryV1, MemoryV2, MetricsV1, MetricsV2, OomV1,
    Pids, ThrottleV1, UsageV1,
};

/// Nanoseconds of a tick in cpuacct.stat, of which there are 100 a second.
const TICK: u64 = 10_000_000;

/// What a group's processes use.
pub fn read(cgroup: &Cgroup) -> Any {
    match cgroup.version() {
        Version::V1 => any("io.containerd.cgroups.v1.Metrics", &v1(cgroup)),
        Version::V2 => any("io.containerd.cgroups.v2.Metrics", &v2(cgroup)),
    }
}

/// Times that the kernel ended a process of the group for want of memory.
pub fn oom_kills(cgroup: &Cgroup) -> u64 {
    let file = match cgroup.version() {
        Version::V1 => "memory.oom_control",
        Version::V2 => "memory.events",
    };
    Keyed::read(cgroup, file).get("oom_kill")
}

/// A file of lines with a name and a number.
struct Keyed(String);

impl Keyed {
    fn read(cgroup: &Cgroup, file: &str) -> Self {
        Self(cgroup.read(file).unwrap_or_default())
    }

    fn get(&self, name: &str) -> u64 {
        let mut lines = self.0.lines().filter_map(|line| line.split_once(' '));
        let found = lines.find(|(key, _)| *key == name);
        found.map_or(0, |(_, value)| number(value))
    }
}

/// A number; `max` and what is none are 0.
fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or(0)
}

/// A limit; none is the largest number.
fn limit(text: &str) -> u64 {
    text.trim().parse().unwrap_or(u64::MAX)
}

fn pids(cgroup: &Cgroup) -> Option<Pids> {
    let current = cgroup.read("pids.current")?;
    let limit = cgroup.read("pids.max").unwrap_or_default();
    Some(Pids {
        current: number(&current),
        limit: number(&limit),
    })
}

fn v1(cgroup: &Cgroup) -> MetricsV1 {
    let value = |file| number(&cgroup.read(file).unwrap_or_default());
    let memory = Keyed::read(cgroup, "memory.stat");
    let times = Keyed::read(cgroup, "cpuacct.stat");
    let throttling = Keyed::read(cgroup, "cpu.stat");
    MetricsV1 {
        pids: pids(cgroup),
        cpu: Some(CpuV1 {
            usage: Some(UsageV1 {
                total: value("cpuacct.usage"),
                kernel: times.get("system").saturating_mul(TICK),
                user: times.get("user").saturating_mul(TICK),
            }),
            throttling: Some(ThrottleV1 {
                periods: throttling.get("nr_periods"),
                throttled_periods: throttling.get("nr_throttled"),
                throttled_time: throttling.get("throttled_time"),
            }),
        }),
        memory: Some(MemoryV1 {
            cache: memory.get("cache"),
            rss: memory.get("rss"),
            mapped_file: memory.get("mapped_file"),
            pg_fault: memory.get("pgfault"),
            pg_maj_fault: memory.get("pgmajfault"),
            inactive_anon: memory.get("inactive_anon"),
            active_anon: memory.get("active_anon"),
            inactive_file: memory.get("inactive_file"),
            active_file: memory.get("active_file"),
            total_rss: memory.get("total_rss"),
            total_pg_fault: memory.get("total_pgfault"),
            total_pg_maj_fault: memory.get("total_pgmajfault"),
            total_inactive_file: memory.get("total_inactive_file"),
            usage: Some(MemoryEntryV1 {
                limit: value("memory.limit_in_bytes"),
                usage: value("memory.usage_in_bytes"),
                max: value("memory.max_usage_in_bytes"),
                failcnt: value("memory.failcnt"),
            }),
        }),
        memory_oom_control: Some(OomV1 {
            oom_kill: oom_kills(cgroup),
        }),
    }
}

fn v2(cgroup: &Cgroup) -> MetricsV2 {
    let cpu = Keyed::read(cgroup, "cpu.stat");
    let memory = Keyed::read(cgroup, "memory.stat");
    let events = Keyed::read(cgroup, "memory.events");
    MetricsV2 {
        pids: pids(cgroup),
        cpu: Some(CpuV2 {
            usage_usec: cpu.get("usage_usec"),
            user_usec: cpu.get("user_usec"),
            system_usec: cpu.get("system_usec"),
            nr_periods: cpu.get("nr_periods"),
            nr_throttled: cpu.get("nr_throttled"),
            throttled_usec: cpu.get("throttled_usec"),
        }),
        memory: Some(MemoryV2 {
            anon: memory.get("anon"),
            file: memory.get("file"),
            file_mapped: memory.get("file_mapped"),
            inactive_anon: memory.get("inactive_anon"),
            active_anon: memory.get("active_anon"),
            inactive_file: memory.get("inactive_file"),
            active_file: memory.get("active_file"),
            pgfault: memory.get("pgfault"),
            pgmajfault: memory.get("pgmajfault"),
            usage: number(&cgroup.read("memory.current").unwrap_or_default()),
            usage_limit: limit(&cgroup.read("memory.max").unwrap_or_default()),
        }),
        memory_events: Some(MemoryEventsV2 {
            low: events.get("low"),
            high: events.get("high"),
            max: events.get("max"),
            oom: events.get("oom"),
            oom_kill: events.get("oom_kill"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_found_by_their_whole_name() {
        let keyed = Keyed("anon_thp 5\nanon 7\nfile x\n".to_owned());
        assert_eq!(
            [keyed.get("anon"), keyed.get("file"), keyed.get("none")],
            [7, 0, 0]
        );
        assert_eq!([limit("max\n"), limit("12\n")], [u64::MAX, 12]);
    }
}
