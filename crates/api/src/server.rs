//! The server's side of the transport: HTTP/2 on a Unix socket, and nothing else of what HTTP servers
//! can do.

use std::convert::Infallible;
use std::pin::pin;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::http::{Request, Response};
use hyper::server::conn::http2::Builder;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::BoxFuture;
use tonic::server::NamedService;
use tower_service::Service;

use crate::v1::agent_server::{Agent, AgentServer};
use crate::v1::machine_server::{Machine, MachineServer};

/// How long a client waits when the kernel refuses its connection, as for want of descriptors.
const RETRY: Duration = Duration::from_millis(100);

/// Serves the API on `listener` until `shutdown` is true; then as long as clients are being answered.
pub async fn serve<M: Machine, A: Agent>(
    listener: UnixListener,
    machine: M,
    agent: A,
    mut shutdown: watch::Receiver<bool>,
) {
    let services = Services {
        machine: MachineServer::new(machine),
        agent: AgentServer::new(agent),
    };
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(services.clone().converse(stream, shutdown.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "The API can't take a connection");
                    tokio::time::sleep(RETRY).await;
                }
            },
            () = over(&mut shutdown) => break,
            Some(_) = connections.join_next() => {}
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Waits until `shutdown` is true.
async fn over(shutdown: &mut watch::Receiver<bool>) {
    // Nobody can set it any more: that is the end, too.
    let _ = shutdown.wait_for(|over| *over).await;
}

/// What requests are for.
#[derive(Debug)]
struct Services<M, A> {
    machine: MachineServer<M>,
    agent: AgentServer<A>,
}

impl<M, A> Clone for Services<M, A> {
    fn clone(&self) -> Self {
        Self {
            machine: self.machine.clone(),
            agent: self.agent.clone(),
        }
    }
}

impl<M: Machine, A: Agent> Services<M, A> {
    /// Answers the requests of one client.
    async fn converse(self, stream: UnixStream, mut shutdown: watch::Receiver<bool>) {
        let answer = service_fn(|request| self.answer(request));
        let mut builder = Builder::new(TokioExecutor::new());
        builder.timer(TokioTimer::new());
        let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), answer));
        let result = tokio::select! {
            result = &mut connection => result,
            () = over(&mut shutdown) => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = result {
            tracing::debug!(%error, "A client of the API is gone");
        }
    }

    fn answer(&self, request: Request<Incoming>) -> BoxFuture<Response<Body>, Infallible> {
        let name = request.uri().path().split('/').nth(1);
        if name == Some(MachineServer::<M>::NAME) {
            self.machine.clone().call(request)
        } else if name == Some(AgentServer::<A>::NAME) {
            self.agent.clone().call(request)
        } else {
            Box::pin(async { Ok(Status::unimplemented("there is no such service").into_http()) })
        }
    }
}
