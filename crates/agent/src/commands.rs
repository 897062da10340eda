//! The commands, and the types of their answers.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Value, json};

use crate::frame::SENTINEL;

/// How a guest is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PowerMode {
    /// Power off.
    Powerdown,
    /// Start anew.
    Reboot,
}

/// A command without data of its own size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Nothing; answers [`Empty`].
    Ping,
    /// Answers [`Info`].
    Info,
    /// Answers [`OsInfo`].
    OsInfo,
    /// Answers [`HostName`].
    HostName,
    /// Answers [`TimeZone`].
    TimeZone,
    /// Answers a list of [`Interface`].
    Interfaces,
    /// Answers a list of [`User`].
    Users,
    /// Answers a list of [`FileSystem`].
    FileSystems,
    /// Writes file systems back and halts writes to them; answers their number.
    Freeze,
    /// Lets them be written again; answers their number.
    Thaw,
    /// Answers [`FreezeStatus`].
    FreezeStatus,
    /// Has no answer when it succeeds.
    Shutdown(PowerMode),
    /// Answers [`ExecResult`].
    ExecStatus(i64),
    /// Answers nanoseconds since 1970.
    GetTime,
    /// Sets the clock to so many nanoseconds since 1970; answers [`Empty`].
    SetTime(i64),
    /// Keys that let a user in; answers [`AuthorizedKeys`].
    SshKeys(String),
    /// Adds keys to a user's; answers [`Empty`].
    AddSshKeys(String, Vec<String>),
    /// Removes keys from a user's; answers [`Empty`].
    RemoveSshKeys(String, Vec<String>),
}

impl Command {
    /// The command as the agent takes it.
    #[must_use]
    pub fn request(&self) -> Vec<u8> {
        let (name, arguments) = match self {
            Self::Ping => ("guest-ping", None),
            Self::Info => ("guest-info", None),
            Self::OsInfo => ("guest-get-osinfo", None),
            Self::HostName => ("guest-get-host-name", None),
            Self::TimeZone => ("guest-get-timezone", None),
            Self::Interfaces => ("guest-network-get-interfaces", None),
            Self::Users => ("guest-get-users", None),
            Self::FileSystems => ("guest-get-fsinfo", None),
            Self::Freeze => ("guest-fsfreeze-freeze", None),
            Self::Thaw => ("guest-fsfreeze-thaw", None),
            Self::FreezeStatus => ("guest-fsfreeze-status", None),
            Self::Shutdown(mode) => ("guest-shutdown", Some(json!({ "mode": mode }))),
            Self::ExecStatus(pid) => ("guest-exec-status", Some(json!({ "pid": pid }))),
            Self::GetTime => ("guest-get-time", None),
            Self::SetTime(time) => ("guest-set-time", Some(json!({ "time": time }))),
            Self::SshKeys(user) => (
                "guest-ssh-get-authorized-keys",
                Some(json!({ "username": user })),
            ),
            Self::AddSshKeys(user, keys) => (
                "guest-ssh-add-authorized-keys",
                Some(json!({ "username": user, "keys": keys })),
            ),
            Self::RemoveSshKeys(user, keys) => (
                "guest-ssh-remove-authorized-keys",
                Some(json!({ "username": user, "keys": keys })),
            ),
        };
        line(name, arguments)
    }
}

fn line(name: &str, arguments: Option<Value>) -> Vec<u8> {
    let mut request = json!({ "execute": name });
    if let (Some(arguments), Value::Object(request)) = (arguments, &mut request) {
        request.insert("arguments".to_owned(), arguments);
    }
    let mut line = request.to_string().into_bytes();
    line.push(b'\n');
    line
}

/// A request that is answered by its own number, behind a [`SENTINEL`]; it has the agent forget
/// half of a request, too.
#[must_use]
pub fn sync(id: u32) -> Vec<u8> {
    let mut request = vec![SENTINEL];
    request.extend(line("guest-sync-delimited", Some(json!({ "id": id }))));
    request
}

