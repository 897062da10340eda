#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use prost::Message;
use tokio::net::{UnixListener, UnixStream};

use super::*;

/// Answers what it is sent; `Wait` never answers.
struct Echo;

impl Service for Echo {
    async fn call(&self, service: &str, method: &str, payload: Vec<u8>) -> Answer {
        assert_eq!(service, "s");
        match method {
            "Echo" => Ok(payload),
            "Wait" => std::future::pending().await,
            _ => Err(CallError::new(Code::NotFound, "no such method")),
        }
    }
}

fn run<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(test)
}

fn request(stream: u32, method: &str, timeout_nano: i64) -> Frame {
    let request = wire::Request {
        service: "s".to_owned(),
        method: method.to_owned(),
        payload: b"abc".to_vec(),
        timeout_nano,
        metadata: Vec::new(),
    };
    Frame {
        stream,
        kind: Kind::Request,
        message: request.encode_to_vec(),
    }
}

#[test]
fn calls_are_answered_by_their_streams_while_others_wait() {
    run(async {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        tokio::spawn(serve(UnixListener::bind(&path).unwrap(), Arc::new(Echo)));
        let mut stream = UnixStream::connect(&path).await.unwrap();
        for frame in [
            request(1, "Wait", 0),
            request(3, "Wait", 1_000_000),
            request(5, "Echo", 0),
            request(7, "Gone", 0),
        ] {
            write_frame(&mut stream, &frame).await.unwrap();
        }
        let mut answers = Vec::new();
        for _ in 0..3 {
            let frame = read_frame(&mut stream).await.unwrap().unwrap();
            let response = wire::Response::decode(frame.message.as_slice()).unwrap();
            let code = response.status.map(|status| status.code);
            answers.push((frame.stream, code, response.payload));
        }
        answers.sort();
        let expected = [
            (3, Some(Code::DeadlineExceeded as i32), Vec::new()),
            (5, None, b"abc".to_vec()),
            (7, Some(Code::NotFound as i32), Vec::new()),
        ];
        assert_eq!(answers, expected);
        let gone = call(&path, "s", "Gone", Vec::new(), "ns").await.unwrap();
        assert_eq!(gone, Err(CallError::new(Code::NotFound, "no such method")));
        let payload = call(&path, "s", "Echo", vec![7], "ns").await.unwrap();
        assert_eq!(payload, Ok(vec![7]));
    });
}

#[test]
fn too_many_calls_are_refused_and_not_queued() {
    run(async {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        tokio::spawn(serve(UnixListener::bind(&path).unwrap(), Arc::new(Echo)));
        let mut stream = UnixStream::connect(&path).await.unwrap();
        for number in 0..=1024 {
            let frame = request(2 * number + 1, "Wait", 0);
            write_frame(&mut stream, &frame).await.unwrap();
        }
        let frame = tokio::time::timeout(Duration::from_secs(20), read_frame(&mut stream));
        let frame = frame.await.unwrap().unwrap().unwrap();
        let response = wire::Response::decode(frame.message.as_slice()).unwrap();
        assert_eq!(
            response.status.unwrap().code,
            Code::ResourceExhausted as i32
        );
    });
}

#[test]
fn long_messages_are_refused_before_they_are_read() {
    let header = [0, 0x40, 0, 1, 0, 0, 0, 1, 1, 0];
    run(async {
        let error = read_frame(&mut header.as_slice()).await.unwrap_err();
        assert!(error.to_string().contains("longer"), "{error}");
        let long = Frame {
            stream: 1,
            kind: Kind::Response,
            message: vec![0; MAX_MESSAGE + 1],
        };
        write_frame(&mut Vec::new(), &long).await.unwrap_err();
    });
}

proptest! {
    #[test]
    fn no_bytes_break_the_reader(bytes: Vec<u8>) {
        run(async { let _ = read_frame(&mut bytes.as_slice()).await; });
    }

    #[test]
    fn frames_come_out_as_they_went_in(stream: u32, message: Vec<u8>) {
        run(async {
            let mut wire = Vec::new();
            let frame = Frame { stream, kind: Kind::Response, message: message.clone() };
            write_frame(&mut wire, &frame).await.unwrap();
            let frame = read_frame(&mut wire.as_slice()).await.unwrap().unwrap();
            prop_assert_eq!((frame.stream, frame.kind, frame.message), (stream, Kind::Response, message));
            Ok(())
        })?;
    }
}
