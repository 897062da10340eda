//! Host ends of the machine's channels: the guest agent's client, and sockets for other programs.

mod socket;

use std::io;
use std::sync::Arc;

use edgevmm_devices::channel::{Channel, ChannelWatcher};
use tokio::sync::Notify;

pub use socket::{ChannelError, ChannelSocket};

/// Passes on what a channel's device tells.
#[derive(Debug, Clone, Default)]
struct Changes(Arc<Notify>);

impl ChannelWatcher for Changes {
    fn changed(&self) {
        self.0.notify_waiters();
    }
}

/// The guest has closed its end of a channel, or opened it anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Closed;

/// A channel to wait for. Nothing wakes while nobody waits.
#[derive(Debug, Clone)]
pub struct Link {
    channel: Arc<Channel>,
    changes: Changes,
}

impl Link {
    /// A channel of this name, closed.
    ///
    /// # Errors
    /// Fails when the process may open no more files.
    pub fn new(name: &str) -> io::Result<Link> {
        let changes = Changes::default();
        let channel = Channel::new(name, Box::new(changes.clone()))?;
        Ok(Link {
            channel: Arc::new(channel),
            changes,
        })
    }

    /// The channel, for a device.
    pub fn channel(&self) -> &Arc<Channel> {
        &self.channel
    }

    /// Waits for the guest to have its end open, and gives the number of that opening.
    pub async fn opened(&self) -> u64 {
        self.until(|| self.channel.guest()).await
    }

    /// Waits for bytes of the guest, and gives how many came.
    ///
    /// # Errors
    /// Fails when nothing is left of what the guest wrote and its opening `opening` is over.
    pub async fn read(&self, opening: u64, buffer: &mut [u8]) -> Result<usize, Closed> {
        let pop = || match self.channel.pop(buffer) {
            0 if self.channel.guest() != Some(opening) => Some(Err(Closed)),
            0 => None,
            count => Some(Ok(count)),
        };
        self.until(pop).await
    }

    /// Waits for bytes of the guest, whoever has its end open, and gives how many came.
    pub async fn take(&self, buffer: &mut [u8]) -> usize {
        let pop = || Some(self.channel.pop(buffer)).filter(|count| *count > 0);
        self.until(pop).await
    }

    /// Writes all of `bytes` at the guest's pace.
    ///
    /// # Errors
    /// Fails when the guest's opening `opening` is over.
    pub async fn write(&self, opening: u64, mut bytes: &[u8]) -> Result<(), Closed> {
        let push = || {
            if self.channel.guest() != Some(opening) {
                return Some(Err(Closed));
            }
            let count = self.channel.push(bytes);
            bytes = bytes.get(count..).unwrap_or_default();
            bytes.is_empty().then_some(Ok(()))
        };
        self.until(push).await
    }

    /// Tries `ready` until it gives something, again after each change.
    async fn until<T>(&self, mut ready: impl FnMut() -> Option<T>) -> T {
        loop {
            let mut changed = std::pin::pin!(self.changes.0.notified());
            // What changes between the look and the wait counts.
            changed.as_mut().enable();
            if let Some(value) = ready() {
                return value;
            }
            changed.await;
        }
    }
}