/// A request to run a program, found in the agent's path, with arguments, variables (`NAME=VALUE`,
/// in place of all that the agent has, if there is any) and an input. Answers [`ExecStarted`].
#[must_use]
pub fn exec(program: &str, arguments: &[String], variables: &[String], input: &[u8]) -> Vec<u8> {
    let mut fields = json!({ "path": program, "arg": arguments, "capture-output": true });
    if let Value::Object(fields) = &mut fields {
        if !variables.is_empty() {
            fields.insert("env".to_owned(), json!(variables));
        }
        if !input.is_empty() {
            fields.insert("input-data".to_owned(), json!(STANDARD.encode(input)));
        }
    }
    line("guest-exec", Some(fields))
}

/// Nothing.
#[derive(Debug, Deserialize)]
pub struct Empty {}

/// The agent.
#[derive(Debug, Deserialize)]
pub struct Info {
    /// Its version.
    pub version: String,
    /// Its commands.
    #[serde(default)]
    pub supported_commands: Vec<SupportedCommand>,
}

/// A command that the agent knows.
#[derive(Debug, Deserialize)]
pub struct SupportedCommand {
    /// Its name.
    pub name: String,
    /// Whether it may be used.
    pub enabled: bool,
}

/// The operating system, as `/etc/os-release` and `uname` have it. What is not known is empty.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct OsInfo {
    /// Like `debian`.
    pub id: String,
    /// Like `Debian GNU/Linux`.
    pub name: String,
    /// Name and version.
    pub pretty_name: String,
    /// Like `12 (bookworm)`.
    pub version: String,
    /// Like `12`.
    pub version_id: String,
    /// Like `6.1.0-18-amd64`.
    pub kernel_release: String,
    /// The build.
    pub kernel_version: String,
    /// Like `x86_64`.
    pub machine: String,
}

/// The guest's host name.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct HostName {
    /// The name.
    pub host_name: String,
}

/// The guest's time zone.
#[derive(Debug, Default, Deserialize)]
pub struct TimeZone {
    /// Its name, as the guest has it.
    #[serde(default)]
    pub zone: String,
    /// Seconds east of UTC.
    pub offset: i64,
}

/// A network interface.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its MAC address; empty if it has none.
    #[serde(default)]
    pub hardware_address: String,
    /// Its addresses.
    #[serde(default)]
    pub ip_addresses: Vec<IpAddress>,
}

/// An address of an interface.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct IpAddress {
    /// The address.
    pub ip_address: String,
    /// Bits of its network.
    pub prefix: u32,
}

/// A user who is logged in.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct User {
    /// The user.
    pub user: String,
    /// Of Windows.
    #[serde(default)]
    pub domain: String,
    /// Seconds since 1970.
    pub login_time: f64,
}

/// A mounted file system.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FileSystem {
    /// Name of its device.
    pub name: String,
    /// Where it is mounted.
    pub mountpoint: String,
    /// Its type.
    #[serde(rename = "type")]
    pub kind: String,
    /// Bytes in use.
    pub used_bytes: Option<u64>,
    /// Bytes in all.
    pub total_bytes: Option<u64>,
    /// The disks it is on.
    #[serde(default)]
    pub disk: Vec<Disk>,
}

/// A disk as the guest sees it.
#[derive(Debug, Deserialize)]
pub struct Disk {
    /// Its device; empty if not known.
    #[serde(default)]
    pub dev: String,
    /// Its serial number; empty if not known.
    #[serde(default)]
    pub serial: String,
}

/// Whether file systems are frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FreezeStatus {
    /// All can be written.
    Thawed,
    /// Writes to them wait.
    Frozen,
}

/// A program that runs.
#[derive(Debug, Deserialize)]
pub struct ExecStarted {
    /// Its process.
    pub pid: i64,
}

