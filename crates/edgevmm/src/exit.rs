//! How this program ends: exit codes and messages of failures.

use std::fmt;
use std::process::ExitCode;

use edgevmm_api::{ExitReason, ExitRecord};
use serde::{Deserialize, Serialize};

use crate::term;

/// Exit code of a failure of the VMM or the host.
const HOST: u8 = 1;
/// Exit code of wrong usage, as clap has it too.
const USAGE: u8 = 2;
/// Exit code for an image that is damaged, or is not the same as another one.
pub const DIFFERENT: u8 = 5;
/// Exit code for an image that is sound, but for space that nothing uses.
pub const LEAKS: u8 = 6;
/// Exit code of a program that a signal ended, less the signal's number.
const SIGNAL: u8 = 128;

/// What a command comes to.
pub type Outcome = Result<ExitCode, Failure>;

/// A failure to tell the user about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    code: u8,
    message: String,
    hint: Option<String>,
}

impl Failure {
    /// The user asked for something wrong.
    pub fn usage(error: impl Into<anyhow::Error>) -> Self {
        Self {
            code: USAGE,
            message: chain(&error.into()),
            hint: None,
        }
    }

    /// The VMM or the host failed.
    pub fn host(error: impl Into<anyhow::Error>) -> Self {
        Self {
            code: HOST,
            message: chain(&error.into()),
            hint: None,
        }
    }

    /// A signal ended it.
    pub fn signal(error: impl Into<anyhow::Error>, signal: i32) -> Self {
        Self {
            code: u8::try_from(signal).map_or(HOST, |signal| SIGNAL.saturating_add(signal)),
            ..Self::host(error)
        }
    }

    /// Ends the program with another code, where a command has its own.
    #[must_use]
    pub fn code(self, code: u8) -> Self {
        Self { code, ..self }
    }

    /// Adds what the user can do.
    #[must_use]
    pub fn hint(self, hint: impl Into<String>) -> Self {
        Self {
            hint: Some(hint.into()),
            ..self
        }
    }

    /// The exit code.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.code)
    }
}

/// The message with its causes, on one line.
fn chain(error: &anyhow::Error) -> String {
    format!("{error:#}").replace('\n', " ")
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::host(error)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "edgevmm: {}", self.message)?;
        self.hint
            .iter()
            .try_for_each(|hint| write!(f, "\nhint: {hint}"))
    }
}

/// The exit code for a guest that ended so.
pub fn code(reason: ExitReason) -> ExitCode {
    ExitCode::from(match reason {
        ExitReason::PowerOff => 0,
        ExitReason::VmmError => HOST,
        ExitReason::GuestCrash => 3,
        ExitReason::Killed | ExitReason::StopTimeout => 4,
    })
}

/// A few words on how a guest ended.
pub const fn words(reason: ExitReason) -> &'static str {
    match reason {
        ExitReason::PowerOff => "powered off",
        ExitReason::Killed => "killed",
        ExitReason::StopTimeout => "killed as it did not power off in time",
        ExitReason::GuestCrash => "crashed",
        ExitReason::VmmError => "failed",
    }
}

/// Tells on standard error how a guest ended, unless it powered off, and gives the exit code.
pub fn report(name: &str, record: &ExitRecord) -> ExitCode {
    let how = words(record.reason);
    match record.reason {
        ExitReason::PowerOff => {}
        ExitReason::Killed | ExitReason::StopTimeout => {
            term::tell(format_args!("edgevmm: {name} {how}"));
        }
        ExitReason::GuestCrash | ExitReason::VmmError => {
            let message = &record.message;
            term::tell(format_args!("edgevmm: {name} {how}: {message}"));
        }
    }
    code(record.reason)
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn failures_are_a_line_and_a_hint() {
        let error = anyhow!("why").context("what");
        let failure = Failure::usage(error);
        assert_eq!(failure.to_string(), "edgevmm: what: why");
        assert_eq!(
            failure.hint("do").to_string(),
            "edgevmm: what: why\nhint: do"
        );
    }
}
