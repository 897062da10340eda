//! Consoles and forwarded ports: WebSockets (RFC 6455) whose binary frames are bytes of a stream, in
//! KubeVirt's subprotocol `plain.kubevirt.io`. Frames of text are skipped, as there.
//!
//! A port is forwarded to the machine's pod and to nothing else: what an instance's status says of
//! addresses can be written by others.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use hyper::body::Incoming;
use hyper::header::{
    CONNECTION, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL,
    SEC_WEBSOCKET_VERSION, UPGRADE,
};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper::{HeaderMap, Request, StatusCode};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, interval_at, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Message, Utf8Bytes};

use edgevmm_kubevirt::api::{Phase, VirtualMachineInstance};

use super::Server;
use super::answer::{Answer, Refusal, empty};
use super::instances;
use super::path::{Kind, Part};
use super::slots::{Full, Slot};
use crate::control;

/// The subprotocol.
const PROTOCOL: &str = "plain.kubevirt.io";
/// Bytes that are passed on at once.
const CHUNK: usize = 8 << 10;
/// Longest message of a client.
const MAX_MESSAGE: usize = 1 << 20;
/// How often a client is asked whether it is there; it is gone when it is silent for two of them.
const PING: Duration = Duration::from_secs(30);
/// How long a client may take to read what it is sent.
const STALL: Duration = Duration::from_secs(30);
/// How long connecting may take.
const CONNECT: Duration = Duration::from_secs(10);

/// `console`: whoever comes takes it from whoever is there.
///
/// # Errors
/// There is none, or not yet, which clients tell by the code: they ask again after 400.
pub async fn console(
    server: &Arc<Server>,
    user: &str,
    part: &Part,
    request: Request<Incoming>,
) -> Result<Answer, Refusal> {
    let instance = instances::get(server, part).await?;
    let devices = &instance.spec.domain.devices;
    if devices.autoattach_serial_console == Some(false) {
        return Err(Refusal::bad("No serial consoles are present."));
    }
    match instances::phase(&instance) {
        Phase::Running => {}
        Phase::Failed | Phase::Succeeded => {
            return Err(Refusal::conflict("VMI has ended: it has no console"));
        }
        _ => return Err(Refusal::bad("VMI is not running")),
    }
    let (upgrade, answer) = upgrade(request)?;
    let slot = slot(server, user)?;
    let pod = control::pod(&server.client, &instance).await?;
    let mut process = control::console(&server.client, &pod).await?;
    let (Some(output), Some(input)) = (process.stdout(), process.stdin()) else {
        return Err(Refusal::failed("The console has no input and output"));
    };
    let (server, uid) = (Arc::clone(server), instance.uid().unwrap_or_default());
    tokio::spawn(async move {
        let seat = take_seat(&server, &uid);
        tokio::select! {
            () = carry(upgrade, output, input, slot) => {}
            () = seat.notified() => {}
        }
        leave_seat(&server, &uid, &seat);
        drop(process);
    });
    Ok(answer)
}

/// Has whoever is at a console leave it. To be kicked out a client waits for its notice.
fn take_seat(server: &Server, uid: &str) -> Arc<Notify> {
    let seat = Arc::new(Notify::new());
    let mut seats = server
        .consoles
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    if let Some(other) = seats.insert(uid.to_owned(), Arc::clone(&seat)) {
        other.notify_one();
    }
    seat
}

fn leave_seat(server: &Server, uid: &str, seat: &Arc<Notify>) {
    let mut seats = server
        .consoles
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    if seats.get(uid).is_some_and(|now| Arc::ptr_eq(now, seat)) {
        seats.remove(uid);
    }
}

