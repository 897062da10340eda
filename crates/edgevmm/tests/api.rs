//! Commands on a machine whose API is served by the test.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::pin::Pin;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use edgevmm_api::v1::machine_server::{Machine, MachineServer};
use edgevmm_api::v1::{self, console_request, console_response};
use edgevmm_api::{ExitReason, ExitRecord, MachineClaim, RuntimeDir};
use edgevmm_config::VmConfig;
use nix::sys::termios::{LocalFlags, tcgetattr};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Request, Response, Status, Streaming};

/// A machine that does nothing but remember what it was asked.
#[derive(Debug, Clone)]
struct Scripted {
    calls: Arc<Mutex<Vec<String>>>,
    claim: Arc<Mutex<Option<MachineClaim>>>,
    end: watch::Sender<Option<ExitRecord>>,
    /// What it takes to end when killed.
    flush: Arc<Mutex<Duration>>,
    /// It runs in the foreground, so that nothing of it is left.
    foreground: Arc<AtomicBool>,
}

impl Scripted {
    fn called(&self, call: impl Into<String>) {
        self.calls.lock().unwrap().push(call.into());
    }

    /// Ends as a VMM does: word is left, and the lock goes. No further call is taken.
    fn finish(&self, reason: ExitReason) {
        let record = ExitRecord::now(reason, "");
        let claim = self.claim.lock().unwrap().take().unwrap();
        claim.open_exit().unwrap().write(&record).unwrap();
        if self.foreground.load(Ordering::Relaxed) {
            claim.remove().unwrap();
        }
        self.end.send_replace(Some(record));
    }
}

