//! What the agent told, for people and as JSON. To a terminal goes nothing that could control it.

use edgevmm_agent::harmless;
use edgevmm_api::v1::{
    GetInfoResponse, GetOsInfoResponse, GuestDisk, GuestFileSystem, GuestInterface, GuestUser,
};
use serde_json::{Value, json};

use crate::image::report::{bytes, print, print_json, utc};
use crate::table::table;

/// How to show it.
#[derive(Debug, Clone, Copy)]
pub struct Show {
    /// As JSON.
    pub json: bool,
}

impl Show {
    fn either(self, json: &Value, text: impl FnOnce() -> String) -> anyhow::Result<()> {
        if self.json {
            print_json(json)
        } else {
            print(&text())
        }
    }

    /// Something that has no answer was done.
    pub fn done(self, text: &str) -> anyhow::Result<()> {
        self.either(&json!({}), || format!("{text}\n"))
    }

    pub fn info(self, info: &GetInfoResponse) -> anyhow::Result<()> {
        let json = json!({ "version": info.version, "commands": info.commands });
        self.either(&json, || {
            let commands = info.commands.iter().map(|name| harmless(name));
            let commands: Vec<_> = commands.collect();
            format!(
                "version {}\n{}\n",
                harmless(&info.version),
                commands.join("\n")
            )
        })
    }

    pub fn os(self, os: GetOsInfoResponse) -> anyhow::Result<()> {
        let json = json!({
            "id": os.id, "name": os.name, "pretty_name": os.pretty_name, "version": os.version,
            "version_id": os.version_id, "kernel_release": os.kernel_release,
            "kernel_version": os.kernel_version, "machine": os.machine,
            "host_name": os.host_name, "time_zone": os.time_zone, "utc_offset": os.utc_offset,
        });
        self.either(&json, || {
            let zone = os.utc_offset.map(|offset| {
                let sign = if offset < 0 { '-' } else { '+' };
                let minutes = offset.unsigned_abs() / 60;
                format!(
                    "{} (UTC{sign}{:02}:{:02})",
                    os.time_zone,
                    minutes / 60,
                    minutes % 60
                )
            });
            let rows = [
                ("host name", os.host_name),
                ("system", os.pretty_name),
                (
                    "kernel",
                    format!("{} {}", os.kernel_release, os.kernel_version),
                ),
                ("machine", os.machine),
                ("time zone", zone.unwrap_or_default()),
            ];
            let rows = rows.map(|(what, text)| [what.to_owned(), harmless(&text)]);
            table(&rows)
        })
    }

    pub fn interfaces(self, interfaces: &[GuestInterface]) -> anyhow::Result<()> {
        let json = interfaces.iter().map(|interface| {
            let GuestInterface {
                name,
                mac,
                addresses,
            } = interface;
            json!({ "name": name, "mac": mac, "addresses": addresses })
        });
        self.either(&json.collect(), || {
            let head = ["NAME", "MAC", "ADDRESSES"].map(ToOwned::to_owned);
            let row = |interface: &GuestInterface| {
                let GuestInterface {
                    name,
                    mac,
                    addresses,
                } = interface;
                [
                    harmless(name),
                    harmless(mac),
                    harmless(&addresses.join(" ")),
                ]
            };
            let rows = interfaces.iter().map(row);
            table(&std::iter::once(head).chain(rows).collect::<Vec<_>>())
        })
    }

    pub fn users(self, users: &[GuestUser]) -> anyhow::Result<()> {
        let since = |user: &GuestUser| user.login_time.as_ref().map(|time| time.seconds);
        let json = users.iter().map(
            |user| json!({ "name": user.name, "domain": user.domain, "login_time": since(user) }),
        );
        self.either(&json.collect(), || {
            let head = ["NAME", "DOMAIN", "SINCE"].map(ToOwned::to_owned);
            let row = |user: &GuestUser| {
                let since = since(user).and_then(|seconds| u64::try_from(seconds).ok());
                let since = since.map(utc).unwrap_or_default();
                [harmless(&user.name), harmless(&user.domain), since]
            };
            let rows = users.iter().map(row);
            table(&std::iter::once(head).chain(rows).collect::<Vec<_>>())
        })
    }

    pub fn file_systems(self, found: &[GuestFileSystem]) -> anyhow::Result<()> {
        let disk = |disk: &GuestDisk| json!({ "device": disk.device, "serial": disk.serial });
        let json = found.iter().map(|fs| {
            json!({
                "name": fs.name, "mountpoint": fs.mountpoint, "type": fs.r#type,
                "used": fs.used, "total": fs.total,
                "disks": fs.disks.iter().map(disk).collect::<Vec<_>>(),
            })
        });
        self.either(&json.collect(), || {
            let head = ["MOUNTPOINT", "TYPE", "NAME", "USED", "TOTAL"].map(ToOwned::to_owned);
            let size = |size: Option<u64>| size.map(bytes).unwrap_or_default();
            let row = |fs: &GuestFileSystem| {
                let texts = [&fs.mountpoint, &fs.r#type, &fs.name];
                let [mountpoint, kind, name] = texts.map(|text| harmless(text));
                [mountpoint, kind, name, size(fs.used), size(fs.total)]
            };
            let rows = found.iter().map(row);
            table(&std::iter::once(head).chain(rows).collect::<Vec<_>>())
        })
    }

    pub fn frozen(self, count: u32) -> anyhow::Result<()> {
        let text = || format!("File systems frozen: {count}\n");
        self.either(&json!({ "count": count }), text)
    }

    pub fn thawed(self, count: u32) -> anyhow::Result<()> {
        let text = || format!("File systems thawed: {count}\n");
        self.either(&json!({ "count": count }), text)
    }

    pub fn freeze_status(self, frozen: bool) -> anyhow::Result<()> {
        let text = if frozen { "frozen\n" } else { "thawed\n" };
        self.either(&json!({ "frozen": frozen }), || text.to_owned())
    }

    /// Seconds and nanoseconds since 1970.
    pub fn time(self, time: Option<(i64, i32)>) -> anyhow::Result<()> {
        let (seconds, nanoseconds) = time.unwrap_or_default();
        let json = json!({ "seconds": seconds, "nanoseconds": nanoseconds });
        self.either(&json, || {
            let seconds = u64::try_from(seconds).unwrap_or(0);
            format!("{}\n", utc(seconds))
        })
    }

    pub fn keys(self, keys: &[String]) -> anyhow::Result<()> {
        self.either(&json!(keys), || {
            let lines = keys.iter().map(|key| harmless(key) + "\n");
            lines.collect()
        })
    }
}
