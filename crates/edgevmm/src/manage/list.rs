//! `ps` and `inspect`.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use edgevmm_api::v1::{AgentState, InspectRequest, InspectResponse, State};
use edgevmm_api::{ExitReason, ExitRecord, MachineDir, RuntimeDir};
use edgevmm_config::VmConfig;
use serde::Serialize;

use super::open;
use crate::cli::{InspectArgs, PsArgs};
use crate::exit::{Failure, Outcome, words};

/// How long a VMM may take to describe its machine.
const ANSWER: Duration = Duration::from_secs(2);

/// What is known of a machine.
#[derive(Debug, Serialize)]
struct Machine {
    name: String,
    state: String,
    /// Why it is in that state.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<i32>,
    /// Seconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    started: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    uptime_seconds: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    resets: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    console_pty: Option<String>,
    /// Whether a guest agent is there to be asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    agent: Option<&'static str>,
    /// What its sandbox consists of.
    #[serde(skip_serializing_if = "Option::is_none")]
    sandbox: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    exit: Option<ExitRecord>,
    #[serde(skip_serializing_if = "Option::is_none")]
    config: Option<VmConfig>,
}

impl Machine {
    /// Asks the VMM, or else looks at what it left.
    async fn read(dir: &MachineDir) -> Result<Self, Failure> {
        let pid = dir.pid().map_err(Failure::host)?;
        let alive = dir.is_alive().map_err(Failure::host)?;
        let config = dir.config_json().ok().flatten();
        let mut machine = Self {
            name: dir.name().to_owned(),
            state: "starting".to_owned(),
            reason: None,
            pid,
            started: None,
            uptime_seconds: None,
            resets: None,
            console_pty: None,
            agent: None,
            sandbox: None,
            exit: None,
            config: config.and_then(|text| serde_json::from_str(&text).ok()),
        };
        if !alive {
            machine.exit = dir.exit().map_err(Failure::host)?;
            let reason = machine.exit.as_ref().map(|exit| exit.reason);
            machine.state = ended_state(reason).to_owned();
        } else if let Some(answer) = ask(dir).await {
            machine.take(answer);
        }
        Ok(machine)
    }

    fn take(&mut self, answer: InspectResponse) {
        self.state = live_state(answer.state()).to_owned();
        self.agent = agent_state(answer.agent());
        self.reason = Some(answer.reason).filter(|reason| !reason.is_empty());
        self.started = answer.start_time.map(|time| time.seconds);
        self.uptime_seconds = answer.uptime.map(|uptime| uptime.seconds);
        self.resets = Some(answer.resets);
        self.console_pty = Some(answer.console_pty).filter(|path| !path.is_empty());
        self.sandbox = Some(answer.sandbox).filter(|sandbox| !sandbox.is_empty());
        self.exit = answer.exit.map(ExitRecord::from);
    }

    fn row(&self) -> [String; 7] {
        let config = self.config.as_ref();
        let known = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        [
            self.name.clone(),
            self.state.clone(),
            known(self.pid.map(|pid| pid.to_string())),
            known(self.uptime_seconds.map(duration)),
            known(config.map(|config| config.cpus.count.to_string())),
            known(config.map(|config| config.memory.size.to_string())),
            self.reason.clone().unwrap_or_default(),
        ]
    }
}

async fn ask(dir: &MachineDir) -> Option<InspectResponse> {
    let answer = async {
        let mut client = edgevmm_api::connect(&dir.socket()).await.ok()?;
        Some(client.inspect(InspectRequest {}).await.ok()?.into_inner())
    };
    tokio::time::timeout(ANSWER, answer).await.ok().flatten()
}

const fn live_state(state: State) -> &'static str {
    match state {
        State::Unspecified => "unknown",
        State::Starting => "starting",
        State::Running => "running",
        State::Paused => "paused",
        State::Stopping => "stopping",
        State::Stopped => "stopped",
    }
}

const fn agent_state(state: AgentState) -> Option<&'static str> {
    match state {
        AgentState::Unspecified => None,
        AgentState::Off => Some("off"),
        AgentState::Disconnected => Some("disconnected"),
        AgentState::Connected => Some("connected"),
        AgentState::Frozen => Some("frozen"),
    }
}

const fn ended_state(reason: Option<ExitReason>) -> &'static str {
    match reason {
        // Its words are a sentence; a table wants one word.
        Some(ExitReason::StopTimeout) => "killed",
        Some(reason) => words(reason),
        None => "lost",
    }
}

/// A duration in its two largest units.
fn duration(seconds: i64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{}s", seconds % 60),
        (0, _, _) => format!("{hours}h{}m", minutes % 60),
        _ => format!("{days}d{}h", hours % 24),
    }
}

/// Lists machines.
///
/// # Errors
///
/// When their folder can't be read.
pub async fn ps(args: &PsArgs) -> Outcome {
    let runtime = RuntimeDir::from_env().map_err(Failure::host)?;
    let mut machines = Vec::new();
    for dir in runtime.list().map_err(Failure::host)? {
        let machine = Machine::read(&dir).await?;
        if args.all || machine.pid.is_some() {
            machines.push(machine);
        }
    }
    if args.json.json {
        print_json(&machines)?;
    } else {
        print!("{}", table(&machines));
    }
    Ok(ExitCode::SUCCESS)
}

fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    println!(
        "{}",
        serde_json::to_string_pretty(value).context("Can't write JSON")?
    );
    Ok(())
}

fn table(machines: &[Machine]) -> String {
    let troubled = machines.iter().any(|machine| machine.reason.is_some());
    let reason = if troubled { "REASON" } else { "" };
    let head = ["NAME", "STATE", "PID", "UPTIME", "CPUS", "MEMORY", reason];
    let head = head.map(ToOwned::to_owned);
    let rows = std::iter::once(head).chain(machines.iter().map(Machine::row));
    crate::table::table(&rows.collect::<Vec<_>>())
}

/// Describes a machine.
///
/// # Errors
///
/// When there is none.
pub async fn inspect(args: &InspectArgs) -> Outcome {
    let machine = Machine::read(&open(&args.name)?).await?;
    if args.json.json {
        print_json(&machine)?;
    } else {
        print!(
            "{}",
            edgevmm_config::to_yaml(&machine)
                .map_err(anyhow::Error::msg)
                .context("Can't write YAML")?
        );
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_two_units() {
        let of = [(5, "5s"), (65, "1m5s"), (3660, "1h1m"), (90_000, "1d1h")];
        for (seconds, text) in of {
            assert_eq!(duration(seconds), text);
        }
    }

    #[test]
    fn an_empty_table_has_its_head() {
        assert_eq!(table(&[]), "NAME   STATE   PID   UPTIME   CPUS   MEMORY\n");
    }
}
