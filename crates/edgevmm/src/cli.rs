//! Commands and their flags.

mod machines;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use edgevmm_config::{
    ByteSize, ChannelConfig, ConsoleConfig, CpuConfig, DataSource, DiskConfig, DiskKind,
    FirmwareChoice, MemoryConfig, NetConfig, PanicAction, PortForward, WatchdogAction,
    WatchdogConfig,
};
use uuid::Uuid;

use crate::agent::args::AgentArgs;
use crate::doctor::DoctorArgs;
use crate::image::args::ImageArgs;
use crate::install::{InstallArgs, TargetArgs};

pub use machines::{
    ConsoleArgs, ConsoleFlags, InspectArgs, JsonArg, MediaArgs, MemoryArgs, NameArg, NameArgs,
    PsArgs, ResizeDiskArgs, RmArgs, StopArgs, VmmArgs,
};

/// Boots disk images as virtual machines on KVM.
#[derive(Debug, Parser)]
#[command(name = "edgevmm", version, after_help = EXIT_CODES, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    pub log: LogArgs,
    #[command(subcommand)]
    pub command: Command,
}

/// What goes to standard error.
#[derive(Debug, Args)]
pub struct LogArgs {
    /// Messages to show on standard error: a level, or levels by module, like
    /// warn,edgevmm_vmm=debug. EDGEVMM_LOG is its default
    #[arg(long, global = true, value_name = "FILTER")]
    pub log: Option<String>,
    /// Show more messages: -v info, -vv debug, -vvv trace
    #[arg(short, long, global = true, action = clap::ArgAction::Count, conflicts_with = "log")]
    pub verbose: u8,
}

/// The commands. Their flags are described to clap when their command is given, and not all of them
/// in each process that becomes a VMM.
#[derive(Debug, Subcommand)]
#[command(defer = true)]
pub enum Command {
    /// Run a machine
    Run(Box<RunArgs>),
    /// List machines
    Ps(PsArgs),
    /// Attach the terminal to a machine's console
    Console(ConsoleArgs),
    /// Press the power button, and end machines by force when they don't power off in time
    Stop(StopArgs),
    /// End machines by force
    Kill(NameArgs),
    /// Halt machines' vCPUs
    Pause(NameArgs),
    /// Let paused machines go on
    Resume(NameArgs),
    /// Reset machines, as their reset button would
    Reset(NameArgs),
    /// Make a disk of a running machine larger, and tell the guest
    ResizeDisk(ResizeDiskArgs),
    /// Show how a machine's memory is used, or have its guest do with less
    Memory(MemoryArgs),
    /// Change what is in a CD-ROM drive of a running machine
    Media(MediaArgs),
    /// Ask a machine's guest agent: describe the guest, run programs, freeze file systems
    Agent(Box<AgentArgs>),
    /// Describe a machine
    Inspect(InspectArgs),
    /// Wait until a machine ends, and exit as its `run` would
    Wait(NameArg),
    /// Show the messages of a detached machine's VMM
    Logs(NameArg),
    /// Remove what ended machines left behind
    Rm(RmArgs),
    /// Make, convert, check and mend disk images
    Image(Box<ImageArgs>),
    /// Check what this host has and lacks to run machines
    Doctor(DoctorArgs),
    /// Make containerd or k3s run pods as machines
    Install(InstallArgs),
    /// Take away what `install` put in place
    Uninstall(TargetArgs),
    /// Write a completion script for a shell
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Show the version
    Version(JsonArg),
    /// The VMM of a detached machine, started by `run --detach`
    #[command(name = "__vmm", hide = true)]
    Vmm(VmmArgs),
}

/// What `run` takes.
#[derive(Debug, Args)]
#[command(after_help = RUN_EXAMPLES)]
pub struct RunArgs {
    /// Disk images to boot from: qcow2 or raw, or of another hypervisor (VMDK, OVA, VHD, VHDX, VDI),
    /// where writes are kept beside the image. They come before those of --disk
    #[arg(value_name = "DISK")]
    pub images: Vec<PathBuf>,
    /// Read the machine from a YAML or JSON file. Flags go before it; disks and networks given as
    /// flags replace those of the file
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Name of the machine. Made from the first disk when absent
    #[arg(long)]
    pub name: Option<String>,
    /// Run in the background and print the name
    #[arg(short, long)]
    pub detach: bool,
    /// Check everything, print the machine as YAML and start nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Print JSON where --dry-run would print YAML
    #[arg(long, requires = "dry_run")]
    pub json: bool,
    /// Close a sandbox around the VMM before the guest runs: a user of its own, no capabilities, no
    /// files but those it has, and only the system calls that each of its threads needs
    #[arg(long)]
    pub sandbox: bool,
    /// Descriptors that the sandbox keeps, as the machine names files by them (/proc/self/fd/N)
    #[arg(long, hide = true, value_delimiter = ',', requires = "sandbox")]
    pub given_fds: Vec<i32>,
    /// Leave the machine's folder to whoever started this: in its sandbox the VMM can't remove it
    #[arg(long, hide = true, requires = "sandbox", conflicts_with = "detach")]
    pub leave_folder: bool,
    #[command(flatten)]
    pub machine: MachineArgs,
    #[command(flatten)]
    pub boot: BootArgs,
    #[command(flatten)]
    pub storage: StorageArgs,
    #[command(flatten)]
    pub network: NetworkArgs,
    #[command(flatten)]
    pub seed: SeedArgs,
}

