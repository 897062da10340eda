//! The machine's channels: the guest agent's, and those that the config names.

use std::io;
use std::sync::Arc;

use edgevmm_config::{AGENT_CHANNEL, VmConfig};
use edgevmm_devices::platform::DeviceLoop;
use edgevmm_devices::virtio::console::ports::Ports;

use crate::agent::Agent;
use crate::channel::{ChannelError, ChannelSocket, Link};

/// Channels that have no host ends yet.
pub(super) struct Channels {
    agent: Option<Link>,
    others: Vec<Link>,
}

impl Channels {
    /// The channels that `config` asks for.
    ///
    /// # Errors
    /// Fails when the process may open no more files.
    pub(super) fn new(config: &VmConfig) -> io::Result<Channels> {
        let agent = config.agent.then(|| Link::new(AGENT_CHANNEL)).transpose()?;
        let others = config.channels.iter();
        let others = others.map(|channel| Link::new(&channel.name));
        Ok(Channels {
            agent,
            others: others.collect::<Result<_, _>>()?,
        })
    }

    /// The device in which the guest finds them; none if there are none.
    pub(super) fn device(&self, device_loop: &Arc<dyn DeviceLoop>) -> Option<Box<Ports>> {
        let links = self.agent.iter().chain(&self.others);
        let channels: Vec<_> = links.map(|link| Arc::clone(link.channel())).collect();
        (!channels.is_empty()).then(|| Box::new(Ports::new(channels, Arc::clone(device_loop))))
    }

    /// Gives each its host end. Sockets are made here.
    ///
    /// # Errors
    /// Fails when a socket can't be made.
    pub(super) fn connect(
        self,
        config: &VmConfig,
    ) -> Result<(Option<Arc<Agent>>, Vec<ChannelSocket>), ChannelError> {
        let paths = config.channels.iter();
        let paths = paths.map(|channel| channel.socket.as_path());
        let sockets = paths.zip(self.others);
        let sockets = sockets.map(|(path, link)| ChannelSocket::bind(path, link));
        let sockets = sockets.collect::<Result<_, _>>()?;
        Ok((self.agent.map(Agent::new).map(Arc::new), sockets))
    }
}
