//! Takes the ELF kernel out of a bzImage (Linux `Documentation/arch/x86/boot.rst`): the payload is
//! packed by xz, zstd or the legacy LZ4 frame format, which is what distributions use.

use std::io::Read;

use anyhow::{Context, Result, bail, ensure};

/// The most one LZ4 legacy block unpacks to.
const LZ4_BLOCK: usize = 8 << 20;

/// Returns the ELF file packed in `image`.
///
/// # Errors
/// Not a bzImage, an unknown compression, or damaged data.
pub fn extract(image: &[u8]) -> Result<Vec<u8>> {
    let payload = payload(image).context("Not a bzImage")?;
    let elf = match payload {
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => read_all(liblzma::read::XzDecoder::new(payload))?,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            read_all(ruzstd::decoding::StreamingDecoder::new(payload).context("Bad zstd data")?)?
        }
        [0x02, 0x21, 0x4c, 0x18, blocks @ ..] => unpack_lz4(blocks)?,
        other => bail!(
            "Unknown compression {:02x?}",
            other.get(..6).unwrap_or_default()
        ),
    };
    ensure!(
        elf.starts_with(b"\x7fELF"),
        "The payload is not an ELF file"
    );
    Ok(elf)
}

/// The packed part: after the setup sectors, at `payload_offset` for `payload_length` bytes.
fn payload(image: &[u8]) -> Option<&[u8]> {
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let setup_sectors = usize::from(*image.get(0x1f1)?);
    let start = (setup_sectors + 1) * 512 + field(image, 0x248)?;
    image.get(start..)?.get(..field(image, 0x24c)?)
}

fn field(bytes: &[u8], offset: usize) -> Option<usize> {
    let bytes = bytes.get(offset..offset + 4)?.try_into().ok()?;
    usize::try_from(u32::from_le_bytes(bytes)).ok()
}

fn read_all(mut reader: impl Read) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    reader
        .read_to_end(&mut out)
        .context("Damaged compressed data")?;
    Ok(out)
}

/// LZ4 legacy frames: blocks with their packed length in front. The kernel's build appends the
/// unpacked length, which looks like a block longer than what is left.
fn unpack_lz4(mut blocks: &[u8]) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    while let Some(length) = field(blocks, 0) {
        let Some(block) = blocks.get(4..4 + length).filter(|block| !block.is_empty()) else {
            break;
        };
        out.append(&mut lz4_flex::block::decompress(block, LZ4_BLOCK).context("Bad LZ4 data")?);
        blocks = &blocks[4 + length..];
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn image_of(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        image.extend_from_slice(payload);
        image
    }

    #[test]
    fn unpacks_legacy_lz4_with_the_length_at_the_end() {
        let elf = [b"\x7fELF".as_slice(), &[7; 5000]].concat();
        let block = lz4_flex::block::compress(&elf);
        let mut payload = vec![0x02, 0x21, 0x4c, 0x18];
        payload.extend_from_slice(&u32::try_from(block.len()).unwrap().to_le_bytes());
        payload.extend_from_slice(&block);
        payload.extend_from_slice(&5004_u32.to_le_bytes());
        assert_eq!(extract(&image_of(&payload)).unwrap(), elf);
    }

    #[test]
    fn refuses_what_is_no_kernel() {
        assert!(extract(b"short").is_err());
        assert!(extract(&image_of(b"\x1f\x8bgzip?")).is_err());
        let mut cut = image_of(b"\xfd7zXZ\0");
        cut[0x24c] = 0xff;
        assert!(extract(&cut).is_err());
    }
}