/// `portforward`.
///
/// # Errors
/// There is no such port, or nobody at it.
pub async fn forward(
    server: &Arc<Server>,
    user: &str,
    part: &Part,
    request: Request<Incoming>,
) -> Result<Answer, Refusal> {
    let port = port(&part.rest)?;
    let instance = instances::get(server, part).await.map_err(|refusal| {
        if part.kind == Kind::Machine && refusal.code == StatusCode::NOT_FOUND {
            return Refusal::conflict("VM is not started");
        }
        refusal
    })?;
    if instances::phase(&instance) != Phase::Running {
        return Err(Refusal::conflict("VMI is not running"));
    }
    let (upgrade, answer) = upgrade(request)?;
    let slot = slot(server, user)?;
    let pod = control::pod(&server.client, &instance).await?;
    let address = SocketAddr::new(address(&instance, &pod)?, port);
    let connected = timeout(CONNECT, TcpStream::connect(address)).await;
    let failed = |why: String| Refusal::failed(format!("Can't connect to {address}: {why}"));
    let stream = connected
        .map_err(|_| failed("it does not answer".to_owned()))?
        .map_err(|error| failed(error.to_string()))?;
    let _ = stream.set_nodelay(true);
    let (from, to) = stream.into_split();
    tokio::spawn(carry(upgrade, from, to, slot));
    Ok(answer)
}

fn port(words: &[String]) -> Result<u16, Refusal> {
    let (port, protocol) = match words {
        [port] => (port, "tcp"),
        [port, protocol] => (port, protocol.as_str()),
        _ => return Err(Refusal::not_found("There is no port in the path")),
    };
    if protocol != "tcp" {
        return Err(Refusal::bad(format!(
            "{protocol} can't be forwarded: tcp can"
        )));
    }
    let port = port.parse().ok().filter(|&port| port != 0);
    port.ok_or_else(|| Refusal::bad("The port has to be a number from 1 to 65535"))
}

/// Where a machine is reached, which has to be where its pod is.
fn address(instance: &VirtualMachineInstance, pod: &Pod) -> Result<IpAddr, Refusal> {
    let interfaces = instance.status.iter().flat_map(|status| &status.interfaces);
    let told = interfaces.into_iter().next();
    let told = told.and_then(|interface| interface.ip_address.as_deref());
    let told =
        told.ok_or_else(|| Refusal::bad("The VMI has no network interface with an address"))?;
    if pod.spec.as_ref().and_then(|spec| spec.host_network) == Some(true) {
        return Err(Refusal::bad("The VMI's pod is on the node's network"));
    }
    let status = pod.status.as_ref();
    let one = status.and_then(|status| status.pod_ip.as_deref());
    let more = status.and_then(|status| status.pod_ips.as_ref());
    let mut known = one
        .into_iter()
        .chain(more.into_iter().flatten().map(|ip| &*ip.ip));
    if !known.any(|known| known == told) {
        return Err(Refusal::bad(
            "The VMI's address is not its pod's, so it can't be reached from here",
        ));
    }
    told.parse()
        .map_err(|_| Refusal::bad("The VMI's address is none"))
}

fn slot(server: &Server, user: &str) -> Result<Slot<String>, Refusal> {
    let slot = server.streams.take(user.to_owned());
    slot.map_err(|full| match full {
        Full::All => Refusal::busy("There are too many consoles and forwarded ports"),
        Full::Own => Refusal::too_many(format!(
            "User {user:?} has too many consoles and forwarded ports: close some"
        )),
    })
}

/// Agrees to become a WebSocket.
fn upgrade(mut request: Request<Incoming>) -> Result<(OnUpgrade, Answer), Refusal> {
    let headers = agree(request.headers())?;
    let mut answer = empty(StatusCode::SWITCHING_PROTOCOLS);
    *answer.headers_mut() = headers;
    Ok((hyper::upgrade::on(&mut request), answer))
}

/// The headers by which a server agrees.
fn agree(headers: &HeaderMap) -> Result<HeaderMap, Refusal> {
    let has = |name, word: &str| {
        let values = headers.get_all(name).iter();
        let mut words = values
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','));
        words.any(|found| found.trim().eq_ignore_ascii_case(word))
    };
    let key = headers.get(SEC_WEBSOCKET_KEY);
    let (Some(key), true, true, true) = (
        key,
        has(UPGRADE, "websocket"),
        has(CONNECTION, "upgrade"),
        has(SEC_WEBSOCKET_VERSION, "13"),
    ) else {
        return Err(Refusal::bad("This path is for WebSockets"));
    };
    let accept = HeaderValue::from_str(&derive_accept_key(key.as_bytes()))
        .map_err(|_| Refusal::bad("The WebSocket's key can't be read"))?;
    let mut answer = HeaderMap::new();
    answer.insert(UPGRADE, HeaderValue::from_static("websocket"));
    answer.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    answer.insert(SEC_WEBSOCKET_ACCEPT, accept);
    if has(SEC_WEBSOCKET_PROTOCOL, PROTOCOL) {
        let protocol = HeaderValue::from_static(PROTOCOL);
        answer.insert(SEC_WEBSOCKET_PROTOCOL, protocol);
    }
    Ok(answer)
}

