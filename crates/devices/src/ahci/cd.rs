//! The tray of a CD-ROM drive: what is in it, what the guest has to be told of it, and the way to
//! change it from outside.

use std::sync::{Arc, Mutex, MutexGuard};

use edgevmm_block::{Access, BlockBackend, BlockError, Limits, MapEntry, Plan, VolatileSlice};
use serde::{Deserialize, Serialize};

use crate::bus::lock;

/// Why a drive's medium can't be changed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MediaError {
    /// The guest uses it.
    #[error(
        "the guest has locked the drive; it was asked to let go, so unmount the medium there and \
         try again, or take it by force"
    )]
    Locked,
}

/// Why a command failed (SPC-4, 4.5).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sense {
    /// Sense key, 0 to 15.
    pub key: u8,
    /// Additional sense code.
    pub code: u8,
    /// Its qualifier.
    pub qualifier: u8,
}

/// What has happened to the medium, for drivers that poll (MMC-6, 6.6).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MediaEvent {
    /// Nothing.
    #[default]
    None,
    /// Somebody wants to take it out.
    EjectRequest,
    /// There is another one.
    New,
    /// It is gone.
    Removal,
}

/// State of a CD-ROM drive beside its medium.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CdState {
    /// The tray is open; what is on it can't be read.
    pub open: bool,
    /// The guest keeps the tray from being opened.
    pub locked: bool,
    /// Why the last command failed.
    pub sense: Sense,
    /// The next command is told that the medium has changed.
    pub changed: bool,
    /// What the next poll is told.
    pub event: MediaEvent,
}

#[derive(Debug)]
pub struct Contents {
    pub state: CdState,
    medium: Option<Arc<dyn BlockBackend>>,
}

impl Contents {
    /// The medium, if it can be read.
    pub fn readable(&self) -> Option<&Arc<dyn BlockBackend>> {
        self.medium.as_ref().filter(|_| !self.state.open)
    }

    /// Opens or closes the tray.
    pub fn move_tray(&mut self, open: bool) {
        if self.state.open == open {
            return;
        }
        self.state.open = open;
        if self.medium.is_some() {
            self.note_change(!open);
        }
    }

    fn note_change(&mut self, present: bool) {
        self.state.changed = present;
        self.state.event = if present {
            MediaEvent::New
        } else {
            MediaEvent::Removal
        };
    }
}

/// The tray, which as a disk is whatever is in it: nothing of no size where it is empty.
#[derive(Debug)]
pub struct Tray(Mutex<Contents>);

impl Tray {
    pub fn new(medium: Option<Arc<dyn BlockBackend>>) -> Self {
        Self(Mutex::new(Contents {
            state: CdState::default(),
            medium,
        }))
    }

    pub fn lock(&self) -> MutexGuard<'_, Contents> {
        lock(&self.0)
    }

    fn medium(&self, offset: u64, len: u64) -> Result<Arc<dyn BlockBackend>, BlockError> {
        let gone = BlockError::OutOfRange {
            offset,
            len,
            size: 0,
        };
        self.lock().readable().cloned().ok_or(gone)
    }
}

impl BlockBackend for Tray {
    fn size(&self) -> u64 {
        self.lock().readable().map_or(0, |medium| medium.size())
    }

    fn read_only(&self) -> bool {
        true
    }

    fn limits(&self) -> Limits {
        Limits {
            logical_block: 2048,
            physical_block: 2048,
            discard_granularity: 0,
        }
    }

    fn read_vectored(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<(), BlockError> {
        self.medium(offset, 0)?.read_vectored(bufs, offset)
    }

    fn write_vectored(&self, _: &[VolatileSlice<'_>], _: u64) -> Result<(), BlockError> {
        Err(BlockError::ReadOnly)
    }

    fn plan(
        &self,
        access: Access,
        offset: u64,
        len: u64,
        plan: &mut Plan,
    ) -> Result<bool, BlockError> {
        self.medium(offset, len)?.plan(access, offset, len, plan)
    }

    fn map(&self, offset: u64, len: u64) -> Result<MapEntry, BlockError> {
        self.medium(offset, len)?.map(offset, len)
    }

    fn flush(&self) -> Result<(), BlockError> {
        Ok(())
    }

    fn discard(&self, _: u64, _: u64) -> Result<(), BlockError> {
        Err(BlockError::ReadOnly)
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<(), BlockError> {
        Err(BlockError::ReadOnly)
    }
}

/// Changes what is in a CD-ROM drive, from any thread.
#[derive(Debug, Clone)]
pub struct MediaHandle(pub(super) Arc<Tray>);

impl MediaHandle {
    /// Puts `medium` into the drive in place of what is there, and closes the tray.
    ///
    /// # Errors
    /// The guest has locked the tray, and it is not by `force`. The guest is asked to let go.
    pub fn insert(&self, medium: Arc<dyn BlockBackend>, force: bool) -> Result<(), MediaError> {
        self.change(Some(medium), force)
    }

    /// Takes out what is in the drive, and leaves the tray open.
    ///
    /// # Errors
    /// As [`MediaHandle::insert`].
    pub fn eject(&self, force: bool) -> Result<(), MediaError> {
        self.change(None, force)
    }

    fn change(&self, medium: Option<Arc<dyn BlockBackend>>, force: bool) -> Result<(), MediaError> {
        let mut contents = self.0.lock();
        if contents.state.locked && contents.readable().is_some() && !force {
            contents.state.event = MediaEvent::EjectRequest;
            return Err(MediaError::Locked);
        }
        let present = medium.is_some();
        let changes = present || contents.medium.is_some();
        contents.state.open = !present;
        let before = std::mem::replace(&mut contents.medium, medium);
        if changes {
            contents.note_change(present);
        }
        drop(contents);
        // Closing files may take long.
        drop(before);
        Ok(())
    }
}
