//! Frozen file systems, and that they never stay so: a guest that can't write is of no use, and
//! whoever froze it may have died meanwhile.

use std::sync::Arc;
use std::time::Duration;

use edgevmm_agent::{AnswerError, Command};
use edgevmm_devices::bus::lock;
use tokio::time::{sleep, timeout};

use super::{Agent, AgentError};

/// How long the agent may take when nobody waits for it.
const PATIENCE: Duration = Duration::from_secs(60);
/// How soon it is asked again.
const AGAIN: Duration = Duration::from_secs(5);

impl Agent {
    /// Freezes the file systems for `thaw_after` at most, and at most until `stopping`; gives their
    /// number.
    pub(super) async fn freeze<F>(
        self: &Arc<Self>,
        time: Duration,
        thaw_after: Duration,
        stopping: impl Fn() -> F,
    ) -> Result<u32, AgentError>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        if self.is_frozen() {
            return Err(AgentError::Frozen);
        }
        // From the start: they may be frozen while nobody hears of it.
        self.thaw_in(time.saturating_add(thaw_after), stopping());
        let count = self.ask(&Command::Freeze, time).await;
        match &count {
            Ok(_) => self.thaw_in(thaw_after, stopping()),
            Err(AgentError::NotConnected | AgentError::Answer(AnswerError::Refused { .. })) => {
                self.stop_waiting();
            }
            Err(_) => {}
        }
        count
    }

    /// Thaws the file systems; gives their number.
    pub(super) async fn thaw(&self, time: Duration) -> Result<u32, AgentError> {
        let count = self.ask(&Command::Thaw, time).await?;
        self.stop_waiting();
        Ok(count)
    }

    /// Whether somebody has frozen the file systems through this client.
    pub fn is_frozen(&self) -> bool {
        lock(&self.thaw).is_some()
    }

    fn thaw_in(
        self: &Arc<Self>,
        time: Duration,
        stopping: impl Future<Output = ()> + Send + 'static,
    ) {
        let waiting = wait_and_thaw(Arc::clone(self), stopping, time);
        let waiting = tokio::spawn(waiting).abort_handle();
        if let Some(former) = lock(&self.thaw).replace(waiting) {
            former.abort();
        }
    }

    fn stop_waiting(&self) {
        if let Some(waiting) = lock(&self.thaw).take() {
            waiting.abort();
        }
    }
}

/// Thaws when the time is over, and before the machine stops: a guest that can't write can't power
/// off.
async fn wait_and_thaw(agent: Arc<Agent>, stopping: impl Future<Output = ()>, time: Duration) {
    let too_long = timeout(time, stopping).await.is_err();
    let mut told = false;
    loop {
        match agent.ask::<u32>(&Command::Thaw, PATIENCE).await {
            Ok(_) if too_long => {
                tracing::warn!("The guest's file systems were frozen for too long");
            }
            // A guest that started anew has none frozen.
            Ok(_) | Err(AgentError::NotConnected) => {}
            Err(error) => {
                if !told {
                    tracing::warn!("The guest's file systems stay frozen for now: {error}");
                    told = true;
                }
                sleep(AGAIN).await;
                continue;
            }
        }
        // The task itself is what is in there.
        lock(&agent.thaw).take();
        return;
    }
}
