//! Real commands on this system, their frames read from the other end of a socket.
#![allow(clippy::unwrap_used)]

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::*;
use crate::lab::protocol::{Frame, INITIAL_CREDIT};

struct Host {
    frames: UnixStream,
    sender: Sender,
}

impl Host {
    fn new() -> Self {
        let (frames, agent) = UnixStream::pair().unwrap();
        frames
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let port = Arc::new(Mutex::new(File::from(OwnedFd::from(agent))));
        Self {
            frames,
            sender: Sender(port),
        }
    }

    fn start(&self, script: &str, terminal: Option<WindowSize>) -> Channel {
        let argv = ["sh", "-c", script].map(str::to_owned).to_vec();
        let spawn = Spawn {
            argv,
            env: Vec::new(),
            cwd: "/".to_owned(),
            terminal,
        };
        Channel::start(1, &spawn, &self.sender).unwrap()
    }

    /// Everything until the command's end: stdout, stderr, credit, exit code.
    fn until_exit(&mut self) -> (String, String, usize, i32) {
        let (mut stdout, mut stderr, mut credit) = (Vec::new(), Vec::new(), 0);
        loop {
            let mut frame = Frame::read(&mut self.frames).unwrap();
            match frame.kind {
                Kind::Output => stdout.append(&mut frame.payload),
                Kind::ErrorOutput => stderr.append(&mut frame.payload),
                Kind::Credit => credit += usize::try_from(frame.number().unwrap()).unwrap(),
                Kind::Exit => {
                    let text = |bytes| String::from_utf8(bytes).unwrap();
                    return (text(stdout), text(stderr), credit, frame.number().unwrap());
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn keeps_the_streams_apart_and_passes_the_exit_code() {
    let mut host = Host::new();
    let _channel = host.start("echo out; echo err >&2; exit 7", None);
    let (stdout, stderr, _, code) = host.until_exit();
    assert_eq!(
        (stdout.as_str(), stderr.as_str(), code),
        ("out\n", "err\n", 7)
    );
}

#[test]
fn sends_all_output_before_the_end() {
    let mut host = Host::new();
    let _channel = host.start("head -c 3000000 /dev/zero | tr '\\0' x", None);
    assert_eq!(host.until_exit().0.len(), 3_000_000);
}

#[test]
fn ends_with_the_command_though_others_keep_its_output_open() {
    let mut host = Host::new();
    let started = Instant::now();
    let _channel = host.start("(sleep 30; echo late) & echo early", None);
    let (stdout, _, _, code) = host.until_exit();
    assert_eq!((stdout.as_str(), code), ("early\n", 0));
    assert!(started.elapsed() < Duration::from_secs(15));
}

#[test]
fn gives_credit_for_input_also_when_nobody_reads_it() {
    let mut host = Host::new();
    let mut channel = host.start("exec <&-; echo closed; sleep 1; exit 3", None);
    for _ in 0..4 {
        channel.input(vec![b'x'; INITIAL_CREDIT / 4]);
    }
    channel.end_input();
    let (stdout, _, credit, code) = host.until_exit();
    assert_eq!(
        (stdout.as_str(), credit, code),
        ("closed\n", INITIAL_CREDIT, 3)
    );
}

#[test]
fn signals_reach_the_command_and_its_children() {
    let mut host = Host::new();
    let channel = host.start("sleep 30 & wait", None);
    thread::sleep(Duration::from_millis(300));
    channel.signal(15);
    assert_eq!(host.until_exit().3, 128 + 15);
}

#[test]
fn a_terminal_has_the_size_it_was_given() {
    let mut host = Host::new();
    let size = WindowSize {
        rows: 33,
        columns: 111,
    };
    let mut channel = host.start(
        "tty >/dev/null && stty size; read x; echo got $x",
        Some(size),
    );
    channel.input(b"word\n".to_vec());
    channel.end_input();
    let (stdout, stderr, _, code) = host.until_exit();
    assert!(
        stdout.contains("33 111\r\n") && stdout.contains("got word\r\n"),
        "{stdout}"
    );
    assert_eq!((stderr.as_str(), code), ("", 0));
}

#[test]
fn says_what_cannot_be_run() {
    let host = Host::new();
    let argv = vec!["/no/such/program".to_owned()];
    let spawn = Spawn {
        argv,
        env: Vec::new(),
        cwd: "/".to_owned(),
        terminal: None,
    };
    let error = Channel::start(1, &spawn, &host.sender).unwrap_err();
    assert!(format!("{error:#}").contains("/no/such/program"));
}