/// Passes bytes on both ways until either end leaves.
async fn carry(
    upgrade: OnUpgrade,
    from: impl AsyncRead + Unpin,
    to: impl AsyncWrite + Unpin,
    slot: Slot<String>,
) {
    let Ok(Ok(stream)) = timeout(CONNECT, upgrade).await else {
        return;
    };
    pass(socket(stream).await, from, to).await;
    drop(slot);
}

async fn socket(stream: Upgraded) -> WebSocketStream<TokioIo<Upgraded>> {
    let config = WebSocketConfig::default()
        .read_buffer_size(CHUNK)
        .write_buffer_size(0)
        .max_write_buffer_size(16 * CHUNK)
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE));
    WebSocketStream::from_raw_socket(TokioIo::new(stream), Role::Server, Some(config)).await
}

async fn pass<S: AsyncRead + AsyncWrite + Unpin>(
    socket: WebSocketStream<S>,
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
) {
    let (mut sink, mut messages) = socket.split();
    let heard = AtomicBool::new(true);
    let up = async {
        while let Some(Ok(message)) = messages.next().await {
            heard.store(true, Ordering::Relaxed);
            match message {
                Message::Binary(bytes) if to.write_all(&bytes).await.is_err() => return,
                Message::Close(_) => return,
                _ => {}
            }
        }
    };
    let down = async {
        let mut pings = interval_at(Instant::now() + PING, PING);
        let mut bytes = vec![0; CHUNK];
        loop {
            let message = tokio::select! {
                read = from.read(&mut bytes) => match read {
                    Ok(length @ 1..) => {
                        let bytes = bytes.get(..length).unwrap_or_default();
                        Message::binary(bytes.to_vec())
                    }
                    _ => return,
                },
                _ = pings.tick() => {
                    if !heard.swap(false, Ordering::Relaxed) {
                        return;
                    }
                    Message::Ping(Vec::new().into())
                }
            };
            let Ok(Ok(())) = timeout(STALL, sink.send(message)).await else {
                return;
            };
        }
    };
    tokio::select! {
        () = up => {}
        () = down => {}
    }
    // Without it clients think that the network broke.
    let end = Message::Close(Some(CloseFrame {
        code: CloseCode::Normal,
        reason: Utf8Bytes::default(),
    }));
    let _ = timeout(CONNECT, sink.send(end)).await;
    let _ = timeout(CONNECT, to.shutdown()).await;
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;
    use tokio::io::duplex;

    fn instance(address: &str) -> VirtualMachineInstance {
        serde_json::from_value(json!({
            "metadata": { "name": "a" },
            "spec": { "domain": { "devices": {} } },
            "status": { "interfaces": [{ "name": "default", "ipAddress": address }] },
        }))
        .unwrap()
    }

    fn pod(host_network: bool) -> Pod {
        serde_json::from_value(json!({
            "metadata": { "name": "p" },
            "spec": { "containers": [], "hostNetwork": host_network },
            "status": { "podIP": "10.42.0.7", "podIPs": [{ "ip": "10.42.0.7" }, { "ip": "fd00::7" }] },
        }))
        .unwrap()
    }

    #[test]
    fn ports_lead_to_the_pod_only() {
        for known in ["10.42.0.7", "fd00::7"] {
            let found = address(&instance(known), &pod(false)).unwrap();
            assert_eq!(found.to_string(), known);
        }
        for other in ["169.254.169.254", "127.0.0.1", "10.42.0.8", ""] {
            address(&instance(other), &pod(false)).unwrap_err();
        }
        address(&instance("10.42.0.7"), &pod(true)).unwrap_err();
    }

    #[test]
    fn ports_are_numbers() {
        let port =
            |words: &[&str]| port(&words.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(port(&["22"]).unwrap(), 22);
        assert_eq!(port(&["22", "tcp"]).unwrap(), 22);
        for words in [&["0"][..], &["65536"], &["ssh"], &["53", "udp"], &[]] {
            port(words).unwrap_err();
        }
    }

    #[test]
    fn only_web_sockets_are_upgraded() {
        let mut headers = HeaderMap::new();
        agree(&headers).unwrap_err();
        for (name, value) in [
            (UPGRADE, "websocket"),
            (CONNECTION, "keep-alive, Upgrade"),
            (SEC_WEBSOCKET_VERSION, "13"),
            (SEC_WEBSOCKET_KEY, "dGhlIHNhbXBsZSBub25jZQ=="),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        // The example of RFC 6455, section 1.3.
        let answer = agree(&headers).unwrap();
        assert_eq!(answer[SEC_WEBSOCKET_ACCEPT], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        assert!(!answer.contains_key(SEC_WEBSOCKET_PROTOCOL));
        let protocols = HeaderValue::from_static("other, plain.kubevirt.io");
        headers.insert(SEC_WEBSOCKET_PROTOCOL, protocols);
        let answer = agree(&headers).unwrap();
        assert_eq!(answer[SEC_WEBSOCKET_PROTOCOL], PROTOCOL);
    }

    #[tokio::test]
    async fn bytes_are_passed_both_ways_and_text_is_skipped() {
        let (ours, theirs) = duplex(4096);
        let (machine, mut guest) = duplex(4096);
        let server = WebSocketStream::from_raw_socket(ours, Role::Server, None).await;
        let mut client = WebSocketStream::from_raw_socket(theirs, Role::Client, None).await;
        let (from, to) = tokio::io::split(machine);
        let passing = tokio::spawn(pass(server, from, to));

        client.send(Message::text("skipped")).await.unwrap();
        client.send(Message::binary(&b"ls\r"[..])).await.unwrap();
        let mut typed = [0; 3];
        guest.read_exact(&mut typed).await.unwrap();
        assert_eq!(&typed, b"ls\r");

        guest.write_all(b"bin").await.unwrap();
        let shown = client.next().await.unwrap().unwrap();
        assert_eq!(shown, Message::binary(&b"bin"[..]));

        // The machine ends: a proper close, by which clients tell it from a broken network.
        drop(guest);
        let end = client.next().await.unwrap().unwrap();
        let normal = |frame: &CloseFrame| frame.code == CloseCode::Normal;
        assert!(
            matches!(&end, Message::Close(Some(frame)) if normal(frame)),
            "{end:?}"
        );
        drop(client);
        passing.await.unwrap();
    }

    /// Whoever doesn't read holds nothing for ever: not with something to be read, and not without.
    #[tokio::test(start_paused = true)]
    async fn clients_that_do_not_read_are_cut() {
        for talks in [true, false] {
            let (ours, theirs) = duplex(256);
            let (machine, mut guest) = duplex(256);
            let server = WebSocketStream::from_raw_socket(ours, Role::Server, None).await;
            let (from, to) = tokio::io::split(machine);
            let passing = tokio::spawn(pass(server, from, to));
            let all = async {
                // The guest is held up no longer than its reader is waited for.
                while talks && guest.write_all(&[b'x'; 100]).await.is_ok() {}
                passing.await
            };
            timeout(3 * PING, all).await.unwrap().unwrap();
            drop(theirs);
        }
    }

    /// A client that only listens is asked, answers, and stays.
    #[tokio::test(start_paused = true)]
    async fn clients_that_answer_stay() {
        let (ours, theirs) = duplex(4096);
        let (machine, guest) = duplex(4096);
        let server = WebSocketStream::from_raw_socket(ours, Role::Server, None).await;
        let mut client = WebSocketStream::from_raw_socket(theirs, Role::Client, None).await;
        let (from, to) = tokio::io::split(machine);
        let passing = tokio::spawn(pass(server, from, to));
        let reading = async { while let Some(Ok(_)) = client.next().await {} };
        timeout(10 * PING, reading).await.unwrap_err();
        assert!(!passing.is_finished());
        drop(guest);
    }
}
