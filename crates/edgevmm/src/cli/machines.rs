//! Flags of commands on machines that are there.

use std::path::PathBuf;

use clap::Args;
use edgevmm_config::ByteSize;

const CONSOLE_KEYS: &str = "\
Keys: Ctrl-A x detaches, Ctrl-A h shows help, Ctrl-A Ctrl-A types Ctrl-A.";

/// What `ps` takes.
#[derive(Debug, Args)]
pub struct PsArgs {
    /// Show machines that have ended, too
    #[arg(short, long)]
    pub all: bool,
    #[command(flatten)]
    pub json: JsonArg,
}

/// What `console` takes.
#[derive(Debug, Args)]
#[command(after_help = CONSOLE_KEYS)]
pub struct ConsoleArgs {
    /// The machine
    pub name: String,
    #[command(flatten)]
    pub flags: ConsoleFlags,
}

/// How to attach to a console.
#[derive(Debug, Args)]
pub struct ConsoleFlags {
    /// Only watch
    #[arg(long, conflicts_with = "exclusive")]
    pub read_only: bool,
    /// Take the console from all others that type
    #[arg(long)]
    pub exclusive: bool,
    /// How much of the past output to show first, like 4K [default: all that is kept]
    #[arg(long, value_name = "SIZE")]
    pub history: Option<ByteSize>,
}

/// What `stop` takes.
#[derive(Debug, Args)]
pub struct StopArgs {
    /// The machines
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
    /// Seconds until they are ended by force [default: as configured]
    #[arg(long, short, value_name = "SECONDS")]
    pub timeout: Option<u32>,
}

/// What `inspect` takes.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// The machine
    pub name: String,
    #[command(flatten)]
    pub json: JsonArg,
}

/// What `resize-disk` takes.
#[derive(Debug, Args)]
pub struct ResizeDiskArgs {
    /// The machine
    pub name: String,
    /// The disk: disk0 is the first
    pub disk: String,
    /// Its new size, like 20G
    pub size: ByteSize,
}

/// What `memory` takes.
#[derive(Debug, Args)]
pub struct MemoryArgs {
    /// The machine
    pub name: String,
    /// Memory that the guest is to do with from now on, like 512M: the rest goes back to the host
    /// as the guest can spare it
    #[arg(long, value_name = "SIZE")]
    pub target: Option<ByteSize>,
    #[command(flatten)]
    pub json: JsonArg,
}

/// What `media` takes.
#[derive(Debug, Args)]
pub struct MediaArgs {
    /// The machine
    pub name: String,
    /// The drive: cdrom0 is the first
    pub drive: String,
    /// The ISO image to put in
    #[arg(required_unless_present = "eject", value_name = "ISO")]
    pub path: Option<PathBuf>,
    /// Take out what is there, and leave the drive open
    #[arg(long, conflicts_with = "path")]
    pub eject: bool,
    /// Do it even if the guest has locked the drive, as it does with what is mounted
    #[arg(long)]
    pub force: bool,
}

/// What `rm` takes.
#[derive(Debug, Args)]
pub struct RmArgs {
    /// The machines
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
    /// End running machines by force first
    #[arg(short, long)]
    pub force: bool,
}

/// Names of machines.
#[derive(Debug, Args)]
pub struct NameArgs {
    /// The machines
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
}

/// The name of a machine.
#[derive(Debug, Args)]
pub struct NameArg {
    /// The machine
    pub name: String,
}

/// The choice of JSON.
#[derive(Debug, Args)]
pub struct JsonArg {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What the parent hands to a detached VMM; the configuration comes on standard input.
#[derive(Debug, Args)]
pub struct VmmArgs {
    /// Folder of the machine
    #[arg(long)]
    pub dir: PathBuf,
    /// File descriptor of its lock
    #[arg(long)]
    pub lock_fd: i32,
    /// File descriptor of the pipe to report the start to
    #[arg(long)]
    pub ready_fd: i32,
    /// Close a sandbox
    #[arg(long)]
    pub sandbox: bool,
}
