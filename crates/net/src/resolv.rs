//! The host's DNS servers that a guest can ask too.

use std::fs;
use std::net::Ipv4Addr;

const RESOLV_CONF: &str = "/etc/resolv.conf";
/// The servers behind systemd-resolved, whose own entry in `RESOLV_CONF` is on the loopback.
const RESOLVED_CONF: &str = "/run/systemd/resolve/resolv.conf";
/// The C library asks no more than these.
const MAX_SERVERS: usize = 3;

/// IPv4 servers of the host that are not on its loopback; may be none.
pub(crate) fn host_servers() -> Vec<Ipv4Addr> {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let servers = parse(&read(RESOLV_CONF));
    if servers.is_empty() {
        parse(&read(RESOLVED_CONF))
    } else {
        servers
    }
}

/// The usable servers of a text in the form of resolv.conf(5).
fn parse(text: &str) -> Vec<Ipv4Addr> {
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split_ascii_whitespace();
            (fields.next() == Some("nameserver"))
                .then(|| fields.next())??
                .parse()
                .ok()
        })
        .filter(|server: &Ipv4Addr| !server.is_loopback() && !server.is_unspecified())
        .take(MAX_SERVERS)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usable_servers() {
        let text = "# a\nsearch example.org\nnameserver 127.0.0.53\nnameserver\nnameserver ::1\n\
                    nameserver 192.0.2.1\n  nameserver\t192.0.2.2 # b\n;nameserver 192.0.2.9\n\
                    nameserver 0.0.0.0\nnameserver fd00::1%eth0\nnameservers 192.0.2.9\n\
                    nameserver 192.0.2.3\nnameserver 192.0.2.4\n";
        let [a, b, c] = [1, 2, 3].map(|host| Ipv4Addr::new(192, 0, 2, host));
        assert_eq!(parse(text), [a, b, c]);
        assert!(parse("nameserver 127.0.0.1\n").is_empty());
    }
}
