//! The way to a container's VMM: its program, and its API.

use std::path::{Path, PathBuf};
use std::time::Duration;

use edgevmm_api::v1;
use edgevmm_api::{Agent, Client, connect, connect_agent};
use tokio::sync::watch;

use crate::record::machines;
use crate::ttrpc::{CallError, Code};

/// The VMM's program.
const PROGRAM: &str = "edgevmm";
/// How long a VMM may take to have all that it needs.
const START_TIME: Duration = Duration::from_secs(60);
/// How long a VMM may take to tell its state, and a guest agent to take an order.
const ANSWER_TIME: Duration = Duration::from_secs(2);
/// Time between two looks for a VMM that is starting.
const LOOK: Duration = Duration::from_millis(5);

/// Finds the VMM's program: beside this one, else on the path.
///
/// # Errors
///
/// When there is none.
pub fn program() -> Result<PathBuf, CallError> {
    let own = std::env::current_exe().ok();
    let beside = own
        .iter()
        .filter_map(|own| own.parent())
        .map(Path::to_owned);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders: Vec<PathBuf> = beside.chain(std::env::split_paths(&path)).collect();
    let mut programs = folders.iter().map(|folder| folder.join(PROGRAM));
    let found = programs.find(|path| path.is_absolute() && path.is_file());
    found.ok_or_else(|| {
        let message = "There is no edgevmm beside containerd-shim-edgevmm-v1 nor on its PATH: \
                       install it there";
        CallError::new(Code::FailedPrecondition, message)
    })
}

/// A machine's VMM, by the machine's name.
#[derive(Debug, Clone)]
pub struct Vmm {
    machine: String,
}

impl Vmm {
    /// That of the machine `machine`.
    pub fn new(machine: String) -> Self {
        Self { machine }
    }

    /// Waits until the guest runs. Gives up when the process has `exited`, or after a minute.
    pub async fn started(&self, mut exited: watch::Receiver<Option<u32>>) -> bool {
        let running = async {
            loop {
                if let Ok(mut client) = self.connect().await
                    && client.inspect(v1::InspectRequest {}).await.is_ok()
                {
                    return true;
                }
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::select! {
            result = tokio::time::timeout(START_TIME, running) => result.unwrap_or(false),
            _ = exited.wait_for(Option::is_some) => false,
        }
    }

    /// Presses the power button, and has the guest's agent power it off if there is one: not every
    /// guest heeds its button. It has as long as whoever stops it gives it.
    pub async fn power_off(&self) -> Result<(), CallError> {
        let mut client = self.connect().await?;
        let stop = client.stop(v1::StopRequest { timeout: None }).await;
        stop.map_err(|error| status(&error))?;
        if let Ok(mut agent) = self.agent().await {
            let request = v1::ShutdownRequest {
                timeout: ANSWER_TIME.try_into().ok(),
                mode: v1::ShutdownMode::PowerOff.into(),
            };
            // One that is not there, or does not answer, leaves it to the button.
            let _ = agent.shutdown(request).await;
        }
        Ok(())
    }

    /// Whether its vCPUs are halted; `None` when it does not tell.
    pub async fn is_paused(&self) -> Option<bool> {
        let ask = async {
            let mut client = self.connect().await.ok()?;
            client.inspect(v1::InspectRequest {}).await.ok()
        };
        let answer = tokio::time::timeout(ANSWER_TIME, ask).await.ok()??;
        Some(answer.into_inner().state() == v1::State::Paused)
    }

    /// Halts the vCPUs.
    pub async fn pause(&self) -> Result<(), CallError> {
        let mut client = self.connect().await?;
        let pause = client.pause(v1::PauseRequest {}).await;
        pause.map(drop).map_err(|error| status(&error))
    }

    /// Lets the vCPUs go on.
    pub async fn resume(&self) -> Result<(), CallError> {
        let mut client = self.connect().await?;
        let resume = client.resume(v1::ResumeRequest {}).await;
        resume.map(drop).map_err(|error| status(&error))
    }

    /// Has the guest do with so many bytes of memory, or with all that it has if that is less.
    pub async fn set_memory(&self, bytes: u64) -> Result<(), CallError> {
        let mut client = self.connect().await?;
        let memory = client.get_memory(v1::GetMemoryRequest {}).await;
        let size = memory.map_err(|error| status(&error))?.into_inner().size;
        let target = bytes.min(size);
        let set = client.set_memory_target(v1::SetMemoryTargetRequest { target });
        set.await.map(drop).map_err(|error| status(&error))
    }

    /// Tells the guest the size of the console's terminal.
    pub async fn resize_console(&self, columns: u32, rows: u32) -> Result<(), CallError> {
        let mut client = self.connect().await?;
        let open = v1::ConsoleOpen {
            history: Some(0),
            access: v1::ConsoleAccess::Shared.into(),
            size: Some(v1::TerminalSize { columns, rows }),
        };
        let request = v1::ConsoleRequest {
            kind: Some(v1::console_request::Kind::Open(open)),
        };
        let console = client.console(tokio_stream::once(request)).await;
        console.map(drop).map_err(|error| status(&error))
    }

    /// Its machine's name.
    pub fn machine(&self) -> &str {
        &self.machine
    }

    async fn connect(&self) -> Result<Client, CallError> {
        let client = connect(&self.socket()?).await;
        client.map_err(|error| unreachable(&error))
    }

    async fn agent(&self) -> Result<Agent, CallError> {
        let agent = connect_agent(&self.socket()?).await;
        agent.map_err(|error| unreachable(&error))
    }

    fn socket(&self) -> Result<PathBuf, CallError> {
        let folder = machines().open(&self.machine);
        let folder = folder.map_err(|error| unreachable(&error))?;
        Ok(folder.socket())
    }
}

fn unreachable(error: &dyn std::error::Error) -> CallError {
    let message = format!("The VMM can't be reached: {}", crate::chain(error));
    CallError::new(Code::Unknown, message)
}

/// The VMM's failure as containerd's.
fn status(status: &tonic::Status) -> CallError {
    let code = match status.code() {
        tonic::Code::FailedPrecondition => Code::FailedPrecondition,
        tonic::Code::InvalidArgument => Code::InvalidArgument,
        _ => Code::Unknown,
    };
    CallError::new(code, status.message())
}
