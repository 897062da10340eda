//! The way to a container's VMM: its program, and its API.

use std::path::{Path, PathBuf};
use std::time::Duration;

use edgevmm_api::v1;
use edgevmm_api::{Client, connect};
use tokio::sync::watch;

use crate::record::machines;
use crate::ttrpc::{CallError, Code};

/// The VMM's program.
const PROGRAM: &str = "edgevmm";
/// How long a VMM may take to have all that it needs.
const START_TIME: Duration = Duration::from_secs(60);
/// Time between two looks for a VMM that is starting.
const LOOK: Duration = Duration::from_millis(5);

/// Finds the VMM's program: beside this one, else on the path.
pub fn program() -> Option<PathBuf> {
    let own = std::env::current_exe().ok();
    let beside = own
        .iter()
        .filter_map(|own| own.parent())
        .map(Path::to_owned);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders: Vec<PathBuf> = beside.chain(std::env::split_paths(&path)).collect();
    let mut programs = folders.iter().map(|folder| folder.join(PROGRAM));
    programs.find(|path| path.is_absolute() && path.is_file())
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

    /// Presses the power button. The guest has as long as whoever stops it gives it.
    pub async fn press_power_button(&self) -> Result<(), CallError> {
        let mut client = self.connect().await?;
        let stop = client.stop(v1::StopRequest { timeout: None }).await;
        stop.map(drop).map_err(|error| status(&error))
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

    async fn connect(&self) -> Result<Client, CallError> {
        let failed = |error: &dyn std::error::Error| {
            let message = format!("The VMM can't be reached: {}", crate::chain(error));
            CallError::new(Code::Unknown, message)
        };
        let folder = machines()
            .open(&self.machine)
            .map_err(|error| failed(&error))?;
        connect(&folder.socket())
            .await
            .map_err(|error| failed(&error))
    }
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
