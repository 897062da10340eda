#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use edgevmm_agent::{Empty, Info};
use edgevmm_devices::channel::Channel;

use super::*;

/// Time for what is to succeed.
const LONG: Duration = Duration::from_secs(20);
/// Time for what is not.
const SHORT: Duration = Duration::from_millis(50);

/// The guest's side of a channel.
struct Guest(Arc<Channel>);

impl Guest {
    async fn line(&self) -> String {
        let mut line = Vec::new();
        loop {
            let mut byte = [0];
            if self.0.input(&mut byte) == 0 {
                sleep(Duration::from_millis(1)).await;
            } else if byte == [b'\n'] {
                return String::from_utf8_lossy(&line).into_owned();
            } else {
                line.push(byte[0]);
            }
        }
    }

    async fn say(&self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let count = self.0.output(bytes);
            bytes = &bytes[count..];
            sleep(Duration::from_millis(u64::from(count == 0))).await;
        }
    }

    /// Answers a request to get in step.
    async fn sync(&self, line: &str) {
        let (_, id) = line.split_once("\"id\":").unwrap();
        let (id, _) = id.split_once('}').unwrap();
        self.say(b"\xff").await;
        self.say(format!("{{\"return\": {id}}}\n").as_bytes()).await;
    }
}

/// An agent, and a guest in which `answer` gives the answers to requests; none is none.
fn talk(
    answer: impl Fn(&str) -> Option<String> + Send + 'static,
) -> (Arc<Agent>, Arc<AtomicUsize>) {
    let (agent, guest) = quiet();
    let syncs = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&syncs);
    tokio::spawn(async move {
        loop {
            let line = guest.line().await;
            if line.contains("guest-sync-delimited") {
                count.fetch_add(1, Ordering::Relaxed);
                guest.sync(&line).await;
            } else if let Some(text) = answer(&line) {
                guest.say(text.as_bytes()).await;
                guest.say(b"\n").await;
            }
        }
    });
    (agent, syncs)
}

/// An agent, and a guest that has the channel open.
fn quiet() -> (Arc<Agent>, Guest) {
    let link = Link::new("a").unwrap();
    let guest = Guest(Arc::clone(link.channel()));
    let agent = Agent::new(link);
    guest.0.set_guest_open(true);
    (Arc::new(agent), guest)
}

#[tokio::test]
async fn a_stream_in_step_stays_so() {
    let (agent, syncs) = talk(|_| Some("{\"return\": {}}".into()));
    for _ in 0..3 {
        agent.ask::<Empty>(&Command::Ping, LONG).await.unwrap();
    }
    assert_eq!(syncs.load(Ordering::Relaxed), 1);
    // Another process has the channel.
    agent.link.channel().set_guest_open(false);
    let error = agent.ask::<Empty>(&Command::Ping, LONG).await.unwrap_err();
    assert!(matches!(error, AgentError::NotConnected), "{error}");
    agent.link.channel().set_guest_open(true);
    agent.ask::<Empty>(&Command::Ping, LONG).await.unwrap();
    assert_eq!(syncs.load(Ordering::Relaxed), 2);
    let error = agent.ask::<Info>(&Command::Info, LONG).await.unwrap_err();
    assert!(matches!(error, AgentError::Answer(_)), "{error}");
    agent.ask::<Empty>(&Command::Ping, LONG).await.unwrap();
    assert_eq!(
        syncs.load(Ordering::Relaxed),
        3,
        "not what it was asked for"
    );
}

#[tokio::test]
async fn an_answer_that_comes_too_late_is_not_taken_for_the_next() {
    let late = AtomicBool::new(true);
    let (agent, _) = talk(move |_| {
        if late.swap(false, Ordering::Relaxed) {
            return None;
        }
        Some("{\"return\": 2}".into())
    });
    let error = agent
        .ask::<i64>(&Command::GetTime, SHORT)
        .await
        .unwrap_err();
    assert!(matches!(error, AgentError::Silent(_)), "{error}");
    // Half of it, and the last one's answer to get in step.
    Guest(Arc::clone(agent.link.channel()))
        .say(b"{\"return\": 1}\n{\"ret\xff{\"return\": 1}\n{\"re")
        .await;
    assert_eq!(agent.ask::<i64>(&Command::GetTime, LONG).await.unwrap(), 2);
    assert_eq!(agent.ask::<i64>(&Command::GetTime, LONG).await.unwrap(), 2);
}

#[tokio::test]
async fn answers_have_a_longest() {
    let (agent, _) = talk(|request| {
        let long = request.contains("guest-info");
        Some(if long {
            "x".repeat(2 << 20)
        } else {
            "{\"return\": {}}".into()
        })
    });
    let error = agent.ask::<Info>(&Command::Info, LONG).await.unwrap_err();
    assert!(matches!(error, AgentError::TooLong(ANSWER)), "{error}");
    agent.ask::<Empty>(&Command::Ping, LONG).await.unwrap();
}

