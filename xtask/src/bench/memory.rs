//! What a VMM takes beyond its guest's RAM, from `/proc/PID/smaps`.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// Memory of a process apart from the RAM of its guest, in KiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// What is in RAM, whoever else has it too.
    pub rss: u64,
    /// What is in RAM, shared pages by this process's part.
    pub pss: u64,
    /// Pages this process alone has written to.
    pub private_dirty: u64,
    /// Pages without a file behind them.
    pub anonymous: u64,
}

/// Memory of process `pid` without mappings as large as a guest's RAM of `ram` KiB.
///
/// # Errors
/// The process is gone or somebody else's.
pub fn beyond_ram(pid: i32, ram: u64) -> Result<Memory> {
    let path = format!("/proc/{pid}/smaps");
    let smaps = fs::read_to_string(&path).with_context(|| format!("Cannot read {path}"))?;
    Ok(sum(&smaps, ram))
}

/// Sums the mappings that are less than half the RAM: RAM may be in two parts around the PCI hole,
/// and nothing else comes near it.
fn sum(smaps: &str, ram: u64) -> Memory {
    let mut sum = Memory::default();
    let mut is_ram = false;
    for line in smaps.lines() {
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        let Some(kib) = value.trim().strip_suffix(" kB") else {
            continue;
        };
        let kib: u64 = kib.trim().parse().unwrap_or(0);
        // The first line of each mapping.
        if key == "Size" {
            is_ram = kib >= ram / 2;
        }
        let field = match key {
            "Rss" => &mut sum.rss,
            "Pss" => &mut sum.pss,
            "Private_Dirty" => &mut sum.private_dirty,
            "Anonymous" => &mut sum.anonymous,
            _ => continue,
        };
        if !is_ram {
            *field += kib;
        }
    }
    sum
}

/// Size in bytes of the shared libraries that process `pid` has loaded.
///
/// # Errors
/// The process is gone or somebody else's.
pub fn libraries(pid: i32) -> Result<u64> {
    let program = fs::read_link(format!("/proc/{pid}/exe"))?;
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let files: BTreeSet<&str> = maps
        .lines()
        .filter(|line| {
            line.split(' ')
                .nth(1)
                .is_some_and(|mode| mode.contains('x'))
        })
        .filter_map(|line| line.find('/').and_then(|start| line.get(start..)))
        .filter(|path| Path::new(path) != program)
        .collect();
    Ok(files
        .into_iter()
        .filter_map(|path| fs::metadata(path).ok())
        .map(|file| file.len())
        .sum())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn leaves_the_ram_out() {
        let smaps = "\
55d0c0000000-55d0c0200000 r-xp 00000000 fe:00 1 /usr/bin/vmm
Size:               2048 kB
Rss:                1000 kB
Pss:                 900 kB
Private_Dirty:         0 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
7f0000000000-7f0010000000 rw-p 00000000 00:00 0
Size:             262144 kB
Rss:               90000 kB
Pss:               90000 kB
Private_Dirty:     90000 kB
Anonymous:         90000 kB
7f0010000000-7f0010021000 rw-p 00000000 00:00 0
Size:                132 kB
Rss:                  12 kB
Pss:                  12 kB
Private_Dirty:        12 kB
Anonymous:            12 kB
";
        let expected = Memory {
            rss: 1012,
            pss: 912,
            private_dirty: 12,
            anonymous: 12,
        };
        assert_eq!(sum(smaps, 262_144), expected);
    }

    #[test]
    fn reads_this_very_process() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let memory = beyond_ram(pid, u64::MAX).unwrap();
        assert!(memory.rss >= memory.pss && memory.private_dirty > 0);
        assert!(libraries(pid).unwrap() > 0);
    }
}
