//! L1 as a QEMU process: its command line, its sockets, its end.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tempfile::TempDir;

use super::protocol::PORT;
use super::qmp::Qmp;
use super::setup::Layout;

/// `mitigations=off … nmi_watchdog=0` save time under emulation; `lpj` and `tsc` skip calibrations
/// that emulation gets wrong on a busy host; `panic=-1` with `-no-reboot` ends QEMU on a panic.
const KERNEL_COMMAND_LINE: &str = "console=ttyS0,115200 quiet loglevel=4 mitigations=off nokaslr \
     tsc=reliable lpj=4000000 random.trust_cpu=1 audit=0 selinux=0 apparmor=0 nmi_watchdog=0 \
     net.ifnames=0 panic=-1";

/// The begin of the name of each running machine's directory; the process id follows.
const RUN_PREFIX: &str = "edgevmm-lab-";

/// The shape of an L1. A snapshot can only be resumed by the very same shape.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Number of vCPUs.
    pub cpus: u8,
    /// RAM in MiB.
    pub memory_mib: u32,
    /// Further virtio disks (`/dev/vdb` …), each as `-drive` of QEMU takes it, such as
    /// `file=PATH,format=raw`.
    pub drives: Vec<String>,
}

impl Default for Machine {
    fn default() -> Self {
        Self {
            cpus: 4,
            memory_mib: 4096,
            drives: Vec::new(),
        }
    }
}

/// How an L1 starts.
#[derive(Debug, Clone, Copy)]
pub(super) enum Start<'a> {
    /// From its kernel.
    Cold,
    /// From its kernel, with its RAM in this file.
    Recorded(&'a Path),
    /// From the snapshot in this directory.
    Resumed(&'a Path),
}

/// A running QEMU. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Vm {
    dir: TempDir,
    ended: Arc<AtomicBool>,
    keeper: Option<(mpsc::Sender<()>, thread::JoinHandle<()>)>,
}

impl Vm {
    pub(super) fn spawn(
        layout: &Layout,
        machine: &Machine,
        start: Start<'_>,
        share: &Path,
    ) -> Result<Self> {
        remove_stale_runs();
        fs::create_dir_all(share).with_context(|| format!("Cannot make {}", share.display()))?;
        let dir = tempfile::Builder::new()
            .prefix(&format!("{RUN_PREFIX}{}-", std::process::id()))
            .tempdir()
            .context("Cannot make a directory for the machine")?;
        let mut command = layout.qemu();
        configure(&mut command, layout, machine, start, share, dir.path());
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(File::create(dir.path().join("stderr"))?);
        let ended = Arc::new(AtomicBool::new(false));
        let keeper = keep(command, Arc::clone(&ended), dir.path())?;
        Ok(Self {
            dir,
            ended,
            keeper: Some(keeper),
        })
    }

    /// Connects to one of the machine's sockets, which appear soon after its start.
    pub(super) fn connect(&self, socket: &str) -> Result<UnixStream> {
        let path = self.dir.path().join(socket);
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            match UnixStream::connect(&path) {
                Ok(stream) => return Ok(stream),
                Err(_) if Instant::now() < deadline && !self.has_ended() => {
                    thread::sleep(Duration::from_millis(5));
                }
                Err(error) => return Err(error).context(self.explain("QEMU does not answer")),
            }
        }
    }

    pub(super) fn qmp(&self) -> Result<Qmp> {
        Qmp::new(self.connect("qmp")?).with_context(|| self.explain("QEMU does not answer"))
    }

    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// `what` with the last words of L1 and of QEMU.
    pub(super) fn explain(&self, what: &str) -> String {
        let tail = |name: &str| {
            let bytes = fs::read(self.dir.path().join(name)).unwrap_or_default();
            let start = bytes.len().saturating_sub(1500);
            String::from_utf8_lossy(&bytes[start..]).into_owned()
        };
        format!(
            "{what}. QEMU said:\n{}\nL1's console said:\n{}",
            tail("stderr"),
            tail("console")
        )
    }

    /// Why the machine ended, once its connections are gone.
    pub(super) fn last_words(&self) -> String {
        let deadline = Instant::now() + Duration::from_secs(2);
        while !self.has_ended() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
        self.explain("The machine ended")
    }

    /// Whether L1's kernel said that it cannot go on.
    pub(super) fn has_panicked(&self) -> bool {
        let console = fs::read(self.dir.path().join("console")).unwrap_or_default();
        String::from_utf8_lossy(&console).contains("Kernel panic")
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if let Some((stop, keeper)) = self.keeper.take() {
            drop(stop);
            let _ = keeper.join();
        }
    }
}

