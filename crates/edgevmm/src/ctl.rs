//! `edgevmm-ctl`: this program under another name, as a pod's shim runs it for `kubectl exec POD --
//! edgevmm-ctl ...`. It does to the pod's own machine what the commands of `edgevmm` do, and to no
//! other machine. Nothing that it takes names a file of the node.

use std::ffi::OsStr;
use std::path::Path;

use anyhow::anyhow;
use clap::{Args, CommandFactory, Parser, Subcommand};
use edgevmm_config::ByteSize;

use crate::agent::args::{AgentArgs, AgentRequest, KeysVerb, Verb as AgentVerb};
use crate::cli::{ConsoleArgs, ConsoleFlags, InspectArgs, JsonArg, MemoryArgs, StopArgs};
use crate::console::AtEnd;
use crate::exit::{Failure, Outcome};
use crate::{agent, client, console, manage, wrong_usage};

/// The name.
const NAME: &str = "edgevmm-ctl";
/// Environment variable with the name of the machine.
const MACHINE: &str = "EDGEVMM_MACHINE";

/// Environment variable that says that there is input, which ends when the client leaves.
const INPUT: &str = "EDGEVMM_INPUT";

/// Controls the machine of a pod.
#[derive(Debug, Parser)]
#[command(name = NAME, version, after_help = HELP, max_term_width = 100)]
struct Ctl {
    #[command(subcommand)]
    verb: Verb,
}

/// The verbs.
#[derive(Debug, Subcommand)]
enum Verb {
    /// Attach the terminal to the console
    #[command(after_help = CONSOLE)]
    Console(ConsoleFlags),
    /// Describe the machine and what it is doing
    Inspect(JsonArg),
    /// Halt the vCPUs; whoever asks the guest for something waits meanwhile, probes too
    Pause,
    /// Let the vCPUs go on
    Resume,
    /// Reset the machine, as its reset button would
    Reset,
    /// Press the power button; the pod's restartPolicy says what comes after the end
    Stop(StopFlags),
    /// Show how the memory is used, or have the guest do with less
    Memory(MemoryFlags),
    /// Ask the guest agent: describe the guest, run programs, freeze file systems
    Agent(Box<AgentRequest>),
}

/// What `stop` takes.
#[derive(Debug, Args)]
struct StopFlags {
    /// Seconds until the machine is ended by force [default: a day]
    #[arg(long, short, value_name = "SECONDS")]
    timeout: Option<u32>,
}

/// What `memory` takes.
#[derive(Debug, Args)]
struct MemoryFlags {
    /// Memory that the guest is to do with from now on, like 512M
    #[arg(long, value_name = "SIZE")]
    target: Option<ByteSize>,
    #[command(flatten)]
    json: JsonArg,
}

/// Whether this program was started under the name.
pub fn is_meant() -> bool {
    let called = std::env::args_os().next();
    called.is_some_and(|name| Path::new(&name).file_name() == Some(OsStr::new(NAME)))
}

/// Does what the command line says.
///
/// # Errors
///
/// When there is no machine, or it does not do it.
pub fn run() -> Outcome {
    match Ctl::try_parse() {
        Ok(ctl) => dispatch(ctl.verb),
        Err(error) => wrong_usage(&error, &Ctl::command()),
    }
}

fn dispatch(verb: Verb) -> Outcome {
    let name = std::env::var(MACHINE).map_err(|_| {
        Failure::usage(anyhow!(
            "{NAME} is for pods, and {MACHINE} names no machine"
        ))
        .hint("use `edgevmm` itself on the node")
    })?;
    client(act(name, verb))
}

async fn act(name: String, verb: Verb) -> Outcome {
    match verb {
        Verb::Console(flags) => {
            // Of a client that has left nothing else is heard.
            let at_end = match std::env::var_os(INPUT) {
                Some(_) => AtEnd::Leave,
                None => AtEnd::Stay,
            };
            console::run(ConsoleArgs { name, flags }, at_end).await
        }
        Verb::Inspect(json) => manage::inspect(&InspectArgs { name, json }).await,
        Verb::Pause => manage::pause(&[name]).await,
        Verb::Resume => manage::resume(&[name]).await,
        Verb::Reset => manage::reset(&[name]).await,
        Verb::Stop(StopFlags { timeout }) => {
            let names = vec![name];
            manage::stop(&StopArgs { names, timeout }).await
        }
        Verb::Memory(MemoryFlags { target, json }) => {
            manage::memory(&MemoryArgs { name, target, json }).await
        }
        Verb::Agent(request) if names_a_file(&request) => {
            let error = anyhow!("--file would be a file of the node");
            Err(Failure::usage(error).hint("give the keys as words"))
        }
        Verb::Agent(request) => {
            let request = *request;
            agent::run(AgentArgs { name, request }).await
        }
    }
}

fn names_a_file(request: &AgentRequest) -> bool {
    let AgentVerb::SshKeys { verb } = &request.verb else {
        return false;
    };
    match verb {
        KeysVerb::Add(keys) | KeysVerb::Remove(keys) => keys.file.is_some(),
        KeysVerb::List { .. } => false,
    }
}

const HELP: &str = "\
Examples:
  kubectl exec POD -- edgevmm-ctl inspect
  kubectl exec -it POD -- edgevmm-ctl console
  kubectl exec POD -- edgevmm-ctl agent network --json
  kubectl exec POD -- uname -a          a program in the guest, by its agent
Without an agent in the guest (apt install qemu-guest-agent) there is all but `agent` and programs.

Exit codes: 0 success, 1 the machine or its agent refused, 2 wrong usage; programs in the guest have
their own (`edgevmm-ctl agent exec --help`).";

const CONSOLE: &str = "\
Use it with `kubectl exec -it`. Keys: Ctrl-A x detaches, Ctrl-A h shows help. With `-i` alone it leaves
when its input has ended and the guest has said nothing for two seconds; without, it stays.";

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn parse(line: &str) -> Result<Ctl, clap::Error> {
        Ctl::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn no_verb_takes_the_name_of_a_machine_or_a_file() {
        for line in [
            "pause other",
            "inspect other",
            "stop other",
            "console other",
            "run x.qcow2",
        ] {
            parse(&format!("edgevmm-ctl {line}")).unwrap_err();
        }
        let line = "edgevmm-ctl agent ssh-keys add root --file /etc/shadow";
        let Verb::Agent(request) = parse(line).unwrap().verb else {
            panic!("not the agent's");
        };
        assert!(names_a_file(&request));
    }

    #[test]
    fn programs_keep_their_flags() {
        let line = "edgevmm-ctl agent exec -- ls --all -l";
        let Verb::Agent(request) = parse(line).unwrap().verb else {
            panic!("not the agent's");
        };
        let AgentVerb::Exec(program) = request.verb else {
            panic!("no program");
        };
        assert_eq!(program.command, ["ls", "--all", "-l"]);
    }
}
