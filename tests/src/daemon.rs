//! Programs in the background that need nobody: they go on in a saved machine that is resumed.

use anyhow::Result;

use crate::command::Command;
use crate::host::Host;

/// What it says goes to `NAME.log`, and its process ID to `NAME.pid`.
const START: &str =
    r#"name=$0; setsid "$@" >> "$name.log" 2>&1 < /dev/null & echo $! > "$name.pid""#;

/// Sends it a signal, and waits until it is gone or nobody's any more but its parent's.
const END: &str = r#"pid=$(cat "$0.pid"); kill -"$1" "$pid"
for i in $(seq 100); do
    state=$(sed 's/.*) //' "/proc/$pid/stat" 2> /dev/null) || exit 0
    case $state in Z*) exit 0; esac; sleep 0.1
done; exit 1"#;

/// A program in the background of a host, in the test's directory.
#[derive(Debug)]
pub(crate) struct Daemon<'h> {
    host: &'h Host,
    name: &'static str,
    command: Command,
}

impl<'h> Daemon<'h> {
    /// It may run already.
    pub(crate) const fn new(host: &'h Host, name: &'static str, command: Command) -> Self {
        Self {
            host,
            name,
            command,
        }
    }

    /// Starts it.
    pub(crate) fn start(&self) -> Result<()> {
        let start = Command::new("bash").args(["-c", START, self.name]);
        self.host.ok(&start.wrapping(&self.command))?;
        Ok(())
    }

    /// Ends it by a signal.
    pub(crate) fn end(&self, signal: &str) -> Result<()> {
        let end = Command::new("bash").args(["-c", END, self.name, signal]);
        self.host.ok(&end)?;
        Ok(())
    }
}