/// CPUs, memory and the like.
#[derive(Debug, Args)]
#[command(next_help_heading = "Machine")]
pub struct MachineArgs {
    /// Number of vCPUs, and their topology if it matters: 4,sockets=1,cores=2,threads=2
    /// [default: 2, or 1 on a host with one CPU]
    #[arg(long, value_name = "N[,KEY=N...]")]
    pub cpus: Option<CpuConfig>,
    /// Memory, like 512M or 4G [default: 1G]
    #[arg(long, short, value_name = "SIZE[,hugepages]")]
    pub memory: Option<MemoryConfig>,
    /// Back memory with huge pages of the host
    #[arg(long)]
    pub hugepages: bool,
    /// Give the guest no balloon, by which memory that it does not need goes back to the host
    #[arg(long)]
    pub no_balloon: bool,
    /// Console: stdio, pty, none or file=PATH; device=virtio for a virtio console
    #[arg(long, value_name = "PLACE[,device=DEVICE]")]
    pub console: Option<ConsoleConfig>,
    /// What to do when the guest's kernel panics, which it tells by pvpanic [default: report]
    #[arg(long, value_name = "ACTION")]
    pub on_panic: Option<PanicArg>,
    /// Give the guest a watchdog (i6300esb), and do this when it runs out
    #[arg(long, value_name = "ACTION")]
    pub watchdog: Option<WatchdogArg>,
    /// Add a channel: a named virtio port in the guest, a Unix socket on the host
    #[arg(long = "channel", value_name = "NAME,socket=PATH")]
    pub channels: Vec<ChannelConfig>,
    /// Leave out the channel that a guest agent looks for
    #[arg(long)]
    pub no_agent: bool,
    /// Seconds that the guest gets to power off when it is asked to [default: 60]
    #[arg(long, value_name = "SECONDS")]
    pub stop_timeout: Option<u32>,
    /// UUID that the guest sees. Derived from name and first disk when absent
    #[arg(long)]
    pub uuid: Option<Uuid>,
}

/// A value of `--on-panic`.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum PanicArg {
    /// Tell it, and let the guest do what it does then
    Report,
    /// Pause the machine
    Pause,
    /// Reset the machine
    Reset,
    /// End the machine, with the exit code of a crash
    End,
}

impl From<PanicArg> for PanicAction {
    fn from(action: PanicArg) -> Self {
        match action {
            PanicArg::Report => Self::Report,
            PanicArg::Pause => Self::Pause,
            PanicArg::Reset => Self::Reset,
            PanicArg::End => Self::End,
        }
    }
}

/// A value of `--watchdog`.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum WatchdogArg {
    /// Reset the machine
    Reset,
    /// Press the power button, and end the machine by force when that does not help in time
    Shutdown,
    /// End the machine, with the exit code of a crash
    End,
    /// Pause the machine
    Pause,
    /// Tell it only
    Report,
}

impl From<WatchdogArg> for WatchdogConfig {
    fn from(action: WatchdogArg) -> Self {
        let action = match action {
            WatchdogArg::Reset => WatchdogAction::Reset,
            WatchdogArg::Shutdown => WatchdogAction::Shutdown,
            WatchdogArg::End => WatchdogAction::End,
            WatchdogArg::Pause => WatchdogAction::Pause,
            WatchdogArg::Report => WatchdogAction::Report,
        };
        Self { action }
    }
}

/// A value of `--firmware`.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum FirmwareArg {
    /// What the partition table of the first boot disk asks for: bios where it has boot code, uefi
    /// where it only has an EFI system partition (the default)
    Auto,
    /// SeaBIOS: boots MBR disks and GPT disks with a BIOS boot partition
    Bios,
    /// UEFI: boots \EFI\BOOT\BOOTX64.EFI of a disk's EFI system partition, or the boot entries in
    /// --uefi-vars
    Uefi,
    /// edgevmm's own: starts the disk's Linux kernel without a boot loader, or leaves the disk to
    /// bios or uefi
    Fast,
    /// No firmware: starts the kernel given by --kernel
    None,
}

