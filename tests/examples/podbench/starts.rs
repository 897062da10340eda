//! How long pods and containers take to their first output.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use edgevmm_e2e::{Cluster, Host};
use xtask::bench::pods::Starts;

/// The image with the machine's payload.
pub(crate) const PAYLOAD: &str = "local.test/payload:1";
/// The image of ordinary containers.
const BUSYBOX: &str = "local.test/busybox:1";

/// Guests' RAM in MiB.
pub(crate) const RAM_MIB: u64 = 64;
/// Limit of memory of machines and containers.
const LIMIT_MIB: u64 = 96;
/// Where the kubelet has containers' output.
const LOGS: &str = "/var/log/pods";
/// Longer than any start takes.
const PATIENCE: Duration = Duration::from_secs(120);
/// How exactly the time of a container's output is seen.
const LOOK: Duration = Duration::from_micros(200);

/// What an ordinary container does: the same as the payload.
const SCRIPT: &str = "echo '!'; exec /bin/busybox sleep 1000000";

pub(crate) fn named(by: &str) -> Starts {
    Starts {
        by: by.to_owned(),
        ..Starts::default()
    }
}

/// A pod.
#[derive(Debug)]
pub(crate) struct Pod {
    pub(crate) name: String,
    pub(crate) machine: bool,
}

impl Pod {
    fn object(&self) -> String {
        let (annotations, class, image, command) = if self.machine {
            let annotations =
                format!("{{edgevmm.io/kernel: /boot/payload, edgevmm.io/memory: \"{RAM_MIB}M\"}}");
            let class = "runtimeClassName: edgevmm";
            (annotations, class, PAYLOAD, "[boot]".to_owned())
        } else {
            let command = format!("[/bin/busybox, sh, -c, \"{SCRIPT}\"]");
            ("{}".to_owned(), "", BUSYBOX, command)
        };
        format!(
            "---
apiVersion: v1
kind: Pod
metadata:
  name: {}
  annotations: {annotations}
spec:
  {class}
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 0
  containers:
  - name: main
    image: {image}
    imagePullPolicy: Never
    command: {command}
    resources: {{limits: {{memory: {LIMIT_MIB}Mi, cpu: 1}}, requests: {{memory: 32Mi, cpu: 10m}}}}
",
            self.name
        )
    }

    /// Its output, once there is some.
    fn log(&self) -> Option<String> {
        let prefix = format!("default_{}_", self.name);
        let folder = fs::read_dir(LOGS).ok()?.flatten().find(|entry| {
            let name = entry.file_name();
            name.to_str().is_some_and(|name| name.starts_with(&prefix))
        })?;
        let text = fs::read_to_string(folder.path().join("main/0.log")).ok()?;
        text.contains('\n').then_some(text)
    }

    fn wait(&self) -> Result<String> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(log) = self.log() {
                return Ok(log);
            }
            thread::sleep(Duration::from_millis(20));
        }
        bail!("The pod {} does not start", self.name)
    }

    /// Starts it; the time from the call of `kubectl` to its first output, as containerd notes that,
    /// in ms.
    pub(crate) fn start(&self, host: &Host, cluster: &Cluster<'_>) -> Result<f64> {
        let file = host.write("pod.yaml", &self.object())?;
        let apply = cluster.kubectl(["apply", "-f", &file]);
        let called = second_of_day(SystemTime::now())?;
        host.ok(&apply)?;
        let log = self.wait().inspect_err(|_| {
            let _ = host.run(&cluster.kubectl(["describe", "pod", &self.name]));
        })?;
        let written = time_of(&log).with_context(|| format!("There is no time in {log}"))?;
        // Across midnight, too.
        Ok((written - called).rem_euclid(86400.0) * 1e3)
    }
}

/// Starts pods at once and waits for all.
pub(crate) fn start_all(host: &Host, cluster: &Cluster<'_>, pods: &[Pod]) -> Result<()> {
    let objects: String = pods.iter().map(Pod::object).collect();
    cluster.apply(&objects)?;
    pods.iter().try_for_each(|pod| {
        pod.wait().map(drop).inspect_err(|_| {
            let _ = host.run(&cluster.kubectl(["describe", "pod", &pod.name]));
        })
    })
}

/// Containers without a kubelet, in turns: from the call of `ctr run` to the first output.
pub(crate) fn by_ctr(host: &Host, cluster: &Cluster<'_>, rounds: usize) -> Result<Starts> {
    let mut starts = named("ctr run");
    let limit = (LIMIT_MIB << 20).to_string();
    let memory = format!("edgevmm.io/memory={RAM_MIB}M");
    let machine = [
        "run",
        "--runtime",
        "io.containerd.edgevmm.v1",
        "--annotation",
        "edgevmm.io/kernel=/boot/payload",
        "--annotation",
        &memory,
    ];
    let ordinary = ["run", "--runtime", "io.containerd.runc.v2"];
    for round in 0..rounds {
        let first = round % 2 == 0;
        for is_machine in [first, !first] {
            let name = format!("c{round}-{is_machine}");
            let file = PathBuf::from(host.path(&format!("{name}.log")));
            let uri = format!("file://{}", file.display());
            let common = ["--detach", "--log-uri", &uri, "--memory-limit", &limit];
            let (kind, image, program): (&[&str], _, &[&str]) = if is_machine {
                (&machine, PAYLOAD, &[])
            } else {
                let program = &["/bin/busybox", "sh", "-c", SCRIPT];
                (&ordinary, BUSYBOX, program)
            };
            let parts = [kind, &common, &[image, &name], program].concat();
            let run = cluster.node.ctr(parts);
            let called = Instant::now();
            let watcher = thread::spawn(move || first_output(&file));
            host.ok(&run)?;
            let written = watcher.join().ok().flatten();
            let written = written.with_context(|| format!("{name} does not start"))?;
            let time = written.duration_since(called).as_secs_f64() * 1e3;
            if is_machine {
                starts.machines.push(time);
            } else {
                starts.ordinary.push(time);
            }
            host.ok(&cluster.node.ctr(["tasks", "rm", "--force", &name]))?;
            host.ok(&cluster.node.ctr(["containers", "rm", &name]))?;
        }
    }
    Ok(starts)
}

fn first_output(file: &Path) -> Option<Instant> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if fs::metadata(file).is_ok_and(|file| file.len() > 0) {
            return Some(Instant::now());
        }
        thread::sleep(LOOK);
    }
    None
}

fn second_of_day(time: SystemTime) -> Result<f64> {
    let since = time.duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64();
    Ok(since.rem_euclid(86400.0))
}

/// The second of the day of a line as `2026-01-31T09:08:07.123456789Z stdout F text`, where its
/// offset from UTC, if not Z, is the machine's.
fn time_of(log: &str) -> Option<f64> {
    let stamp = log.split(' ').next()?;
    let (_, time) = stamp.split_once('T')?;
    let (time, offset) = match time.find(['Z', '+', '-']) {
        Some(at) => (time.get(..at)?, time.get(at..)?),
        None => (time, "Z"),
    };
    let seconds = |text: &str| -> Option<f64> {
        text.split(':').try_fold(0.0, |sum, part| {
            Some(sum * 60.0 + part.parse::<f64>().ok()?)
        })
    };
    let ahead = match offset.split_at_checked(1)? {
        ("+", rest) => seconds(rest)? * 60.0,
        ("-", rest) => -seconds(rest)? * 60.0,
        _ => 0.0,
    };
    Some((seconds(time)? - ahead).rem_euclid(86400.0))
}
