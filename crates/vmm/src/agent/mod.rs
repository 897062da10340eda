//! The client of the guest agent (`org.qemu.guest_agent.0`), for the API.
//!
//! It has no thread and no timer while nobody asks. One request is under way at a time; each has a
//! time, a longest answer, and a limit to what the guest may say besides. A stream that is out of
//! step, after an answer that did not come in time or from an agent that was started anew, is brought
//! back in step before the next request.

mod freeze;
mod service;
mod session;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use edgevmm_agent::{AnswerError, Command, ExecResult, ExecStarted, PowerMode, exec};
use serde::de::DeserializeOwned;
use tokio::sync::Mutex as AsyncMutex;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout};

pub use service::AgentService;

use crate::channel::{Closed, Link};
use session::Session;

/// Longest answer but for those with a program's output, in bytes.
const ANSWER: usize = 1 << 20;

/// Longest answer with a program's output, in base64.
const EXEC_ANSWER: usize = 4 << 20;

/// How long the agent may take to start a program or tell what became of it.
const EXEC_PATIENCE: Duration = Duration::from_secs(30);

/// How soon a program is looked after first, and how seldom at last.
const FIRST_LOOK: Duration = Duration::from_millis(20);
const LAST_LOOK: Duration = Duration::from_millis(500);

/// Why the guest agent did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// There is no channel.
    #[error("The machine has no channel to a guest agent: start it without --no-agent")]
    Off,
    /// Nobody has the channel open.
    #[error(
        "No guest agent is connected: wait until the guest has booted, or install qemu-guest-agent \
         in it"
    )]
    NotConnected,
    /// It took too long.
    #[error(
        "The guest agent has not answered within {} s: the guest may be busy or halted",
        .0.as_secs_f64()
    )]
    Silent(Duration),
    /// The guest closed the channel.
    #[error("The guest agent left before it answered: try again")]
    Left,
    /// The answer is too long.
    #[error("The guest agent's answer is longer than {} KiB", .0 >> 10)]
    TooLong(usize),
    /// The output is too long.
    #[error(
        "The program wrote more than {} KiB: have it write to a file in the guest",
        EXEC_ANSWER / 4 * 3 / 1024
    )]
    MuchOutput,
    /// Something else than an agent is there.
    #[error("What has the channel open in the guest does not speak as a guest agent does")]
    Nonsense,
    /// The agent said something else than an answer, or no.
    #[error(transparent)]
    Answer(#[from] AnswerError),
    /// They are.
    #[error("The guest's file systems are frozen already: thaw them first")]
    Frozen,
    /// The program takes long.
    #[error(
        "The program has not ended within {} s: it goes on in the guest as process {pid}",
        time.as_secs_f64()
    )]
    StillRunning {
        /// Its process.
        pid: i64,
        /// The time it had.
        time: Duration,
    },
}

impl From<Closed> for AgentError {
    fn from(_: Closed) -> Self {
        Self::Left
    }
}

/// A program to run in the guest.
#[derive(Debug, Default)]
pub struct Program {
    /// Program and arguments.
    pub command: Vec<String>,
    /// Variables.
    pub env: Vec<String>,
    /// Standard input.
    pub stdin: Vec<u8>,
    /// How long it may take.
    pub time: Option<Duration>,
}

/// The guest agent.
#[derive(Debug)]
pub struct Agent {
    link: Link,
    session: AsyncMutex<Session>,
    /// Who thaws the guest's file systems, while they are frozen.
    thaw: Mutex<Option<AbortHandle>>,
}

impl Agent {
    /// The agent at the guest's end of `link`.
    pub fn new(link: Link) -> Agent {
        // Always open: the agent of a guest that finds it closed looks ten times a second.
        link.channel().set_open(true);
        Agent {
            link,
            session: AsyncMutex::default(),
            thaw: Mutex::default(),
        }
    }

    /// Whether somebody in the guest has the channel open.
    pub fn is_connected(&self) -> bool {
        self.link.channel().guest().is_some()
    }

    /// Waits until somebody has.
    async fn connected(&self) {
        self.link.opened().await;
    }

    /// Asks for the answer to `command`.
    async fn ask<T: DeserializeOwned>(
        &self,
        command: &Command,
        time: Duration,
    ) -> Result<T, AgentError> {
        self.request(&command.request(), ANSWER, time).await
    }

    async fn request<T: DeserializeOwned>(
        &self,
        request: &[u8],
        longest: usize,
        time: Duration,
    ) -> Result<T, AgentError> {
        let work = async {
            let mut session = self.session.lock().await;
            session.ask(&self.link, request, longest).await
        };
        let answer = timeout(time, work).await;
        answer.map_err(|_| AgentError::Silent(time))?
    }

    /// Has the guest end. An agent that does so says nothing or leaves.
    async fn shut_down(&self, mode: PowerMode, time: Duration) -> Result<(), AgentError> {
        let request = Command::Shutdown(mode).request();
        let work = async {
            let mut session = self.session.lock().await;
            session.tell(&self.link, &request).await
        };
        let told = timeout(time, work).await;
        told.map_err(|_| AgentError::Silent(time))?
    }

    /// Runs a program to its end.
    async fn exec(&self, program: &Program) -> Result<ExecResult, AgentError> {
        let (path, arguments) = program.command.split_first().ok_or(AgentError::Nonsense)?;
        let request = exec(path, arguments, &program.env, &program.stdin);
        let began = Instant::now();
        let ExecStarted { pid } = self.request(&request, ANSWER, EXEC_PATIENCE).await?;
        let look = Command::ExecStatus(pid).request();
        let mut pause = FIRST_LOOK;
        loop {
            let result = self.request(&look, EXEC_ANSWER, EXEC_PATIENCE).await;
            let result: ExecResult = result.map_err(|error| match error {
                AgentError::TooLong(_) => AgentError::MuchOutput,
                error => error,
            })?;
            if result.out_truncated || result.err_truncated {
                return Err(AgentError::MuchOutput);
            }
            if result.exited {
                return Ok(result);
            }
            if let Some(time) = program.time {
                let left = time.saturating_sub(began.elapsed());
                if left.is_zero() {
                    return Err(AgentError::StillRunning { pid, time });
                }
                pause = pause.min(left);
            }
            sleep(pause).await;
            pause = (pause * 2).min(LAST_LOOK);
        }
    }
}

/// The agent of a machine that may have no channel to one.
fn present(agent: Option<&Arc<Agent>>) -> Result<&Arc<Agent>, AgentError> {
    agent.ok_or(AgentError::Off)
}
