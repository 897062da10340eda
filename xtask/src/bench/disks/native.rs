//! One run of one contestant on this host.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::cases::Case;
use super::export::Export;
use super::images::Images;
use crate::process;
use crate::progress::note;

/// Seconds that a run may take, on however busy a host.
const TIMEOUT: &str = "300";

/// Who does the requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contestant {
    /// Our block layer, called as `qemu-img bench` calls QEMU's.
    Layer,
    /// Our virtio disk, whose driver is another thread.
    Disk,
    /// `qemu-img bench` by io_uring.
    Uring,
    /// `qemu-img bench` by Linux AIO or, for what is cached, threads.
    Other,
    /// QEMU's virtio disk by io_uring, with the driver that ours has.
    Export,
}

impl Contestant {
    /// All of them, as the tables have them.
    pub const ALL: [Self; 5] = [
        Self::Layer,
        Self::Uring,
        Self::Other,
        Self::Disk,
        Self::Export,
    ];

    /// What QEMU has of the same kind.
    #[must_use]
    pub fn rival(self) -> Self {
        match self {
            Self::Disk | Self::Export => Self::Export,
            _ => Self::Uring,
        }
    }

    /// What the results call it.
    #[must_use]
    pub fn key(self) -> &'static str {
        match self {
            Self::Layer => "layer",
            Self::Disk => "disk",
            Self::Uring => "qemu-io_uring",
            Self::Other => "qemu-other",
            Self::Export => "qemu-virtio",
        }
    }
}

/// What a run gave.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Sample {
    /// Requests a second.
    pub iops: f64,
    /// CPU time of a request, in microseconds.
    pub cpu: f64,
    /// Interrupts for a request.
    pub interrupts: Option<f64>,
    /// Microseconds to a request's end: median, 99 %, 99.9 %.
    pub latency: Option<[f64; 3]>,
}

/// What crates/devices/examples/blkbench writes.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Outcome {
    /// How long it took.
    pub seconds: f64,
    /// Requests a second.
    pub iops: f64,
    /// CPU time of a request, in microseconds.
    pub cpu: f64,
    /// Interrupts for a request.
    pub interrupts: f64,
    /// Microseconds to a request's end: median, 99 %, 99.9 %.
    pub latency: [f64; 3],
}

/// Programs and images.
#[derive(Debug)]
pub struct Native {
    /// `blkbench`.
    pub blkbench: PathBuf,
    /// What is read and written.
    pub images: Images,
}

impl Native {
    /// Has `contestant` do `case` once. There is no sample of QEMU's if it fails: now and then
    /// `qemu-img bench` (10.0.2) crashes.
    ///
    /// # Errors
    /// Our program does not run, or an image cannot be made.
    pub fn run(&self, contestant: Contestant, case: &Case) -> Result<Option<Sample>> {
        self.images.prepare(case.image, case.direct)?;
        let other = if case.direct { "native" } else { "threads" };
        let qemu = |sample: Result<Sample>| {
            let tell = |error| note(&format!("No figure of QEMU: {error:#}"));
            Ok(sample.map_err(tell).ok())
        };
        match contestant {
            Contestant::Layer => self.blkbench(case, "engine", None).map(Some),
            Contestant::Disk => self.blkbench(case, "virtio", None).map(Some),
            Contestant::Uring => qemu(self.qemu_img("io_uring", case)),
            Contestant::Other => qemu(self.qemu_img(other, case)),
            Contestant::Export => qemu(self.export(case)),
        }
        .with_context(|| format!("Cannot measure {}", case.key()))
    }

    fn export(&self, case: &Case) -> Result<Sample> {
        let export = Export::start(case, &self.images.path(case.image))?;
        self.blkbench(case, "vhost-user", Some(&export))
    }

    fn blkbench(&self, case: &Case, way: &str, export: Option<&Export>) -> Result<Sample> {
        let path = self.images.path(case.image).display().to_string();
        let mut job = job(case, way, &path, case.image.size());
        if let Some(export) = export {
            job["peer"] = export.peer(case);
        }
        // A daemon that crashes leaves its driver waiting.
        let mut command = Command::new("timeout");
        command.arg(TIMEOUT).arg(&self.blkbench);
        let output = process::output(command.arg(job.to_string()))?;
        let outcome: Outcome = serde_json::from_str(&output)?;
        Ok(Sample {
            iops: outcome.iops,
            cpu: outcome.cpu,
            interrupts: (way != "engine").then_some(outcome.interrupts),
            latency: Some(outcome.latency),
        })
    }

    fn qemu_img(&self, aio: &str, case: &Case) -> Result<Sample> {
        let bench = |count: usize| -> Result<(String, f64)> {
            let mut command = Command::new("qemu-img");
            command.args(["bench", "-f", case.image.format(), "-i", aio]);
            command.args(["-t", if case.direct { "none" } else { "writeback" }]);
            for (option, value) in [
                ("-c", count as u64),
                ("-d", case.depth as u64),
                ("-s", u64::from(case.block)),
                ("-S", case.step(case.image.size())),
            ] {
                command.arg(option).arg(value.to_string());
            }
            command.args(case.write.then_some("-w"));
            command.arg(self.images.path(case.image));
            let before = children_cpu()?;
            let output = process::output(&mut command)?;
            Ok((output, children_cpu()? - before))
        };
        // What starting and ending takes is none of the requests'.
        let (_, start) = bench(1)?;
        let (output, cpu) = bench(case.count)?;
        let seconds = seconds(&output).with_context(|| format!("No time in: {output}"))?;
        let count = case.count as f64;
        Ok(Sample {
            iops: count / seconds,
            cpu: (cpu - start).max(0.0) * 1e6 / count,
            interrupts: None,
            latency: None,
        })
    }
}

/// A job for `blkbench`.
#[must_use]
pub fn job(case: &Case, way: &str, path: &str, size: u64) -> Value {
    json!({
        "image": path,
        "direct": case.direct,
        "write": case.write,
        "way": way,
        "block": case.block,
        "step": case.step(size),
        "depth": case.depth,
        "count": case.count,
    })
}

/// The time that `qemu-img bench` says.
fn seconds(output: &str) -> Option<f64> {
    let (_, rest) = output.split_once("completed in ")?;
    rest.split(' ').next()?.parse().ok()
}

/// CPU time of the processes that this one has started and that have ended, in seconds.
fn children_cpu() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Ok(micros as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_is_found() {
        let output = "Sending 4 read requests, 4096 bytes each\nRun completed in 0.250 seconds.\n";
        assert_eq!(seconds(output).map(f64::to_bits), Some(0.25_f64.to_bits()));
        assert_eq!(seconds("nothing"), None);
    }
}
