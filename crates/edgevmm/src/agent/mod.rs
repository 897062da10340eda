//! `agent`: what a machine's guest agent can do.

pub mod args;
mod exec;
mod show;

use std::fs;
use std::process::ExitCode;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context, anyhow};
use edgevmm_api::Agent;
use edgevmm_api::v1::{
    AddSshKeysRequest, FreezeRequest, GetFileSystemsRequest, GetFreezeStatusRequest,
    GetInfoRequest, GetInterfacesRequest, GetOsInfoRequest, GetTimeRequest, GetUsersRequest,
    ListSshKeysRequest, PingRequest, RemoveSshKeysRequest, SetTimeRequest, ShutdownMode,
    ShutdownRequest, ThawRequest,
};
use tonic::{Code, Response, Status};

use crate::exit::{Failure, Outcome};
use crate::manage;
use args::{AgentArgs, KeysArgs, KeysVerb, Verb};
use show::Show;

/// Asks the agent for one thing.
///
/// # Errors
///
/// When there is no machine or agent, or it does not do it.
pub async fn run(args: AgentArgs) -> Outcome {
    let AgentArgs { name, request } = args;
    let show = Show { json: request.json };
    let timeout = request.timeout.map(seconds);
    match request.verb {
        Verb::Exec(program) => exec::run(&name, program, timeout, show).await,
        verb => {
            let mut agent = connect(&name).await?;
            match ask(&mut agent, verb, timeout, show).await {
                Ok(()) => Ok(ExitCode::SUCCESS),
                Err(Failed::Call(status)) => Err(refused(&name, &status)),
                Err(Failed::Here(failure)) => Err(failure),
            }
        }
    }
}

/// Why there is nothing to show.
enum Failed {
    Call(Status),
    Here(Failure),
}

impl From<Status> for Failed {
    fn from(status: Status) -> Self {
        Self::Call(status)
    }
}

impl From<anyhow::Error> for Failed {
    fn from(error: anyhow::Error) -> Self {
        Self::Here(error.into())
    }
}

async fn connect(name: &str) -> Result<Agent, Failure> {
    let (_, agent) = manage::reach(name, edgevmm_api::connect_agent).await?;
    Ok(agent)
}

fn refused(name: &str, status: &Status) -> Failure {
    let text = match status.code() {
        // A VMM of before there were agents.
        Code::Unimplemented if status.message().is_empty() => "the VMM is older than this program",
        _ => status.message(),
    };
    Failure::host(anyhow!("{name}: {text}"))
}

/// A time as requests have it.
fn time<T>(time: Option<Duration>) -> Option<T>
where
    Duration: TryInto<T>,
{
    time?.try_into().ok()
}

fn seconds(seconds: u32) -> Duration {
    Duration::from_secs(seconds.into())
}

/// Makes a call, and gives its answer.
macro_rules! call {
    ($agent:ident.$method:ident($request:expr)) => {
        $agent.$method($request).await.map(Response::into_inner)?
    };
}

async fn ask(
    agent: &mut Agent,
    verb: Verb,
    timeout: Option<Duration>,
    show: Show,
) -> Result<(), Failed> {
    let timeout = time(timeout);
    match verb {
        Verb::Ping { wait } => {
            call!(agent.ping(PingRequest { timeout, wait }));
            show.done("The guest agent answers")?;
        }
        Verb::Info => show.info(&call!(agent.get_info(GetInfoRequest { timeout })))?,
        Verb::Osinfo => show.os(call!(agent.get_os_info(GetOsInfoRequest { timeout })))?,
        Verb::Network => {
            let found = call!(agent.get_interfaces(GetInterfacesRequest { timeout }));
            show.interfaces(&found.interfaces)?;
        }
        Verb::Users => show.users(&call!(agent.get_users(GetUsersRequest { timeout })).users)?,
        Verb::Filesystems => {
            let found = call!(agent.get_file_systems(GetFileSystemsRequest { timeout }));
            show.file_systems(&found.file_systems)?;
        }
        Verb::GetTime => {
            let told = call!(agent.get_time(GetTimeRequest { timeout })).time;
            show.time(told.map(|time| (time.seconds, time.nanos)))?;
        }
        Verb::SetTime { time } => {
            let time = time.map(|time| (UNIX_EPOCH + seconds(time)).into());
            call!(agent.set_time(SetTimeRequest { timeout, time }));
            show.done("The guest's clock is set")?;
        }
        Verb::Freeze { thaw_after } => {
            let thaw_after = time(Some(seconds(thaw_after)));
            let request = FreezeRequest {
                timeout,
                thaw_after,
            };
            show.frozen(call!(agent.freeze(request)).count)?;
        }
        Verb::Thaw => show.thawed(call!(agent.thaw(ThawRequest { timeout })).count)?,
        Verb::FreezeStatus => {
            let status = call!(agent.get_freeze_status(GetFreezeStatusRequest { timeout }));
            show.freeze_status(status.frozen)?;
        }
        Verb::Shutdown => {
            let mode = ShutdownMode::PowerOff.into();
            call!(agent.shutdown(ShutdownRequest { timeout, mode }));
            show.done("The guest powers off")?;
        }
        Verb::Reboot => {
            let mode = ShutdownMode::Reboot.into();
            call!(agent.shutdown(ShutdownRequest { timeout, mode }));
            show.done("The guest starts anew")?;
        }
        Verb::SshKeys {
            verb: KeysVerb::List { user },
        } => {
            let found = call!(agent.list_ssh_keys(ListSshKeysRequest { timeout, user }));
            show.keys(&found.keys)?;
        }
        Verb::SshKeys {
            verb: KeysVerb::Add(args),
        } => {
            let (user, keys) = keys(args)?;
            call!(agent.add_ssh_keys(AddSshKeysRequest {
                timeout,
                user,
                keys
            }));
            show.done("The keys let the user in")?;
        }
        Verb::SshKeys {
            verb: KeysVerb::Remove(args),
        } => {
            let (user, keys) = keys(args)?;
            call!(agent.remove_ssh_keys(RemoveSshKeysRequest {
                timeout,
                user,
                keys
            }));
            show.done("The keys let nobody in any more")?;
        }
        Verb::Exec(_) => {}
    }
    Ok(())
}

/// The user, and the keys given as words and in a file.
fn keys(args: KeysArgs) -> anyhow::Result<(String, Vec<String>)> {
    let mut keys = args.keys;
    if let Some(path) = args.file {
        let text = fs::read_to_string(&path);
        let text = text.with_context(|| format!("Can't read {}", path.display()))?;
        let lines = text.lines().map(str::trim);
        let lines = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
        keys.extend(lines.map(ToOwned::to_owned));
    }
    Ok((args.user, keys))
}
