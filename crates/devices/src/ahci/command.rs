//! Commands as the driver put them into memory: command list, command table and the table of the
//! memory for their data (AHCI 1.3.1, 4.2).

use vm_memory::{Bytes, GuestAddress};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::fis::{self, REGISTER_LEN};
use crate::GuestMemory;
use crate::virtio::buffers::Buffers;

/// Commands that a port can have at a time.
pub const SLOTS: usize = 32;

/// Pieces of memory that a command may have: the most sectors that one can ask for, by pages.
/// Drivers use some hundreds.
pub const MAX_PIECES: usize = 8192 + 16;

/// Bytes of a SCSI command of an ATAPI drive.
pub const PACKET_LEN: usize = 16;

/// Offset of the packet in a command table.
const PACKET_AT: u64 = 0x40;
/// Offset of the table of memory in a command table.
const PIECES_AT: u64 = 0x80;
/// The last byte of a piece of memory, less one.
const PIECE_LEN: u32 = 0x003f_ffff;
/// A piece of memory asks for an interrupt.
const PIECE_INTERRUPT: u32 = 1 << 31;
/// Pieces that are read at a time.
const BATCH: usize = 64;

/// A structure is not in memory, or is beyond what the adapter can hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostError;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    /// Length of the FIS, flags and pieces of memory.
    options: U32,
    transferred: U32,
    table: U64,
    reserved: [U32; 4],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Piece {
    address: U64,
    reserved: U32,
    len: U32,
}

/// Header flag: BSY is cleared as soon as the drive has the FIS.
const CLEAR_BUSY: u32 = 1 << 10;

/// A command, read once.
#[derive(Debug, Clone, Copy, Default)]
pub struct Fetched {
    /// `None` for a FIS that no drive knows.
    pub fis: Option<fis::Command>,
    pub clear_busy: bool,
    pub packet: [u8; PACKET_LEN],
    pieces: u32,
    header: u64,
    table: u64,
}

impl Fetched {
    /// Reads the command in `slot` of the command list at `list`.
    pub fn read(memory: &GuestMemory, list: u64, slot: usize) -> Result<Self, HostError> {
        let offset = (slot * size_of::<Header>()) as u64;
        let at = list.checked_add(offset).ok_or(HostError)?;
        let mut header = Header::new_zeroed();
        read(memory, at, header.as_mut_bytes())?;
        let table = header.table.get() & !0x7f;
        let mut bytes = [0; REGISTER_LEN];
        read(memory, table, &mut bytes)?;
        let mut packet = [0; PACKET_LEN];
        read(
            memory,
            table.checked_add(PACKET_AT).ok_or(HostError)?,
            &mut packet,
        )?;
        let options = header.options.get();
        let long_enough = (options & 0x1f) as usize * 4 >= REGISTER_LEN;
        Ok(Self {
            fis: fis::Command::parse(&bytes).filter(|_| long_enough),
            clear_busy: options & CLEAR_BUSY != 0,
            packet,
            pieces: options >> 16,
            header: at,
            table,
        })
    }

    /// Puts the command's memory into `buffers`, up to `wanted` bytes, which are empty. Returns
    /// whether a piece asks for an interrupt.
    pub fn gather(
        &self,
        memory: &GuestMemory,
        wanted: u64,
        buffers: &mut Buffers,
    ) -> Result<bool, HostError> {
        let mut interrupt = false;
        let mut batch = [Piece::new_zeroed(); BATCH];
        let (mut at, mut left) = (
            self.table.checked_add(PIECES_AT).ok_or(HostError)?,
            self.pieces,
        );
        while left > 0 && buffers.bytes() < wanted {
            let count = BATCH.min(usize::try_from(left).unwrap_or(BATCH));
            let pieces = batch.get_mut(..count).ok_or(HostError)?;
            read(memory, at, pieces.as_mut_bytes())?;
            for piece in pieces.iter() {
                let missing = wanted - buffers.bytes();
                if missing == 0 {
                    break;
                }
                let len = (piece.len.get() & PIECE_LEN) + 1;
                let len = len.min(u32::try_from(missing).unwrap_or(u32::MAX));
                let address = GuestAddress(piece.address.get());
                buffers.push(address, len).map_err(|_| HostError)?;
                interrupt |= piece.len.get() & PIECE_INTERRUPT != 0;
            }
            at = at
                .checked_add((count * size_of::<Piece>()) as u64)
                .ok_or(HostError)?;
            left -= u32::try_from(count).unwrap_or(left);
        }
        Ok(interrupt)
    }

    /// Tells the driver how many bytes were moved.
    pub fn set_transferred(&self, memory: &GuestMemory, bytes: u64) {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        // It was read from there, so it is memory.
        let _ = memory.write_slice(&bytes.to_le_bytes(), GuestAddress(self.header + 4));
    }
}

fn read(memory: &GuestMemory, at: u64, into: &mut [u8]) -> Result<(), HostError> {
    memory
        .read_slice(into, GuestAddress(at))
        .map_err(|_| HostError)
}
