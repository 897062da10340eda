//! What a CD-ROM drive answers: the layouts of SPC-4 and MMC-6.

use super::cd::Sense;
use super::drive::SCRATCH_LEN;

/// Bytes of a block of data.
pub const BLOCK: u64 = 2048;
const BLOCK_BYTES: [u8; 4] = [0, 0, 8, 0];

/// Blocks of the longest CD, 80 minutes; what has more is a DVD.
const CD_BLOCKS: u64 = 80 * 60 * FRAMES;
/// Blocks in a second.
const FRAMES: u64 = 75;
/// Blocks before the first one.
const PREGAP: u64 = 2 * FRAMES;
/// Number of the track that begins where the disc ends.
const LEAD_OUT: u8 = 0xaa;
/// A data track that may not be copied digitally.
const DATA_TRACK: u8 = 0x14;

const PROFILE_CD: u16 = 0x0008;
const PROFILE_DVD: u16 = 0x0010;

/// Speed in kB/s: that of a drive of 40 times the first one's.
const SPEED: [u8; 2] = 7056_u16.to_be_bytes();

/// An answer in the making.
#[derive(Debug)]
pub struct Reply<'a> {
    bytes: &'a mut [u8; SCRATCH_LEN],
    len: usize,
}

impl<'a> Reply<'a> {
    pub fn new(bytes: &'a mut [u8; SCRATCH_LEN]) -> Self {
        Self { bytes, len: 0 }
    }

    pub fn put(&mut self, data: &[u8]) {
        for (slot, byte) in self.bytes.iter_mut().skip(self.len).zip(data) {
            *slot = *byte;
        }
        self.len = SCRATCH_LEN.min(self.len + data.len());
    }

    fn put_wide(&mut self, value: u64) {
        let value = u32::try_from(value).unwrap_or(u32::MAX);
        self.put(&value.to_be_bytes());
    }

    /// Bytes to send when the host has room for `allocated`.
    pub fn len(&self, allocated: usize) -> usize {
        self.len.min(allocated)
    }

    /// Puts the number of bytes that follow it into two bytes at `at`.
    fn set_len(&mut self, at: usize) {
        let len = u16::try_from(self.len.saturating_sub(at + 2)).unwrap_or(u16::MAX);
        if let Some(slot) = self.bytes.get_mut(at..at + 2) {
            slot.copy_from_slice(&len.to_be_bytes());
        }
    }
}

pub fn sense(reply: &mut Reply<'_>, sense: Sense) {
    let Sense {
        key,
        code,
        qualifier,
    } = sense;
    reply.put(&[0x70, 0, key, 0, 0, 0, 0, 10, 0, 0, 0, 0]);
    reply.put(&[code, qualifier, 0, 0, 0, 0]);
}

/// `None` for a page of vital product data that there is not.
pub fn inquiry(reply: &mut Reply<'_>, vital: bool, page: u8) -> Option<()> {
    match (vital, page) {
        // The list of such pages.
        (true, 0) => reply.put(&[5, 0, 0, 1, 0]),
        (false, 0) => {
            reply.put(&[5, 0x80, 5, 2, 31, 0, 0, 0]);
            reply.put(b"edgevmm CD-ROM          1.0 ");
        }
        _ => return None,
    }
    Some(())
}

pub fn capacity(reply: &mut Reply<'_>, blocks: u64) {
    reply.put_wide(blocks.saturating_sub(1));
    reply.put(&BLOCK_BYTES);
}

/// `None` for a format or a track that there is not.
pub fn toc(reply: &mut Reply<'_>, format: u8, in_time: bool, from: u8, end: u64) -> Option<()> {
    // The first track and the last.
    reply.put(&[0, 0, 1, 1]);
    let mut track = |number: u8, block: u64| {
        reply.put(&[0, DATA_TRACK, number, 0]);
        if in_time {
            let frames = block + PREGAP;
            let part = |value: u64| u8::try_from(value).unwrap_or(u8::MAX);
            let (minutes, seconds) = (frames / FRAMES / 60, frames / FRAMES % 60);
            reply.put(&[0, part(minutes), part(seconds), part(frames % FRAMES)]);
        } else {
            reply.put_wide(block);
        }
    };
    match (format, from) {
        (0, 0 | 1) => {
            track(1, 0);
            track(LEAD_OUT, end);
        }
        (0, LEAD_OUT) => track(LEAD_OUT, end),
        // The first track of the last session.
        (1, _) => track(1, 0),
        _ => return None,
    }
    reply.set_len(0);
    Some(())
}

