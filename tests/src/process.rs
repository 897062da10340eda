//! A command that runs while the test goes on.

use std::time::Duration;

use anyhow::{Context, Result};
use xtask::lab::{self, Lab, WindowSize};

use crate::command::Output;
use crate::host::tail;
use crate::native;

/// A command running on a host. Dropping it ends it, after its last words were printed for the
/// reader of a failure.
#[derive(Debug)]
pub struct Process<'h> {
    name: String,
    running: Running<'h>,
}

#[derive(Debug)]
enum Running<'h> {
    Native(native::Running),
    Lab(&'h Lab, lab::Running),
}

impl<'h> Process<'h> {
    pub(crate) const fn native(name: String, running: native::Running) -> Self {
        let running = Running::Native(running);
        Self { name, running }
    }

    pub(crate) const fn in_lab(name: String, lab: &'h Lab, running: lab::Running) -> Self {
        let running = Running::Lab(lab, running);
        Self { name, running }
    }

    /// Sends text to its stdin.
    ///
    /// # Errors
    /// It takes none.
    pub fn write(&self, text: &str) -> Result<()> {
        match &self.running {
            Running::Native(running) => running.write(text.as_bytes()),
            Running::Lab(_, running) => running.write(text.as_bytes()),
        }
    }

    /// Ends its stdin.
    ///
    /// # Errors
    /// The lab ended.
    pub fn close_stdin(&self) -> Result<()> {
        match &self.running {
            Running::Native(running) => {
                running.close_stdin();
                Ok(())
            }
            Running::Lab(_, running) => running.close_stdin(),
        }
    }

    /// Sends it a signal, by number.
    ///
    /// # Errors
    /// It has ended.
    pub fn signal(&self, number: i32) -> Result<()> {
        match &self.running {
            Running::Native(running) => running.signal(number),
            Running::Lab(_, running) => running.signal(number),
        }
    }

    /// Changes the size of its terminal.
    ///
    /// # Errors
    /// It has none, or has ended.
    pub fn resize(&self, size: WindowSize) -> Result<()> {
        match &self.running {
            Running::Native(running) => running.resize(size),
            Running::Lab(_, running) => running.resize(size),
        }
    }

    /// What it wrote to its stdout so far.
    #[must_use]
    pub fn stdout(&self) -> String {
        match &self.running {
            Running::Native(running) => running.stdout(),
            Running::Lab(_, running) => running.stdout(),
        }
    }

    /// Waits until `text` is in its stdout after the first `skip` bytes; returns the byte after it.
    ///
    /// # Errors
    /// It ends without, or the time is over.
    pub fn wait_for_stdout(&self, text: &str, skip: usize, timeout: Duration) -> Result<usize> {
        match &self.running {
            Running::Native(running) => running.wait_for_stdout(text, skip, timeout),
            Running::Lab(_, running) => running.wait_for_stdout(text, skip, timeout),
        }
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// The time is over first.
    pub fn wait(&self, timeout: Duration) -> Result<Output> {
        let output = match &self.running {
            Running::Native(running) => running.wait(timeout),
            Running::Lab(lab, running) => lab.wait(running, Some(timeout)).map(
                |lab::Output {
                     code,
                     stdout,
                     stderr,
                 }| Output {
                    code,
                    stdout,
                    stderr,
                },
            ),
        };
        output.with_context(|| format!("While waiting for the end of `{}`", self.name))
    }
}

impl Drop for Process<'_> {
    fn drop(&mut self) {
        let said = self.stdout();
        eprintln!(
            "--- the end of what `{}` wrote:\n{}\n---",
            self.name,
            tail(&said, 3000)
        );
    }
}
