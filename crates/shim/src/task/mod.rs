//! All containers of a pod, and what containerd does with them.

mod aside;
mod container;
mod create;
mod exec;
mod log;
mod processes;
mod spawn;
mod state;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

pub use container::Container;
pub use exec::Exec;
pub use log::Log;
pub use state::{Action, Exit, State};

use crate::events::{Event, Events};
use crate::proto::events::{
    TaskCreate, TaskDelete, TaskExit, TaskIo, TaskOom, TaskPaused, TaskResumed, TaskStart,
};
use crate::proto::now;
use crate::proto::task::CreateRequest;
use crate::ttrpc::{CallError, Code};

/// All containers of a pod.
#[derive(Debug)]
pub struct Tasks {
    namespace: String,
    containers: Mutex<HashMap<String, Arc<Container>>>,
    /// Held while a container is made.
    creation: tokio::sync::Mutex<()>,
    events: Events,
    log: Log,
    shutdown: watch::Sender<bool>,
}

impl Tasks {
    /// None yet, of a namespace of containerd's.
    pub fn new(namespace: &str, events: Events, log: Log) -> Self {
        Self {
            namespace: namespace.to_owned(),
            containers: Mutex::default(),
            creation: tokio::sync::Mutex::default(),
            events,
            log,
            shutdown: watch::Sender::new(false),
        }
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Arc<Container>>> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn events(&self) -> &Events {
        &self.events
    }

    /// Where what nobody asked for is told.
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// The container of that ID.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn get(&self, id: &str) -> Result<Arc<Container>, CallError> {
        let found = self.containers().get(id).cloned();
        found.ok_or_else(|| CallError::new(Code::NotFound, format!("There is no container {id}")))
    }

    /// Makes a container; it waits to be started. Returns its process ID.
    ///
    /// # Errors
    ///
    /// When it can't be made; nothing is left of it.
    pub async fn create(self: &Arc<Self>, request: CreateRequest) -> Result<u32, CallError> {
        let creation = self.creation.lock().await;
        if *self.shutdown.borrow() {
            let message = "The shim of the container's pod is ending";
            return Err(CallError::new(Code::FailedPrecondition, message));
        }
        let id = request.id.clone();
        if self.containers().contains_key(&id) {
            let message = format!("There is a container {id} already");
            return Err(CallError::new(Code::AlreadyExists, message));
        }
        // One that has ended is a machine of the pod until it is deleted, when its network goes.
        let has_machine = self
            .containers()
            .values()
            .any(|container| container.machine.is_some());
        let container = create::create(request, &self.namespace, has_machine, &self.log).await?;
        let container = Arc::new(container);
        let pid = container.process.id();
        self.events.tell(&created(&container));
        self.containers().insert(id, Arc::clone(&container));
        drop(creation);
        tokio::spawn(Arc::clone(self).follow(container));
        Ok(pid)
    }

    /// Waits for the end of a container's process, and tells it. Not before it was told that it
    /// runs, if it ever did.
    async fn follow(self: Arc<Self>, container: Arc<Container>) {
        let mut exited = container.exited.clone();
        let status = match exited.wait_for(Option::is_some).await {
            Ok(status) => status.unwrap_or(255),
            Err(_) => 255,
        };
        let changing = container.changes.lock().await;
        let id = container.request.id.clone();
        container.execs.kill_all();
        if container.is_victim(status) {
            self.events.tell(&Event::Oom(TaskOom {
                container_id: id.clone(),
            }));
        }
        let at = now();
        self.events.tell(&Event::Exit(TaskExit {
            container_id: id.clone(),
            id,
            pid: container.process.id(),
            exit_status: status,
            exited_at: Some(at),
        }));
        container.stage.set(State::Stopped(Exit { status, at }));
        drop(changing);
    }

    /// Lets a container run. Returns its process ID.
    ///
    /// # Errors
    ///
    /// When there is none, it is not in a state for it, or its VMM can't start.
    pub async fn start(&self, id: &str) -> Result<u32, CallError> {
        let container = self.get(id)?;
        let _changing = container.changes.lock().await;
        container.start().await?;
        let pid = container.process.id();
        self.events.tell(&Event::Start(TaskStart {
            container_id: id.to_owned(),
            pid,
        }));
        Ok(pid)
    }

