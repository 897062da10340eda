//! What is on a port: a disk or a CD-ROM drive.

use std::sync::Arc;

use edgevmm_block::engine::{Helpers, Request};
use edgevmm_block::{BlockBackend, BlockError};
use serde::{Deserialize, Serialize};

use super::ata::{self, AtaDisk, AtaState};
use super::atapi::{self, CdDrive};
use super::cd::{CdState, MediaHandle, Tray};
use super::command::PACKET_LEN;
use super::fis::{ABORTED, Command, TaskFile};
use crate::GuestMemory;
use crate::disk::handle::Shared;
use crate::disk::jobs::Terms;
use crate::disk::limiter::Limiter;
use crate::disk::{Aio, BlockHandle, ErrorPolicy, RateLimits};
use crate::platform::MachineControl;
use crate::state::StateError;

/// Longest data that a drive makes itself, in bytes.
pub const SCRATCH_LEN: usize = 512;

/// What is fixed when a drive is built.
#[derive(Debug, Clone, Default)]
pub struct DriveConfig {
    /// Name for logs and threads, such as "disk0".
    pub name: String,
    /// Serial number that the guest can read, the first 20 bytes of it; the name if it is empty.
    pub serial: String,
    /// By which means its image is read and written.
    pub aio: Aio,
    /// What to do about requests that the host fails.
    pub error_policy: ErrorPolicy,
    /// How much the guest may ask for in a second.
    pub rate_limits: RateLimits,
}

/// State of a drive beside its data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DriveState {
    /// Of a disk.
    Disk(AtaState),
    /// Of a CD-ROM drive.
    CdRom(CdState),
}

/// How a command ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// By a register FIS.
    Plain,
    /// By the PIO setup of its last data.
    PioIn,
    /// With others of the queue.
    Queued,
}

/// What is to be done about a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Nothing more; it has ended like this.
    Done(TaskFile),
    /// The host gets so many bytes of the drive's own.
    Reply { len: usize, protocol: Protocol },
    /// The disk does it, and makes it durable.
    Disk {
        request: Request,
        durable: bool,
        protocol: Protocol,
    },
    /// Ranges that come from the host are discarded.
    Trim { durable: bool },
}

impl Action {
    /// The end of a command that failed with these bits of the error register.
    pub fn failed(fis: &Command, error: u8) -> Self {
        Self::Done(TaskFile::failed(fis, error))
    }

    pub fn reply(len: usize, protocol: Protocol) -> Self {
        Self::Reply { len, protocol }
    }
}

#[derive(Debug)]
enum Kind {
    Disk(AtaDisk),
    CdRom(CdDrive),
}

/// A drive, to be put on a port.
#[derive(Debug)]
pub struct Drive {
    kind: Kind,
    config: DriveConfig,
    helpers: Arc<Helpers>,
    limiter: Option<Arc<Limiter>>,
    control: Arc<dyn MachineControl>,
    shared: Arc<Shared>,
}

impl Drive {
    /// A disk over `backend`, with its write cache on. It asks `control` to pause the machine when
    /// it can't go on.
    pub fn disk(
        config: DriveConfig,
        backend: Arc<dyn BlockBackend>,
        control: Arc<dyn MachineControl>,
    ) -> Self {
        let disk = AtaDisk::new(Arc::clone(&backend), serial(&config));
        Self::new(Kind::Disk(disk), config, backend, control)
    }

    /// A CD-ROM drive with `medium` in it, or empty.
    pub fn cdrom(
        config: DriveConfig,
        medium: Option<Arc<dyn BlockBackend>>,
        control: Arc<dyn MachineControl>,
    ) -> Self {
        let tray = Arc::new(Tray::new(medium));
        let drive = CdDrive::new(Arc::clone(&tray), serial(&config));
        Self::new(Kind::CdRom(drive), config, tray, control)
    }

    fn new(
        kind: Kind,
        config: DriveConfig,
        backend: Arc<dyn BlockBackend>,
        control: Arc<dyn MachineControl>,
    ) -> Self {
        Self {
            kind,
            helpers: Arc::new(Helpers::new(&config.name, &backend)),
            limiter: Limiter::new(&config.rate_limits).map(Arc::new),
            config,
            control,
            shared: Arc::new(Shared::new(backend)),
        }
    }

    /// The way to this drive once an adapter owns it.
    pub fn handle(&self) -> BlockHandle {
        BlockHandle(Arc::clone(&self.shared))
    }

