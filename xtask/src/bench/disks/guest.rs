//! The same loads inside of a guest, on the virtio disks of the VMMs that are compared.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::super::config::{Comparison, Files, Vmm};
use super::super::guest::{Guest, Launch};
use super::super::probe::Job;
use super::super::results::is_vcpu;
use super::super::{Place, left_out};
use super::cases::{self, Case};
use super::native::{Outcome, Sample, job};
use crate::images::Images;
use crate::kernel::{Initrd, Kernel};
use crate::lab::{self, Lab, Layout};
use crate::progress::step;

const INIT: &str = include_str!("init.sh");

/// Drivers of the guest. `virtio_mmio` is for machines without PCI.
const MODULES: &[&str] = &["virtio_pci", "virtio_mmio", "virtio_blk"];

/// The disk in the lab: RAM as a block device, so that what is measured is the way to it.
const LAB_DISK: &str = "/dev/ram0";
/// Its size in MiB, as that of a file where no lab is needed.
const DISK_MIB: u64 = 64;

/// Emulation on a busy host takes minutes.
const TIMEOUT: Duration = Duration::from_secs(600);

/// What one VMM gave: by case of [`cases::of_guest`], a sample of each boot.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Measured {
    /// The VMM's name.
    pub name: String,
    /// What is special about it.
    pub note: String,
    /// Its version.
    pub version: String,
    /// Samples by case.
    pub samples: Vec<Vec<Sample>>,
}

/// What runs guests.
#[derive(Debug)]
pub struct Guests<'a> {
    /// The VMMs.
    pub comparison: &'a Comparison,
    /// Our program.
    pub edgevmm: &'a Path,
    /// This program, for the lab.
    pub xtask: &'a Path,
    /// `blkbench`, statically linked.
    pub blkbench: &'a Path,
    /// A directory for the guest's files.
    pub dir: &'a Path,
    /// Whether guests run in the lab.
    pub in_lab: bool,
}

impl Guests<'_> {
    /// Boots each VMM `boots` times, in turns, and measures all cases in each boot. Returns the
    /// lab's machine too, if it was used.
    ///
    /// # Errors
    /// edgevmm does not run; another VMM that does not is left out.
    pub fn run(&self, boots: usize) -> Result<(Vec<Measured>, Option<serde_json::Value>)> {
        let cases = cases::of_guest();
        let initrd = self.dir.join("initrd");
        fs::write(&initrd, self.initrd(&cases)?)?;
        let mut files = Files {
            edgevmm: self.edgevmm.to_owned(),
            kernel: Images::of_this_user().vmlinux(),
            initrd,
            disk: self.dir.join("guest.raw"),
        };
        let place = if self.in_lab {
            let paths = [&mut files.edgevmm, &mut files.kernel, &mut files.initrd];
            let lab = super::super::lab(self.xtask, paths)?;
            make_lab_disk(&lab)?;
            files.disk = PathBuf::from(LAB_DISK);
            Place::Lab(Box::new(lab))
        } else {
            fs::write(&files.disk, vec![1; usize::try_from(DISK_MIB << 20)?])?;
            Place::Here
        };
        let machine = match place {
            Place::Lab(_) => Some(place.measure(&Job::Machine)?),
            Place::Here => None,
        };
        let mut all: Vec<Measured> = Vec::new();
        for vmm in &self.comparison.vmms {
            all.push(Measured {
                name: vmm.name.clone(),
                note: vmm.note.clone(),
                version: super::super::version(&place, vmm, &files)?,
                samples: vec![Vec::new(); cases.len()],
            });
        }
        for round in 0..boots {
            let mut order: Vec<_> = self.comparison.vmms.iter().zip(&mut all).collect();
            if round % 2 == 1 {
                order.reverse();
            }
            for (vmm, measured) in order {
                let what = format!("Disk of {}, {} of {boots}", vmm.name, round + 1);
                match step(&what, || self.measure(&place, vmm, &files, cases.len())) {
                    Ok(samples) => {
                        for (all, sample) in measured.samples.iter_mut().zip(samples) {
                            all.push(sample);
                        }
                    }
                    Err(error) => left_out(vmm, &error)?,
                }
            }
        }
        Ok((all, machine))
    }

    fn measure(
        &self,
        place: &Place,
        vmm: &Vmm,
        files: &Files,
        loads: usize,
    ) -> Result<Vec<Sample>> {
        let arguments = vmm.boot.as_ref().context("A VMM without arguments")?;
        let launch = self.comparison.launch(vmm, arguments, files);
        place.measure(&Job::Loads { launch, loads })
    }

    fn initrd(&self, cases: &[Case]) -> Result<Vec<u8>> {
        let tree = Images::of_this_user().kernel_tree();
        let modules = Kernel::open(&tree)?.modules()?;
        let busybox = Layout::of_this_user().tools().path("usr/bin/busybox");
        let mut jobs = String::new();
        for case in cases {
            jobs += &job(case, "engine", "/dev/vda", DISK_MIB << 20).to_string();
            jobs.push('\n');
        }
        let blkbench = fs::read(self.blkbench)
            .with_context(|| format!("Cannot read {}", self.blkbench.display()))?;
        Ok(Initrd::new(&busybox, INIT)?
            .program("bin/blkbench", &blkbench)
            .program("jobs", jobs.as_bytes())
            .modules(&modules, MODULES)?
            .finish())
    }
}

