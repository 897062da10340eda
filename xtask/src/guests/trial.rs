//! One guest of the matrix, started once where its VMM runs: in the lab's L1 or on this host.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::bench::counters::{self, Histogram};
use crate::bench::guest::{Guest, Launch};
use crate::bench::memory;

/// The guest is up, as its first program says.
const READY: &str = "GUEST-READY ";
/// What it has written came back from the disk.
const WROTE: &[u8] = b"GUEST-WROTE";

/// Emulation on a busy host takes minutes.
const BOOT_TIMEOUT: Duration = Duration::from_secs(420);
const END_TIMEOUT: Duration = Duration::from_secs(540);

/// What is to be done.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Trial {
    /// The VMM with the guest.
    pub launch: Launch,
    /// The guest's RAM in KiB.
    pub ram_kib: u64,
    /// Programs that look at the disk afterwards, one by one: each has to end with code 0.
    pub checks: Vec<Launch>,
    /// Where the VMM's messages go.
    pub messages: PathBuf,
}

/// What came of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Boot {
    /// What the guest says of itself.
    pub report: String,
    /// From exec to the guest's report.
    pub seconds: f64,
    /// CPU time of the VMM and its guest until then, in seconds.
    pub cpu_seconds: f64,
    /// The guest's exits until then, as KVM counts them.
    pub exits: Option<u64>,
    /// Those of them that the VMM had to see to.
    pub userspace_exits: Option<u64>,
    /// The VMM's memory beyond the guest's RAM then, in KiB, shared pages by its part.
    pub memory: u64,
    /// From exec to the VMM's end after the guest's power-off.
    pub until_off: f64,
    /// The VMM's messages.
    pub messages: String,
}

impl Trial {
    /// Starts the guest, waits for its power-off, and looks at its disk.
    ///
    /// # Errors
    /// Whatever goes wrong: the guest does not come up, loses data, or leaves its disk damaged.
    pub fn perform(&self) -> Result<Boot> {
        let messages = fs::File::create(&self.messages)
            .with_context(|| format!("Cannot make {}", self.messages.display()))?;
        let boot = self.boot(messages);
        let said = fs::read_to_string(&self.messages).unwrap_or_default();
        let mut boot = boot.with_context(|| format!("The VMM said: {}", said.trim()))?;
        said.trim().clone_into(&mut boot.messages);
        self.checks.iter().try_for_each(check)?;
        Ok(boot)
    }

    fn boot(&self, messages: fs::File) -> Result<Boot> {
        // Without root there are no counters.
        let userspace = Histogram::start("kvm_userspace_exit", "reason").ok();
        let mut guest = Guest::start_with(&self.launch, messages)?;
        let seconds = guest.wait_for(READY.as_bytes(), BOOT_TIMEOUT)?;
        let pid = guest.pid();
        let mut boot = guest.frozen(|| {
            let to_vmm = userspace.as_ref().and_then(|each| each.read(pid).ok());
            Ok(Boot {
                report: String::new(),
                seconds: seconds.as_secs_f64(),
                cpu_seconds: guest.cpu_time()?.as_secs_f64(),
                exits: counters::exits(pid),
                userspace_exits: to_vmm.map(|reasons| reasons.values().sum()),
                memory: memory::beyond_ram(pid, self.ram_kib)?.pss,
                until_off: 0.0,
                messages: String::new(),
            })
        })?;
        drop(userspace);
        boot.report = guest.line_after(READY, BOOT_TIMEOUT)?;
        guest.wait_for(WROTE, END_TIMEOUT)?;
        boot.until_off = guest.wait_for_end(END_TIMEOUT)?.as_secs_f64();
        Ok(boot)
    }
}

fn check(program: &Launch) -> Result<()> {
    let output = Command::new(&program.program)
        .args(&program.arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("Cannot start {}", program.program))?;
    if output.status.success() {
        return Ok(());
    }
    bail!(
        "The disk is not as it should be ({}): {}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn shell(script: &str) -> Launch {
        Launch {
            program: "sh".into(),
            arguments: vec!["-c".into(), script.into()],
        }
    }

    fn trial(script: &str, check: &str) -> Result<Boot> {
        let dir = tempfile::tempdir().unwrap();
        Trial {
            launch: shell(script),
            ram_kib: 1 << 20,
            checks: vec![shell(check)],
            messages: dir.path().join("messages"),
        }
        .perform()
    }

    #[test]
    fn a_guest_has_to_come_up_write_end_and_leave_its_disk_clean() {
        let good = "echo note >&2; echo GUEST-READY cpus=1; sleep 0.1; echo GUEST-WROTE";
        let boot = trial(good, "true").unwrap();
        assert_eq!((&*boot.report, &*boot.messages), ("cpus=1", "note"));
        assert!(boot.until_off > boot.seconds);
        for (script, checker, reason) in [
            (good, "echo dirty; exit 4", "dirty"),
            ("echo GUEST-READY x; sleep 0.1", "true", "ended"),
            ("echo no >&2; exit 2", "true", "no"),
            (
                "echo GUEST-READY x; sleep 0.1; echo GUEST-WROTE; exit 9",
                "true",
                "9",
            ),
        ] {
            let error = format!("{:#}", trial(script, checker).unwrap_err());
            assert!(error.contains(reason), "{error}");
        }
    }
}
