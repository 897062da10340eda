//! The agent: reads frames from the virtio-serial port and hands them to the commands they are for.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

use super::command::Channel;
use super::init::mount_at;
use crate::lab::protocol::{Frame, Hello, Kind, PORT, Spawn, WindowSize};

/// The sending half of the port, shared by all commands.
#[derive(Debug, Clone)]
pub(super) struct Sender(pub(super) Arc<Mutex<File>>);

impl Sender {
    /// Sends one frame. A host that went away is noticed by the reading side.
    pub(super) fn send(&self, channel: u32, kind: Kind, payload: &[u8]) {
        let frame = Frame {
            channel,
            kind,
            payload: payload.to_vec(),
        };
        let mut port = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = frame.write(&mut *port);
    }
}

/// Reads a port that says "end of file" whenever no host is connected.
struct Port {
    file: File,
    /// A frame has begun, so its end is worth waiting for.
    connected: bool,
}

impl Read for Port {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.file.read(buffer) {
                Ok(0) if !self.connected => thread::sleep(Duration::from_millis(5)),
                Ok(count) => {
                    self.connected = count > 0;
                    return Ok(count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Serves the port until the machine ends.
///
/// # Errors
/// The port does not exist or cannot be opened.
pub fn run() -> Result<()> {
    let path = find_port()?;
    let file = File::options()
        .read(true)
        .write(true)
        .open(&path)
        .with_context(|| format!("Cannot open {}", path.display()))?;
    let sender = Sender(Arc::new(Mutex::new(file.try_clone()?)));
    let mut port = Port {
        file,
        connected: false,
    };
    let mut channels = HashMap::new();
    loop {
        match Frame::read(&mut port) {
            Ok(frame) => dispatch(&frame, &mut channels, &sender),
            // The host went away in the middle of a frame: the next one begins a new connection.
            Err(_) => port.connected = false,
        }
    }
}

fn find_port() -> Result<PathBuf> {
    let class = "/sys/class/virtio-ports";
    for entry in fs::read_dir(class).with_context(|| format!("Cannot read {class}"))? {
        let entry = entry?;
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim_end() == PORT {
            return Ok(PathBuf::from("/dev").join(entry.file_name()));
        }
    }
    anyhow::bail!("No virtio-serial port is called {PORT}")
}

fn dispatch(frame: &Frame, channels: &mut HashMap<u32, Channel>, sender: &Sender) {
    let id = frame.channel;
    match frame.kind {
        Kind::Hello => {
            channels.clear();
            let answer = hello(&frame.payload)
                .err()
                .map(|error| format!("{error:#}"));
            sender.send(0, Kind::Ready, answer.unwrap_or_default().as_bytes());
        }
        Kind::Spawn => {
            let started = serde_json::from_slice::<Spawn>(&frame.payload)
                .context("Bad request")
                .and_then(|spawn| Channel::start(id, &spawn, sender));
            match started {
                Ok(channel) => drop(channels.insert(id, channel)),
                Err(error) => sender.send(id, Kind::Failed, format!("{error:#}").as_bytes()),
            }
        }
        Kind::Input => {
            if let Some(channel) = channels.get(&id) {
                channel.input(frame.payload.clone());
            }
        }
        Kind::InputEnd => {
            if let Some(channel) = channels.get_mut(&id) {
                channel.end_input();
            }
        }
        Kind::Resize => {
            let size = serde_json::from_slice::<WindowSize>(&frame.payload);
            if let (Some(channel), Ok(size)) = (channels.get(&id), size) {
                channel.resize(size);
            }
        }
        Kind::Signal => {
            if let (Some(channel), Some(signal)) = (channels.get(&id), frame.number()) {
                channel.signal(signal);
            }
        }
        Kind::Close => drop(channels.remove(&id)),
        _ => {}
    }
}

/// Makes a machine that may have slept in a snapshot fit for now.
fn hello(payload: &[u8]) -> Result<()> {
    let hello: Hello = serde_json::from_slice(payload).context("Bad greeting")?;
    let now = TimeSpec::from_duration(Duration::from_nanos(hello.unix_nanos));
    clock_settime(ClockId::CLOCK_REALTIME, now).context("Cannot set the clock")?;
    stir_entropy(&hello.entropy).context("Cannot stir the random numbers")?;
    if hello.mount_shares {
        let common = "trans=virtio,version=9p2000.L,msize=512000";
        mount_at("host", "/host", "9p", &format!("{common},cache=loose,ro"))
            .context("Cannot mount /host")?;
        mount_at("share", "/share", "9p", common).context("Cannot mount /share")?;
    }
    Ok(())
}

fn stir_entropy(bytes: &[u8]) -> Result<()> {
    // RNDRESEEDCRNG of linux/random.h.
    nix::ioctl_none!(reseed, b'R', 7);
    fs::write("/dev/urandom", bytes)?;
    let random = File::open("/dev/urandom")?;
    // SAFETY: RNDRESEEDCRNG takes no argument and the descriptor is open.
    unsafe { reseed(random.as_raw_fd()) }?;
    Ok(())
}
