//! A thread that was taken over tries to get out of the sandbox; see `examples/captive.rs`.
#![allow(clippy::unwrap_used)]

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

/// Attempts that come through outside of a sandbox, and never in it.
const ATTEMPTS: [&str; 19] = [
    "host-file",
    "own-program",
    "other-process",
    "kvm-again",
    "list",
    "write",
    "tcp",
    "udp",
    "unix",
    "listen",
    "program",
    "process",
    "trace",
    "signal",
    "executable",
    "root",
    "memory-file",
    "watch",
    "uring",
];
const KINDS: [&str; 7] = [
    "Main",
    "Vcpu",
    "Devices",
    "Disk",
    "DiskHelper",
    "Copy",
    "Starter",
];

fn captive(kind: &str, attempt: &str) -> Output {
    let mut program: PathBuf = std::env::current_exe().unwrap();
    program.pop();
    program.pop();
    program.push("examples/captive");
    Command::new(program)
        .args([kind, attempt])
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn text(output: &Output) -> String {
    let streams = [&output.stdout, &output.stderr];
    streams
        .map(|stream| String::from_utf8_lossy(stream).into_owned())
        .concat()
}

#[test]
fn what_is_work_goes_on() {
    for kind in KINDS {
        let output = captive(kind, "work");
        assert!(text(&output).contains("REACHED work"), "{kind}: {output:?}");
    }
    for kind in ["Main", "Starter"] {
        let output = captive(kind, "thread");
        assert!(
            text(&output).contains("REACHED thread"),
            "{kind}: {output:?}"
        );
    }
}

#[test]
fn nothing_gets_out() {
    for attempt in ATTEMPTS {
        let output = captive("none", attempt);
        // Some hosts have no io_uring.
        let possible = attempt != "uring" || text(&output).contains("REACHED");
        assert!(text(&output).contains("REACHED") || !possible, "{output:?}");
        for kind in KINDS {
            let output = captive(kind, attempt);
            let text = text(&output);
            if kind == "Starter" && attempt == "uring" {
                continue;
            }
            assert!(!text.contains("REACHED"), "{kind} {attempt}: {text}");
            let refused = text.contains(&format!("refused {attempt}"));
            let ended = text.contains("the sandbox has ended this process: its thread ca")
                && text.contains("made system call");
            assert!(
                refused || ended,
                "{kind} {attempt}: {text} {:?}",
                output.status
            );
        }
    }
    let _ = std::fs::remove_file("/tmp/edgevmm-captive");
}

/// The number of SIGSYS.
const SIGSYS: i32 = 31;

#[test]
fn threads_are_of_their_kind_only() {
    for (kind, attempt) in [("Vcpu", "thread"), ("Vcpu", "type"), ("Main", "namespace")] {
        let output = captive(kind, attempt);
        // The C library blocks signals while it makes a thread: then nothing can be told.
        let ended =
            text(&output).contains("made system call") || output.status.signal() == Some(SIGSYS);
        assert!(ended, "{kind} {attempt}: {output:?}");
    }
}
