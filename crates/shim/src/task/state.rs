//! What state a task is in, and what may be done in which.

use prost_types::Timestamp;
use tokio::sync::watch;

use crate::proto::now;
use crate::proto::task::Status;
use crate::ttrpc::{CallError, Code};

/// How a task ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255, as a shell would have it.
    pub status: u32,
    /// When.
    pub at: Timestamp,
}

/// What state a task is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Its process waits for the start.
    Created,
    /// It runs.
    Running,
    /// Its vCPUs are halted.
    Paused,
    /// It has ended.
    Stopped(Exit),
}

/// What may be done with a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Let it run.
    Start,
    /// Halt its vCPUs.
    Pause,
    /// Let them go on.
    Resume,
    /// Forget it.
    Delete,
    /// Send it a signal, or change its limits.
    Control,
    /// Run a program in it.
    Exec,
}

impl State {
    /// Whether an action fits the state.
    ///
    /// # Errors
    ///
    /// When it does not: NOT_FOUND for signals to what has ended, which whoever stops a task takes
    /// for success.
    pub fn allows(&self, action: Action) -> Result<(), CallError> {
        let fits = match action {
            Action::Start => matches!(self, Self::Created),
            Action::Pause => matches!(self, Self::Running),
            Action::Resume => matches!(self, Self::Paused),
            Action::Delete => matches!(self, Self::Created | Self::Stopped(_)),
            Action::Control => !matches!(self, Self::Stopped(_)),
            Action::Exec => matches!(self, Self::Running | Self::Paused),
        };
        if fits {
            return Ok(());
        }
        let code = match action {
            Action::Control => Code::NotFound,
            _ => Code::FailedPrecondition,
        };
        let (verb, state) = (action.verb(), self.words());
        Err(CallError::new(
            code,
            format!("Can't {verb} a task that {state}"),
        ))
    }

    /// How it ended, if it has.
    pub fn exit(&self) -> Option<&Exit> {
        match self {
            Self::Stopped(exit) => Some(exit),
            _ => None,
        }
    }

    /// As containerd has it.
    pub fn status(&self) -> Status {
        match self {
            Self::Created => Status::Created,
            Self::Running => Status::Running,
            Self::Paused => Status::Paused,
            Self::Stopped(_) => Status::Stopped,
        }
    }

    fn words(&self) -> &'static str {
        match self {
            Self::Created => "was not started",
            Self::Running => "runs",
            Self::Paused => "is paused",
            Self::Stopped(_) => "has ended",
        }
    }
}

impl Action {
    fn verb(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Delete => "delete",
            Self::Control => "control",
            Self::Exec => "run a program in",
        }
    }
}

/// The state of something that goes from one to the next, to be read and waited for.
#[derive(Debug)]
pub struct Stage(watch::Sender<State>);

impl Default for Stage {
    fn default() -> Self {
        Self(watch::Sender::new(State::Created))
    }
}

impl Stage {
    /// The state.
    pub fn get(&self) -> State {
        self.0.borrow().clone()
    }

    /// Changes it, and tells whether that made a difference. What has ended stays so.
    pub fn set(&self, to: State) -> bool {
        self.0.send_if_modified(|state| {
            let changes = state.exit().is_none() && *state != to;
            if changes {
                *state = to;
            }
            changes
        })
    }

    /// Waits for the end.
    pub async fn ended(&self) -> Exit {
        let mut states = self.0.subscribe();
        let state = states.wait_for(|state| state.exit().is_some()).await;
        let exit = state.ok().and_then(|state| state.exit().cloned());
        // The sender is here, so it can't be gone.
        exit.unwrap_or_else(|| Exit {
            status: 255,
            at: now(),
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn each_state_allows_what_fits_it() {
        use Action::{Control, Delete, Exec, Pause, Resume, Start};
        let stopped = State::Stopped(Exit {
            status: 137,
            at: Timestamp::default(),
        });
        let table = [
            (State::Created, vec![Start, Delete, Control]),
            (State::Running, vec![Pause, Control, Exec]),
            (State::Paused, vec![Resume, Control, Exec]),
            (stopped, vec![Delete]),
        ];
        for (state, fits) in table {
            for action in [Start, Pause, Resume, Delete, Control, Exec] {
                let allowed = state.allows(action);
                assert_eq!(
                    allowed.is_ok(),
                    fits.contains(&action),
                    "{state:?} {action:?}"
                );
                if let Err(error) = allowed {
                    let gone = action == Control;
                    let code = if gone {
                        Code::NotFound
                    } else {
                        Code::FailedPrecondition
                    };
                    assert_eq!(error.code, code);
                }
            }
        }
    }
}