type ConsoleStream = Pin<Box<dyn Stream<Item = Result<v1::ConsoleResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Machine for Scripted {
    type ConsoleStream = ConsoleStream;

    async fn get_version(
        &self,
        _: Request<v1::GetVersionRequest>,
    ) -> Result<Response<v1::GetVersionResponse>, Status> {
        Ok(Response::new(v1::GetVersionResponse {
            version: "0.0.0".into(),
        }))
    }

    async fn inspect(
        &self,
        _: Request<v1::InspectRequest>,
    ) -> Result<Response<v1::InspectResponse>, Status> {
        Ok(Response::new(v1::InspectResponse {
            state: v1::State::Paused.into(),
            uptime: Some(prost_types::Duration {
                seconds: 3700,
                nanos: 0,
            }),
            resets: 2,
            reason: "disk0: full".into(),
            ..Default::default()
        }))
    }

    async fn pause(
        &self,
        _: Request<v1::PauseRequest>,
    ) -> Result<Response<v1::PauseResponse>, Status> {
        self.called("pause");
        Ok(Response::new(v1::PauseResponse {}))
    }

    async fn resume(
        &self,
        _: Request<v1::ResumeRequest>,
    ) -> Result<Response<v1::ResumeResponse>, Status> {
        Err(Status::failed_precondition("The machine is running"))
    }

    async fn reset(
        &self,
        _: Request<v1::ResetRequest>,
    ) -> Result<Response<v1::ResetResponse>, Status> {
        self.called("reset");
        Ok(Response::new(v1::ResetResponse {}))
    }

    async fn resize_disk(
        &self,
        request: Request<v1::ResizeDiskRequest>,
    ) -> Result<Response<v1::ResizeDiskResponse>, Status> {
        let v1::ResizeDiskRequest { disk, size } = request.into_inner();
        if disk != "disk0" {
            return Err(Status::not_found(format!("there is no disk {disk:?}")));
        }
        self.called(format!("resize {size}"));
        Ok(Response::new(v1::ResizeDiskResponse {}))
    }

    async fn change_medium(
        &self,
        request: Request<v1::ChangeMediumRequest>,
    ) -> Result<Response<v1::ChangeMediumResponse>, Status> {
        let v1::ChangeMediumRequest {
            drive,
            path,
            force,
            file,
        } = request.into_inner();
        let path = path.rsplit('/').next().unwrap_or_default();
        if path == "locked" && !force {
            return Err(Status::failed_precondition("the guest has locked it"));
        }
        self.called(format!("medium {drive} {path:?} {force} {file}"));
        Ok(Response::new(v1::ChangeMediumResponse {}))
    }

    async fn stop(
        &self,
        request: Request<v1::StopRequest>,
    ) -> Result<Response<v1::StopResponse>, Status> {
        let timeout = request.into_inner().timeout;
        self.called(format!("stop {:?}", timeout.map(|timeout| timeout.seconds)));
        let in_time = timeout.is_none();
        self.finish(if in_time {
            ExitReason::PowerOff
        } else {
            ExitReason::StopTimeout
        });
        Ok(Response::new(v1::StopResponse { timeout }))
    }

    async fn get_memory(
        &self,
        _: Request<v1::GetMemoryRequest>,
    ) -> Result<Response<v1::GetMemoryResponse>, Status> {
        Ok(Response::new(v1::GetMemoryResponse {
            size: 1 << 30,
            target: 1 << 29,
            resident: 1 << 20,
            ..v1::GetMemoryResponse::default()
        }))
    }

    async fn set_memory_target(
        &self,
        request: Request<v1::SetMemoryTargetRequest>,
    ) -> Result<Response<v1::SetMemoryTargetResponse>, Status> {
        let target = request.into_inner().target;
        if target > 1 << 30 {
            return Err(Status::invalid_argument("it has no more"));
        }
        self.called(format!("target {target}"));
        Ok(Response::new(v1::SetMemoryTargetResponse {}))
    }

    async fn kill(
        &self,
        _: Request<v1::KillRequest>,
    ) -> Result<Response<v1::KillResponse>, Status> {
        self.called("kill");
        // Nothing else is answered meanwhile.
        std::thread::sleep(*self.flush.lock().unwrap());
        self.finish(ExitReason::Killed);
        Ok(Response::new(v1::KillResponse {}))
    }

    async fn wait(
        &self,
        _: Request<v1::WaitRequest>,
    ) -> Result<Response<v1::WaitResponse>, Status> {
        let mut end = self.end.subscribe();
        let exit = end.wait_for(Option::is_some).await.unwrap().clone();
        Ok(Response::new(v1::WaitResponse {
            exit: exit.map(Into::into),
        }))
    }

    /// Sends a history, echoes input and ends at a Q.
    async fn console(
        &self,
        request: Request<Streaming<v1::ConsoleRequest>>,
    ) -> Result<Response<ConsoleStream>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?.and_then(|request| request.kind);
        let Some(console_request::Kind::Open(open)) = first else {
            panic!("{first:?}")
        };
        self.called(format!("console {:?} {:?}", open.access(), open.history));
        if open.access() == v1::ConsoleAccess::Shared && open.history == Some(7) {
            return Err(Status::failed_precondition("another client has it"));
        }
        let (sender, receiver) = mpsc::channel(4);
        let send = async move |kind| {
            sender
                .send(Ok(v1::ConsoleResponse { kind: Some(kind) }))
                .await
        };
        tokio::spawn(async move {
            send(console_response::Kind::History(b"history,".to_vec()))
                .await
                .unwrap();
            send(console_response::Kind::Dropped(5)).await.unwrap();
            while let Ok(Some(request)) = requests.message().await {
                let Some(console_request::Kind::Input(bytes)) = request.kind else {
                    continue;
                };
                let quit = bytes.contains(&b'Q');
                send(console_response::Kind::Output(bytes)).await.unwrap();
                if quit {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

/// Numbers files that are handed over, from 1.
fn take_files(listener: std::os::unix::net::UnixListener) {
    std::thread::spawn(move || {
        let mut clients = Vec::new();
        for number in 1_u64.. {
            let (mut client, _) = listener.accept().unwrap();
            edgevmm_api::files::receive(client.as_fd()).unwrap();
            client.write_all(&number.to_le_bytes()).unwrap();
            clients.push(client);
        }
    });
}

/// A runtime folder with a served machine named vm.
struct Bench {
    folder: tempfile::TempDir,
    machine: Scripted,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let claim = RuntimeDir::new(folder.path()).claim("vm").unwrap();
        claim
            .write_config(&serde_json::to_string(&VmConfig::default()).unwrap())
            .unwrap();
        let (socket, files) = (claim.dir().socket(), claim.dir().files_socket());
        take_files(std::os::unix::net::UnixListener::bind(files).unwrap());
        let claim = Arc::new(Mutex::new(Some(claim)));
        let machine = Scripted {
            calls: Arc::default(),
            claim,
            end: watch::Sender::new(None),
            flush: Arc::default(),
            foreground: Arc::default(),
        };
        let listener = std::os::unix::net::UnixListener::bind(socket).unwrap();
        listener.set_nonblocking(true).unwrap();
        let service = MachineServer::new(machine.clone());
        let mut end = machine.end.subscribe();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let incoming = UnixListenerStream::new(UnixListener::from_std(listener).unwrap());
                let server = tonic::transport::Server::builder().add_service(service);
                let ended = async move { drop(end.wait_for(Option::is_some).await) };
                let served = server.serve_with_incoming_shutdown(incoming, ended);
                served.await.unwrap();
            });
        });
        Self { folder, machine }
    }

    fn command(&self, args: &[&str]) -> Command {
        command(self.folder.path(), args)
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).stdin(Stdio::null()).output().unwrap()
    }

    fn type_in(&self, args: &[&str], input: &[u8]) -> Output {
        let mut command = self.command(args);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        child.wait_with_output().unwrap()
    }

    fn calls(&self) -> Vec<String> {
        self.machine.calls.lock().unwrap().clone()
    }
}

