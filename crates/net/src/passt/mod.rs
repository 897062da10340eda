//! User-mode networking by passt: a network of its own for the guest behind the host's sockets,
//! without privileges and without anything set up on the host.
//!
//! The guest gets one IPv4 address by DHCP; passt is always told the whole network and never
//! derives it from the host, so that it runs the same with no default route and offline. Left out:
//! IPv6. Frames carry no virtio-net header, hence no offloads.
//!
//! What a hostile guest reaches: whatever a process of this user reaches, which includes services
//! that listen on all of the host's addresses, but not those on its loopback alone. For these
//! `--no-map-gw` keeps the gateway's address from meaning the loopback, and [`FrameSocket`] drops
//! what is addressed to the loopback itself.
//!
//! passt quits when its socket is closed, so it does not outlive this process however that ends. A
//! parent-death signal would not do: the kernel clears it when passt changes its credentials.

mod command;
mod ready;

use std::fmt;
use std::io::{self, ErrorKind, Read};
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::socket::FrameSocket;

/// How long passt may take to answer. It is ready after some 20 ms; a loaded or nested host needs
/// more.
const START_LIMIT: Duration = Duration::from_secs(20);
/// How long passt may take to end once its socket is closed.
const EXIT_LIMIT: Duration = Duration::from_secs(2);
/// Of passt's messages, this much is kept.
const LOG_LIMIT: usize = 4096;
/// IPv4's least MTU, and the largest that passt takes.
const MTU: std::ops::RangeInclusive<u16> = 68..=65_520;

/// The guest's network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PasstConfig {
    /// The passt program; a bare name is searched in `PATH`.
    pub program: PathBuf,
    /// The guest's address.
    pub guest: Ipv4Addr,
    /// Bits of the network's mask.
    pub prefix: u8,
    /// The guest's gateway, and the source of what reaches it from the host's loopback.
    pub gateway: Ipv4Addr,
    /// DNS servers for the guest; `None` for the host's, as far as they are not on its loopback.
    pub dns: Option<Vec<Ipv4Addr>>,
    /// MTU told to the guest, in bytes; `None` for 65520.
    pub mtu: Option<u16>,
    /// Host ports that lead to the guest.
    pub forwards: Vec<Forward>,
    /// Whether the guest reaches services on the host's loopback by its gateway's address.
    pub host_loopback: bool,
}

impl Default for PasstConfig {
    fn default() -> Self {
        Self {
            program: PathBuf::from("passt"),
            guest: Ipv4Addr::new(10, 0, 2, 15),
            prefix: 24,
            gateway: Ipv4Addr::new(10, 0, 2, 2),
            dns: None,
            mtu: None,
            forwards: Vec::new(),
            host_loopback: false,
        }
    }
}

/// A host port that leads to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forward {
    /// Transport.
    pub transport: Transport,
    /// Host address to listen at; `None` for all.
    pub address: Option<Ipv4Addr>,
    /// Host port.
    pub host: u16,
    /// Guest port.
    pub guest: u16,
}

/// Transport of a forwarded port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Forward {
    /// Writes it the way passt's options take it: `[ADDRESS/]HOST:GUEST`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(address) = self.address {
            write!(f, "{address}/")?;
        }
        write!(f, "{}:{}", self.host, self.guest)
    }
}

/// Why passt could not be started.
#[derive(Debug, Error)]
pub enum PasstError {
    /// passt is not there.
    #[error(
        "{program:?} is not there: install the package `passt`, or use a tap device instead of the \
         user network"
    )]
    Missing {
        /// The program that was searched.
        program: PathBuf,
    },
    /// The addresses make no network.
    #[error("Guest {guest}/{prefix} and gateway {gateway} are not two hosts of one network")]
    Network {
        /// The guest's address.
        guest: Ipv4Addr,
        /// Bits of the mask.
        prefix: u8,
        /// The gateway's address.
        gateway: Ipv4Addr,
    },
    /// The MTU is out of bounds.
    #[error("MTU {mtu} is not in {} to {}", MTU.start(), MTU.end())]
    Mtu {
        /// The MTU as given.
        mtu: u16,
    },
    /// A forward has port 0.
    #[error("Port forward {forward} needs ports from 1 to 65535")]
    Forward {
        /// The forward as given.
        forward: Forward,
    },
    /// The process could not be made.
    #[error("Cannot start {program:?}")]
    Spawn {
        /// The program.
        program: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// passt ended before it was ready.
    #[error("passt could not start ({exit}){hint}", hint = hint(&exit.message))]
    Refused {
        /// How it ended and what it said.
        exit: PasstExit,
    },
    /// passt runs but does not answer.
    #[error("passt did not answer within {} seconds", START_LIMIT.as_secs())]
    Silent,
}

/// How passt ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PasstExit {
    /// Its exit status.
    pub status: ExitStatus,
    /// The last that it said; may be empty.
    pub message: String,
}