#[tokio::test]
async fn a_flood_ends() {
    for flood in [&b"x"[..], b"\xff1\n"] {
        let (agent, guest) = quiet();
        let said = Arc::new(AtomicUsize::new(0));
        let (count, flood) = (Arc::clone(&said), flood.repeat(4096));
        let flood = tokio::spawn(async move {
            loop {
                let taken = guest.0.output(&flood);
                count.fetch_add(taken, Ordering::Relaxed);
                if taken < flood.len() {
                    tokio::task::yield_now().await;
                }
            }
        });
        let error = agent.ask::<Empty>(&Command::Ping, LONG).await.unwrap_err();
        assert!(matches!(error, AgentError::Nonsense), "{error}");
        let heard = said.load(Ordering::Relaxed);
        assert!(heard <= (65 << 20), "{heard}");
        // Nobody asks, so nobody reads.
        sleep(SHORT).await;
        let heard = said.load(Ordering::Relaxed);
        sleep(SHORT).await;
        assert_eq!(said.load(Ordering::Relaxed), heard);
        flood.abort();
    }
}

#[tokio::test]
async fn a_guest_that_ends_says_nothing() {
    let (agent, _) = talk(|_| None);
    agent.shut_down(PowerMode::Powerdown, LONG).await.unwrap();
    let refusal = "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}";
    let (agent, _) = talk(move |_| Some(refusal.into()));
    let error = agent.shut_down(PowerMode::Reboot, LONG).await.unwrap_err();
    assert_eq!(error.to_string(), "The guest agent refused: no");

    let (agent, guest) = quiet();
    tokio::spawn(async move {
        guest.sync(&guest.line().await).await;
        assert!(guest.line().await.contains("guest-shutdown"));
        guest.0.set_guest_open(false);
    });
    agent.shut_down(PowerMode::Powerdown, LONG).await.unwrap();
}

#[tokio::test]
async fn a_program_runs_to_its_end() {
    let looks = AtomicUsize::new(0);
    let (agent, _) = talk(move |request| {
        let answer = if request.contains("guest-exec-status") {
            match looks.fetch_add(1, Ordering::Relaxed) {
                0 | 1 => "{\"exited\": false}".to_owned(),
                2 => "{\"exited\": true, \"exitcode\": 3, \"out-data\": \"aGk=\"}".to_owned(),
                _ => format!(
                    "{{\"exited\": true, \"out-data\": \"{}\"}}",
                    "A".repeat(5 << 20)
                ),
            }
        } else {
            assert!(request.contains("\"arg\":[\"-l\"]") && request.contains("\"path\":\"ls\""));
            "{\"pid\": 7}".to_owned()
        };
        Some(format!("{{\"return\": {answer}}}"))
    });
    let program = Program {
        command: vec!["ls".into(), "-l".into()],
        ..Program::default()
    };
    let result = agent.exec(&program).await.unwrap();
    assert_eq!(
        (result.exitcode, result.out_data.as_slice()),
        (Some(3), &b"hi"[..])
    );
    let error = agent.exec(&program).await.unwrap_err();
    assert!(matches!(error, AgentError::MuchOutput), "{error}");

    let (agent, _) = talk(|_| Some("{\"return\": {\"pid\": 7, \"exited\": false}}".into()));
    let program = Program {
        time: Some(SHORT),
        ..program
    };
    let error = agent.exec(&program).await.unwrap_err();
    assert!(
        matches!(error, AgentError::StillRunning { pid: 7, .. }),
        "{error}"
    );
}

#[tokio::test]
async fn nothing_stays_frozen() {
    let frozen = Arc::new(AtomicBool::new(false));
    let state = Arc::clone(&frozen);
    let (agent, _) = talk(move |request| {
        state.store(request.contains("freeze-freeze"), Ordering::Relaxed);
        Some("{\"return\": 3}".into())
    });
    let thawed = async || {
        while frozen.load(Ordering::Relaxed) || agent.is_frozen() {
            sleep(Duration::from_millis(1)).await;
        }
    };
    let never = std::future::pending::<()>;
    assert_eq!(agent.freeze(LONG, SHORT, never).await.unwrap(), 3);
    assert!(agent.is_frozen());
    timeout(LONG, thawed()).await.unwrap();

    agent.freeze(LONG, LONG, || sleep(SHORT)).await.unwrap();
    let error = agent.freeze(LONG, LONG, never).await.unwrap_err();
    assert!(matches!(error, AgentError::Frozen), "{error}");
    timeout(LONG / 2, thawed()).await.unwrap();

    agent.freeze(LONG, LONG, never).await.unwrap();
    assert_eq!(agent.thaw(LONG).await.unwrap(), 3);
    assert!(!agent.is_frozen());

    // Whether it froze them nobody knows.
    let (agent, _) = talk(|request| {
        let answer = request.contains("thaw");
        answer.then(|| "{\"return\": 1}".into())
    });
    let error = agent.freeze(SHORT, SHORT, never).await.unwrap_err();
    assert!(matches!(error, AgentError::Silent(_)) && agent.is_frozen());
    while agent.is_frozen() {
        sleep(Duration::from_millis(1)).await;
    }
}
