//! A command and its outcome, the same for this machine and the lab.

use anyhow::{Result, ensure};
use xtask::lab::WindowSize;

/// The size of a terminal to begin with.
pub(crate) const TERMINAL: WindowSize = WindowSize {
    rows: 24,
    columns: 80,
};

/// A command for a [`crate::Host`].
#[derive(Debug, Clone)]
pub struct Command {
    pub(crate) argv: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
    pub(crate) terminal: bool,
}

impl Command {
    /// A program, looked up in the host's `PATH`.
    #[must_use]
    pub fn new(program: impl Into<String>) -> Self {
        Self {
            argv: vec![program.into()],
            env: Vec::new(),
            terminal: false,
        }
    }

    /// A script for `bash`, which ends at the first command that fails.
    #[must_use]
    pub fn script(script: impl Into<String>) -> Self {
        Self::new("bash").args(["-ec"]).args([script.into()])
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: Into<String>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.argv.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Adds all of another command as arguments.
    #[must_use]
    pub fn wrapping(mut self, inner: &Self) -> Self {
        self.argv.extend(inner.argv.iter().cloned());
        self.env.extend(inner.env.iter().cloned());
        self
    }

    /// Gives it a terminal of 24 rows and 80 columns, on which stdout and stderr become one.
    #[must_use]
    pub fn on_terminal(mut self) -> Self {
        self.terminal = true;
        self
    }
}

/// How a command ended, and what it wrote.
#[derive(Debug, Clone)]
pub struct Output {
    /// The exit code; 128 + N when it was ended by signal N.
    pub code: i32,
    /// All of its stdout.
    pub stdout: String,
    /// All of its stderr.
    pub stderr: String,
}

impl Output {
    /// Checks the exit code, and gives what was written to stdout without white space around it.
    ///
    /// # Errors
    /// It is another one.
    pub fn expect_code(&self, code: i32) -> Result<&str> {
        let Self { stdout, stderr, .. } = self;
        ensure!(
            self.code == code,
            "Ended with exit code {} in place of {code}.\nstdout: {stdout}\nstderr: {stderr}",
            self.code
        );
        Ok(stdout.trim())
    }
}
