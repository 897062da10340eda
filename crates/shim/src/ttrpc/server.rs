//! The answering side: many calls at a time on each connection.

use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use tokio::net::unix::OwnedReadHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};

use super::{Answer, CallError, Code, Frame, Kind, read_frame, wire, write_frame};

/// Calls under way at a time on one connection; containerd keeps one or two open for each task.
const MAX_CALLS: usize = 1024;
/// Answers that wait to be written.
const MAX_ANSWERS: usize = 16;
/// Pause after a failure to accept, such as want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What is served.
pub trait Service: Send + Sync + 'static {
    /// Answers a call.
    fn call(
        &self,
        service: &str,
        method: &str,
        payload: Vec<u8>,
    ) -> impl Future<Output = Answer> + Send;
}

/// Serves all who connect, for ever.
pub async fn serve(listener: UnixListener, service: Arc<impl Service>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(connection(stream, Arc::clone(&service)));
            }
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

async fn connection(stream: UnixStream, service: Arc<impl Service>) {
    let (reader, mut writer) = stream.into_split();
    let (answers, mut outgoing) = mpsc::channel::<Frame>(MAX_ANSWERS);
    let writing = tokio::spawn(async move {
        while let Some(frame) = outgoing.recv().await {
            if write_frame(&mut writer, &frame).await.is_err() {
                return;
            }
        }
    });
    // Ends when the peer leaves. What it asked for is carried out all the same.
    let _ = read_calls(reader, &answers, service).await;
    drop(answers);
    let _ = writing.await;
}

async fn read_calls(
    mut reader: OwnedReadHalf,
    answers: &mpsc::Sender<Frame>,
    service: Arc<impl Service>,
) -> std::io::Result<()> {
    let slots = Arc::new(Semaphore::new(MAX_CALLS));
    while let Some(frame) = read_frame(&mut reader).await? {
        if frame.kind != Kind::Request {
            continue;
        }
        let service = Arc::clone(&service);
        let answers = answers.clone();
        let slot = Arc::clone(&slots).try_acquire_owned();
        tokio::spawn(async move {
            let answer = match &slot {
                Ok(_) => answer(&frame.message, service).await,
                Err(_) => Err(CallError::new(
                    Code::ResourceExhausted,
                    format!("More than {MAX_CALLS} calls are under way"),
                )),
            };
            // Fails when the peer has left, which then wants no answer.
            let _ = answers.send(response(frame.stream, answer)).await;
        });
    }
    Ok(())
}

async fn answer(message: &[u8], service: Arc<impl Service>) -> Answer {
    let request = wire::Request::decode(message).map_err(|error| {
        CallError::new(
            Code::InvalidArgument,
            format!("The request can't be read: {error}"),
        )
    })?;
    let wire::Request {
        service: name,
        method,
        payload,
        timeout_nano,
        ..
    } = request;
    let call = service.call(&name, &method, payload);
    match u64::try_from(timeout_nano) {
        Ok(nanoseconds) if nanoseconds > 0 => {
            let timeout = Duration::from_nanos(nanoseconds);
            tokio::time::timeout(timeout, call)
                .await
                .unwrap_or_else(|_| {
                    let message = format!("{method} took longer than {timeout:?}");
                    Err(CallError::new(Code::DeadlineExceeded, message))
                })
        }
        _ => call.await,
    }
}

fn response(stream: u32, answer: Answer) -> Frame {
    let response = match answer {
        Ok(payload) => wire::Response {
            status: None,
            payload,
        },
        Err(CallError { code, message }) => wire::Response {
            status: Some(wire::Status {
                code: code as i32,
                message,
            }),
            payload: Vec::new(),
        },
    };
    Frame {
        stream,
        kind: Kind::Response,
        message: response.encode_to_vec(),
    }
}
