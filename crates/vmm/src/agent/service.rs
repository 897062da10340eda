//! The agent's API.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use edgevmm_agent::{
    AnswerError, AuthorizedKeys, Command, Empty, FileSystem, FreezeStatus, HostName, Info,
    Interface, OsInfo, PowerMode, TimeZone, User,
};
use edgevmm_api::v1::agent_server::Agent as AgentApi;
use edgevmm_api::v1::{self, exec_response};
use serde::de::DeserializeOwned;
use tokio::time::timeout;
use tonic::{Request, Response, Status};

use super::{Agent, AgentError, Program, present};
use crate::lifecycle::Handle;

/// How long the agent may take when the caller doesn't say.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long for all that the guest has cached.
const FREEZE_PATIENCE: Duration = Duration::from_secs(60);
/// How long file systems stay frozen when the caller doesn't say.
const THAW_AFTER: Duration = Duration::from_secs(60);
/// Longest time of all these.
const LONGEST: Duration = Duration::from_secs(3600);

/// Largest standard input of a program, in bytes.
const MAX_STDIN: usize = 2 << 20;

/// The API of one machine's guest agent.
#[derive(Debug)]
pub struct AgentService {
    agent: Option<Arc<Agent>>,
    machine: Handle,
}

impl AgentService {
    /// The API of `agent`, which is in the machine behind `machine`.
    pub fn new(agent: Option<Arc<Agent>>, machine: Handle) -> AgentService {
        AgentService { agent, machine }
    }

    fn agent(&self) -> Result<&Arc<Agent>, Status> {
        present(self.agent.as_ref()).map_err(status)
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        command: Command,
        time: Option<impl TryInto<Duration>>,
    ) -> Result<T, Status> {
        let time = limit(time, PATIENCE)?;
        let answer = self.agent()?.ask(&command, time).await;
        answer.map_err(status)
    }
}

fn status(error: impl Into<AgentError>) -> Status {
    let error = error.into();
    let text = error.to_string();
    match error {
        AgentError::Off | AgentError::Frozen => Status::failed_precondition(text),
        AgentError::NotConnected => Status::unavailable(text),
        AgentError::Silent(_) | AgentError::StillRunning { .. } => Status::deadline_exceeded(text),
        AgentError::Left => Status::aborted(text),
        AgentError::TooLong(_) | AgentError::MuchOutput => Status::resource_exhausted(text),
        AgentError::Answer(AnswerError::Refused { unknown: true, .. }) => {
            Status::unimplemented(text)
        }
        AgentError::Answer(AnswerError::Refused { .. }) => Status::failed_precondition(text),
        AgentError::Answer(AnswerError::Malformed(cause)) => {
            Status::internal(format!("{text}: {cause}"))
        }
        AgentError::Nonsense => Status::internal(text),
    }
}

/// A time of a request, by default `absent`.
fn limit(time: Option<impl TryInto<Duration>>, absent: Duration) -> Result<Duration, Status> {
    let Some(time) = time else {
        return Ok(absent);
    };
    match time.try_into() {
        Ok(time) if !time.is_zero() => Ok(time.min(LONGEST)),
        _ => Err(Status::invalid_argument("a time must be more than zero")),
    }
}

/// A time that the guest tells, if it is one until the year 9999.
fn time(since_1970: Duration) -> Option<SystemTime> {
    const YEAR_10000: u64 = 253_402_300_800;
    let since_1970 = Some(since_1970).filter(|time| time.as_secs() < YEAR_10000)?;
    UNIX_EPOCH.checked_add(since_1970)
}

#[tonic::async_trait]
impl AgentApi for AgentService {
    async fn ping(
        &self,
        request: Request<v1::PingRequest>,
    ) -> Result<Response<v1::PingResponse>, Status> {
        let request = request.into_inner();
        let time = limit(request.timeout, PATIENCE)?;
        let agent = self.agent()?;
        let ping = async {
            if request.wait {
                agent.connected().await;
            }
            agent.ask::<Empty>(&Command::Ping, time).await
        };
        let answer = timeout(time, ping).await;
        let absent = || {
            if agent.is_connected() {
                AgentError::Silent(time)
            } else {
                AgentError::NotConnected
            }
        };
        answer.map_err(|_| absent()).flatten().map_err(status)?;
        Ok(Response::new(v1::PingResponse {}))
    }

