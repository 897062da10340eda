//! `console`: the terminal as a machine's console.

use std::io::{Read, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, anyhow};
use edgevmm_api::v1::{
    ConsoleAccess, ConsoleOpen, ConsoleRequest, ConsoleResponse, TerminalSize, console_request,
    console_response,
};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use crate::cli::ConsoleArgs;
use crate::escape::{Escape, Typed};
use crate::exit::{Failure, Outcome};
use crate::manage;
use crate::term::{self, RawMode, Stream};

/// Chunks of input on their way before the keyboard has to wait.
const QUEUE: usize = 16;
/// For how long a guest says nothing that has nothing more to say to a client that has left.
const QUIET: Duration = Duration::from_secs(2);
/// Stack of the keyboard's thread.
const STACK: usize = 64 << 10;

const HELP: &str = "Ctrl-A x: detach, the machine goes on. Ctrl-A Ctrl-A: type Ctrl-A";

/// What the end of the input means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AtEnd {
    /// Nothing: the output goes on.
    Stay,
    /// That nobody is there any more, once the guest has said what it has to say to it.
    Leave,
}

/// Attaches to the console of a machine until it ends or the user leaves.
///
/// # Errors
///
/// When the machine isn't there or ends the connection.
pub async fn run(args: ConsoleArgs, at_end: AtEnd) -> Outcome {
    let (dir, mut client) = manage::connect(&args.name).await?;
    let access = match (args.flags.read_only, args.flags.exclusive) {
        (true, _) => ConsoleAccess::ReadOnly,
        (false, true) => ConsoleAccess::Exclusive,
        (false, false) => ConsoleAccess::Shared,
    };
    let (requests, receiver) = mpsc::channel(QUEUE);
    let open = ConsoleOpen {
        history: args.flags.history.map(|size| size.0),
        access: access.into(),
        size: term::size(),
    };
    send(&requests, console_request::Kind::Open(open)).await;
    let response = client.console(ReceiverStream::new(receiver)).await;
    let output = response
        .map_err(|status| refused(&args.name, &status))?
        .into_inner();

    let raw = RawMode::enter().context("Can't make the terminal raw")?;
    if raw.is_some() {
        term::notice(&format!(
            "attached to {}: Ctrl-A x detaches, Ctrl-A h shows help",
            args.name
        ));
    }
    let keyboard = Keyboard {
        raw: raw.is_some(),
        read_only: args.flags.read_only,
        at_end,
    };
    let end = attached(output, requests, keyboard).await;
    drop(raw);
    match end? {
        End::Detached => eprintln!("[detached from {}]", args.name),
        End::Refused(status) => return Err(refused(&args.name, &status)),
        End::Machine => {
            // The console ends before the VMM has written down how the guest did.
            manage::left(&dir, manage::LEAVE).await?;
            let record = dir.exit().ok().flatten();
            let how = record.map_or("has ended", |record| crate::exit::words(record.reason));
            eprintln!("[{} {how}]", args.name);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Why an attachment ended.
enum End {
    Detached,
    Machine,
    Refused(Status),
}

/// What is done with what is typed.
#[derive(Debug, Clone, Copy)]
struct Keyboard {
    raw: bool,
    read_only: bool,
    at_end: AtEnd,
}

/// Who leaves.
enum Left {
    /// The user, by a key.
    User,
    /// Perhaps: the input has ended.
    Input,
}

async fn attached(
    mut output: Streaming<ConsoleResponse>,
    requests: mpsc::Sender<ConsoleRequest>,
    keyboard: Keyboard,
) -> anyhow::Result<End> {
    let mut resized =
        signal(SignalKind::window_change()).context("Can't watch the window's size")?;
    let (quit, mut left) = mpsc::channel(1);
    read_keyboard(requests.clone(), quit.clone(), keyboard)?;
    let mut stdout = Stream::stdout().context("Can't use standard output")?;
    let mut alone = false;
    let quiet = sleep(QUIET);
    tokio::pin!(quiet);
    loop {
        tokio::select! {
            message = output.message() => match message {
                Ok(Some(response)) => {
                    show(&mut stdout, response).context("Can't write the output")?;
                    quiet.as_mut().reset(Instant::now() + QUIET);
                }
                Ok(None) => return Ok(End::Machine),
                Err(status) if status.code() == Code::Unavailable => return Ok(End::Machine),
                Err(status) => return Ok(End::Refused(status)),
            },
            _ = resized.recv() => {
                if let Some(size) = term::size() {
                    resize(&requests, size);
                }
            }
            who = left.recv() => match who {
                Some(Left::Input) => {
                    alone = true;
                    quiet.as_mut().reset(Instant::now() + QUIET);
                }
                Some(Left::User) | None => return Ok(End::Detached),
            },
            () = &mut quiet, if alone => return Ok(End::Detached),
        }
    }
}

/// Tells the size if there is room to; one that is lost is followed by another at the next change.
fn resize(requests: &mpsc::Sender<ConsoleRequest>, size: TerminalSize) {
    let kind = Some(console_request::Kind::Resize(size));
    let _ = requests.try_send(ConsoleRequest { kind });
}

async fn send(requests: &mpsc::Sender<ConsoleRequest>, kind: console_request::Kind) {
    // The receiver goes with the connection, whose end is told elsewhere.
    let _ = requests.send(ConsoleRequest { kind: Some(kind) }).await;
}

fn show(stdout: &mut Stream, response: ConsoleResponse) -> std::io::Result<()> {
    match response.kind {
        Some(console_response::Kind::History(bytes) | console_response::Kind::Output(bytes)) => {
            stdout.write_all(&bytes)
        }
        Some(console_response::Kind::Dropped(bytes)) => {
            term::notice(&format!("{bytes} bytes of output were lost here"));
            Ok(())
        }
        None => Ok(()),
    }
}

/// Reads standard input on a thread of its own, which may be left behind in a read.
fn read_keyboard(
    requests: mpsc::Sender<ConsoleRequest>,
    quit: mpsc::Sender<Left>,
    keyboard: Keyboard,
) -> anyhow::Result<()> {
    let Ok(mut stdin) = Stream::stdin() else {
        return Ok(());
    };
    let body = move || {
        let mut escape = Escape::default();
        let mut bytes = [0; 1024];
        while let Ok(length @ 1..) = stdin.read(&mut bytes) {
            let bytes = bytes.get(..length).unwrap_or_default();
            let typed = if keyboard.raw {
                escape.feed(bytes)
            } else {
                vec![Typed::Input(bytes.to_vec())]
            };
            for typed in typed {
                match typed {
                    Typed::Quit => {
                        let _ = quit.blocking_send(Left::User);
                        return;
                    }
                    Typed::Help => term::notice(HELP),
                    Typed::Input(_) if keyboard.read_only => {}
                    Typed::Input(input) => {
                        let kind = Some(console_request::Kind::Input(input));
                        if requests.blocking_send(ConsoleRequest { kind }).is_err() {
                            return;
                        }
                    }
                }
            }
        }
        if keyboard.at_end == AtEnd::Leave {
            let _ = quit.blocking_send(Left::Input);
        }
    };
    let builder = std::thread::Builder::new()
        .name("keyboard".into())
        .stack_size(STACK);
    builder
        .spawn(body)
        .map(drop)
        .context("Can't start a thread for the keyboard")
}

fn refused(name: &str, status: &Status) -> Failure {
    let failure = Failure::host(anyhow!(
        "The console of {name} can't be used: {}",
        status.message()
    ));
    match status.code() {
        Code::FailedPrecondition => {
            failure.hint("watch with --read-only, or take it with --exclusive")
        }
        _ => failure,
    }
}
