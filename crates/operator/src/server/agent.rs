//! What the guest's agent tells, in KubeVirt's words. All of it is the guest's to choose: it is passed
//! on as data, and nothing is decided by it.

use serde_json::{Value, json};

/// A question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Question {
    /// Of the operating system.
    System,
    /// Who is logged in.
    Users,
    /// What is mounted.
    FileSystems,
}

impl Question {
    /// The question of a path.
    pub fn of(part: &str) -> Option<Self> {
        match part {
            "guestosinfo" => Some(Self::System),
            "userlist" => Some(Self::Users),
            "filesystemlist" => Some(Self::FileSystems),
            _ => None,
        }
    }

    /// What it is to `edgevmm-ctl agent`.
    pub fn verb(self) -> &'static str {
        match self {
            Self::System => "osinfo",
            Self::Users => "users",
            Self::FileSystems => "filesystems",
        }
    }

    /// What was told, as KubeVirt's clients read it.
    pub fn answer(self, told: &Value) -> Value {
        match self {
            Self::System => system(told),
            Self::Users => list("VirtualMachineInstanceGuestOSUserList", told, user),
            Self::FileSystems => list("VirtualMachineInstanceFileSystemList", told, file_system),
        }
    }
}

fn list(kind: &str, told: &Value, item: fn(&Value) -> Value) -> Value {
    let items = told.as_array().into_iter().flatten().map(item);
    json!({
        "apiVersion": "kubevirt.io/v1",
        "kind": kind,
        "metadata": {},
        "items": items.collect::<Vec<_>>(),
    })
}

/// A field, of the type that clients expect or left out.
fn text<'a>(told: &'a Value, name: &str) -> &'a str {
    told.get(name).and_then(Value::as_str).unwrap_or_default()
}

fn number(told: &Value, name: &str) -> i64 {
    told.get(name).and_then(Value::as_i64).unwrap_or_default()
}

fn system(told: &Value) -> Value {
    json!({
        "apiVersion": "kubevirt.io/v1",
        "kind": "VirtualMachineInstanceGuestAgentInfo",
        "hostname": text(told, "host_name"),
        "os": {
            "name": text(told, "name"),
            "kernelRelease": text(told, "kernel_release"),
            "version": text(told, "version"),
            "prettyName": text(told, "pretty_name"),
            "versionId": text(told, "version_id"),
            "kernelVersion": text(told, "kernel_version"),
            "machine": text(told, "machine"),
            "id": text(told, "id"),
        },
        "timezone": format!("{}, {}", text(told, "time_zone"), number(told, "utc_offset")),
    })
}

fn user(told: &Value) -> Value {
    json!({
        "userName": text(told, "name"),
        "domain": text(told, "domain"),
        "loginTime": number(told, "login_time"),
    })
}

fn file_system(told: &Value) -> Value {
    let disks = told.get("disks").and_then(Value::as_array);
    let disks = disks
        .into_iter()
        .flatten()
        .map(|disk| json!({ "busType": "", "serial": text(disk, "serial") }));
    json!({
        "diskName": text(told, "name"),
        "mountPoint": text(told, "mountpoint"),
        "fileSystemType": text(told, "type"),
        "usedBytes": number(told, "used"),
        "totalBytes": number(told, "total"),
        "disk": disks.collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn answers_are_in_kubevirts_words() {
        let told = json!({ "host_name": "web", "pretty_name": "Debian GNU/Linux 12 (bookworm)",
                           "time_zone": "UTC", "utc_offset": 0 });
        let answer = Question::System.answer(&told);
        assert_eq!(answer["hostname"], "web");
        assert_eq!(answer["os"]["prettyName"], "Debian GNU/Linux 12 (bookworm)");
        assert_eq!(answer["timezone"], "UTC, 0");

        let told = json!([{ "name": "vda1", "mountpoint": "/", "type": "ext4", "used": 1,
                            "total": 2, "disks": [{ "device": "/dev/vda1", "serial": "s" }] }]);
        let answer = Question::FileSystems.answer(&told);
        assert_eq!(answer["items"][0]["mountPoint"], "/");
        assert_eq!(answer["items"][0]["disk"][0]["serial"], "s");
    }

    #[test]
    fn a_guest_can_tell_anything() {
        for told in [json!(null), json!([1, null, {}]), json!({ "used": -1 })] {
            for part in ["guestosinfo", "userlist", "filesystemlist"] {
                let answer = Question::of(part).unwrap().answer(&told);
                assert_eq!(answer["apiVersion"], "kubevirt.io/v1");
            }
        }
    }
}