/// Starts QEMU in a thread of its own that lives as long as QEMU does.
///
/// QEMU asks the kernel to end it when the *thread* that started it ends, so that it never outlives
/// this process; a test's thread, which may end earlier, must therefore not be the one.
fn keep(
    mut command: Command,
    ended: Arc<AtomicBool>,
    dir: &Path,
) -> Result<(mpsc::Sender<()>, thread::JoinHandle<()>)> {
    // SAFETY: prctl is async-signal-safe and PR_SET_PDEATHSIG takes a plain number.
    unsafe {
        command.pre_exec(|| {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let (stop, stopped) = mpsc::channel::<()>();
    let (started, has_started) = mpsc::channel();
    let status_file = dir.join("status");
    let keeper = thread::spawn(move || {
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) => return drop(started.send(Err(error))),
        };
        let _ = started.send(Ok(()));
        if let Some(status) = watch(&mut child, &stopped) {
            let _ = fs::write(status_file, format!("QEMU ended by itself: {status}"));
        }
        ended.store(true, Ordering::Release);
    });
    has_started
        .recv()
        .context("The machine's thread ended")?
        .context("Cannot start QEMU")?;
    Ok((stop, keeper))
}

/// Waits for QEMU's end; its status, when nobody asked for it.
fn watch(child: &mut Child, stopped: &mpsc::Receiver<()>) -> Option<ExitStatus> {
    loop {
        match stopped.recv_timeout(Duration::from_millis(20)) {
            Err(mpsc::RecvTimeoutError::Timeout) => match child.try_wait() {
                Ok(None) => {}
                Ok(status) => return status,
                Err(_) => return None,
            },
            _ => {
                let _ = child.kill();
                let _ = child.wait();
                return None;
            }
        }
    }
}

fn configure(
    command: &mut Command,
    layout: &Layout,
    machine: &Machine,
    start: Start<'_>,
    share: &Path,
    dir: &Path,
) {
    let memory = match start {
        Start::Cold => format!("memory-backend-ram,id=ram,size={}M", machine.memory_mib),
        Start::Recorded(ram) => memory_file(machine, ram, "on"),
        Start::Resumed(snapshot) => memory_file(machine, &snapshot.join("ram"), "off"),
    };
    let socket = |name: &str| escaped(&dir.join(name));
    let root = escaped(&layout.root_image());
    let share = escaped(share);
    let options: Vec<(&str, String)> = vec![
        ("-object", memory),
        ("-M", "q35,memory-backend=ram".into()),
        ("-cpu", "max,la57=off".into()),
        ("-smp", machine.cpus.to_string()),
        ("-m", format!("{}M", machine.memory_mib)),
        ("-accel", "tcg,thread=multi,tb-size=512".into()),
        ("-display", "none".into()),
        ("-serial", format!("file:{}", socket("console"))),
        ("-qmp", format!("unix:{},server=on,wait=off", socket("qmp"))),
        (
            "-drive",
            format!("file={root},if=none,id=root,format=raw,readonly=on,file.locking=off"),
        ),
        ("-device", "virtio-blk-pci,drive=root".into()),
        ("-device", "virtio-serial-pci".into()),
        (
            "-chardev",
            format!(
                "socket,id=agent,path={},server=on,wait=off",
                socket("agent")
            ),
        ),
        (
            "-device",
            format!("virtserialport,chardev=agent,name={PORT}"),
        ),
        (
            "-fsdev",
            "local,id=host,path=/,security_model=none,multidevs=remap,readonly=on".into(),
        ),
        ("-device", "virtio-9p-pci,fsdev=host,mount_tag=host".into()),
        (
            "-fsdev",
            format!("local,id=share,path={share},security_model=none,multidevs=remap"),
        ),
        (
            "-device",
            "virtio-9p-pci,fsdev=share,mount_tag=share".into(),
        ),
        ("-netdev", "user,id=net".into()),
        ("-device", "virtio-net-pci,netdev=net,romfile=".into()),
        ("-device", "virtio-rng-pci".into()),
        ("-kernel", layout.kernel().display().to_string()),
        ("-initrd", layout.initrd().display().to_string()),
        ("-append", KERNEL_COMMAND_LINE.into()),
    ];
    command.args(["-nodefaults", "-no-user-config", "-no-reboot"]);
    for (option, value) in options {
        command.arg(option).arg(value);
    }
    for (index, drive) in machine.drives.iter().enumerate() {
        command
            .arg("-drive")
            .arg(format!("{drive},if=none,id=extra{index}"));
        command
            .arg("-device")
            .arg(format!("virtio-blk-pci,drive=extra{index}"));
    }
    if let Start::Resumed(_) = start {
        command.args(["-incoming", "defer"]);
    }
}

fn memory_file(machine: &Machine, path: &Path, share: &str) -> String {
    let (size, path) = (machine.memory_mib, escaped(path));
    format!("memory-backend-file,id=ram,size={size}M,mem-path={path},share={share}")
}

/// A path inside an option of QEMU, where a comma separates.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// Saves the device state of a machine whose RAM is [`Start::Recorded`] already.
pub(super) fn save(qmp: &mut Qmp, state: &Path) -> Result<()> {
    qmp.execute("stop", &json!({}))?;
    leave_ram_alone(qmp)?;
    qmp.execute(
        "migrate",
        &json!({ "uri": format!("file:{}", state.display()) }),
    )?;
    wait_for_migration(qmp)
}

/// Loads the device state of a snapshot into a [`Start::Resumed`] machine and lets it go on.
pub(super) fn resume(qmp: &mut Qmp, state: &Path) -> Result<()> {
    leave_ram_alone(qmp)?;
    qmp.execute(
        "migrate-incoming",
        &json!({ "uri": format!("file:{}", state.display()) }),
    )?;
    wait_for_migration(qmp)?;
    qmp.execute("cont", &json!({})).map(drop)
}

/// RAM is in a file already: a migration need not carry it.
fn leave_ram_alone(qmp: &mut Qmp) -> Result<()> {
    let capability = json!({ "capability": "x-ignore-shared", "state": true });
    qmp.execute(
        "migrate-set-capabilities",
        &json!({ "capabilities": [capability] }),
    )
    .map(drop)
}

fn wait_for_migration(qmp: &mut Qmp) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let answer = qmp.execute("query-migrate", &json!({}))?;
        match answer["status"].as_str() {
            Some("completed") => return Ok(()),
            Some("failed") => bail!("Migration failed: {answer}"),
            _ if Instant::now() > deadline => bail!("Migration does not end: {answer}"),
            _ => thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// Removes what machines of processes left behind that were killed.
fn remove_stale_runs() {
    let Ok(entries) = fs::read_dir(std::env::temp_dir()) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let owner = name
            .to_str()
            .and_then(|name| name.strip_prefix(RUN_PREFIX)?.split('-').next());
        if owner.is_some_and(|pid| !PathBuf::from("/proc").join(pid).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
