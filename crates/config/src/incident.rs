//! What is to be done when a guest can't go on by itself.

use serde::{Deserialize, Serialize};

/// What to do when the guest's kernel has told its panic.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PanicAction {
    /// Tell it, and let the guest do what it does then.
    #[default]
    Report,
    /// Pause the machine, so that somebody can look at it.
    Pause,
    /// Reset the machine.
    Reset,
    /// End the machine as crashed.
    End,
}

/// What to do when the guest has let its watchdog run out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WatchdogAction {
    /// Reset the machine.
    #[default]
    Reset,
    /// Press the power button, and end the machine by force when that does not help in time.
    Shutdown,
    /// End the machine as crashed.
    End,
    /// Pause the machine, so that somebody can look at it.
    Pause,
    /// Tell it only.
    Report,
}

/// A watchdog: a device that the guest has to call on in time, once it has begun to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WatchdogConfig {
    /// What to do when it does not.
    pub action: WatchdogAction,
}
