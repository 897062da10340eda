//! What `virtctl console` and `virtctl port-forward` are but for the terminal: input goes to a stream of
//! the API server, a WebSocket of KubeVirt's subprotocol, and what comes from it to output.
//!
//! `stream KUBECONFIG PATH` ends with 0 when the other end closes in the normal way or input ends, with 3
//! and a line of why when the server refuses, and with 1 for all else.

use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use futures_util::{SinkExt, StreamExt};
use http::StatusCode;
use http::header::{
    CONNECTION, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use hyper_util::rt::TokioIo;
use kube::client::Body;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use tokio::io::AsyncReadExt;
use tokio::runtime::Builder;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::protocol::Role;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

/// The subprotocol.
const PROTOCOL: &str = "plain.kubevirt.io";
/// The exit code of a refusal.
const REFUSED: u8 = 3;

fn main() -> Result<ExitCode> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let code = runtime.block_on(run());
    // Else it would wait for more input.
    runtime.shutdown_background();
    code
}

async fn run() -> Result<ExitCode> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [config, path] = &*words else {
        bail!("How to use it: stream KUBECONFIG PATH");
    };
    let config = Kubeconfig::read_from(config)?;
    let config = Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await?;
    let client = Client::try_from(config)?;
    let request = http::Request::get(path)
        .header(UPGRADE, "websocket")
        .header(CONNECTION, "Upgrade")
        .header(SEC_WEBSOCKET_VERSION, "13")
        .header(SEC_WEBSOCKET_KEY, generate_key())
        .header(SEC_WEBSOCKET_PROTOCOL, PROTOCOL);
    let answer = client.send(request.body(Body::empty())?).await?;
    let status = answer.status();
    if status != StatusCode::SWITCHING_PROTOCOLS {
        let body = answer.into_body().collect_bytes().await?;
        eprintln!("{status}: {}", String::from_utf8_lossy(&body));
        return Ok(ExitCode::from(REFUSED));
    }
    let protocol = answer.headers().get(SEC_WEBSOCKET_PROTOCOL);
    let protocol = protocol.and_then(|name| name.to_str().ok());
    anyhow::ensure!(
        protocol == Some(PROTOCOL),
        "The subprotocol is {protocol:?}"
    );
    let stream = TokioIo::new(hyper::upgrade::on(answer).await?);
    carry(WebSocketStream::from_raw_socket(stream, Role::Client, None).await).await?;
    Ok(ExitCode::SUCCESS)
}

async fn carry<S>(socket: WebSocketStream<S>) -> Result<()>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let (mut sink, mut messages) = socket.split();
    let up = async {
        let mut input = tokio::io::stdin();
        let mut bytes = vec![0; 4096];
        loop {
            let length = input.read(&mut bytes).await?;
            let Some(typed) = bytes.get(..length).filter(|typed| !typed.is_empty()) else {
                return Ok(sink.close().await?);
            };
            sink.send(Message::binary(typed.to_vec())).await?;
        }
    };
    let down = async {
        while let Some(message) = messages.next().await {
            match message.context("The stream broke")? {
                Message::Binary(bytes) => {
                    let mut output = io::stdout().lock();
                    output.write_all(&bytes)?;
                    output.flush()?;
                }
                Message::Close(Some(frame)) if frame.code == CloseCode::Normal => return Ok(()),
                Message::Close(frame) => bail!("The stream closed by {frame:?}"),
                _ => {}
            }
        }
        bail!("The stream ended without a close")
    };
    tokio::select! {
        sent = up => sent,
        received = down => received,
    }
}
