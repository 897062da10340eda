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
mod slots;
mod streams;
mod tls;
mod webhooks;

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::IpAddr;
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
use slots::{Slot, Slots};

/// The API's group.
pub const GROUP: &str = "subresources.kubevirt.io";
/// The API's version.
pub const VERSION: &str = "v1";
/// The APIService that names our service.
const API_SERVICE: &str = "v1.subresources.kubevirt.io";
/// The name of the webhooks' configurations.
const WEBHOOKS: &str = "edgevmm-operator";

/// Most connections of the API server's proxy at a time, which it shows to be by its certificate.
const MAX_PROXIED: usize = 256;
/// Most other connections at a time: anybody may open some, and the API server for webhooks.
const MAX_OTHERS: usize = 256;
/// Most of them from one address.
const MAX_OTHERS_EACH: usize = 64;
/// Most consoles and forwarded ports at a time.
const MAX_STREAMS: usize = 96;
/// Most of them of one user.
const MAX_STREAMS_EACH: usize = 32;
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
    /// Connections of the API server's proxy.
    proxied: Semaphore,
    /// Others, by their addresses.
    others: Arc<Slots<IpAddr>>,
    /// Consoles and forwarded ports, by users.
    streams: Arc<Slots<String>>,
    /// Who is at the console of an instance, by its UID.
    consoles: Mutex<HashMap<String, Arc<Notify>>>,
}

impl Server {
    fn new(client: Client, settings: Settings) -> Self {
        Self {
            client,
            settings,
            proxy: RwLock::default(),
            proxied: Semaphore::new(MAX_PROXIED),
            others: Slots::new(MAX_OTHERS, MAX_OTHERS_EACH),
            streams: Slots::new(MAX_STREAMS, MAX_STREAMS_EACH),
            consoles: Mutex::default(),
        }
    }

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
    let server = Arc::new(Server::new(client, settings));
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
            () = accept(&listener, &server, &config) => {}
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

async fn accept(listener: &TcpListener, server: &Arc<Server>, config: &Arc<ServerConfig>) {
    let acceptor = TlsAcceptor::from(Arc::clone(config));
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                // Who has too many is turned away at once, and takes nobody's turn.
                let Ok(slot) = server.others.take(peer.ip()) else {
                    continue;
                };
                let (server, acceptor) = (Arc::clone(server), acceptor.clone());
                tokio::spawn(async move { connection(&server, acceptor, stream, slot).await });
            }
            Err(error) => {
                warn!("Can't take a connection: {error}");
                sleep(RETRY).await;
            }
        }
    }
}

async fn connection(
    server: &Arc<Server>,
    acceptor: TlsAcceptor,
    stream: TcpStream,
    slot: Slot<IpAddr>,
) {
    let Ok(Ok(stream)) = timeout(HANDSHAKE, acceptor.accept(stream)).await else {
        return;
    };
    let (_, session) = stream.get_ref();
    let shown = session.peer_certificates().and_then(<[_]>::first);
    let name = shown.and_then(tls::common_name);
    let (mut other, mut proxied) = (Some(slot), None);
    if server.proxy().is(name.as_deref()) {
        let Ok(Ok(permit)) = timeout(HANDSHAKE, server.proxied.acquire()).await else {
            return;
        };
        proxied = Some(permit);
        other = None;
    }
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
    drop((other, proxied));
}
