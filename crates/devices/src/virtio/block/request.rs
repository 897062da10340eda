//! One request: header, data and status byte (virtio 1.2, 5.2.6).

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use edgevmm_block::{BlockBackend, BlockError, SECTOR_SIZE};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::config::MAX_RANGE_SECTORS;
use crate::virtio::DriverError;
use crate::virtio::ring::Chain;

/// Bytes of a serial number, padded with zeroes.
pub(super) const SERIAL_LEN: usize = VIRTIO_BLK_ID_BYTES as usize;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    kind: U32,
    reserved: U32,
    sector: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RangeSegment {
    sector: U64,
    num_sectors: U32,
    flags: U32,
}

/// Why a request is not done; tells the guest no more than a disk would.
enum Failure {
    /// The request is one that the device never said it could do.
    Unsupported,
    /// The request makes no sense, such as a length that is no multiple of a sector.
    Invalid(&'static str),
    /// The backend failed or refused.
    Backend(BlockError),
}

impl From<BlockError> for Failure {
    fn from(error: BlockError) -> Self {
        Self::Backend(error)
    }
}

/// Carries requests out. One per queue.
#[derive(Debug, Clone)]
pub(super) struct Executor {
    pub(super) name: Arc<str>,
    pub(super) backend: Arc<dyn BlockBackend>,
    pub(super) serial: [u8; SERIAL_LEN],
    /// The driver accepted flush. Otherwise it doesn't know that it has to (5.2.6.2).
    pub(super) flush: bool,
    /// Writes may stay in the host's cache until the guest flushes.
    pub(super) writeback: Arc<AtomicBool>,
    /// The driver accepted discard.
    pub(super) discard: bool,
    /// The driver accepted write zeroes.
    pub(super) write_zeroes: bool,
}

impl Executor {
    /// Does what `chain` asks for and writes its status byte. Returns the used length.
    ///
    /// # Errors
    /// The chain is no block request at all. Failures of a request go into its status.
    pub(super) fn execute(&self, chain: &mut Chain) -> Result<u32, DriverError> {
        let mut header = Header::new_zeroed();
        if chain.readable.copy_out(header.as_mut_bytes()) < size_of::<Header>() {
            return Err(DriverError::Chain("the request header is too short"));
        }
        chain.detach_status()?;
        let writable = chain.writable.bytes();
        let (status, written) = match self.run(&header, chain) {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(Failure::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
            Err(failure) => {
                self.log(&header, &failure);
                (VIRTIO_BLK_S_IOERR, 0)
            }
        };
        chain.write_status(u8::try_from(status).unwrap_or(u8::MAX));
        // The used length counts from the front without gaps, so it covers the status byte only
        // if all before it was written.
        let used = if written == writable {
            written.saturating_add(1)
        } else {
            written
        };
        Ok(u32::try_from(used).unwrap_or(u32::MAX))
    }

    /// Returns how many bytes of the chain's writable part were written.
    fn run(&self, header: &Header, chain: &mut Chain) -> Result<u64, Failure> {
        match header.kind.get() {
            VIRTIO_BLK_T_IN => self.read(header.sector.get(), chain),
            VIRTIO_BLK_T_OUT => self.write(header.sector.get(), chain),
            VIRTIO_BLK_T_FLUSH => {
                self.backend.flush()?;
                Ok(0)
            }
            VIRTIO_BLK_T_GET_ID => Ok(chain.writable.copy_in(&self.serial) as u64),
            VIRTIO_BLK_T_DISCARD if self.discard => self.discard(chain),
            VIRTIO_BLK_T_WRITE_ZEROES if self.write_zeroes => self.write_zeroes(chain),
            _ => Err(Failure::Unsupported),
        }
    }

    fn read(&self, sector: u64, chain: &Chain) -> Result<u64, Failure> {
        let len = chain.writable.bytes();
        let offset = self.offset(sector, len)?;
        self.backend
            .read_vectored(chain.writable.slices(), offset)?;
        Ok(len)
    }

    fn write(&self, sector: u64, chain: &Chain) -> Result<u64, Failure> {
        let offset = self.offset(sector, chain.readable.bytes())?;
        self.backend
            .write_vectored(chain.readable.slices(), offset)?;
        self.write_through()?;
        Ok(0)
    }

    fn discard(&self, chain: &mut Chain) -> Result<u64, Failure> {
        let (offset, len, flags) = self.range(chain)?;
        if flags != 0 {
            return Err(Failure::Unsupported);
        }
        if len > 0 {
            self.backend.discard(offset, len)?;
            self.write_through()?;
        }
        Ok(0)
    }

    fn write_zeroes(&self, chain: &mut Chain) -> Result<u64, Failure> {
        let (offset, len, flags) = self.range(chain)?;
        if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
            return Err(Failure::Unsupported);
        }
        if len > 0 {
            self.backend.write_zeroes(offset, len, flags != 0)?;
            self.write_through()?;
        }
        Ok(0)
    }

    /// Takes the one segment of a discard or write-zeroes request: offset, bytes and flags.
    fn range(&self, chain: &mut Chain) -> Result<(u64, u64, u32), Failure> {
        let mut segment = RangeSegment::new_zeroed();
        let expected = size_of::<RangeSegment>();
        if chain.readable.bytes() != expected as u64
            || chain.readable.copy_out(segment.as_mut_bytes()) != expected
        {
            return Err(Failure::Invalid("it has not exactly one segment"));
        }
        let sectors = segment.num_sectors.get();
        if sectors > MAX_RANGE_SECTORS {
            return Err(Failure::Invalid("its range is too long"));
        }
        let len = u64::from(sectors) * SECTOR_SIZE;
        let offset = self.offset(segment.sector.get(), len)?;
        Ok((offset, len, segment.flags.get()))
    }

    /// The byte offset of `sector`, provided that `len` bytes from there are on the disk.
    fn offset(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        if !len.is_multiple_of(SECTOR_SIZE) {
            return Err(Failure::Invalid("its length is no multiple of a sector"));
        }
        let sectors = self.backend.size() / SECTOR_SIZE;
        match sector.checked_add(len / SECTOR_SIZE) {
            Some(end) if end <= sectors => Ok(sector * SECTOR_SIZE),
            _ => Err(Failure::Invalid("it reaches past the end of the disk")),
        }
    }

    fn write_through(&self) -> Result<(), BlockError> {
        if self.flush && self.writeback.load(Ordering::Acquire) {
            Ok(())
        } else {
            self.backend.flush()
        }
    }

    fn log(&self, header: &Header, failure: &Failure) {
        let (kind, sector) = (header.kind.get(), header.sector.get());
        match failure {
            // What a guest can cause at will must not fill the host's log.
            Failure::Unsupported => {}
            Failure::Invalid(reason) => {
                tracing::debug!(
                    device = &*self.name,
                    kind,
                    sector,
                    "Request refused: {reason}"
                );
            }
            Failure::Backend(BlockError::ReadOnly | BlockError::OutOfRange { .. }) => {
                tracing::debug!(device = &*self.name, kind, sector, "Request refused");
            }
            Failure::Backend(error) => {
                let error: &dyn std::error::Error = error;
                tracing::warn!(device = &*self.name, kind, sector, error, "Request failed");
            }
        }
    }
}
