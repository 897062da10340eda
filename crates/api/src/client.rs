//! The client's way to a machine.

use std::io;
use std::path::{Path, PathBuf};

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;

use crate::v1::agent_client::AgentClient;
use crate::v1::machine_client::MachineClient;

/// A connection to a machine.
pub type Client = MachineClient<Channel>;

/// A connection to a machine's guest agent.
pub type Agent = AgentClient<Channel>;

/// Why there is no connection to a machine.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody listens at the socket, or it isn't ours.
    #[error("Can't connect to {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
    /// The listener doesn't speak the protocol.
    #[error("{} doesn't answer as a machine's API does", path.display())]
    Transport {
        /// The socket.
        path: PathBuf,
        /// What the transport says.
        source: tonic::transport::Error,
    },
}

/// Connects to the API at `socket`.
///
/// # Errors
///
/// When nobody serves the API there.
pub async fn connect(socket: &Path) -> Result<Client, ConnectError> {
    channel(socket).await.map(MachineClient::new)
}

/// As [`connect`], to ask the guest agent.
///
/// # Errors
///
/// When nobody serves the API there.
pub async fn connect_agent(socket: &Path) -> Result<Agent, ConnectError> {
    channel(socket).await.map(AgentClient::new)
}

async fn channel(socket: &Path) -> Result<Channel, ConnectError> {
    // The first connection is made here, so that its error isn't buried in the transport's.
    let stream = UnixStream::connect(socket)
        .await
        .map_err(|source| ConnectError::Connect {
            path: socket.to_owned(),
            source,
        })?;
    let mut first = Some(stream);
    let path = socket.to_owned();
    let connector = service_fn(move |_: Uri| {
        let first = first.take();
        let path = path.clone();
        async move {
            let stream = match first {
                Some(stream) => stream,
                None => UnixStream::connect(path).await?,
            };
            Ok::<_, io::Error>(TokioIo::new(stream))
        }
    });
    // The authority is sent to the server, which has no use for it.
    Endpoint::from_static("http://localhost")
        .connect_with_connector(connector)
        .await
        .map_err(|source| ConnectError::Transport {
            path: socket.to_owned(),
            source,
        })
}