fn command(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_edgevmm"));
    command
        .args(args)
        .env("EDGEVMM_RUNTIME_DIR", folder)
        .env_remove("EDGEVMM_LOG");
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn machines_are_listed_and_described() {
    let bench = Bench::new();
    let list = text(&bench.run(&["ps"]).stdout);
    let row: Vec<_> = list.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(
        (row[0], row[1], row[3], row[5], row[6..].join(" ").as_str()),
        ("vm", "paused", "1h1m", "1G", "disk0: full")
    );
    let json: serde_json::Value =
        serde_json::from_slice(&bench.run(&["inspect", "--json", "vm"]).stdout).unwrap();
    assert_eq!(
        (json["resets"].as_u64(), json["uptime_seconds"].as_i64()),
        (Some(2), Some(3700))
    );
    assert_eq!(json["reason"], "disk0: full");
    assert_eq!(json["config"]["memory"]["size"], "1G");
    assert_eq!(json["pid"].as_u64(), Some(std::process::id().into()));
}

#[test]
fn calls_arrive_and_refusals_are_told() {
    let bench = Bench::new();
    assert_eq!(text(&bench.run(&["pause", "vm"]).stdout), "vm\n");
    assert!(bench.run(&["reset", "vm"]).status.success());
    let refused = bench.run(&["resume", "vm"]);
    assert_eq!(refused.status.code(), Some(1));
    assert_eq!(
        text(&refused.stderr),
        "edgevmm: Can't resume vm: The machine is running\n"
    );
    assert!(
        bench
            .run(&["resize-disk", "vm", "disk0", "2G"])
            .status
            .success()
    );
    let refused = bench.run(&["resize-disk", "vm", "disk7", "2G"]);
    assert_eq!(refused.status.code(), Some(2));
    assert_eq!(
        text(&refused.stderr),
        "edgevmm: Can't resize a disk of vm: there is no disk \"disk7\"\n"
    );
    assert_eq!(bench.calls(), ["pause", "reset", "resize 2147483648"]);
}

#[test]
fn discs_are_changed() {
    let bench = Bench::new();
    let image = |name: &str| {
        let path = bench.folder.path().join(name);
        std::fs::write(&path, "content").unwrap();
        path.into_os_string().into_string().unwrap()
    };
    let (disc, locked) = (image("a.iso"), image("locked"));
    for args in [
        &["media", "vm", "cdrom0", &disc][..],
        &["media", "vm", "cdrom1", "--eject"],
        &["media", "vm", "cdrom0", &locked, "--force"],
    ] {
        assert!(bench.run(args).status.success(), "{args:?}");
    }
    let refused = bench.run(&["media", "vm", "cdrom0", &locked]);
    let text = String::from_utf8_lossy(&refused.stderr);
    assert!(
        text.contains("Can't change the medium of vm: the guest has locked it"),
        "{text}"
    );
    let wrong = bench.run(&["media", "vm", "cdrom0", "/a.iso", "--eject"]);
    assert_eq!(wrong.status.code(), Some(2));
    assert_eq!(
        bench.calls(),
        [
            "medium cdrom0 \"a.iso\" false 1",
            "medium cdrom1 \"\" false 0",
            "medium cdrom0 \"locked\" true 2"
        ]
    );
}

#[test]
fn one_failure_does_not_stop_the_others() {
    let bench = Bench::new();
    let output = bench.run(&["pause", "nobody", "vm"]);
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(text(&output.stdout), "vm\n");
    assert!(text(&output.stderr).contains("nobody"));
}

#[test]
fn a_stop_waits_for_the_end() {
    let bench = Bench::new();
    let output = bench.run(&["stop", "vm"]);
    assert_eq!(
        (output.status.code(), text(&output.stdout).as_str()),
        (Some(0), "vm\n")
    );
    assert_eq!(bench.calls(), ["stop None"]);
    let again = bench.run(&["stop", "vm"]);
    assert_eq!(again.status.code(), Some(2));
    assert!(text(&again.stderr).contains("Machine vm has ended"));
    assert_eq!(text(&bench.run(&["wait", "vm"]).stdout), "powered off\n");
}

#[test]
fn a_stop_hears_of_the_end_of_a_machine_that_leaves_nothing() {
    // A stop that came too late to hear of it would now and then still make it.
    for _ in 0..10 {
        let bench = Bench::new();
        bench.machine.foreground.store(true, Ordering::Relaxed);
        let output = bench.run(&["stop", "vm"]);
        assert_eq!(
            (output.status.code(), text(&output.stderr).as_str()),
            (Some(0), "")
        );
    }
}

#[test]
fn a_stop_that_takes_too_long_is_told() {
    let bench = Bench::new();
    let output = bench.run(&["stop", "--timeout", "9", "vm"]);
    assert_eq!(output.status.code(), Some(4));
    assert!(text(&output.stderr).contains("did not power off in time"));
    assert_eq!(bench.calls(), ["stop Some(9)"]);
}

#[test]
fn a_wait_ends_with_the_machine() {
    let bench = Bench::new();
    let mut command = bench.command(&["wait", "vm"]);
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    assert!(bench.run(&["kill", "vm"]).status.success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(
        (output.status.code(), text(&output.stdout).as_str()),
        (Some(4), "killed\n")
    );
}

#[test]
fn memory_is_shown_and_taken() {
    let bench = Bench::new();
    let output = bench.run(&["memory", "vm"]);
    assert!(output.status.success());
    assert!(
        String::from_utf8_lossy(&output.stdout).contains("1024.0 MiB"),
        "{output:?}"
    );
    assert!(
        bench
            .run(&["memory", "vm", "--target", "512M"])
            .status
            .success()
    );
    assert_eq!(bench.calls(), ["target 536870912"]);
    let output = bench.run(&["memory", "vm", "--target", "2G"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("it has no more"));
}

#[test]
fn a_kill_lets_the_last_flush_finish() {
    let bench = Bench::new();
    *bench.machine.flush.lock().unwrap() = Duration::from_secs(8);
    let output = bench.run(&["kill", "vm"]);
    let message = text(&output.stderr);
    assert!(output.status.success(), "{message}");
    assert_eq!(
        message,
        "edgevmm: waiting for vm to write to its disks what is not there yet\n"
    );
    assert!(bench.machine.end.borrow().is_some());
}

#[test]
fn rm_with_force_ends_first() {
    let bench = Bench::new();
    assert_eq!(bench.run(&["rm", "vm"]).status.code(), Some(2));
    assert!(bench.run(&["rm", "-f", "vm"]).status.success());
    assert_eq!(bench.calls(), ["kill"]);
    assert!(!bench.folder.path().join("vm").exists());
}

#[test]
fn a_console_shows_history_and_echo() {
    let bench = Bench::new();
    // Ctrl-A is no command when it doesn't come from a terminal.
    let output = bench.type_in(&["console", "vm"], b"ab\x01xQ");
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(output.stdout, b"history,ab\x01xQ");
    let errors = text(&output.stderr);
    assert!(
        errors.contains("5 bytes of output were lost") && errors.contains("has ended"),
        "{errors}"
    );
    assert_eq!(bench.calls(), ["console Shared None"]);
}

#[test]
fn a_console_that_is_taken_is_told() {
    let bench = Bench::new();
    let output = bench.type_in(&["console", "--history", "7", "vm"], b"");
    assert_eq!(output.status.code(), Some(1));
    let errors = text(&output.stderr);
    assert!(
        errors.contains("another client has it") && errors.contains("--exclusive"),
        "{errors}"
    );
    let output = bench.type_in(&["console", "--exclusive", "--history", "4K", "vm"], b"Q");
    assert!(output.status.success());
    assert_eq!(bench.calls()[1], "console Exclusive Some(4096)");
}

#[test]
fn a_terminal_is_raw_until_one_detaches() {
    let bench = Bench::new();
    let pty = nix::pty::openpty(None, None).unwrap();
    let mode = || tcgetattr(&pty.slave).unwrap().local_flags;
    let before = mode();
    let mut command = bench.command(&["console", "vm"]);
    command
        .stdin(pty.slave.try_clone().unwrap())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; b"history,".len()]).unwrap();
    assert!(!mode().intersects(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG));
    let mut keyboard = std::fs::File::from(pty.master);
    keyboard.write_all(b"ab\x03").unwrap();
    let mut echo = [0; 3];
    stdout.read_exact(&mut echo).unwrap();
    assert_eq!(&echo, b"ab\x03");
    keyboard.write_all(b"\x01").unwrap();
    keyboard.write_all(b"x").unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(mode(), before);
    assert!(text(&output.stderr).ends_with("[detached from vm]\n"));
    assert!(bench.machine.claim.lock().unwrap().is_some());
}
