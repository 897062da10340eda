//! `agent NAME exec`: a program in the guest as if it ran here.

use std::io::{self, IsTerminal, Read, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, anyhow};
use edgevmm_api::v1::exec_response::End;
use edgevmm_api::v1::{ExecRequest, ExecResponse, PingRequest};
use serde_json::json;
use tonic::Code;

use super::args::ExecArgs;
use super::show::Show;
use super::{connect, refused, time};
use crate::exit::{Failure, Outcome};
use crate::image::report::{broken_pipe_is_fine, print_json};

/// Exit code when it has not ended in time, as of timeout(1).
const TIMEOUT: u8 = 124;
/// Exit code when it could not be run, as of container tools.
const FAILED: u8 = 125;
/// Exit code of a program that a signal ended, less the signal's number.
const SIGNAL: u8 = 128;

/// Most standard input, in bytes.
const MAX_STDIN: u64 = 2 << 20;

/// Runs a program to its end.
///
/// # Errors
///
/// When that is not possible.
pub async fn run(name: &str, args: ExecArgs, timeout: Option<Duration>, show: Show) -> Outcome {
    let answer = ask(name, args, timeout).await?;
    let written = if show.json {
        print_json(&json(&answer))
    } else {
        pass_on(&answer)
    };
    written.map_err(|error| Failure::from(error).code(FAILED))?;
    Ok(ExitCode::from(code(answer.end)))
}

async fn ask(
    name: &str,
    args: ExecArgs,
    timeout: Option<Duration>,
) -> Result<ExecResponse, Failure> {
    let connected = connect(name).await;
    let mut agent = connected.map_err(|failure| failure.code(FAILED))?;
    let mut stdin = Vec::new();
    if !args.no_stdin && !io::stdin().is_terminal() {
        // Nobody has to type for an agent that is not there.
        let ping = agent.ping(PingRequest::default()).await;
        ping.map_err(|status| refused(name, &status).code(FAILED))?;
        stdin = read_stdin().map_err(|failure| failure.code(FAILED))?;
    }
    let request = ExecRequest {
        timeout: time(timeout),
        command: args.command,
        env: args.env,
        stdin,
    };
    let answer = agent.exec(request).await;
    let answer = answer.map_err(|status| {
        let code = match status.code() {
            Code::DeadlineExceeded => TIMEOUT,
            _ => FAILED,
        };
        refused(name, &status).code(code)
    })?;
    Ok(answer.into_inner())
}

fn read_stdin() -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    let mut input = io::stdin().lock().take(MAX_STDIN + 1);
    input
        .read_to_end(&mut bytes)
        .context("Can't read standard input")?;
    if bytes.len() as u64 > MAX_STDIN {
        let error = anyhow!("There are more than 2 MiB of standard input");
        return Err(Failure::usage(error).hint("take a disk or the network to the guest"));
    }
    Ok(bytes)
}

fn pass_on(answer: &ExecResponse) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    broken_pipe_is_fine(out.write_all(&answer.stdout).and_then(|()| out.flush()))?;
    broken_pipe_is_fine(io::stderr().lock().write_all(&answer.stderr))
}

fn json(answer: &ExecResponse) -> serde_json::Value {
    let (code, signal) = match answer.end {
        Some(End::Signal(signal)) => (None, Some(signal)),
        Some(End::Code(code)) => (Some(code), None),
        None => (None, None),
    };
    let text = |bytes| String::from_utf8_lossy(bytes);
    json!({
        "code": code,
        "signal": signal,
        "stdout": text(&answer.stdout),
        "stderr": text(&answer.stderr),
    })
}

/// The exit code for a program that ended so. Those of Windows may be larger than ours.
fn code(end: Option<End>) -> u8 {
    match end {
        Some(End::Code(code)) => u8::try_from(code).unwrap_or(u8::MAX),
        Some(End::Signal(signal)) => SIGNAL.saturating_add(u8::try_from(signal).unwrap_or(u8::MAX)),
        None => FAILED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_those_of_a_shell() {
        let of = |end| code(Some(end));
        assert_eq!(of(End::Code(0)), 0);
        assert_eq!(of(End::Code(7)), 7);
        assert_eq!(of(End::Code(0xc000_0005)), 255);
        assert_eq!(of(End::Signal(9)), 137);
        assert_eq!(of(End::Signal(i64::MAX)), 255);
    }
}
