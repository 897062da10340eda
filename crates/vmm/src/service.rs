//! The gRPC API of one machine, on a Unix socket in its runtime folder.

mod memory;

pub use memory::open_status;

use std::fs::File;
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use edgevmm_api::v1::machine_server::Machine as MachineApi;
use edgevmm_api::v1::{
    self, ConsoleAccess, ConsoleRequest, ConsoleResponse, console_request, console_response,
};
use edgevmm_block::BlockError;
use edgevmm_devices::ahci::MediaHandle;
use edgevmm_devices::disk::BlockHandle;
use edgevmm_devices::virtio::balloon::BalloonHandle;
pub use edgevmm_devices::virtio::console::Resizer;
use edgevmm_devices::virtio::console::TerminalSize;
use tokio::net::UnixListener;
use tokio::sync::{Mutex as AsyncMutex, mpsc, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::agent::{Agent, AgentService};
use crate::console::{ConsoleHub, HISTORY};
use crate::files::HandedFiles;
use crate::lifecycle::{Handle, Phase, RequestError};
use crate::machine::{use_disc, with_sources};

/// Console chunks that wait for a client before its reader waits.
const CONSOLE_QUEUE: usize = 4;
const CONSOLE_CHUNK: usize = 4096;
/// How often a client's input is tried again while the guest does not read.
const INPUT_RETRY: Duration = Duration::from_millis(10);

/// What the API tells of a machine and never changes.
#[derive(Debug)]
pub struct Facts {
    /// Name of the machine.
    pub name: String,
    /// The VMM's process, as the host knows it.
    pub pid: u32,
    /// What its sandbox consists of; empty without one.
    pub sandbox: String,
    /// Its configuration as JSON.
    pub config_json: String,
    /// Path of the console's pseudo-terminal.
    pub console_pty: Option<PathBuf>,
}

/// The ways to the parts of a machine that the API reaches by itself.
#[derive(Debug)]
pub struct Ways {
    /// To the console's terminal size, if its device has one.
    pub resizer: Option<Resizer>,
    /// To the disks, by name.
    pub disks: Vec<(String, BlockHandle)>,
    /// To what is in the CD-ROM drives, by name.
    pub drives: Vec<(String, MediaHandle)>,
    /// To the balloon, if there is one.
    pub balloon: Option<BalloonHandle>,
    /// To the guest agent, if there is a channel to it.
    pub agent: Option<Arc<Agent>>,
    /// The guest's memory in bytes.
    pub memory: u64,
    /// To the files that clients hand over.
    pub files: HandedFiles,
    /// What the kernel tells of this process, if it does.
    pub status: Option<File>,
}

/// Why the API can't be served.
#[derive(Debug, thiserror::Error)]
#[error("Can't serve the API at {}", path.display())]
pub struct ServeError {
    path: PathBuf,
    #[source]
    source: std::io::Error,
}

/// A bound socket.
#[derive(Debug)]
pub struct Socket(UnixListener);

impl Socket {
    /// Binds the API's socket.
    ///
    /// # Errors
    /// Fails when the folder is not writable or the path too long.
    pub fn bind(path: &Path) -> Result<Socket, ServeError> {
        let error = |source| ServeError {
            path: path.to_path_buf(),
            source,
        };
        let listener = StdListener::bind(path).map_err(error)?;
        listener.set_nonblocking(true).map_err(error)?;
        UnixListener::from_std(listener).map(Socket).map_err(error)
    }

    /// Serves the API until `shutdown` is true.
    pub async fn serve(
        self,
        service: Service,
        agent: AgentService,
        shutdown: watch::Receiver<bool>,
    ) {
        edgevmm_api::serve(self.0, service, agent, shutdown).await;
    }
}

/// Who may type: bumped by every exclusive attachment, which ends the writers before it.
#[derive(Debug)]
struct Writers {
    epoch: watch::Sender<u64>,
    exclusive: AsyncMutex<std::sync::Weak<()>>,
}

/// The API of one machine.
#[derive(Debug)]
pub struct Service {
    handle: Handle,
    facts: Facts,
    console: Arc<ConsoleHub>,
    ways: Ways,
    writers: Writers,
}

impl Service {
    /// The API of the machine behind `handle`.
    pub fn new(handle: Handle, facts: Facts, console: Arc<ConsoleHub>, ways: Ways) -> Service {
        let writers = Writers {
            epoch: watch::Sender::new(0),
            exclusive: AsyncMutex::default(),
        };
        Service {
            handle,
            facts,
            console,
            ways,
            writers,
        }
    }

    /// Admits a console client that can write. Gives its hold on exclusivity, if it asked.
    async fn admit(&self, access: ConsoleAccess) -> Result<Option<Arc<()>>, Status> {
        let mut exclusive = self.writers.exclusive.lock().await;
        match access {
            ConsoleAccess::ReadOnly => Ok(None),
            ConsoleAccess::Exclusive => {
                let hold = Arc::new(());
                *exclusive = Arc::downgrade(&hold);
                self.writers.epoch.send_modify(|epoch| *epoch += 1);
                Ok(Some(hold))
            }
            ConsoleAccess::Shared | ConsoleAccess::Unspecified => {
                if exclusive.upgrade().is_some() {
                    return Err(Status::failed_precondition(
                        "another client has the console for itself",
                    ));
                }
                Ok(None)
            }
        }
    }
}

/// The way to one of `ways` by its name; `kind` says to what.
fn named<T: Clone>(ways: &[(String, T)], kind: &str, name: &str) -> Result<T, Status> {
    let found = ways.iter().find(|(known, _)| known == name);
    found.map(|(_, way)| way.clone()).ok_or_else(|| {
        let names: Vec<_> = ways.iter().map(|(name, _)| name.as_str()).collect();
        let there = match names.is_empty() {
            true => "none".to_owned(),
            false => names.join(", "),
        };
        Status::not_found(format!("there is no {kind} {name:?}: it has {there}"))
    })
}

fn refused(error: &RequestError) -> Status {
    match error {
        RequestError::Phase(_) => Status::failed_precondition(error.to_string()),
        RequestError::Gone => Status::unavailable(error.to_string()),
        RequestError::Failed(_) => Status::internal(error.to_string()),
    }
}

/// Why a disk could not be made larger.
fn not_resized(error: &BlockError) -> Status {
    let text = with_sources(error);
    match error {
        BlockError::ReadOnly | BlockError::Unsupported { .. } => Status::failed_precondition(text),
        _ => Status::internal(text),
    }
}

fn state(phase: Phase) -> v1::State {
    match phase {
        Phase::Running => v1::State::Running,
        Phase::Paused => v1::State::Paused,
        Phase::Stopping => v1::State::Stopping,
        Phase::Stopped => v1::State::Stopped,
    }
}

fn agent_state(agent: Option<&Agent>) -> v1::AgentState {
    match agent {
        None => v1::AgentState::Off,
        Some(agent) if !agent.is_connected() => v1::AgentState::Disconnected,
        Some(agent) if agent.is_frozen() => v1::AgentState::Frozen,
        Some(_) => v1::AgentState::Connected,
    }
}

type ConsoleStream = Pin<Box<dyn Stream<Item = Result<ConsoleResponse, Status>> + Send>>;

#[tonic::async_trait]
impl MachineApi for Service {
    type ConsoleStream = ConsoleStream;

    async fn get_version(
        &self,
        _: Request<v1::GetVersionRequest>,
    ) -> Result<Response<v1::GetVersionResponse>, Status> {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Ok(Response::new(v1::GetVersionResponse { version }))
    }

    async fn inspect(
        &self,
        _: Request<v1::InspectRequest>,
    ) -> Result<Response<v1::InspectResponse>, Status> {
        let status = self.handle.status();
        let pty = self
            .facts
            .console_pty
            .as_ref()
            .map(|p| p.display().to_string());
        Ok(Response::new(v1::InspectResponse {
            name: self.facts.name.clone(),
            state: state(status.phase).into(),
            reason: status
                .exit
                .as_ref()
                .map(|exit| exit.message.clone())
                .or(status.trouble)
                .unwrap_or_default(),
            pid: self.facts.pid,
            start_time: Some(status.started.into()),
            uptime: status.since.elapsed().try_into().ok(),
            config_json: self.facts.config_json.clone(),
            exit: status.exit.map(Into::into),
            resets: status.resets,
            console_pty: pty.unwrap_or_default(),
            agent: agent_state(self.ways.agent.as_deref()).into(),
            sandbox: self.facts.sandbox.clone(),
        }))
    }

    async fn pause(
        &self,
        _: Request<v1::PauseRequest>,
    ) -> Result<Response<v1::PauseResponse>, Status> {
        self.handle.pause().await.map_err(|e| refused(&e))?;
        Ok(Response::new(v1::PauseResponse {}))
    }

    async fn resume(
        &self,
        _: Request<v1::ResumeRequest>,
    ) -> Result<Response<v1::ResumeResponse>, Status> {
        self.handle.resume().await.map_err(|e| refused(&e))?;
        Ok(Response::new(v1::ResumeResponse {}))
    }

    async fn reset(
        &self,
        _: Request<v1::ResetRequest>,
    ) -> Result<Response<v1::ResetResponse>, Status> {
        self.handle.reset().await.map_err(|e| refused(&e))?;
        Ok(Response::new(v1::ResetResponse {}))
    }

    async fn resize_disk(
        &self,
        request: Request<v1::ResizeDiskRequest>,
    ) -> Result<Response<v1::ResizeDiskResponse>, Status> {
        let v1::ResizeDiskRequest { disk, size } = request.into_inner();
        let disk = named(&self.ways.disks, "disk", &disk)?;
        // The host's storage may take its time.
        let resized = tokio::task::spawn_blocking(move || disk.resize(size));
        let resized = resized.await.map_err(|e| Status::internal(e.to_string()))?;
        resized.map_err(|e| not_resized(&e))?;
        Ok(Response::new(v1::ResizeDiskResponse {}))
    }

    async fn get_memory(
        &self,
        _: Request<v1::GetMemoryRequest>,
    ) -> Result<Response<v1::GetMemoryResponse>, Status> {
        Ok(Response::new(memory::get(&self.ways).await))
    }

    async fn set_memory_target(
        &self,
        request: Request<v1::SetMemoryTargetRequest>,
    ) -> Result<Response<v1::SetMemoryTargetResponse>, Status> {
        memory::set_target(&self.ways, request.into_inner().target)?;
        Ok(Response::new(v1::SetMemoryTargetResponse {}))
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
        let drive = named(&self.ways.drives, "CD-ROM drive", &drive)?;
        let disc = match file {
            0 if path.is_empty() => None,
            0 => return Err(Status::invalid_argument("the image must be handed over")),
            number => {
                let file = self.ways.files.take(number);
                let file = file.ok_or_else(|| Status::not_found("no such file waits"))?;
                Some((file, PathBuf::from(path)))
            }
        };
        // The host's storage may take its time.
        let changed = tokio::task::spawn_blocking(move || change(&drive, disc, force));
        let changed = changed.await.map_err(|e| Status::internal(e.to_string()))?;
        changed.map_err(Status::failed_precondition)?;
        Ok(Response::new(v1::ChangeMediumResponse {}))
    }

    async fn stop(
        &self,
        request: Request<v1::StopRequest>,
    ) -> Result<Response<v1::StopResponse>, Status> {
        let timeout = request
            .into_inner()
            .timeout
            .map(Duration::try_from)
            .transpose();
        let timeout =
            timeout.map_err(|_| Status::invalid_argument("the timeout can't be negative"))?;
        let timeout = self.handle.stop(timeout).await.map_err(|e| refused(&e))?;
        Ok(Response::new(v1::StopResponse {
            timeout: timeout.try_into().ok(),
        }))
    }

    async fn kill(
        &self,
        _: Request<v1::KillRequest>,
    ) -> Result<Response<v1::KillResponse>, Status> {
        self.handle.kill().await.map_err(|e| refused(&e))?;
        Ok(Response::new(v1::KillResponse {}))
    }

    async fn wait(
        &self,
        _: Request<v1::WaitRequest>,
    ) -> Result<Response<v1::WaitResponse>, Status> {
        let exit = self.handle.clone().ended().await;
        Ok(Response::new(v1::WaitResponse {
            exit: exit.map(Into::into),
        }))
    }

    async fn console(
        &self,
        request: Request<Streaming<ConsoleRequest>>,
    ) -> Result<Response<Self::ConsoleStream>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?.and_then(|request| request.kind);
        let Some(console_request::Kind::Open(open)) = first else {
            return Err(Status::invalid_argument(
                "the first message must open the console",
            ));
        };
        let access = open.access();
        let exclusive = self.admit(access).await?;
        let mut epoch = self.writers.epoch.subscribe();
        epoch.mark_unchanged();
        let history = open.history.unwrap_or(HISTORY as u64);
        let (sender, receiver) = mpsc::channel(CONSOLE_QUEUE);
        let output = send_output(self.console.reader(history), sender.clone());
        let resizer = self.ways.resizer.clone();
        let may_write = access != ConsoleAccess::ReadOnly;
        if let (Some(resizer), Some(size)) = (&resizer, open.size.filter(|_| may_write)) {
            resize(resizer, size);
        }
        let input = take_input(requests, Arc::clone(&self.console), resizer, access);
        tokio::spawn(async move {
            let _exclusive = exclusive;
            let taken_over = async {
                if access == ConsoleAccess::ReadOnly || epoch.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            let end = tokio::select! {
                () = output => None,
                end = input => end,
                () = sender.closed() => None,
                () = taken_over => Some(Status::aborted("another client took the console")),
            };
            if let Some(status) = end {
                let _ = sender.send(Err(status)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

/// Changes what is in a drive.
///
/// # Errors
/// In words, why it is not changed.
fn change(drive: &MediaHandle, disc: Option<(File, PathBuf)>, force: bool) -> Result<(), String> {
    let changed = match disc {
        None => drive.eject(force),
        Some((file, path)) => {
            let disc = use_disc(file, &path, false).map_err(|error| with_sources(&error))?;
            drive.insert(disc, force)
        }
    };
    changed.map_err(|error| error.to_string())
}

/// Sends output until the console closes or the client leaves.
async fn send_output(
    mut reader: crate::console::Reader,
    sender: mpsc::Sender<Result<ConsoleResponse, Status>>,
) {
    let mut buffer = vec![0; CONSOLE_CHUNK];
    loop {
        let chunk = reader.read(&mut buffer).await;
        if chunk.closed {
            return;
        }
        let bytes = buffer.get(..chunk.len).unwrap_or_default().to_vec();
        let mut parts = Vec::with_capacity(2);
        if chunk.dropped > 0 {
            parts.push(console_response::Kind::Dropped(chunk.dropped));
        }
        parts.push(if chunk.history {
            console_response::Kind::History(bytes)
        } else {
            console_response::Kind::Output(bytes)
        });
        for kind in parts {
            if sender
                .send(Ok(ConsoleResponse { kind: Some(kind) }))
                .await
                .is_err()
            {
                return;
            }
        }
    }
}

/// Types what the client sends. `None` when the client is done, else what it did wrong.
async fn take_input(
    mut requests: Streaming<ConsoleRequest>,
    console: Arc<ConsoleHub>,
    resizer: Option<Resizer>,
    access: ConsoleAccess,
) -> Option<Status> {
    loop {
        let request = match requests.message().await {
            Ok(Some(request)) => request,
            // A client may close its side and go on reading.
            Ok(None) => std::future::pending().await,
            Err(_) => return None,
        };
        match request.kind {
            Some(console_request::Kind::Input(_)) if access == ConsoleAccess::ReadOnly => {
                return Some(Status::permission_denied(
                    "the console is attached read-only",
                ));
            }
            Some(console_request::Kind::Input(bytes)) => type_in(&console, &bytes).await,
            Some(console_request::Kind::Resize(size)) if access != ConsoleAccess::ReadOnly => {
                // A serial port has no way to tell the guest.
                if let Some(resizer) = &resizer {
                    resize(resizer, size);
                }
            }
            Some(console_request::Kind::Resize(_)) | None => {}
            Some(console_request::Kind::Open(_)) => {
                return Some(Status::invalid_argument("the console is open already"));
            }
        }
    }
}

/// Tells the guest the size of a user's terminal.
pub fn resize(resizer: &Resizer, size: v1::TerminalSize) {
    let clamp = |value| u16::try_from(value).unwrap_or(u16::MAX);
    let (columns, rows) = (clamp(size.columns), clamp(size.rows));
    resizer.resize(TerminalSize { columns, rows });
}

async fn type_in(console: &ConsoleHub, mut bytes: &[u8]) {
    loop {
        let taken = console.input().push(bytes);
        bytes = bytes.get(taken..).unwrap_or_default();
        if bytes.is_empty() {
            return;
        }
        tokio::time::sleep(INPUT_RETRY).await;
    }
}