    async fn get_info(
        &self,
        request: Request<v1::GetInfoRequest>,
    ) -> Result<Response<v1::GetInfoResponse>, Status> {
        let info: Info = self
            .ask(Command::Info, request.into_inner().timeout)
            .await?;
        let commands = info.supported_commands.into_iter();
        let commands = commands.filter(|command| command.enabled);
        Ok(Response::new(v1::GetInfoResponse {
            version: info.version,
            commands: commands.map(|command| command.name).collect(),
        }))
    }

    async fn get_os_info(
        &self,
        request: Request<v1::GetOsInfoRequest>,
    ) -> Result<Response<v1::GetOsInfoResponse>, Status> {
        let time = request.into_inner().timeout;
        let os: OsInfo = self.ask(Command::OsInfo, time).await?;
        // Older agents don't know these.
        let host: Option<HostName> = self.ask(Command::HostName, time).await.ok();
        let zone: Option<TimeZone> = self.ask(Command::TimeZone, time).await.ok();
        Ok(Response::new(v1::GetOsInfoResponse {
            id: os.id,
            name: os.name,
            pretty_name: os.pretty_name,
            version: os.version,
            version_id: os.version_id,
            kernel_release: os.kernel_release,
            kernel_version: os.kernel_version,
            machine: os.machine,
            host_name: host.unwrap_or_default().host_name,
            utc_offset: zone.as_ref().map(|zone| zone.offset),
            time_zone: zone.unwrap_or_default().zone,
        }))
    }

    async fn get_interfaces(
        &self,
        request: Request<v1::GetInterfacesRequest>,
    ) -> Result<Response<v1::GetInterfacesResponse>, Status> {
        let time = request.into_inner().timeout;
        let interfaces: Vec<Interface> = self.ask(Command::Interfaces, time).await?;
        let interfaces = interfaces.into_iter().map(|interface| {
            let addresses = interface.ip_addresses.into_iter();
            let addresses = addresses.map(|at| format!("{}/{}", at.ip_address, at.prefix));
            v1::GuestInterface {
                name: interface.name,
                mac: interface.hardware_address,
                addresses: addresses.collect(),
            }
        });
        Ok(Response::new(v1::GetInterfacesResponse {
            interfaces: interfaces.collect(),
        }))
    }

    async fn get_users(
        &self,
        request: Request<v1::GetUsersRequest>,
    ) -> Result<Response<v1::GetUsersResponse>, Status> {
        let users: Vec<User> = self
            .ask(Command::Users, request.into_inner().timeout)
            .await?;
        let users = users.into_iter().map(|user| v1::GuestUser {
            login_time: Duration::try_from_secs_f64(user.login_time)
                .ok()
                .and_then(time)
                .map(Into::into),
            name: user.user,
            domain: user.domain,
        });
        Ok(Response::new(v1::GetUsersResponse {
            users: users.collect(),
        }))
    }

    async fn get_file_systems(
        &self,
        request: Request<v1::GetFileSystemsRequest>,
    ) -> Result<Response<v1::GetFileSystemsResponse>, Status> {
        let time = request.into_inner().timeout;
        let found: Vec<FileSystem> = self.ask(Command::FileSystems, time).await?;
        let found = found.into_iter().map(|fs| {
            let disks = fs.disk.into_iter().map(|disk| v1::GuestDisk {
                device: disk.dev,
                serial: disk.serial,
            });
            v1::GuestFileSystem {
                name: fs.name,
                mountpoint: fs.mountpoint,
                r#type: fs.kind,
                used: fs.used_bytes,
                total: fs.total_bytes,
                disks: disks.collect(),
            }
        });
        Ok(Response::new(v1::GetFileSystemsResponse {
            file_systems: found.collect(),
        }))
    }

    async fn freeze(
        &self,
        request: Request<v1::FreezeRequest>,
    ) -> Result<Response<v1::FreezeResponse>, Status> {
        let request = request.into_inner();
        let time = limit(request.timeout, FREEZE_PATIENCE)?;
        let thaw_after = limit(request.thaw_after, THAW_AFTER)?;
        let stopping = || {
            let mut machine = self.machine.clone();
            async move { machine.stopping().await }
        };
        let count = self.agent()?.freeze(time, thaw_after, stopping).await;
        let count = count.map_err(status)?;
        Ok(Response::new(v1::FreezeResponse { count }))
    }

    async fn thaw(
        &self,
        request: Request<v1::ThawRequest>,
    ) -> Result<Response<v1::ThawResponse>, Status> {
        let time = limit(request.into_inner().timeout, FREEZE_PATIENCE)?;
        let count = self.agent()?.thaw(time).await.map_err(status)?;
        Ok(Response::new(v1::ThawResponse { count }))
    }