pub fn disc_information(reply: &mut Reply<'_>) {
    // A finished disc of one finished session, with one track.
    reply.put(&[0, 0, 0x0e, 1, 1, 1, 1, 0x20]);
    reply.put(&[0; 26]);
    reply.set_len(0);
}

/// Features that are of kind `which` (0: all, 1: that apply now, 2: the one) from `first` on.
pub fn configuration(reply: &mut Reply<'_>, which: u8, first: u16, blocks: Option<u64>) {
    let profile = match blocks {
        None => 0,
        Some(blocks) if blocks > CD_BLOCKS => PROFILE_DVD,
        Some(_) => PROFILE_CD,
    };
    let (cd, dvd) = (
        u8::from(profile == PROFILE_CD),
        u8::from(profile == PROFILE_DVD),
    );
    let any = cd | dvd;
    let [b0, b1] = profile.to_be_bytes();
    reply.put(&[0, 0, 0, 0, 0, 0, b0, b1]);
    // Each has its number, flags (bit 0: now) and length.
    let features: [&[u8]; 7] = [
        &[0, 0, 3, 8, 0, 0x10, dvd, 0, 0, 8, cd, 0],
        &[0, 1, 0x0b, 8, 0, 0, 0, 2, 1, 0, 0, 0],
        &[0, 2, 7, 4, 2, 0, 0, 0],
        &[0, 3, 3, 4, 0x29, 0, 0, 0],
        &[0, 0x10, any, 8, 0, 0, 8, 0, 0, 1, 0, 0],
        &[0, 0x1e, cd, 4, 0, 0, 0, 0],
        &[0, 0x1f, dvd, 0],
    ];
    for feature in features {
        let number = feature.get(1).copied().map_or(0, u16::from);
        let now = feature.get(2).is_some_and(|flags| flags & 1 != 0);
        let wanted = match which {
            0 => number >= first,
            1 => number >= first && now,
            _ => number == first,
        };
        if wanted {
            reply.put(feature);
        }
    }
    reply.set_len(2);
}

/// The pages that `selector` names; without a medium, `Err` tells whether the tray is open. `None`
/// for a page that there is not.
pub fn mode_pages(
    reply: &mut Reply<'_>,
    selector: u8,
    medium: Result<u64, bool>,
    locked: bool,
) -> Option<()> {
    let (page, changeable) = (selector & 0x3f, selector >> 6 == 1);
    let kind = match medium {
        Ok(_) => 0x01,
        Err(false) => 0x70,
        Err(true) => 0x71,
    };
    reply.put(&[0, 0, kind, 0, 0, 0, 0, 0]);
    let [s0, s1] = SPEED;
    let locks = 0x29 | u8::from(locked) << 1;
    let pages: [&[u8]; 3] = [
        // Retries of reads.
        &[0x01, 6, 0, 5, 0, 0, 0, 0],
        // Audio, of which there is none.
        &[0x0e, 14, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        // What it reads: CD-R, CD-RW, DVD-ROM, several sessions. A tray that locks and ejects.
        &[
            0x2a, 18, 0x0b, 0, 0x70, 0, locks, 0, s0, s1, 0, 2, 2, 0, s0, s1, 0, 0, 0, 0,
        ],
    ];
    let mut found = false;
    for bytes in pages {
        let number = bytes.first().copied().unwrap_or(0);
        if page != 0x3f && page != number {
            continue;
        }
        found = true;
        if changeable {
            // Nothing is.
            reply.put(bytes.get(..2)?);
            reply.put([0; 18].get(..bytes.len() - 2)?);
        } else {
            reply.put(bytes);
        }
    }
    reply.set_len(0);
    found.then_some(())
}

pub fn mechanism(reply: &mut Reply<'_>, open: bool) {
    reply.put(&[0, u8::from(open) << 4, 0, 0, 0, 0, 0, 0]);
}