impl From<FirmwareArg> for FirmwareChoice {
    fn from(firmware: FirmwareArg) -> Self {
        match firmware {
            FirmwareArg::Auto => Self::Auto,
            FirmwareArg::Bios => Self::Bios,
            FirmwareArg::Uefi => Self::Uefi,
            FirmwareArg::Fast => Self::Fast,
            FirmwareArg::None => Self::None,
        }
    }
}

/// What starts the guest.
#[derive(Debug, Args)]
#[command(next_help_heading = "Boot")]
pub struct BootArgs {
    /// What starts the disk's boot loader
    #[arg(long, value_enum, value_name = "FIRMWARE")]
    pub firmware: Option<FirmwareArg>,
    /// Boot this kernel (vmlinux or bzImage) in place of the disk's boot loader
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk for the kernel
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Command line for the kernel
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// BIOS image [default: SeaBIOS of the host]
    #[arg(long, value_name = "FILE")]
    pub bios: Option<PathBuf>,
    /// UEFI image: CLOUDHV.fd, or OVMF's code [default: what the host's packages have; OVMF with
    /// --uefi-vars]
    #[arg(long, value_name = "FILE")]
    pub uefi: Option<PathBuf>,
    /// Keep the guest's UEFI variables (boot entries and the like) in this file from run to run,
    /// by OVMF. Made when it is not there yet
    #[arg(long, value_name = "FILE")]
    pub uefi_vars: Option<PathBuf>,
    /// Option ROM by which SeaBIOS boots from --net interfaces with a bootindex [default: iPXE's of
    /// the host]
    #[arg(long, value_name = "FILE")]
    pub net_rom: Option<PathBuf>,
    /// Have the firmware wait a few seconds for ESC, which shows what it can boot from (SeaBIOS and
    /// OVMF)
    #[arg(long)]
    pub boot_menu: bool,
    /// Write the messages of the firmware's debug port to a file, or to standard error with -
    #[arg(long, value_name = "FILE")]
    pub debugcon: Option<PathBuf>,
}

/// Disks.
#[derive(Debug, Args)]
#[command(next_help_heading = "Disks")]
pub struct StorageArgs {
    /// Add a disk. Keys: bus=sata for guests without virtio drivers, ro, snapshot, direct, serial=, bootindex=, queues=, overlay=FILE and
    /// overlay_size= for what is written over the image; and what the image is made of: backing=
    /// for each backing file of a qcow2, data_file= for each further file with its data,
    /// internal_snapshot=, member= of an OVA, format=. How it is served: aio=io_uring|threads;
    /// error_policy=stop|report|ignore|enospace (stop pauses the machine until `edgevmm resume`);
    /// bps=, iops= limit bytes and requests a second, bps_read=, bps_write=, iops_read=,
    /// iops_write= one direction, bps_burst=, iops_burst= what may come at once. A comma in a path
    /// is written twice
    #[arg(long = "disk", value_name = "PATH[,KEY=VALUE...]")]
    pub disks: Vec<DiskConfig>,
    /// Add a CD-ROM drive with an ISO image in it, or an empty one by `none`. Drives come after the
    /// disks, also in the boot order, unless bootindex= says otherwise
    #[arg(long = "cdrom", value_name = "ISO[,KEY=VALUE...]|none")]
    pub cdroms: Vec<CdromArg>,
    /// Keep all images as they are: writes of the guest go to throw-away overlays
    #[arg(long)]
    pub snapshot: bool,
    /// Keep all images as they are, and what the guest writes in overlays, from run to run: in the
    /// folder DIR/NAME with the machine's name. An image that changes meanwhile is refused
    #[arg(long, value_name = "DIR")]
    pub overlay: Option<PathBuf>,
    /// Size of the first disk with its overlay, which may be larger than the image
    #[arg(long, value_name = "SIZE")]
    pub overlay_size: Option<ByteSize>,
}

/// A value of `--cdrom`: a disk of that kind.
#[derive(Debug, Clone)]
pub struct CdromArg(pub DiskConfig);

impl std::str::FromStr for CdromArg {
    type Err = edgevmm_config::FlagError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut disk: DiskConfig = text.parse()?;
        disk.kind = DiskKind::Cdrom;
        if disk.path.as_os_str() == "none" {
            disk.path = PathBuf::new();
        }
        Ok(Self(disk))
    }
}

