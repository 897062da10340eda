//! The shim as containerd drives it, without containerd: real VMMs with a guest of a few instructions,
//! so that much can happen in a few seconds.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod any_order;
mod faults;
mod guest;
mod ordinary;
mod puppet;
mod shim;
mod taken_over;
mod volumes;

use edgevmm_shim::proto::task::ExecRequest;
use edgevmm_shim::ttrpc::Code;
use shim::{Shim, children, descriptors, eventually, memory, process};

/// Runs a test, or tells why not.
fn run(test: impl Future<Output = ()>) {
    if let Some(why) = shim::missing() {
        eprintln!("skipped: {why}");
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.unwrap().block_on(test);
}

/// A program to be run in container `a`.
fn exec(exec_id: &str, words: &[&str], stdout: &str) -> ExecRequest {
    let spec = serde_json::json!({ "args": words }).to_string();
    ExecRequest {
        id: "a".to_owned(),
        exec_id: exec_id.to_owned(),
        stdout: stdout.to_owned(),
        stderr: stdout.to_owned(),
        spec: Some(prost_types::Any {
            type_url: String::new(),
            value: spec.into_bytes(),
        }),
        ..ExecRequest::default()
    }
}

#[test]
fn two_hundred_containers_leave_nothing_behind() {
    run(async {
        let shim = Shim::start("a").await;
        let (daemon, _) = shim.pids("a").await;
        let mut before = None;
        for round in 0..200 {
            shim.create("a").await.unwrap();
            let machine = shim.machine("a").unwrap();
            // Every fifth runs, as that takes the most time.
            if round % 5 == 0 {
                shim.plain("Start", "a").await.unwrap();
                shim.kill("a", 9).await.unwrap();
                assert_eq!(shim.wait("a", "").await, Ok(137));
            }
            assert_eq!(shim.delete("a").await, Ok(137));
            assert_eq!(shim.leftovers(&[machine]), Vec::<String>::new());
            assert_eq!(children(daemon), Vec::<u32>::new());
            // What is made once has been made by then.
            if round == 20 {
                before = Some((descriptors(daemon), memory(daemon)));
            }
            if let Some((files, kib)) = before {
                // Connections of the last calls may still be there.
                eventually("descriptors leak", || descriptors(daemon) <= files).await;
                let now = memory(daemon);
                assert!(now <= kib + 192, "{now} KiB were {kib}");
            }
        }
    });
}

#[test]
fn volumes_become_disks() {
    run(async {
        let shim = Shim::start("a").await;
        volumes::become_disks(&shim).await;
    });
}

#[test]
fn a_vmm_that_was_taken_over_reaches_nothing() {
    run(async {
        let (shim, other) = (Shim::start("a").await, Shim::start("a").await);
        taken_over::reaches_nothing(&shim, &other).await;
    });
}

#[test]
fn ordinary_containers_run_beside_the_machine() {
    if ordinary::runc_is_missing() {
        eprintln!("skipped: there is no runc");
        return;
    }
    run(async {
        let shim = Shim::start("a").await;
        shim.run("a").await;
        ordinary::without_a_program_is_told(&shim).await;
        ordinary::lives_and_ends(&shim).await;
        ordinary::goes_with_its_shim(&shim).await;
    });
}

#[test]
fn programs_are_run_told_and_forgotten() {
    run(async {
        let shim = Shim::start("a").await;
        let output = shim.bundle_path("a").join("output");
        let file = format!("file://{}", output.display());
        let inspect = exec("e1", &["edgevmm-ctl", "inspect"], &file);
        let code = shim.call("Exec", &inspect).await.unwrap_err().code;
        assert_eq!(code, Code::NotFound);
        shim.create("a").await.unwrap();
        let code = shim.call("Exec", &inspect).await.unwrap_err().code;
        assert_eq!(code, Code::FailedPrecondition);
        shim.plain("Start", "a").await.unwrap();

        shim.call("Exec", &inspect).await.unwrap();
        let code = shim.call("Exec", &inspect).await.unwrap_err().code;
        assert_eq!(code, Code::AlreadyExists);
        let program = process("a", "e1");
        shim.call("Start", &program).await.unwrap();
        assert_eq!(shim.wait("a", "e1").await, Ok(0));
        let code = shim.call("Start", &program).await.unwrap_err().code;
        assert_eq!(code, Code::FailedPrecondition);
        shim.call("Delete", &program).await.unwrap();
        let code = shim.call("State", &program).await.unwrap_err().code;
        assert_eq!(code, Code::NotFound);
        let text = std::fs::read_to_string(&output).unwrap();
        assert!(text.contains("state: running"), "{text}");

        // The guest has no agent, which is told with what to do.
        shim.call("Exec", &exec("e2", &["true"], &file))
            .await
            .unwrap();
        shim.call("Start", &process("a", "e2")).await.unwrap();
        assert_eq!(shim.wait("a", "e2").await, Ok(125));
        let text = std::fs::read_to_string(&output).unwrap();
        assert!(text.contains("install qemu-guest-agent"), "{text}");

        // One that was never deleted goes with its container.
        let control = ["edgevmm-ctl", "agent", "ping", "--wait", "--timeout", "600"];
        shim.call("Exec", &exec("e3", &control, "")).await.unwrap();
        shim.call("Start", &process("a", "e3")).await.unwrap();
        shim.kill("a", 9).await.unwrap();
        shim.wait("a", "").await.unwrap();
        shim.delete("a").await.unwrap();
        let told = shim.told(("delete", "a")).await;
        let of = |last: bool| {
            let told = told.iter().filter(move |(_, of)| (of == "e3") == last);
            let told = told.map(|(topic, of)| (topic.as_str(), of.as_str()));
            told.collect::<Vec<_>>()
        };
        let expected = [
            ("create", "a"),
            ("start", "a"),
            ("exec-added", "e1"),
            ("exec-started", "e1"),
            ("exit", "e1"),
            ("exec-added", "e2"),
            ("exec-started", "e2"),
            ("exit", "e2"),
            ("exit", "a"),
            ("delete", "a"),
        ];
        assert_eq!(of(false), expected);
        // It may end before its container's end is told.
        let expected = ["exec-added", "exec-started", "exit"].map(|topic| (topic, "e3"));
        assert_eq!(of(true), expected);
    });
}
