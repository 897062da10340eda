//! The server behind the cluster's API server: the parts of machines (`subresources.kubevirt.io`) and
//! the webhooks that the API server asks about new objects.
//!
//! HTTP/1.1 only: consoles need its upgrades, and one protocol is less to guard. Numbers of
//! connections and streams, lengths of bodies and times are bounded.

mod agent;
mod answer;
mod args;
mod auth;
mod certs;
mod discovery;
mod instances;
mod machines;
mod path;
mod route;
mod streams;
mod tls;
mod webhooks;

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use anyhow::{Context, Result};
use futures_util::{Stream, StreamExt};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tracing::{info, warn};

pub use args::ServerArgs;
use args::Settings;
use auth::Proxy;

/// The API's group.
pub const GROUP: &str = "subresources.kubevirt.io";
/// The API's version.
pub const VERSION: &str = "v1";
/// The APIService that names our service.
const API_SERVICE: &str = "v1.subresources.kubevirt.io";
/// The name of the webhooks' configurations.
const WEBHOOKS: &str = "edgevmm-operator";

/// Most connections at a time.
const MAX_CONNECTIONS: usize = 256;
/// Most consoles and forwarded ports at a time.
const MAX_STREAMS: usize = 64;
/// How long a client may take to shake hands.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long a client may take to ask, also between two requests.
const ASKING: Duration = Duration::from_secs(60);
/// How often certificates are looked at.
const LOOK: Duration = Duration::from_secs(12 * 60 * 60);
/// How long to wait after a failure.
const RETRY: Duration = Duration::from_secs(5);

/// What requests are served with.
struct Server {
    client: Client,
    settings: Settings,
    proxy: RwLock<Proxy>,
    streams: Arc<Semaphore>,
    /// Who is at the console of an instance, by its UID.
    consoles: Mutex<HashMap<String, Arc<Notify>>>,
}

impl Server {
    fn proxy(&self) -> Proxy {
        let proxy = self.proxy.read().unwrap_or_else(PoisonError::into_inner);
        proxy.clone()
    }
}

/// Serves until it is dropped.
///
/// # Errors
/// The address can't be listened at.
pub async fn serve(client: Client, settings: Settings) -> Result<()> {
    let listener = TcpListener::bind(settings.listen).await;
    let listener = listener.with_context(|| format!("Can't listen at {}", settings.listen))?;
    info!(address = %settings.listen, "serving subresources and webhooks");
    let server = Arc::new(Server {
        client,
        settings,
        proxy: RwLock::default(),
        streams: Arc::new(Semaphore::new(MAX_STREAMS)),
        consoles: Mutex::default(),
    });
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut proxies = Box::pin(proxies(&server.client));
    loop {
        let config = loop {
            match configure(&server).await {
                Ok(config) => break config,
                Err(error) => {
                    warn!("{error:#}");
                    sleep(RETRY).await;
                }
            }
        };
        // Until certificates are to be looked at, or the API server's proxy has others.
        tokio::select! {
            () = accept(&listener, &server, &config, &slots) => {}
            () = sleep(LOOK) => {}
            Some(proxy) = proxies.next() => {
                *server.proxy.write().unwrap_or_else(PoisonError::into_inner) = proxy;
            }
        }
    }
}

async fn configure(server: &Server) -> Result<Arc<ServerConfig>> {
    let Server {
        client, settings, ..
    } = server;
    let certificates = certs::ensure(client, settings).await?;
    certs::publish(client, &certificates.authority).await?;
    tls::config(&certificates, &server.proxy().authorities)
}

/// What the API server tells of its proxy, now and whenever it changes.
fn proxies(client: &Client) -> impl Stream<Item = Proxy> + use<> {
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), auth::NAMESPACE);
    let found = watcher::watch_object(api, auth::CONFIG).default_backoff();
    let mut last = None;
    found.filter_map(move |config| {
        let new = match config {
            Ok(config) => Some(config.as_ref().map(Proxy::of).unwrap_or_default()),
            Err(error) => {
                warn!("Can't read {}/{}: {error}", auth::NAMESPACE, auth::CONFIG);
                None
            }
        };
        let new = new.filter(|new| last.as_ref() != Some(new));
        if let Some(new) = &new {
            last = Some(new.clone());
        }
        std::future::ready(new)
    })
}

async fn accept(
    listener: &TcpListener,
    server: &Arc<Server>,
    config: &Arc<ServerConfig>,
    slots: &Arc<Semaphore>,
) {
    let acceptor = TlsAcceptor::from(Arc::clone(config));
    loop {
        // Others wait in the kernel's queue.
        let Ok(slot) = Arc::clone(slots).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let (server, acceptor) = (Arc::clone(server), acceptor.clone());
                tokio::spawn(async move {
                    connection(&server, acceptor, stream).await;
                    drop(slot);
                });
            }
            Err(error) => {
                warn!("Can't take a connection: {error}");
                sleep(RETRY).await;
            }
        }
    }
}

async fn connection(server: &Arc<Server>, acceptor: TlsAcceptor, stream: TcpStream) {
    let Ok(Ok(stream)) = timeout(HANDSHAKE, acceptor.accept(stream)).await else {
        return;
    };
    let (_, session) = stream.get_ref();
    let shown = session.peer_certificates().and_then(<[_]>::first);
    let name = shown.and_then(tls::common_name);
    let service = service_fn(|request| {
        let answer = route::answer(server, name.as_deref(), request);
        async { Ok::<_, Infallible>(answer.await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(ASKING)
        .max_buf_size(64 << 10)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    // A client that leaves is no news.
    let _ = served.await;
}