/// Makes the block device in RAM. Its driver is none of those that L1 has.
fn make_lab_disk(lab: &Lab) -> Result<()> {
    let modules = Kernel::open(&Layout::of_this_user().kernel_tree())?.modules()?;
    let path = modules.closure(&["brd"]).pop().context("No module brd")?;
    lab.write("/tmp/brd.ko", modules.read(&path)?)?;
    let script = format!(
        "insmod /tmp/brd.ko rd_nr=1 rd_size={} && \
         dd if=/dev/urandom of={LAB_DISK} bs=1M count={DISK_MIB} oflag=direct status=none",
        DISK_MIB << 10
    );
    let output = lab.run(&lab::Command::script(script))?;
    ensure!(output.success(), "{}", output.stderr.trim());
    Ok(())
}

/// Boots a VMM and takes the outcomes of its guest's loads. Runs where the VMM does.
///
/// # Errors
/// The VMM does not start, or a load fails.
pub fn loads(launch: &Launch, loads: usize) -> Result<Vec<Sample>> {
    let mut guest = Guest::start(launch)?;
    let mut samples = Vec::new();
    for number in 0..loads {
        guest.wait_for(format!("LOAD-BEGIN-{number}.").as_bytes(), TIMEOUT)?;
        let before = device_cpu(guest.pid())?;
        let line = guest.line_after(&format!("LOAD-END-{number}."), TIMEOUT)?;
        let cpu = device_cpu(guest.pid())? - before;
        samples.push(sample(&line, cpu).with_context(|| format!("The guest said: {line}"))?);
    }
    Ok(samples)
}

/// What a guest's line tells: interrupts, and the outcome.
fn sample(line: &str, cpu: f64) -> Result<Sample> {
    let (interrupts, outcome) = line.trim().split_once(' ').context("Too few words")?;
    let outcome: Outcome = serde_json::from_str(outcome)?;
    let count = outcome.iops * outcome.seconds;
    Ok(Sample {
        iops: outcome.iops,
        cpu: cpu * 1e6 / count,
        interrupts: Some(interrupts.parse::<f64>()? / count),
        latency: Some(outcome.latency),
    })
}

/// CPU time in seconds of the threads of a VMM that run no vCPU.
fn device_cpu(pid: i32) -> Result<f64> {
    let mut seconds = 0.0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        let read = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        if is_vcpu(&read("comm")) {
            continue;
        }
        let schedstat = read("schedstat");
        let nanos = schedstat.split(' ').next().map(str::parse::<f64>);
        seconds += nanos.and_then(Result::ok).unwrap_or(0.0) / 1e9;
    }
    Ok(seconds)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_guest_tells_how_a_load_went() {
        let said = concat!(
            r#"500 {"seconds":0.5,"iops":2000.0,"cpu":3.0,"interrupts":0.0,"#,
            r#""latency":[400.0,500.0,600.0]}"#,
        );
        let line = Guest::start(&Launch {
            program: "sh".into(),
            arguments: vec![
                "-c".into(),
                format!("echo LOAD-BEGIN-0.; echo 'LOAD-END-0. {said}'; sleep 100"),
            ],
        })
        .unwrap()
        .line_after("LOAD-END-0.", Duration::from_secs(30))
        .unwrap();
        let sample = sample(&line, 0.002).unwrap();
        assert!((sample.cpu - 2.0).abs() < 1e-6, "{sample:?}");
        assert!(
            (sample.interrupts.unwrap() - 0.5).abs() < 1e-6,
            "{sample:?}"
        );
        assert!(super::sample("5", 0.0).is_err());
    }
}
