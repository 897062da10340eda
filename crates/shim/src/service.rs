//! containerd's task API, versions 2 and 3, which differ by their name only.

use std::sync::Arc;

use prost::Message;

use crate::proto::task::{
    ConnectResponse, CreateRequest, DeleteResponse, KillRequest, PidResponse, PidsResponse,
    ProcessInfo, ProcessRequest, ResizePtyRequest, ShutdownRequest, StateResponse, StatsResponse,
    UpdateRequest, WaitResponse,
};
use crate::stats;
use crate::task::{Action, Container, Tasks};
use crate::ttrpc::{Answer, CallError, Code, Service};

/// Names of the service.
const SERVICES: [&str; 2] = ["containerd.task.v2.Task", "containerd.task.v3.Task"];

/// Answers containerd's calls.
#[derive(Debug)]
pub struct TaskService {
    tasks: Arc<Tasks>,
}

impl TaskService {
    /// For the containers of a pod.
    pub fn new(tasks: Arc<Tasks>) -> Self {
        Self { tasks }
    }

    /// The container that a request is about. There are no processes in it but its own.
    fn container(&self, request: &ProcessRequest) -> Result<Arc<Container>, CallError> {
        no_process(&request.exec_id)?;
        self.tasks.get(&request.id)
    }
}

impl Service for TaskService {
    async fn call(&self, service: &str, method: &str, payload: Vec<u8>) -> Answer {
        if !SERVICES.contains(&service) {
            let message = format!("There is no service {service}");
            return Err(CallError::new(Code::Unimplemented, message));
        }
        let tasks = &self.tasks;
        let payload = payload.as_slice();
        match method {
            "Create" => {
                let pid = tasks.create(decode::<CreateRequest>(payload)?).await?;
                Ok(PidResponse { pid }.encode_to_vec())
            }
            "Start" => {
                let request: ProcessRequest = decode(payload)?;
                no_process(&request.exec_id)?;
                let pid = tasks.start(&request.id).await?;
                Ok(PidResponse { pid }.encode_to_vec())
            }
            "State" => {
                let container = self.container(&decode(payload)?)?;
                Ok(state(&container).encode_to_vec())
            }
            "Wait" => {
                let exit = self.container(&decode(payload)?)?.ended().await;
                Ok(WaitResponse {
                    exit_status: exit.status,
                    exited_at: Some(exit.at),
                }
                .encode_to_vec())
            }
            "Kill" => {
                let request: KillRequest = decode(payload)?;
                no_process(&request.exec_id)?;
                done(tasks.get(&request.id)?.kill(request.signal).await)
            }
            "Delete" => {
                let request: ProcessRequest = decode(payload)?;
                no_process(&request.exec_id)?;
                let (pid, exit) = tasks.delete(&request.id).await?;
                Ok(DeleteResponse {
                    pid,
                    exit_status: exit.status,
                    exited_at: Some(exit.at),
                }
                .encode_to_vec())
            }
            "Pids" => Ok(pids(&*self.container(&decode(payload)?)?).encode_to_vec()),
            "Pause" => done(tasks.pause(&decode::<ProcessRequest>(payload)?.id).await),
            "Resume" => done(tasks.resume(&decode::<ProcessRequest>(payload)?.id).await),
            "Update" => {
                let request: UpdateRequest = decode(payload)?;
                let resources = request.resources.unwrap_or_default().value;
                done(tasks.update(&request.id, &resources).await)
            }
            "ResizePty" => done(self.resize(&decode(payload)?).await),
            // The console's input stays open for whoever attaches next.
            "CloseIO" => done(self.container(&decode(payload)?).map(drop)),
            "Stats" => {
                let container = self.container(&decode(payload)?)?;
                let stats = Some(stats::read(&container.cgroup));
                Ok(StatsResponse { stats }.encode_to_vec())
            }
            "Connect" => {
                let request: ProcessRequest = decode(payload)?;
                let container = tasks.get(&request.id);
                Ok(ConnectResponse {
                    shim_pid: std::process::id(),
                    task_pid: container.map_or(0, |container| container.process.id()),
                    version: env!("CARGO_PKG_VERSION").to_owned(),
                }
                .encode_to_vec())
            }
            "Shutdown" => {
                tasks.shut_down(decode::<ShutdownRequest>(payload)?.now);
                Ok(Vec::new())
            }
            "Exec" => Err(CallError::new(
                Code::Unimplemented,
                "Programs in a machine can't be started yet: use its console (kubectl attach)",
            )),
            _ => Err(CallError::new(
                Code::Unimplemented,
                format!("Machines have no {method}"),
            )),
        }
    }
}

impl TaskService {
    async fn resize(&self, request: &ResizePtyRequest) -> Result<(), CallError> {
        no_process(&request.exec_id)?;
        let container = self.tasks.get(&request.id)?;
        let machine = container.machine(Action::Control)?;
        // A terminal of no size is none that anybody sees.
        if request.width == 0 || request.height == 0 {
            return Ok(());
        }
        machine
            .vmm
            .resize_console(request.width, request.height)
            .await
    }
}

fn decode<M: Message + Default>(payload: &[u8]) -> Result<M, CallError> {
    M::decode(payload).map_err(|error| {
        let message = format!("The request can't be read: {error}");
        CallError::new(Code::InvalidArgument, message)
    })
}

fn done(result: Result<(), CallError>) -> Answer {
    result.map(|()| Vec::new())
}

fn no_process(exec_id: &str) -> Result<(), CallError> {
    if exec_id.is_empty() {
        return Ok(());
    }
    let message = format!("There is no process {exec_id}");
    Err(CallError::new(Code::NotFound, message))
}

fn pids(container: &Container) -> PidsResponse {
    let mut pids = container.cgroup.processes();
    // containerd takes a container without any for one whose shim is lost.
    let own = container.process.id();
    if !pids.contains(&own) {
        pids.push(own);
    }
    let processes = pids.into_iter().map(|pid| ProcessInfo { pid });
    PidsResponse {
        processes: processes.collect(),
    }
}

fn state(container: &Container) -> StateResponse {
    let state = container.state();
    let request = container.request.clone();
    let exit = state.exit();
    StateResponse {
        id: request.id,
        bundle: request.bundle,
        pid: container.process.id(),
        status: state.status().into(),
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
        terminal: request.terminal,
        exit_status: exit.map_or(0, |exit| exit.status),
        exited_at: exit.map(|exit| exit.at),
        exec_id: String::new(),
    }
}