    /// Forgets a container that has ended, or was never started, and removes all that it has on the
    /// host. Returns its process ID and how it ended.
    ///
    /// # Errors
    ///
    /// When there is none, it runs, or something can't be removed.
    pub async fn delete(&self, id: &str) -> Result<(u32, Exit), CallError> {
        if self.get(id).is_err() {
            // It may be about to be made, by a call whose caller has given up.
            drop(self.creation.lock().await);
        }
        let container = self.get(id)?;
        {
            // Whoever starts it has done so, or finds it ended.
            let _changing = container.changes.lock().await;
            container.state().allows(Action::Delete)?;
            container.process.kill();
        }
        let exit = container.stage.ended().await;
        container.execs.ended().await;
        let _changing = container.changes.lock().await;
        // Somebody else may have been faster.
        self.get(id)?;
        let bundle = container.request.bundle.as_ref();
        let cleared = container.record.clear_aside(bundle).await;
        cleared.map_err(|error| CallError::new(Code::Unknown, crate::chain(error.as_ref())))?;
        self.containers().remove(id);
        let pid = container.process.id();
        self.events.tell(&Event::Delete(TaskDelete {
            container_id: id.to_owned(),
            pid,
            exit_status: exit.status,
            exited_at: Some(exit.at),
        }));
        Ok((pid, exit))
    }

    /// Halts a machine's vCPUs.
    ///
    /// # Errors
    ///
    /// When there is none, or it does not run.
    pub async fn pause(&self, id: &str) -> Result<(), CallError> {
        let container = self.get(id)?;
        let _changing = container.changes.lock().await;
        self.look(&container).await;
        container.machine(Action::Pause)?.vmm.pause().await?;
        self.look_at(&container, true);
        Ok(())
    }

    /// Lets a machine's vCPUs go on.
    ///
    /// # Errors
    ///
    /// When there is none, or it is not paused.
    pub async fn resume(&self, id: &str) -> Result<(), CallError> {
        let container = self.get(id)?;
        let _changing = container.changes.lock().await;
        self.look(&container).await;
        container.machine(Action::Resume)?.vmm.resume().await?;
        self.look_at(&container, false);
        Ok(())
    }

    /// Looks whether a machine's vCPUs are halted: its VMM, or somebody who talks to it, may have done
    /// that. Whoever calls holds the lock on changes.
    async fn look(&self, container: &Container) {
        if container.state().allows(Action::Exec).is_ok()
            && let Some(machine) = &container.machine
            && let Some(paused) = machine.vmm.is_paused().await
        {
            self.look_at(container, paused);
        }
    }

    fn look_at(&self, container: &Container, paused: bool) {
        let container_id = container.request.id.clone();
        if paused && container.stage.set(State::Paused) {
            self.events
                .tell(&Event::Paused(TaskPaused { container_id }));
        } else if !paused && container.stage.set(State::Running) {
            self.events
                .tell(&Event::Resumed(TaskResumed { container_id }));
        }
    }

    /// The container of that ID, with a state that is true now.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub async fn up_to_date(&self, id: &str) -> Result<Arc<Container>, CallError> {
        let container = self.get(id)?;
        // Somebody who changes the state knows it; waiting for that would keep a caller.
        if let Ok(_changing) = container.changes.try_lock() {
            self.look(&container).await;
        }
        Ok(container)
    }

    /// Changes a container's limits.
    ///
    /// # Errors
    ///
    /// When there is none, or it has ended.
    pub async fn update(&self, id: &str, resources: &[u8]) -> Result<(), CallError> {
        let container = self.get(id)?;
        let resources = serde_json::from_slice(resources).map_err(|error| {
            let message = format!("The resources can't be read: {error}");
            CallError::new(Code::InvalidArgument, message)
        })?;
        for note in container.update(resources).await? {
            self.log.say(&note);
        }
        Ok(())
    }

    /// Ends the daemon, unless there are containers left; those are ended too if it must be `now`.
    pub async fn shut_down(&self, now: bool) {
        let _creation = self.creation.lock().await;
        let left: Vec<_> = self.containers().values().cloned().collect();
        if !left.is_empty() && !now {
            return;
        }
        for container in left {
            let bundle = container.request.bundle.as_ref();
            let _ = container.record.clear_aside(bundle).await;
        }
        self.shutdown.send_replace(true);
    }

    /// Returns when the daemon is to end.
    pub async fn stopping(&self) {
        let mut shutdown = self.shutdown.subscribe();
        // The sender is here, so it can't be gone.
        let _ = shutdown.wait_for(|shutdown| *shutdown).await;
    }

    /// Returns when all events are sent.
    pub async fn sent(&self) {
        self.events.sent().await;
    }
}

fn created(container: &Container) -> Event {
    let CreateRequest {
        id,
        bundle,
        rootfs,
        terminal,
        stdin,
        stdout,
        stderr,
        ..
    } = container.request.clone();
    Event::Create(TaskCreate {
        container_id: id,
        bundle,
        rootfs,
        io: Some(TaskIo {
            stdin,
            stdout,
            stderr,
            terminal,
        }),
        pid: container.process.id(),
    })
}
