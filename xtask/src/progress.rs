//! Progress on stderr: one line per step with how long it took, a spinner while it runs on a
//! terminal.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};

/// Runs `work` as a step called `what`, shown while it runs and with its duration at the end.
///
/// # Errors
/// Whatever `work` returns; the step is then shown as failed.
pub fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let started = Instant::now();
    let bar = spinner(what);
    let result = work();
    bar.finish_and_clear();
    let mark = if result.is_ok() { "ok" } else { "FAILED" };
    note(&format!(
        "{what} … {mark} ({:.1} s)",
        started.elapsed().as_secs_f64()
    ));
    result
}

/// Writes one line for the person at the terminal. A closed stderr is no reason to stop.
pub fn note(text: &str) {
    let _ = writeln!(std::io::stderr(), "xtask: {text}");
}

fn spinner(what: &str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{spinner} {msg} ({elapsed})")
        .unwrap_or_else(|_| ProgressStyle::default_spinner());
    let bar = ProgressBar::new_spinner()
        .with_style(style)
        .with_message(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}