    async fn get_freeze_status(
        &self,
        request: Request<v1::GetFreezeStatusRequest>,
    ) -> Result<Response<v1::GetFreezeStatusResponse>, Status> {
        let time = request.into_inner().timeout;
        let status: FreezeStatus = self.ask(Command::FreezeStatus, time).await?;
        Ok(Response::new(v1::GetFreezeStatusResponse {
            frozen: status == FreezeStatus::Frozen,
        }))
    }

    async fn shutdown(
        &self,
        request: Request<v1::ShutdownRequest>,
    ) -> Result<Response<v1::ShutdownResponse>, Status> {
        let request = request.into_inner();
        let mode = match request.mode() {
            v1::ShutdownMode::Reboot => PowerMode::Reboot,
            v1::ShutdownMode::PowerOff | v1::ShutdownMode::Unspecified => PowerMode::Powerdown,
        };
        let time = limit(request.timeout, PATIENCE)?;
        let told = self.agent()?.shut_down(mode, time).await;
        told.map_err(status)?;
        Ok(Response::new(v1::ShutdownResponse {}))
    }

    async fn exec(
        &self,
        request: Request<v1::ExecRequest>,
    ) -> Result<Response<v1::ExecResponse>, Status> {
        let request = request.into_inner();
        let time = request.timeout.map(|time| limit(Some(time), LONGEST));
        if request.command.is_empty() {
            return Err(Status::invalid_argument("a program is needed"));
        }
        if request.stdin.len() > MAX_STDIN {
            return Err(Status::invalid_argument(
                "a program gets 2 MiB of standard input at most",
            ));
        }
        let program = Program {
            command: request.command,
            env: request.env,
            stdin: request.stdin,
            time: time.transpose()?,
        };
        let result = self.agent()?.exec(&program).await.map_err(status)?;
        let end = match (result.signal, result.exitcode) {
            (Some(signal), _) => exec_response::End::Signal(signal),
            (None, code) => exec_response::End::Code(code.unwrap_or(0)),
        };
        Ok(Response::new(v1::ExecResponse {
            end: Some(end),
            stdout: result.out_data,
            stderr: result.err_data,
        }))
    }

    async fn get_time(
        &self,
        request: Request<v1::GetTimeRequest>,
    ) -> Result<Response<v1::GetTimeResponse>, Status> {
        let nanoseconds: i64 = self
            .ask(Command::GetTime, request.into_inner().timeout)
            .await?;
        let since_1970 = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(0));
        Ok(Response::new(v1::GetTimeResponse {
            time: time(since_1970).map(Into::into),
        }))
    }

    async fn set_time(
        &self,
        request: Request<v1::SetTimeRequest>,
    ) -> Result<Response<v1::SetTimeResponse>, Status> {
        let request = request.into_inner();
        let to = request.time.map(SystemTime::try_from);
        let to = to
            .unwrap_or_else(|| Ok(SystemTime::now()))
            .ok()
            .and_then(|to| to.duration_since(UNIX_EPOCH).ok());
        let to = to.and_then(|to| i64::try_from(to.as_nanos()).ok());
        let to = to.ok_or_else(|| Status::invalid_argument("the time is not from 1970 to 2262"))?;
        let _: Empty = self.ask(Command::SetTime(to), request.timeout).await?;
        Ok(Response::new(v1::SetTimeResponse {}))
    }

    async fn list_ssh_keys(
        &self,
        request: Request<v1::ListSshKeysRequest>,
    ) -> Result<Response<v1::ListSshKeysResponse>, Status> {
        let request = request.into_inner();
        let command = Command::SshKeys(request.user);
        let AuthorizedKeys { keys } = self.ask(command, request.timeout).await?;
        Ok(Response::new(v1::ListSshKeysResponse { keys }))
    }

    async fn add_ssh_keys(
        &self,
        request: Request<v1::AddSshKeysRequest>,
    ) -> Result<Response<v1::AddSshKeysResponse>, Status> {
        let request = request.into_inner();
        let command = Command::AddSshKeys(request.user, request.keys);
        let _: Empty = self.ask(command, request.timeout).await?;
        Ok(Response::new(v1::AddSshKeysResponse {}))
    }

    async fn remove_ssh_keys(
        &self,
        request: Request<v1::RemoveSshKeysRequest>,
    ) -> Result<Response<v1::RemoveSshKeysResponse>, Status> {
        let request = request.into_inner();
        let command = Command::RemoveSshKeys(request.user, request.keys);
        let _: Empty = self.ask(command, request.timeout).await?;
        Ok(Response::new(v1::RemoveSshKeysResponse {}))
    }
}
