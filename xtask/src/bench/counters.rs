//! Exits of a guest, as KVM counts them: by kind in debugfs, by reason in histograms of its
//! tracepoints. Both are root's alone, and a VM's counters go with the VM.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

const DEBUGFS: &str = "/sys/kernel/debug/kvm";
const EVENTS: &str = "/sys/kernel/tracing/events/kvm";

/// All exits of the VM that process `pid` runs. `None` when there is no such counter to be read.
pub fn exits(pid: i32) -> Option<u64> {
    // A VM's directory is named for the thread that made it and a descriptor.
    let threads = threads(pid);
    let vm = fs::read_dir(DEBUGFS).ok()?.flatten().find(|entry| {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| name.split_once('-'));
        owner.is_some_and(|(owner, _)| owner.parse().is_ok_and(|owner| threads.contains(&owner)))
    })?;
    let count = fs::read_to_string(vm.path().join("exits")).ok()?;
    count.trim().parse().ok()
}

fn threads(pid: i32) -> BTreeSet<i32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    tasks
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

/// A histogram of a tracepoint of KVM, by thread and by one field. Filled until dropped.
#[derive(Debug)]
pub struct Histogram {
    event: PathBuf,
    trigger: String,
}

impl Histogram {
    /// Starts to count `event` by `field`.
    ///
    /// # Errors
    /// Tracing is not to be had.
    pub fn start(event: &str, field: &str) -> Result<Self> {
        let event = Path::new(EVENTS).join(event);
        let trigger = format!("hist:keys=common_pid,{field}:size=16384");
        let path = event.join("trigger");
        fs::write(&path, &trigger).with_context(|| format!("Cannot write {}", path.display()))?;
        Ok(Self { event, trigger })
    }

    /// How often each value of the field came up in the threads of process `pid`.
    ///
    /// # Errors
    /// The histogram cannot be read.
    pub fn read(&self, pid: i32) -> Result<BTreeMap<u64, u64>> {
        let path = self.event.join("hist");
        let text =
            fs::read_to_string(&path).with_context(|| format!("Cannot read {}", path.display()))?;
        Ok(parse(&text, &threads(pid)))
    }
}

impl Drop for Histogram {
    fn drop(&mut self) {
        let _ = fs::write(self.event.join("trigger"), format!("!{}", self.trigger));
    }
}

/// Lines such as `{ common_pid: 812, exit_reason: 96 } hitcount: 979`.
fn parse(text: &str, threads: &BTreeSet<i32>) -> BTreeMap<u64, u64> {
    let mut counts = BTreeMap::new();
    for line in text.lines().filter(|line| line.starts_with('{')) {
        let mut numbers = line
            .split(|character: char| !character.is_ascii_digit())
            .filter(|part| !part.is_empty());
        let (Some(thread), Some(value), Some(count)) =
            (numbers.next(), numbers.next(), numbers.next())
        else {
            continue;
        };
        if thread.parse().is_ok_and(|thread| threads.contains(&thread))
            && let (Ok(value), Ok(count)) = (value.parse(), count.parse::<u64>())
        {
            *counts.entry(value).or_default() += count;
        }
    }
    counts
}

/// The name of an exit reason of the vendor whose module drives KVM.
pub fn reason_name(reason: u64) -> String {
    let names: &[(RangeInclusive<u64>, &str)] = if Path::new("/sys/module/kvm_amd").exists() {
        SVM
    } else {
        VMX
    };
    let name = names.iter().find(|(numbers, _)| numbers.contains(&reason));
    name.map_or_else(|| format!("{reason:#x}"), |(_, name)| (*name).to_owned())
}

/// AMD64 Architecture Programmer's Manual, volume 2, appendix C. Names are common to both tables
/// where the cause is.
const SVM: &[(RangeInclusive<u64>, &str)] = &[
    (0x00..=0x1f, "control register"),
    (0x20..=0x3f, "debug register"),
    (0x60..=0x60, "interrupt"),
    (0x61..=0x61, "NMI"),
    (0x64..=0x64, "interrupt window"),
    (0x65..=0x65, "control register"),
    (0x72..=0x72, "CPUID"),
    (0x77..=0x77, "PAUSE"),
    (0x78..=0x78, "HLT"),
    (0x7b..=0x7b, "port I/O"),
    (0x7c..=0x7c, "MSR"),
    (0x8d..=0x8d, "XSETBV"),
    (0x400..=0x400, "nested page fault"),
];

/// Intel SDM, volume 3, appendix C.
const VMX: &[(RangeInclusive<u64>, &str)] = &[
    (0..=0, "exception or NMI"),
    (1..=1, "interrupt"),
    (7..=7, "interrupt window"),
    (10..=10, "CPUID"),
    (12..=12, "HLT"),
    (28..=28, "control register"),
    (29..=29, "debug register"),
    (30..=30, "port I/O"),
    (31..=32, "MSR"),
    (40..=40, "PAUSE"),
    (48..=49, "nested page fault"),
    (52..=52, "preemption timer"),
    (55..=55, "XSETBV"),
];

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn counts_only_the_vmm_s_own_threads() {
        let text = "\
# event histogram
#
# trigger info: hist:keys=common_pid,exit_reason:vals=hitcount:sort=hitcount:size=16384 [active]
#

{ common_pid:        901, exit_reason:         96 } hitcount:          1
{ common_pid:        812, exit_reason:        120 } hitcount:         14
{ common_pid:        811, exit_reason:         96 } hitcount:         20
{ common_pid:        812, exit_reason:         96 } hitcount:        979

Totals:
    Hits: 1014
    Entries: 4
    Dropped: 0
";
        let counts = parse(text, &BTreeSet::from([811, 812]));
        assert_eq!(counts, BTreeMap::from([(96, 999), (120, 14)]));
    }

    #[test]
    fn there_is_no_vm_of_this_process() {
        assert_eq!(exits(i32::try_from(std::process::id()).unwrap()), None);
    }
}
