//! The verbs of `agent` and their flags.

use std::path::PathBuf;

use clap::{Args, Subcommand};

/// What `agent` takes.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub struct AgentArgs {
    /// The machine
    pub name: String,
    #[command(flatten)]
    pub request: AgentRequest,
}

/// What the agent is asked for.
#[derive(Debug, Args)]
pub struct AgentRequest {
    /// Print JSON
    #[arg(long, global = true)]
    pub json: bool,
    /// Seconds that the agent may take [default: 10; to freeze and thaw: 60; a program: for ever]
    #[arg(long, short, global = true, value_name = "SECONDS",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub timeout: Option<u32>,
    #[command(subcommand)]
    pub verb: Verb,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Tell whether the agent answers
    Ping {
        /// Wait within the timeout for an agent to connect
        #[arg(long)]
        wait: bool,
    },
    /// Describe the agent: its version and its commands
    Info,
    /// Describe the guest's operating system
    Osinfo,
    /// List network interfaces with their addresses
    Network,
    /// List users who are logged in
    Users,
    /// List mounted file systems
    Filesystems,
    /// Write file systems back to the disks and halt writes, to copy the disks meanwhile
    #[command(after_help = FREEZE)]
    Freeze {
        /// Seconds after which edgevmm thaws them by itself
        #[arg(long, value_name = "SECONDS", default_value_t = 60,
              value_parser = clap::value_parser!(u32).range(1..=3600))]
        thaw_after: u32,
    },
    /// Let file systems be written again
    Thaw,
    /// Tell whether file systems are frozen
    FreezeStatus,
    /// Power the guest off
    Shutdown,
    /// Start the guest anew
    Reboot,
    /// Run a program in the guest
    #[command(after_help = EXEC)]
    Exec(ExecArgs),
    /// Show the guest's clock
    GetTime,
    /// Set the guest's clock to the host's, or to a time
    SetTime {
        /// Seconds since 1970
        time: Option<u32>,
    },
    /// List, add and remove SSH keys that let a user in
    SshKeys {
        #[command(subcommand)]
        verb: KeysVerb,
    },
}

/// What `agent NAME exec` takes.
#[derive(Debug, Args)]
pub struct ExecArgs {
    /// Give it this variable. If there is any it gets no others, not even PATH
    #[arg(long, short, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// Don't pass standard input on, which is done unless it is a terminal
    #[arg(long, short)]
    pub no_stdin: bool,
    /// The program and its arguments; no shell is between
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

/// The verbs of `agent NAME ssh-keys`.
#[derive(Debug, Subcommand)]
pub enum KeysVerb {
    /// List them
    List {
        /// The guest's user
        user: String,
    },
    /// Add some
    Add(KeysArgs),
    /// Remove some
    Remove(KeysArgs),
}

/// SSH keys.
#[derive(Debug, Args)]
pub struct KeysArgs {
    /// The guest's user
    pub user: String,
    /// Public keys, each one word of the shell
    #[arg(required_unless_present = "file")]
    pub keys: Vec<String>,
    /// Read keys from a file, too
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,
}

const HELP: &str = "\
The agent is QEMU's, in the guest: `apt install qemu-guest-agent` or what its distribution calls it.
What it says is the guest's word.

Examples:
  edgevmm agent web ping --wait --timeout 120
  edgevmm agent web exec -- systemctl is-active nginx
  edgevmm agent web network --json";

const FREEZE: &str = "\
Example:
  edgevmm agent web freeze && cp --sparse=always web.raw backup.raw; edgevmm agent web thaw
edgevmm thaws them when the time is over and before the machine stops, whatever became of the
command that froze them. While they are frozen the agent does little else.";

const EXEC: &str = "\
Exit code: that of the program; 128+N when signal N ended it; 124 when it did not end in time (it
goes on); 125 when it could not be run or asked for. It gets at most 2 MiB of standard input, and may
write 3 MiB. It runs as the agent's user, mostly root.

Example:
  edgevmm agent web exec -- sh -c 'cat > /etc/motd' < motd";
