//! The client's way to a machine.

use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{self, Poll};

use hyper::body::Incoming;
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper::http::{Request, Response, Uri};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::UnixStream;
use tonic::body::Body;
use tower_service::Service;

use crate::v1::agent_client::AgentClient;
use crate::v1::machine_client::MachineClient;

/// The client of a machine.
pub type Client = MachineClient<Connection>;

/// The client of a machine's guest agent.
pub type Agent = AgentClient<Connection>;

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
        source: hyper::Error,
    },
}

/// Connects to the API at `socket`.
///
/// # Errors
///
/// When nobody serves the API there.
pub async fn connect(socket: &Path) -> Result<Client, ConnectError> {
    let connection = Connection::open(socket).await?;
    Ok(MachineClient::with_origin(connection, origin()))
}

/// As [`connect`], to ask the guest agent.
///
/// # Errors
///
/// When nobody serves the API there.
pub async fn connect_agent(socket: &Path) -> Result<Agent, ConnectError> {
    let connection = Connection::open(socket).await?;
    Ok(AgentClient::with_origin(connection, origin()))
}

/// What requests must have, and the server has no use for.
fn origin() -> Uri {
    Uri::from_static("http://localhost")
}

/// An HTTP/2 connection to a machine, good until either side ends: it is not made anew, as a machine
/// that has ended does not come back.
#[derive(Debug, Clone)]
pub struct Connection(SendRequest<Body>);

impl Connection {
    async fn open(socket: &Path) -> Result<Self, ConnectError> {
        let stream = UnixStream::connect(socket).await;
        let stream = stream.map_err(|source| ConnectError::Connect {
            path: socket.to_owned(),
            source,
        })?;
        let opened = handshake(TokioExecutor::new(), TokioIo::new(stream)).await;
        let (requests, connection) = opened.map_err(|source| ConnectError::Transport {
            path: socket.to_owned(),
            source,
        })?;
        // Why it ended is what each of its requests tells.
        tokio::spawn(connection);
        Ok(Self(requests))
    }
}

impl Service<Request<Body>> for Connection {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Incoming>, hyper::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut task::Context<'_>) -> Poll<Result<(), hyper::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}
