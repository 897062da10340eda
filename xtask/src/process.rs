//! Running other programs: quiet when they succeed, all they said when they fail.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Runs `command` to its end and returns its stdout.
///
/// # Errors
/// It cannot be started, or fails: the error then holds what it wrote.
pub fn output(command: &mut Command) -> Result<String> {
    let shown = shown(command);
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("Cannot start {shown}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    bail!(
        "{shown} failed ({}):\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Runs `command` with this process's own stdin, stdout and stderr.
///
/// # Errors
/// It cannot be started, or fails.
pub fn run(command: &mut Command) -> Result<()> {
    let shown = shown(command);
    let status = command
        .status()
        .with_context(|| format!("Cannot start {shown}"))?;
    if status.success() {
        Ok(())
    } else {
        bail!("{shown} failed ({status})")
    }
}

/// The command as a person would type it, cut when it is long.
fn shown(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
        if text.len() > 300 {
            return text.chars().take(300).chain("…".chars()).collect();
        }
    }
    text
}