impl fmt::Display for PasstExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.status)?;
        if !self.message.is_empty() {
            write!(f, ": {}", self.message)?;
        }
        Ok(())
    }
}

/// A running passt. Dropping it ends and reaps the process.
#[derive(Debug)]
pub struct Passt {
    child: Child,
    log: Log,
}

impl Passt {
    /// Starts passt and waits until it answers; returns it and the guest's end of its socket.
    ///
    /// # Errors
    /// Fails when passt is not installed, when the configuration makes no sense, and when passt
    /// gives up, for a port in use for example: with what it said.
    pub fn spawn(config: &PasstConfig) -> Result<(Self, FrameSocket), PasstError> {
        config.check()?;
        let spawn_error = |source: io::Error| match source.kind() {
            ErrorKind::NotFound => PasstError::Missing {
                program: config.program.clone(),
            },
            _ => PasstError::Spawn {
                program: config.program.clone(),
                source,
            },
        };
        let (stream, theirs) = UnixStream::pair().map_err(spawn_error)?;
        let (child, log) = command::spawn(config, &theirs).map_err(spawn_error)?;
        // From here on passt alone holds its end, and our end tells when it is gone.
        drop(theirs);
        let mut passt = Self { child, log };

        match ready::wait(stream, config.gateway, START_LIMIT) {
            Ok(socket) => Ok((passt, socket)),
            Err(error) if error.kind() == ErrorKind::TimedOut => Err(PasstError::Silent),
            Err(source) => match passt.wait(EXIT_LIMIT) {
                Some(exit) => Err(PasstError::Refused { exit }),
                None => Err(spawn_error(source)),
            },
        }
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How passt ended, if it has. To be asked when the socket reports an end of file.
    pub fn try_wait(&mut self) -> Option<PasstExit> {
        self.log.drain();
        let status = self.child.try_wait().ok().flatten()?;
        self.log.drain();
        Some(PasstExit {
            status,
            message: self.log.message(),
        })
    }

    /// Waits for the end of passt, whose socket is closed.
    fn wait(&mut self, limit: Duration) -> Option<PasstExit> {
        let start = Instant::now();
        loop {
            let exit = self.try_wait();
            if exit.is_some() || start.elapsed() >= limit {
                return exit;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        // Both fail only for a process that was reaped already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl PasstConfig {
    fn check(&self) -> Result<(), PasstError> {
        let mask = u32::MAX
            .checked_shl(32 - u32::from(self.prefix.min(32)))
            .unwrap_or(0);
        let host = |address: Ipv4Addr| {
            let bits = address.to_bits() & !mask;
            bits != 0 && bits != !mask && !address.is_loopback() && !address.is_multicast()
        };
        let together = self.guest.to_bits() & mask == self.gateway.to_bits() & mask;
        let sensible = (1..=30).contains(&self.prefix) && self.guest != self.gateway;
        if !(together && sensible && host(self.guest) && host(self.gateway)) {
            return Err(PasstError::Network {
                guest: self.guest,
                prefix: self.prefix,
                gateway: self.gateway,
            });
        }
        if let Some(mtu) = self.mtu.filter(|mtu| !MTU.contains(mtu)) {
            return Err(PasstError::Mtu { mtu });
        }
        let invalid = |forward: &&Forward| forward.host == 0 || forward.guest == 0;
        match self.forwards.iter().find(invalid) {
            Some(&forward) => Err(PasstError::Forward { forward }),
            None => Ok(()),
        }
    }
}

/// What to do about a message of passt.
fn hint(message: &str) -> &'static str {
    let message = message.to_ascii_lowercase();
    if message.contains("bind") {
        ": is the port taken, or below 1024 without privilege?"
    } else if message.contains("namespace") {
        ": passt needs user namespaces, which sysctl, AppArmor or the container may forbid"
    } else {
        ""
    }
}

/// The end of what passt says, from a pipe that nobody waits for.
#[derive(Debug)]
struct Log {
    pipe: io::PipeReader,
    text: Vec<u8>,
}

impl Log {
    fn drain(&mut self) {
        // No more than a pipe holds, so that this ends even if passt never pauses.
        for _ in 0..128 {
            let mut chunk = [0; 512];
            let Ok(count @ 1..) = self.pipe.read(&mut chunk) else {
                return;
            };
            self.text
                .extend_from_slice(chunk.get(..count).unwrap_or_default());
            let excess = self.text.len().saturating_sub(LOG_LIMIT);
            self.text.drain(..excess);
        }
    }

    /// The last lines, without those that never explain an end.
    fn message(&self) -> String {
        let noise = ["to syslog", "to nobody", "nameserver", "AVX2"];
        let text = String::from_utf8_lossy(&self.text);
        let lines: Vec<&str> = text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !noise.iter().any(|noise| line.contains(noise)))
            .collect();
        lines
            .get(lines.len().saturating_sub(3)..)
            .unwrap_or_default()
            .join("; ")
    }
}
