//! Calls at random, many at a time: whatever their order, each is answered, and in the end everything
//! is gone and was told in its order.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use edgevmm_shim::proto::task::{
    CloseIoRequest, KillRequest, ResizePtyRequest, StateResponse, Status, UpdateRequest,
};
use edgevmm_shim::ttrpc::{Answer, Code};
use prost::Message;

use crate::shim::{Shim, children, descriptors, process};
use crate::{exec, run};

/// Who call at a time, and how often each does.
const CALLERS: u64 = 6;
const CALLS: u32 = 350;

/// Numbers at random (xorshift64*), the same in each run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit
    }
}

#[test]
fn calls_in_any_order_are_answered_and_leave_nothing() {
    run(async {
        let shim = Arc::new(Shim::start("a").await);
        shim.bundle("b", "/boot/guest");
        let (daemon, _) = shim.pids("a").await;
        // What is made once is made now.
        shim.run("a").await;
        let machine = shim.machine("a").unwrap();
        shim.kill("a", 9).await.unwrap();
        shim.wait("a", "").await.unwrap();
        shim.delete("a").await.unwrap();
        let before = descriptors(daemon);

        let calls = Arc::new(AtomicU32::new(0));
        let callers: Vec<_> = (1..=CALLERS)
            .map(|seed| {
                let (shim, calls) = (Arc::clone(&shim), Arc::clone(&calls));
                tokio::task::spawn(async move {
                    let mut random = Random(seed);
                    for _ in 0..CALLS {
                        let ends = calls.fetch_add(1, Ordering::Relaxed) % 90 >= 70;
                        one(&shim, &mut random, ends).await;
                    }
                })
            })
            .collect();
        for caller in callers {
            caller.await.unwrap();
        }

        for id in ["a", "b"] {
            let _ = shim.kill(id, 9).await;
            if shim.plain("State", id).await.is_ok() {
                // One that was not started has nothing to end; a delete ends it.
                let deleted = shim.delete(id).await;
                if deleted.is_err() {
                    shim.wait(id, "").await.unwrap();
                    shim.delete(id).await.unwrap();
                }
            }
            assert_eq!(shim.delete(id).await.unwrap_err().code, Code::NotFound);
        }
        assert_eq!(children(daemon), Vec::<u32>::new());
        assert_eq!(shim.leftovers(&[machine]), Vec::<String>::new());
        // Answers that nobody waited for may be on their way out.
        crate::shim::eventually("descriptors are left", || descriptors(daemon) <= before).await;
        shim.run("a").await;
        shim.kill("a", 9).await.unwrap();
        shim.wait("a", "").await.unwrap();
        shim.delete("a").await.unwrap();
        let told = shim.told(("delete", "a")).await;
        for id in ["a", "b"] {
            let topics = told.iter().filter(|(_, of)| of == id);
            let topics: Vec<_> = topics.map(|(topic, _)| topic.as_str()).collect();
            check(&topics);
        }
    });
}

/// A container is made, perhaps started, ends and is deleted, again and again. It is paused and goes on
/// while it runs.
fn check(topics: &[&str]) {
    let mut before = "delete";
    for topic in topics {
        let fits = match *topic {
            "create" => before == "delete",
            "start" => before == "create",
            "paused" => ["start", "resumed"].contains(&before),
            "resumed" => before == "paused",
            "exit" => ["create", "start", "paused", "resumed"].contains(&before),
            "delete" => before == "exit",
            _ => false,
        };
        assert!(fits, "{topic} after {before} in {topics:?}");
        before = topic;
    }
    assert_eq!(before, "delete", "{topics:?}");
}

/// Makes a call at random, and looks at the answer. Only at times is it likely to be one that `ends`
/// something, so that there is something to end.
async fn one(shim: &Shim, random: &mut Random, ends: bool) {
    let id = if random.below(8) == 0 { "b" } else { "a" };
    let exec_id = format!("e{}", random.below(3));
    let exec_id = exec_id.as_str();
    match random.below(24) {
        20..24 if ends => fits("Kill", shim.kill(id, 9).await, true),
        20..24 => fits("Start", shim.plain("Start", id).await, true),
        0..3 => fits("Create", shim.create(id).await, true),
        3..6 => fits("Start", shim.plain("Start", id).await, true),
        6 => {
            let answer = shim.plain("State", id).await;
            if let Ok(state) = &answer {
                let state = StateResponse::decode(state.as_slice()).unwrap();
                assert_ne!(state.status(), Status::Unknown);
                assert!(state.pid > 0 && state.id == id, "{state:?}");
                assert!(state.status() == Status::Stopped || state.exit_status == 0);
            }
            fits("State", answer, false);
        }
        7 => {
            let wait = shim.wait(id, "");
            if let Ok(answer) = tokio::time::timeout(Duration::from_millis(100), wait).await {
                fits("Wait", answer.map(|_| Vec::new()), false);
            }
        }
        8 => {
            let signals = [0, 9, 15, 28, 99, u32::MAX];
            let signal = signals[random.below(signals.len() as u64) as usize];
            fits("Kill", shim.kill(id, signal).await, true);
        }
        9 | 19 if ends => fits("Delete", shim.plain("Delete", id).await, false),
        10 => fits("Pause", shim.plain("Pause", id).await, true),
        11 => fits("Resume", shim.plain("Resume", id).await, true),
        12 => {
            let method = ["Stats", "Pids", "Connect"][random.below(3) as usize];
            fits(method, shim.plain(method, id).await, false);
        }
        13 => {
            let program = exec(exec_id, &["edgevmm-ctl", "inspect"], "");
            fits("Exec", shim.call("Exec", &program).await, false);
        }
        14 => {
            let program = process("a", exec_id);
            fits("Start", shim.call("Start", &program).await, true);
        }
        15 => {
            let method = ["State", "Delete"][random.below(2) as usize];
            fits(
                method,
                shim.call(method, &process("a", exec_id)).await,
                false,
            );
        }
        16 => {
            let request = KillRequest {
                id: "a".to_owned(),
                exec_id: exec_id.to_owned(),
                signal: 9,
                all: false,
            };
            fits("Kill", shim.call("Kill", &request).await, false);
        }
        17 => {
            let request = ResizePtyRequest {
                id: id.to_owned(),
                width: 80,
                height: random.below(2) as u32 * 25,
                ..ResizePtyRequest::default()
            };
            fits("ResizePty", shim.call("ResizePty", &request).await, true);
        }
        18 => {
            let request = CloseIoRequest {
                id: id.to_owned(),
                exec_id: exec_id.to_owned(),
                stdin: true,
            };
            fits("CloseIO", shim.call("CloseIO", &request).await, false);
        }
        _ => {
            let limits = br#"{"memory":{"limit":67108864}}"#.to_vec();
            let request = UpdateRequest {
                id: id.to_owned(),
                resources: Some(prost_types::Any {
                    type_url: String::new(),
                    value: limits,
                }),
            };
            fits("Update", shim.call("Update", &request).await, true);
        }
    }
}

/// A call succeeds, or fails by a code that tells why. One that talks to a VMM may find it gone.
fn fits(method: &str, answer: Answer, reaches_vmm: bool) {
    let Err(error) = answer else { return };
    let expected = match error.code {
        Code::NotFound | Code::AlreadyExists | Code::FailedPrecondition => true,
        Code::InvalidArgument => method == "Kill",
        Code::Unknown => reaches_vmm,
        _ => false,
    };
    assert!(expected, "{method}: {error:?}");
}