/// Network interfaces.
#[derive(Debug, Args)]
#[command(next_help_heading = "Network")]
pub struct NetworkArgs {
    /// Add a network interface: user (the default when none is given), tap=NAME, or none for no
    /// network. Keys: mac=, host_loopback for user, and bootindex= to boot from the network as the
    /// firmware does (SeaBIOS, OVMF)
    #[arg(long = "net", value_name = "TYPE[,KEY=VALUE...]")]
    pub nets: Vec<NetArg>,
    /// Forward a port of the host to the guest's user network, like 2222:22
    #[arg(short, long = "publish", value_name = "[tcp|udp:][ADDR:]HOST:GUEST")]
    pub publish: Vec<PortForward>,
}

/// A value of `--net`.
#[derive(Debug, Clone)]
pub enum NetArg {
    /// No network at all.
    None,
    /// An interface.
    Interface(NetConfig),
}

impl std::str::FromStr for NetArg {
    type Err = edgevmm_config::FlagError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "none" {
            Ok(Self::None)
        } else {
            text.parse().map(Self::Interface)
        }
    }
}

/// The cloud-init seed.
#[derive(Debug, Args)]
#[command(next_help_heading = "cloud-init")]
pub struct SeedArgs {
    /// File with user-data (#cloud-config or a script)
    #[arg(long, value_name = "FILE")]
    pub user_data: Option<PathBuf>,
    /// File with public SSH keys for the image's default user
    #[arg(long, value_name = "FILE")]
    pub ssh_key: Option<PathBuf>,
    /// In which form cloud-init is told [default: nocloud]
    ///
    /// `config-drive` is OpenStack's, for guests that read nothing else (Windows' cloudbase-init,
    /// CoreOS' ignition of old). Its network configuration is OpenStack's network_data.json.
    #[arg(long, value_name = "FORM")]
    pub datasource: Option<DataSourceArg>,
    /// Host name of the guest
    #[arg(long, value_name = "NAME")]
    pub hostname: Option<String>,
    /// File with the network configuration
    #[arg(long, value_name = "FILE")]
    pub network_config: Option<PathBuf>,
}

/// A value of `--datasource`.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum DataSourceArg {
    /// A volume labelled cidata
    Nocloud,
    /// A volume labelled config-2
    ConfigDrive,
}

impl From<DataSourceArg> for DataSource {
    fn from(arg: DataSourceArg) -> Self {
        match arg {
            DataSourceArg::Nocloud => DataSource::NoCloud,
            DataSourceArg::ConfigDrive => DataSource::ConfigDrive,
        }
    }
}

/// The table of exit codes; [`crate::exit`] keeps to it.
pub const EXIT_CODES: &str = "\
Exit codes:
  0  success; for `run` and `wait`: the guest powered off
  1  the VMM or something of the host failed
  2  wrong usage or configuration; nothing was started
  3  the guest crashed: triple fault or an error of KVM while running it
  4  the guest was ended by force: killed, or not powered off in time
  5  `image check` found damage, or `image compare` a difference
  6  `image check` found nothing worse than lost space
128+N  signal N ended a command on images; what was unfinished is removed";

const RUN_EXAMPLES: &str = "\
Examples:
  Boot a cloud image; changes stay in the image:
    edgevmm run debian-12.qcow2
  The same, but leave the image as it is, log in by SSH (ssh -p 2222 debian@localhost):
    edgevmm run --snapshot --ssh-key ~/.ssh/id_ed25519.pub -p 2222:22 debian-12.qcow2
  In the background, with a name:
    edgevmm run --detach --name web --memory 2G --cpus 4 web.qcow2
    edgevmm console web
    edgevmm stop web
  A second disk, read-only; a tap in place of the user network:
    edgevmm run os.qcow2 --disk data.img,ro,serial=data --net tap=tap0
  A qcow2 with a backing file, which must be named:
    edgevmm run --disk overlay.qcow2,backing=base.qcow2
  Install from an ISO image onto a blank disk, which a guest without virtio drivers sees too:
    edgevmm run --disk new.raw,bus=sata --cdrom debian.iso
  A disk of another hypervisor; writes are kept in legacy.vmdk.overlay.qcow2:
    edgevmm run legacy.vmdk
  Several machines over one image, each keeping what it writes, on a larger disk:
    edgevmm run --overlay /var/lib/vms --name web1 --overlay-size 20G debian-12.qcow2
  A kernel directly:
    edgevmm run --kernel vmlinux --initrd initrd.img --cmdline 'console=ttyS0' --net none
  From a file; `edgevmm run --dry-run ...` writes one:
    edgevmm run --config web.yaml

Keys on the terminal: Ctrl-A x presses the power button (twice: ends the machine by force),
Ctrl-A h shows help. Exit codes: see `edgevmm --help`.";
