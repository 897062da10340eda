//! passt's command line and process.

use std::fmt::Display;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use nix::fcntl::OFlag;
use nix::unistd::pipe2;

use super::{Log, PasstConfig, Transport};
use crate::resolv;

/// passt's own Ethernet address; given because passt would else take that of a host interface.
const GATEWAY_MAC: &str = "52:55:0a:00:02:02";

/// Starts passt with `socket` as its guest's side.
pub(super) fn spawn(config: &PasstConfig, socket: &UnixStream) -> io::Result<(Child, Log)> {
    let dns = config.dns.clone().unwrap_or_else(resolv::host_servers);
    if dns.is_empty() {
        tracing::warn!("the host has no DNS server off its loopback, so the guest gets none");
    }
    // Non-blocking at both ends: passt must not stall on a log that nobody reads.
    let (log, stderr) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    let socket = socket.as_raw_fd();
    let mut command = Command::new(&config.program);
    command
        .args(arguments(config, &dns, socket))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr)
        // A group of its own keeps a Ctrl-C in the terminal from it: it ends when we do.
        .process_group(0);
    let keep_socket = move || {
        // SAFETY: fcntl with these arguments touches no memory; a bad descriptor is an error.
        if unsafe { libc::fcntl(socket, libc::F_SETFD, 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes one fcntl, which is async-signal-safe.
    unsafe { command.pre_exec(keep_socket) };
    let child = command.spawn()?;
    Ok((
        child,
        Log {
            pipe: log.into(),
            text: Vec::new(),
        },
    ))
}

fn arguments(config: &PasstConfig, dns: &[Ipv4Addr], socket: RawFd) -> Vec<String> {
    let mut arguments = Vec::new();
    let mut flag = |flag: &str| arguments.push(flag.to_owned());
    flag("--foreground");
    flag("--quiet");
    flag("--ipv4-only");
    if !config.host_loopback {
        flag("--no-map-gw");
    }
    let mut option = |flag: &str, value: &dyn Display| {
        arguments.extend([flag.to_owned(), value.to_string()]);
    };
    option("--fd", &socket);
    // Which interface is of no matter, as all that passt would take from it is given; but one
    // without a default route is taken only when it is named, and every host has this one.
    option("--interface", &"lo");
    option("--mac-addr", &GATEWAY_MAC);
    option("--address", &config.guest);
    option("--netmask", &config.prefix);
    option("--gateway", &config.gateway);
    if let Some(mtu) = config.mtu {
        option("--mtu", &mtu);
    }
    for server in dns {
        option("--dns", server);
    }
    for forward in &config.forwards {
        let flag = match forward.transport {
            Transport::Tcp => "--tcp-ports",
            Transport::Udp => "--udp-ports",
        };
        option(flag, forward);
    }
    arguments
}

#[cfg(test)]
mod tests {
    use super::super::Forward;
    use super::*;

    #[test]
    fn the_network_is_given_whole() {
        let config = PasstConfig::default();
        assert_eq!(
            arguments(&config, &[Ipv4Addr::new(9, 9, 9, 9)], 7).join(" "),
            "--foreground --quiet --ipv4-only --no-map-gw --fd 7 --interface lo \
             --mac-addr 52:55:0a:00:02:02 --address 10.0.2.15 --netmask 24 --gateway 10.0.2.2 \
             --dns 9.9.9.9"
        );
    }

    #[test]
    fn forwards_mtu_and_the_hosts_loopback() {
        let forward = Forward {
            transport: Transport::Tcp,
            address: None,
            host: 2222,
            guest: 22,
        };
        let address = Some(Ipv4Addr::LOCALHOST);
        let config = PasstConfig {
            mtu: Some(1400),
            host_loopback: true,
            forwards: vec![
                forward,
                Forward {
                    transport: Transport::Udp,
                    address,
                    ..forward
                },
            ],
            ..PasstConfig::default()
        };
        let arguments = arguments(&config, &[], 7).join(" ");
        assert!(
            arguments.ends_with("--mtu 1400 --tcp-ports 2222:22 --udp-ports 127.0.0.1/2222:22")
        );
        assert!(!arguments.contains("--no-map-gw"));
        assert!(!arguments.contains("--dns"));
    }
}
