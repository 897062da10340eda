//! Boots disk images as virtual machines on KVM.

mod agent;
mod cli;
mod console;
mod ctl;
mod detach;
mod doctor;
mod escape;
mod exit;
mod host;
mod image;
mod install;
mod janitor;
mod launch;
mod manage;
mod messages;
mod rate_limit;
mod resolve;
mod table;
mod term;

use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::Context;
use clap::{CommandFactory, Parser};
use tracing_subscriber::Layer as _;
use tracing_subscriber::filter::{DynFilterFn, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use cli::{Cli, Command, JsonArg, LogArgs, RunArgs};
use exit::{Failure, Outcome};
use rate_limit::RateLimit;

/// Messages that are shown when nothing else is asked for.
const DEFAULT_FILTER: &str = "warn";

fn main() -> ExitCode {
    let result = if ctl::is_meant() {
        ctl::run()
    } else {
        edgevmm()
    };
    let code = result.unwrap_or_else(|failure| {
        term::tell(&failure);
        failure.exit_code()
    });
    messages::flush();
    code
}

fn edgevmm() -> Outcome {
    match Cli::try_parse() {
        Ok(cli) => {
            let detached = matches!(cli.command, Command::Vmm(_));
            start_log(&cli.log, detached).and_then(|filter| dispatch(cli.command, &filter))
        }
        Err(error) => wrong_usage(&error, &Cli::command()),
    }
}

/// Prints the help that was asked for, or brings clap's words into the form of all others.
fn wrong_usage(error: &clap::Error, of: &clap::Command) -> Outcome {
    if !error.use_stderr() {
        error.print().context("Can't print the help")?;
        return Ok(ExitCode::SUCCESS);
    }
    let text = error.render().to_string();
    let mut paragraphs = text.split("\n\n").map(one_line);
    let message = paragraphs.next().unwrap_or_default();
    let message = message
        .strip_prefix("error: ")
        .unwrap_or(&message)
        .to_owned();
    let tip = paragraphs.find_map(|text| text.strip_prefix("tip: ").map(ToOwned::to_owned));
    let command = std::env::args().nth(1);
    let command = command.filter(|name| of.find_subcommand(name).is_some());
    let command = command.map(|name| format!("{name} ")).unwrap_or_default();
    let hint =
        tip.unwrap_or_else(|| format!("`{} {command}--help` shows what there is", of.get_name()));
    Err(Failure::usage(anyhow::Error::msg(message)).hint(hint))
}

fn one_line(paragraph: &str) -> String {
    paragraph.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Sends messages to standard error: with time and place into a log or for who asked for more than
/// warnings. Returns the filter in use.
fn start_log(args: &LogArgs, detached: bool) -> Result<String, Failure> {
    let filter = match args.verbose {
        0 => args
            .log
            .clone()
            .or_else(|| std::env::var(detach::LOG_VARIABLE).ok()),
        1 => Some("info".to_owned()),
        // The transport's own messages are about frames.
        2 => Some("debug,h2=info,hyper=info,hyper_util=info,tower=info".to_owned()),
        _ => Some("trace".to_owned()),
    };
    let filter = filter
        .filter(|filter| !filter.is_empty())
        .unwrap_or_else(|| DEFAULT_FILTER.to_owned());
    let parsed = filter.parse::<Targets>().map_err(|error| {
        Failure::usage(anyhow::Error::from(error).context(format!("`{filter}` is no log filter")))
            .hint("write a level (error, warn, info, debug, trace), or levels by module")
    })?;
    let limit = RateLimit::default();
    let limit = DynFilterFn::new(move |message, _| limit.admits(message));
    let log = tracing_subscriber::fmt::layer()
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(|| term::Stderr);
    let registry = tracing_subscriber::registry().with(parsed);
    if detached || filter != DEFAULT_FILTER {
        registry.with(log.with_filter(limit)).init();
    } else {
        registry
            .with(log.without_time().with_target(false).with_filter(limit))
            .init();
    }
    Ok(filter)
}

fn dispatch(command: Command, log_filter: &str) -> Outcome {
    match command {
        Command::Run(args) => run(*args, log_filter),
        Command::Vmm(args) => detach::vmm(&args),
        Command::Ps(args) => client(manage::ps(&args)),
        Command::Console(args) => client(console::run(args, console::AtEnd::Stay)),
        Command::Stop(args) => client(manage::stop(&args)),
        Command::Kill(args) => client(manage::kill_all(&args.names)),
        Command::Pause(args) => client(manage::pause(&args.names)),
        Command::Resume(args) => client(manage::resume(&args.names)),
        Command::Reset(args) => client(manage::reset(&args.names)),
        Command::Media(args) => client(manage::media(&args)),
        Command::ResizeDisk(args) => client(manage::resize_disk(&args)),
        Command::Memory(args) => client(manage::memory(&args)),
        Command::Agent(args) => client(agent::run(*args)),
        Command::Inspect(args) => client(manage::inspect(&args)),
        Command::Wait(args) => client(manage::wait(&args.name)),
        Command::Rm(args) => client(manage::rm(&args)),
        Command::Logs(args) => manage::logs(&args.name),
        Command::Image(args) => image::run(args.verb),
        Command::Doctor(args) => doctor::run(&args),
        Command::Install(args) => install::install(&args),
        Command::Uninstall(args) => install::uninstall(&args),
        Command::Version(args) => version(&args),
        Command::Completions { shell } => {
            clap_complete::generate(
                shell,
                &mut Cli::command(),
                "edgevmm",
                &mut std::io::stdout(),
            );
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Runs a command that talks to machines.
fn client(command: impl Future<Output = Outcome>) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime
        .context("Can't start the event loop")?
        .block_on(command)
}

fn run(args: RunArgs, log_filter: &str) -> Outcome {
    let RunArgs {
        detach,
        dry_run,
        json,
        sandbox,
        leave_folder,
        ..
    } = args;
    let given = args.given_fds.clone();
    let vm = resolve::resolve(args)?;
    host::check(&vm)?;
    if dry_run {
        let text = if json {
            serde_json::to_string_pretty(&vm).context("Can't write JSON")?
        } else {
            vm.to_yaml()
                .map_err(anyhow::Error::msg)
                .context("Can't write YAML")?
        };
        println!("{}", text.trim_end());
        return Ok(ExitCode::SUCCESS);
    }
    host::tell_of_overlays(&vm);
    if detach {
        detach::run(vm, log_filter, sandbox)
    } else {
        let sandbox = sandbox.then_some(launch::Sandbox {
            given,
            leave_folder,
        });
        launch::foreground(vm, sandbox)
    }
}

fn version(args: &JsonArg) -> Outcome {
    let version = env!("CARGO_PKG_VERSION");
    if args.json {
        println!("{}", serde_json::json!({ "version": version }));
    } else {
        println!("edgevmm {version}");
    }
    Ok(ExitCode::SUCCESS)
}
