//! Processes, told apart by ID and start time, as IDs are used again.

use std::fs;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// A process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its ID.
    pub pid: i32,
    /// When it was started, in the kernel's ticks since the host's boot.
    pub start_time: u64,
}

impl Process {
    /// The process that has an ID now; `None` when there is none, or it has ended.
    pub fn find(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let start_time = parse_stat(&stat)?;
        Some(Self { pid, start_time })
    }

    /// Whether it still runs.
    pub fn is_alive(self) -> bool {
        Self::find(self.pid) == Some(self)
    }

    /// Ends it at once, if it still runs.
    pub fn kill(self) {
        if self.pid > 1 && self.is_alive() {
            let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        }
    }

    /// Its ID as containerd has them.
    pub fn id(self) -> u32 {
        u32::try_from(self.pid).unwrap_or(0)
    }
}

/// The start time in a line of `/proc/PID/stat`, unless the process has ended. Its second field, the
/// program's name, may hold anything.
fn parse_stat(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    match fields.next()? {
        "Z" | "X" => None,
        _ => fields.nth(18)?.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn only_the_same_process_is_ended() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let process = Process::find(pid).unwrap();
        let other = Process {
            start_time: process.start_time + 1,
            ..process
        };
        other.kill();
        assert!(process.is_alive() && !other.is_alive());
        process.kill();
        child.wait().unwrap();
        assert!(!process.is_alive());
    }

    #[test]
    fn names_with_parentheses_and_the_dead_are_told() {
        let rest = "1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 777 0";
        assert_eq!(parse_stat(&format!("7 (a) R) S {rest}")), Some(777));
        assert_eq!(parse_stat(&format!("7 (a) Z {rest}")), None);
        assert_eq!(parse_stat("7 (a"), None);
    }
}
