//! Compressing clusters and getting them back.
//!
//! Deflate is written with a window of 4 KiB, as that is all that QEMU reads it with.

use std::io;

use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use ruzstd::encoding::{CompressionLevel, compress_to_vec};

use super::create::Compression;

/// Binary logarithm of the window that QEMU reads deflate with.
const DEFLATE_WINDOW_BITS: u8 = 12;
/// Largest window that a zstd frame may ask for, in bytes: more than any level of zstd uses for a
/// cluster.
const MAX_ZSTD_WINDOW: u64 = 8 << 20;

/// What unpacks clusters, one at a time.
pub struct Unpacker {
    inflate: Decompress,
    zstd: FrameDecoder,
}

impl std::fmt::Debug for Unpacker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unpacker").finish_non_exhaustive()
    }
}

impl Default for Unpacker {
    fn default() -> Self {
        let mut zstd = FrameDecoder::new();
        zstd.set_max_window_size(MAX_ZSTD_WINDOW);
        Self {
            inflate: Decompress::new(false),
            zstd,
        }
    }
}

impl Unpacker {
    /// Fills `to` with what `packed` begins with; what else follows there is not looked at.
    ///
    /// # Errors
    /// It is damaged, or not as long.
    pub fn unpack(&mut self, how: Compression, packed: &[u8], to: &mut [u8]) -> io::Result<()> {
        match how {
            Compression::Zlib => self.inflate(packed, to),
            Compression::Zstd => self.unzstd(packed, to),
        }
    }

    fn inflate(&mut self, packed: &[u8], to: &mut [u8]) -> io::Result<()> {
        self.inflate.reset(false);
        let status = self
            .inflate
            .decompress(packed, to, FlushDecompress::Finish)
            .map_err(invalid)?;
        // As in QEMU, the end of the stream need not be seen.
        if self.inflate.total_out() == to.len() as u64 {
            Ok(())
        } else {
            Err(invalid(format!(
                "it ends after {} bytes ({status:?})",
                self.inflate.total_out()
            )))
        }
    }

    fn unzstd(&mut self, mut packed: &[u8], to: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        // Several frames may follow each other.
        while filled < to.len() {
            self.zstd.reset(&mut packed).map_err(invalid)?;
            loop {
                let rest = to.get_mut(filled..).unwrap_or_default();
                if !self.zstd.is_finished() {
                    let some = BlockDecodingStrategy::UptoBytes(rest.len().max(1));
                    self.zstd
                        .decode_blocks(&mut packed, some)
                        .map_err(invalid)?;
                }
                let got = io::Read::read(&mut self.zstd, rest)?;
                filled += got;
                if filled == to.len() || (got == 0 && self.zstd.is_finished()) {
                    break;
                }
            }
        }
        Ok(())
    }
}

/// Packs a cluster; none if that does not make it shorter.
pub fn pack(how: Compression, data: &[u8]) -> Option<Vec<u8>> {
    let packed = match how {
        Compression::Zlib => deflate(data)?,
        Compression::Zstd => compress_to_vec(data, CompressionLevel::Fastest),
    };
    (packed.len() < data.len()).then_some(packed)
}

fn deflate(data: &[u8]) -> Option<Vec<u8>> {
    let level = flate2::Compression::default();
    let mut deflate = Compress::new_with_window_bits(level, false, DEFLATE_WINDOW_BITS);
    let mut packed = vec![0; data.len()];
    let status = deflate.compress(data, &mut packed, FlushCompress::Finish);
    // If it does not fit, it is not shorter.
    if status.is_ok_and(|status| status == Status::StreamEnd) {
        packed.truncate(usize::try_from(deflate.total_out()).ok()?);
        Some(packed)
    } else {
        None
    }
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    const BOTH: [Compression; 2] = [Compression::Zlib, Compression::Zstd];

    fn text(len: usize) -> Vec<u8> {
        (0..len)
            .map(|at| u8::try_from((at / 7 + at * at / 977) % 11).unwrap())
            .collect()
    }

    #[test]
    fn packed_clusters_come_back() {
        for how in BOTH {
            for bits in 9..=21 {
                let data = text(1 << bits);
                let mut packed = pack(how, &data).unwrap();
                packed.extend([0xa5; 700]);
                let mut back = vec![0; data.len()];
                Unpacker::default().unpack(how, &packed, &mut back).unwrap();
                assert!(back == data, "{how:?}, 2^{bits}");
            }
        }
    }

    #[test]
    fn too_short_or_too_large_a_window() {
        let data = text(4096);
        for how in BOTH {
            let packed = pack(how, &data).unwrap();
            let mut unpacker = Unpacker::default();
            let mut back = vec![0; 8192];
            unpacker.unpack(how, &packed, &mut back).unwrap_err();
            let cut = &packed[..packed.len() / 2];
            unpacker.unpack(how, cut, &mut back[..4096]).unwrap_err();
            unpacker.unpack(how, &packed, &mut back[..4096]).unwrap();
            assert!(back[..4096] == data, "an error leaves nothing behind");
        }
        // A frame of 1 GiB: magic, no content size, window 2^30.
        let frame = [0x28, 0xb5, 0x2f, 0xfd, 0, 20 << 3, 1, 0, 0];
        let mut unpacker = Unpacker::default();
        let refused = unpacker.unpack(Compression::Zstd, &frame, &mut [0; 512]);
        assert!(refused.unwrap_err().to_string().contains("window"));
    }

    #[test]
    fn noise_is_left_alone() {
        let mut state = 1_u32;
        let noise: Vec<u8> = (0..4096)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                state.to_le_bytes()[3]
            })
            .collect();
        assert!(BOTH.iter().all(|how| pack(*how, &noise).is_none()));
    }

    proptest! {
        #[test]
        fn anything_is_unpacked_or_refused(
            mut packed: Vec<u8>, flips in proptest::collection::vec((0..2000_usize, any::<u8>()), 0..4),
            from_text: bool, zstd: bool,
        ) {
            let how = BOTH[usize::from(zstd)];
            if from_text {
                packed = pack(how, &text(65536)).unwrap();
            }
            for (at, value) in flips {
                if let Some(byte) = packed.get_mut(at) {
                    *byte = value;
                }
            }
            let _ = Unpacker::default().unpack(how, &packed, &mut [0; 65536]);
        }
    }
}
