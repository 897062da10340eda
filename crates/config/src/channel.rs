//! Channels between programs of the guest and of the host.

use std::collections::HashSet;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::ConfigError;
use crate::keys::shorten;

/// The name by which a guest finds the channel of the QEMU guest agent.
pub const AGENT_CHANNEL: &str = "org.qemu.guest_agent.0";

/// Most channels beside the agent's.
const MAX_CHANNELS: usize = 16;
/// Longest name of a channel in bytes.
const MAX_NAME: usize = 64;
/// Longest path of a Unix socket in bytes.
const MAX_SOCKET: usize = 107;

/// A channel: a named virtio port in the guest, a Unix socket on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChannelConfig {
    /// Name that the guest finds it by, as in `/dev/virtio-ports`.
    pub name: String,
    /// Socket that the VMM makes and listens at.
    pub socket: PathBuf,
}

/// Checks channels, beside one for the agent if it has its own.
pub(crate) fn check_channels(channels: &[ChannelConfig], agent: bool) -> Result<(), ConfigError> {
    if channels.len() > MAX_CHANNELS {
        return Err(ConfigError::Channels(channels.len()));
    }
    let mut names = HashSet::new();
    let mut sockets = HashSet::new();
    for ChannelConfig { name, socket } in channels {
        let letter = |byte: u8| byte.is_ascii_alphanumeric() || b"._-:+".contains(&byte);
        let starts = name
            .bytes()
            .next()
            .is_some_and(|byte| byte.is_ascii_alphanumeric());
        if name.len() > MAX_NAME || !starts || !name.bytes().all(letter) {
            return Err(ConfigError::ChannelName(shorten(name)));
        }
        if agent && name == AGENT_CHANNEL {
            return Err(ConfigError::AgentChannel);
        }
        if !(1..=MAX_SOCKET).contains(&socket.as_os_str().len()) {
            return Err(ConfigError::ChannelSocket(name.clone()));
        }
        let (what, value) = if !names.insert(name) {
            ("The channel", name.clone())
        } else if !sockets.insert(socket) {
            ("The socket", shorten(&socket.display().to_string()))
        } else {
            continue;
        };
        return Err(ConfigError::Duplicate { what, value });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use crate::VmConfig;

    use super::*;

    fn check(yaml: &str) -> Result<(), String> {
        let config = VmConfig::parse(&format!("boot: {{kernel: k}}\n{yaml}")).unwrap();
        config.validate().map_err(|error| error.to_string())
    }

    #[test]
    fn a_flag_makes_a_channel() {
        let channel: ChannelConfig = "com.example.0,socket=/run/a".parse().unwrap();
        assert_eq!(channel.name, "com.example.0");
        assert_eq!(channel.socket, PathBuf::from("/run/a"));
        let error = "a".parse::<ChannelConfig>().unwrap_err().to_string();
        assert!(error.contains("socket=VALUE"), "{error}");
    }

    #[test]
    fn names_and_sockets_are_fit_and_unique() {
        let agent = format!("{{name: {AGENT_CHANNEL}, socket: s}}");
        assert_eq!(check(&format!("agent: false\nchannels: [{agent}]")), Ok(()));
        let long = "s".repeat(108);
        for (channels, expected) in [
            (agent.as_str(), "--no-agent"),
            ("{name: a/b, socket: s}", "can't name a channel"),
            ("{name: '', socket: s}", "can't name a channel"),
            ("{name: ..., socket: s}", "can't name a channel"),
            ("{name: a, socket: ''}", "1 to 107 bytes"),
            (&format!("{{name: a, socket: {long}}}"), "1 to 107 bytes"),
            (
                "{name: a, socket: s}, {name: a, socket: t}",
                "channel a is there twice",
            ),
            (
                "{name: a, socket: s}, {name: b, socket: s}",
                "socket s is there twice",
            ),
        ] {
            let error = check(&format!("channels: [{channels}]")).unwrap_err();
            assert!(error.contains(expected), "{channels}: {error}");
        }
        let many: String = (0..17)
            .map(|i| format!("{{name: c{i}, socket: s{i}}},"))
            .collect();
        let error = check(&format!("channels: [{many}]")).unwrap_err();
        assert!(error.contains("17 channels"), "{error}");
    }
}
