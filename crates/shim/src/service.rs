//! containerd's task API, versions 2 and 3, which differ by their name only.

use std::sync::Arc;

use prost::Message;

use crate::proto::task::{
    CloseIoRequest, ConnectResponse, CreateRequest, DeleteResponse, ExecRequest, KillRequest,
    PidResponse, PidsResponse, ProcessInfo, ProcessRequest, ResizePtyRequest, ShutdownRequest,
    StateResponse, StatsResponse, UpdateRequest, WaitResponse,
};
use crate::stats;
use crate::task::{Action, Container, Exec, Exit, Tasks};
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
}

impl Service for TaskService {
    async fn call(&self, service: &str, method: &str, payload: Vec<u8>) -> Answer {
        if !SERVICES.contains(&service) {
            let message = format!("There is no service {service}");
            return Err(CallError::new(Code::Unimplemented, message));
        }
        let calls = Calls(Arc::clone(&self.tasks));
        if method == "Wait" {
            return calls.wait(&decode(&payload)?).await;
        }
        // What was begun is done to its end, also when the caller's time is over before.
        let method = method.to_owned();
        let work = tokio::spawn(async move { calls.answer(&method, &payload).await });
        work.await
            .unwrap_or_else(|error| Err(CallError::new(Code::Unknown, error.to_string())))
    }
}

/// One call, on the containers of a pod.
struct Calls(Arc<Tasks>);

impl Calls {
    async fn answer(&self, method: &str, payload: &[u8]) -> Answer {
        let tasks = &self.0;
        match method {
            "Create" => pid(tasks.create(decode::<CreateRequest>(payload)?).await?),
            "Start" => self.start(&decode(payload)?).await,
            "State" => self.state(&decode(payload)?).await,
            "Kill" => done(self.kill(&decode(payload)?).await),
            "Delete" => self.delete(&decode(payload)?).await,
            "Exec" => done(tasks.exec(decode::<ExecRequest>(payload)?).await),
            "Pids" => {
                Ok(pids(&*tasks.get(&decode::<ProcessRequest>(payload)?.id)?).encode_to_vec())
            }
            "Pause" => done(tasks.pause(&decode::<ProcessRequest>(payload)?.id).await),
            "Resume" => done(tasks.resume(&decode::<ProcessRequest>(payload)?.id).await),
            "Update" => {
                let request: UpdateRequest = decode(payload)?;
                let resources = request.resources.unwrap_or_default().value;
                done(tasks.update(&request.id, &resources).await)
            }
            "ResizePty" => done(self.resize(&decode(payload)?).await),
            "CloseIO" => done(self.close_input(&decode(payload)?)),
            "Stats" => {
                let container = tasks.get(&decode::<ProcessRequest>(payload)?.id)?;
                container.cgroup.restore(|note| tasks.log().say(&note));
                let stats = Some(stats::read(&container.cgroup));
                Ok(StatsResponse { stats }.encode_to_vec())
            }
            "Connect" => Ok(self.connect(&decode(payload)?).encode_to_vec()),
            "Shutdown" => {
                tasks
                    .shut_down(decode::<ShutdownRequest>(payload)?.now)
                    .await;
                Ok(Vec::new())
            }
            _ => Err(CallError::new(
                Code::Unimplemented,
                format!("Machines have no {method}"),
            )),
        }
    }

    /// The program that a request is about, if it is not about the container itself.
    fn exec(&self, id: &str, exec_id: &str) -> Result<Option<Arc<Exec>>, CallError> {
        let container = self.0.get(id)?;
        if exec_id.is_empty() {
            return Ok(None);
        }
        container.execs.get(exec_id).map(Some)
    }

    async fn start(&self, request: &ProcessRequest) -> Answer {
        pid(match request.exec_id.as_str() {
            "" => self.0.start(&request.id).await?,
            exec_id => self.0.start_exec(&request.id, exec_id).await?,
        })
    }

    async fn state(&self, request: &ProcessRequest) -> Answer {
        let response = match self.exec(&request.id, &request.exec_id)? {
            Some(exec) => exec_state(&exec, &*self.0.get(&request.id)?),
            None => state(&*self.0.up_to_date(&request.id).await?),
        };
        Ok(response.encode_to_vec())
    }

    async fn wait(&self, request: &ProcessRequest) -> Answer {
        let exit = match self.exec(&request.id, &request.exec_id)? {
            Some(exec) => exec.stage.ended().await,
            None => self.0.get(&request.id)?.stage.ended().await,
        };
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: Some(exit.at),
        }
        .encode_to_vec())
    }

    async fn kill(&self, request: &KillRequest) -> Result<(), CallError> {
        match self.exec(&request.id, &request.exec_id)? {
            Some(exec) => exec.kill(request.signal),
            None => self.0.get(&request.id)?.kill(request.signal).await,
        }
    }

    async fn delete(&self, request: &ProcessRequest) -> Answer {
        let (pid, Exit { status, at }) = match request.exec_id.as_str() {
            "" => self.0.delete(&request.id).await?,
            exec_id => self.0.delete_exec(&request.id, exec_id).await?,
        };
        Ok(DeleteResponse {
            pid,
            exit_status: status,
            exited_at: Some(at),
        }
        .encode_to_vec())
    }

    async fn resize(&self, request: &ResizePtyRequest) -> Result<(), CallError> {
        let ResizePtyRequest { width, height, .. } = *request;
        let exec = self.exec(&request.id, &request.exec_id)?;
        // A terminal of no size is none that anybody sees.
        if width == 0 || height == 0 {
            return Ok(());
        }
        if let Some(exec) = exec {
            return exec.resize(width, height);
        }
        let container = self.0.get(&request.id)?;
        let machine = container.machine(Action::Control)?;
        // Before its start it has nobody to tell; whoever attaches tells it again.
        if container.state().allows(Action::Exec).is_err() {
            return Ok(());
        }
        machine.vmm.resize_console(width, height).await
    }

    /// A program's client has closed its end of the FIFO, so the input ends behind what is in there.
    fn close_input(&self, request: &CloseIoRequest) -> Result<(), CallError> {
        if self.exec(&request.id, &request.exec_id)?.is_none() {
            self.0.get(&request.id)?.close_input();
        }
        Ok(())
    }

    fn connect(&self, request: &ProcessRequest) -> ConnectResponse {
        let container = self.0.get(&request.id);
        ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: container.map_or(0, |container| container.process.id()),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
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

fn pid(pid: u32) -> Answer {
    Ok(PidResponse { pid }.encode_to_vec())
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

fn exec_state(exec: &Exec, container: &Container) -> StateResponse {
    let state = exec.stage.get();
    let request = exec.request.clone();
    let exit = state.exit();
    StateResponse {
        id: request.id,
        bundle: container.request.bundle.clone(),
        pid: exec.pid(),
        status: state.status().into(),
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
        terminal: request.terminal,
        exit_status: exit.map_or(0, |exit| exit.status),
        exited_at: exit.map(|exit| exit.at),
        exec_id: request.exec_id,
    }
}