/// What has become of a program.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ExecResult {
    /// Whether it has ended.
    pub exited: bool,
    /// With this code.
    pub exitcode: Option<i64>,
    /// By this signal.
    pub signal: Option<i64>,
    /// What it wrote to standard output.
    #[serde(default, deserialize_with = "base64")]
    pub out_data: Vec<u8>,
    /// What it wrote to standard error.
    #[serde(default, deserialize_with = "base64")]
    pub err_data: Vec<u8>,
    /// Standard output is cut short.
    #[serde(default)]
    pub out_truncated: bool,
    /// Standard error is cut short.
    #[serde(default)]
    pub err_truncated: bool,
}

/// Keys that let a user in.
#[derive(Debug, Deserialize)]
pub struct AuthorizedKeys {
    /// In the form of `authorized_keys`.
    pub keys: Vec<String>,
}

fn base64<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
    STANDARD
        .decode(text.as_bytes())
        .map_err(serde::de::Error::custom)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::answer;

    #[test]
    fn requests_are_lines_of_json() {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        assert_eq!(
            text(Command::Ping.request()),
            "{\"execute\":\"guest-ping\"}\n"
        );
        assert_eq!(
            text(Command::Shutdown(PowerMode::Reboot).request()),
            "{\"arguments\":{\"mode\":\"reboot\"},\"execute\":\"guest-shutdown\"}\n"
        );
        let request = sync(7);
        assert_eq!(request[0], SENTINEL);
        assert!(text(request[1..].to_vec()).contains("\"id\":7"));
        let request = text(exec("cat", &["-\n".into()], &["A=b".into()], b"\0\xff"));
        assert_eq!(
            request.matches('\n').count(),
            1,
            "one line whatever is in it: {request}"
        );
        assert!(
            request.contains("\"input-data\":\"AP8=\"") && request.contains("\"env\":[\"A=b\"]")
        );
        assert!(!text(exec("cat", &[], &[], b"")).contains("env"));
    }

    #[test]
    fn answers_are_read() {
        let interfaces: Vec<Interface> = answer(
            br#"{"return": [{"name": "lo", "ip-addresses": [{"ip-address-type": "ipv4",
                "ip-address": "127.0.0.1", "prefix": 8}], "statistics": {"rx-bytes": 1}},
                {"name": "eth0", "hardware-address": "52:54:00:12:34:56"}]}"#,
        )
        .unwrap();
        assert_eq!(interfaces[0].ip_addresses[0].ip_address, "127.0.0.1");
        assert_eq!(interfaces[1].hardware_address, "52:54:00:12:34:56");
        let result: ExecResult = answer(
            br#"{"return": {"exited": true, "signal": 9, "out-data": "AP8=", "err-truncated": true}}"#,
        )
        .unwrap();
        assert_eq!((result.exitcode, result.signal), (None, Some(9)));
        assert_eq!(
            (result.out_data.as_slice(), result.err_truncated),
            (&b"\0\xff"[..], true)
        );
        answer::<ExecResult>(br#"{"return": {"exited": true, "out-data": "*"}}"#).unwrap_err();
        let os: OsInfo = answer(br#"{"return": {"id": "debian", "version-id": "12"}}"#).unwrap();
        assert_eq!(
            (os.id.as_str(), os.version_id.as_str(), os.name.as_str()),
            ("debian", "12", "")
        );
        let file_systems: Vec<FileSystem> = answer(
            br#"{"return": [{"name": "vda3", "total-bytes": 5, "mountpoint": "/", "disk":
                [{"bus-type": "virtio", "dev": "/dev/vda3", "pci-controller": {}}], "type": "ext4"}]}"#,
        )
        .unwrap();
        assert_eq!(
            (file_systems[0].total_bytes, file_systems[0].used_bytes),
            (Some(5), None)
        );
        assert_eq!(
            answer::<FreezeStatus>(br#"{"return": "frozen"}"#).unwrap(),
            FreezeStatus::Frozen
        );
    }
}