    /// The way to what is in the drive, if that can be changed.
    pub fn media(&self) -> Option<MediaHandle> {
        match &self.kind {
            Kind::Disk(_) => None,
            Kind::CdRom(drive) => Some(drive.media()),
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.config.name
    }

    pub(super) fn shared(&self) -> &Shared {
        &self.shared
    }

    pub(super) fn terms(&self, memory: &Arc<GuestMemory>) -> Terms {
        Terms {
            name: self.config.name.as_str().into(),
            backend: Arc::clone(&self.shared.backend),
            helpers: Arc::clone(&self.helpers),
            memory: Arc::clone(memory),
            aio: self.config.aio,
            limiter: self.limiter.clone(),
            policy: self.config.error_policy,
            control: Arc::clone(&self.control),
            retries: Arc::clone(&self.shared.retries),
        }
    }

    pub(super) fn signature(&self) -> u32 {
        match self.kind {
            Kind::Disk(_) => ata::SIGNATURE,
            Kind::CdRom(_) => atapi::SIGNATURE,
        }
    }

    /// Whether a command is for the drive's queue.
    pub(super) fn is_queued(&self, fis: &Command) -> bool {
        matches!(self.kind, Kind::Disk(_)) && ata::is_queued(fis)
    }

    /// Begins a command.
    pub(super) fn command(
        &self,
        fis: &Command,
        packet: &[u8; PACKET_LEN],
        scratch: &mut [u8; SCRATCH_LEN],
    ) -> Action {
        match &self.kind {
            Kind::Disk(disk) => disk.command(fis, scratch),
            Kind::CdRom(drive) => drive.command(fis, packet, scratch),
        }
    }

    /// The next range of a TRIM, as [`AtaDisk::next_trim`].
    pub(super) fn next_trim(
        &self,
        ranges: &[u8; SCRATCH_LEN],
        next: &mut usize,
    ) -> Result<Option<Request>, u8> {
        match &self.kind {
            Kind::Disk(disk) => disk.next_trim(ranges, next),
            Kind::CdRom(_) => Err(ABORTED),
        }
    }

    /// The registers of a command that went well.
    pub(super) fn good(&self, fis: &Command) -> TaskFile {
        match &self.kind {
            Kind::Disk(_) => TaskFile::good(fis),
            Kind::CdRom(_) => atapi::good(fis),
        }
    }

    /// The registers of a command that the host failed.
    pub(super) fn failed(&self, fis: &Command, error: &BlockError) -> TaskFile {
        match &self.kind {
            Kind::Disk(disk) => TaskFile::failed(fis, disk.failed(fis, error)),
            Kind::CdRom(drive) => drive.failed(fis, error),
        }
    }

    /// Notes that a queued command has failed.
    pub(super) fn note_queued_error(&self, fis: &Command, error: u8) {
        if let Kind::Disk(disk) = &self.kind {
            disk.note_queued_error(fis, error);
        }
    }

    /// Returns to the state after power-on, but for what is in a drive.
    pub(super) fn power_on(&self) {
        match &self.kind {
            Kind::Disk(disk) => disk.power_on(),
            Kind::CdRom(drive) => drive.power_on(),
        }
    }

    pub(super) fn state(&self) -> DriveState {
        match &self.kind {
            Kind::Disk(disk) => DriveState::Disk(disk.state()),
            Kind::CdRom(drive) => DriveState::CdRom(drive.state()),
        }
    }

    /// Takes up a saved state.
    ///
    /// # Errors
    /// Refuses the state of a drive of another kind, and one that no driver could have caused.
    pub(super) fn restore(&self, saved: &DriveState) -> Result<(), StateError> {
        match (&self.kind, saved) {
            (Kind::Disk(disk), DriveState::Disk(state)) => disk.restore(state),
            (Kind::CdRom(drive), DriveState::CdRom(state)) => drive.restore(state),
            (_, saved) => Err(StateError::OtherConfig {
                what: "signature of a SATA drive",
                saved: match saved {
                    DriveState::Disk(_) => ata::SIGNATURE.into(),
                    DriveState::CdRom(_) => atapi::SIGNATURE.into(),
                },
                expected: self.signature().into(),
            }),
        }
    }
}

fn serial(config: &DriveConfig) -> String {
    let given = Some(&config.serial).filter(|serial| !serial.is_empty());
    given.unwrap_or(&config.name).clone()
}
