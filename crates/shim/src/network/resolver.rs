//! The names that a pod knows: what its resolv.conf(5) and its host name tell a guest.

use std::fs::File;
use std::io::Read;
use std::net::IpAddr;
use std::path::Path;

use edgevmm_config::check_hostname;

/// Longest file that is read, in bytes.
const MAX_FILE: u64 = 1 << 16;
/// As many servers as resolvers ask.
const MAX_SERVERS: usize = 3;
/// Where CRI mounts the pod's in a container.
pub const RESOLV_CONF: &str = "/etc/resolv.conf";

/// What a guest is told of names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resolver {
    /// Name servers.
    pub servers: Vec<IpAddr>,
    /// Domains to look names up in.
    pub search: Vec<String>,
    /// The guest's own name.
    pub hostname: Option<String>,
}

impl Resolver {
    /// Reads them; a file that can't be read tells nothing, and neither does a name that is none.
    pub fn read(resolv_conf: Option<&Path>, hostname: Option<&str>) -> Self {
        let hostname = hostname.filter(|name| check_hostname(name).is_ok());
        Self {
            hostname: hostname.map(str::to_owned),
            ..Self::parse(&resolv_conf.map(read).unwrap_or_default())
        }
    }

    /// Reads a text in the form of resolv.conf(5). What is no domain is left out, and so are
    /// servers at a loopback, which a guest does not reach.
    fn parse(text: &str) -> Self {
        let mut resolver = Self::default();
        for line in text.lines() {
            let mut fields = line.split_ascii_whitespace();
            match fields.next() {
                Some("nameserver") => {
                    let server = fields.next().and_then(|text| text.parse::<IpAddr>().ok());
                    let server = server.filter(|at| !at.is_loopback() && !at.is_unspecified());
                    resolver.servers.extend(server);
                }
                // The last one counts.
                Some("search" | "domain") => {
                    let domains = fields.map(|domain| domain.trim_end_matches('.').to_owned());
                    let sound = domains.filter(|domain| check_hostname(domain).is_ok());
                    resolver.search = sound.collect();
                }
                _ => {}
            }
        }
        resolver.servers.truncate(MAX_SERVERS);
        resolver
    }
}

fn read(path: &Path) -> String {
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(MAX_FILE).read_to_string(&mut text));
    read.map_or_else(|_| String::new(), |_| text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_a_kubelet_writes_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let conf = folder.path().join("r");
        let text = "domain old\nsearch ns.svc.cluster.local svc.cluster.local cluster.local. a_b\n\
                    nameserver 127.0.0.53\nnameserver fd00::a\nnameserver 10.43.0.10\n\
                    options ndots:5\n";
        std::fs::write(&conf, text).unwrap();
        let resolver = Resolver::read(Some(&conf), Some("web-0"));
        let servers = ["fd00::a", "10.43.0.10"].map(|at| at.parse::<IpAddr>().unwrap());
        assert_eq!(resolver.servers, servers);
        let search = ["ns.svc.cluster.local", "svc.cluster.local", "cluster.local"];
        assert_eq!(resolver.search, search);
        assert_eq!(resolver.hostname.as_deref(), Some("web-0"));
    }

    #[test]
    fn what_is_not_there_or_sound_is_not_told() {
        let resolver = Resolver::read(Some(Path::new("/none")), Some("a b"));
        assert_eq!(resolver, Resolver::default());
    }
}
