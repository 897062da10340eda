//! Ethernet frames on a byte stream: each behind its length, 4 bytes, big-endian. This is what
//! QEMU's `-netdev stream` and passt speak.
//!
//! Neither side is trusted. A length out of bounds ends the stream with an error; a frame of the
//! guest is copied before anything in it is looked at, because the guest may change its own copy.

use std::io::{self, ErrorKind, Read, Write};

use vm_memory::VolatileSlice;

/// Shortest frame: an Ethernet header.
pub(crate) const MIN_FRAME: usize = 14;
/// Longest frame: an Ethernet header and the largest IP packet.
pub(crate) const MAX_FRAME: usize = MIN_FRAME + 65_535;

const LENGTH: usize = 4;
/// Room for the longest frame and as much again, so that one read takes in many frames.
const READ_BUFFER: usize = 2 * (LENGTH + MAX_FRAME);

/// Takes frames from a stream.
#[derive(Debug)]
pub(crate) struct FrameReader {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

/// Puts frames on a stream.
#[derive(Debug)]
pub(crate) struct FrameWriter {
    /// The frame that was taken last, and which of its bytes the stream did not take yet.
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Default for FrameReader {
    fn default() -> Self {
        Self {
            buffer: vec![0; READ_BUFFER].into(),
            start: 0,
            end: 0,
        }
    }
}

impl FrameReader {
    /// The next frame of `source`, or `None` until all of it is there. The same frame comes again
    /// until [`FrameReader::consume`].
    ///
    /// # Errors
    /// As for [`FrameReader::read`].
    fn peek(&mut self, source: &mut impl Read) -> io::Result<Option<&[u8]>> {
        loop {
            let length = self.announced()?;
            if let Some(length) = length
                && self.end - self.start >= LENGTH + length
            {
                let frame = self.start + LENGTH;
                return Ok(self.buffer.get(frame..frame + length));
            }
            if !self.fill(source)? {
                return Ok(None);
            }
        }
    }

    /// Drops the frame that [`FrameReader::peek`] gave.
    fn consume(&mut self) {
        if let Ok(Some(length)) = self.announced() {
            self.start = self.end.min(self.start + LENGTH + length);
        }
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
    }

    /// Moves the next frame of `source` into `parts` and returns its length, or `None` until all of
    /// it is there. A frame longer than `parts` is lost.
    ///
    /// # Errors
    /// `UnexpectedEof` when the peer has closed the stream, `InvalidData` when it announces a frame
    /// shorter than [`MIN_FRAME`] or longer than [`MAX_FRAME`] (the stream is then useless), and
    /// what `source` reports.
    pub(crate) fn read(
        &mut self,
        source: &mut impl Read,
        parts: &[VolatileSlice<'_>],
    ) -> io::Result<Option<usize>> {
        let Some(frame) = self.peek(source)? else {
            return Ok(None);
        };
        let length = frame.len();
        if length <= total(parts) {
            scatter(frame, parts);
        }
        self.consume();
        Ok(Some(length))
    }

    /// The length of the frame at the start of the buffer, once that is there.
    fn announced(&self) -> io::Result<Option<usize>> {
        let held = self.buffer.get(self.start..self.end).unwrap_or_default();
        let Some(length) = held.first_chunk::<LENGTH>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*length);
        match usize::try_from(length) {
            Ok(length) if (MIN_FRAME..=MAX_FRAME).contains(&length) => Ok(Some(length)),
            _ => Err(io::Error::new(
                ErrorKind::InvalidData,
                format!("the peer announces a frame of {length} bytes"),
            )),
        }
    }

    /// Reads what is there; `false` when that is nothing for now.
    fn fill(&mut self, source: &mut impl Read) -> io::Result<bool> {
        if self.buffer.len() - self.start < LENGTH + MAX_FRAME {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let free = self.buffer.get_mut(self.end..).unwrap_or_default();
        loop {
            return match source.read(free) {
                Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    self.end += count.min(free.len());
                    Ok(true)
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
                Err(error) => Err(error),
            };
        }
    }
}

impl Default for FrameWriter {
    fn default() -> Self {
        Self {
            buffer: vec![0; LENGTH + MAX_FRAME].into(),
            start: 0,
            end: 0,
        }
    }
}

impl FrameWriter {
    /// Takes a frame, given in parts, and puts it on `sink` unless `allow` refuses it. Returns
    /// `false` when there is no room for it before `sink` takes the rest of an earlier one; offer it
    /// again then. After `true` the frame is on its way, though [`FrameWriter::flush`] may have to
    /// bring the rest of it.
    ///
    /// What `allow` sees is what is sent, however `parts` change meanwhile.
    ///
    /// # Errors
    /// `InvalidInput` when the frame is shorter than [`MIN_FRAME`] or longer than [`MAX_FRAME`],
    /// `WriteZero` when the peer is gone, and what `sink` reports.
    pub(crate) fn write(
        &mut self,
        sink: &mut impl Write,
        parts: &[VolatileSlice<'_>],
        allow: impl FnOnce(&[u8]) -> bool,
    ) -> io::Result<bool> {
        let length = total(parts);
        if !(MIN_FRAME..=MAX_FRAME).contains(&length) {
            return Err(ErrorKind::InvalidInput.into());
        }
        if !self.flush(sink)? {
            return Ok(false);
        }
        let end = LENGTH + length;
        let frame = self.buffer.get_mut(LENGTH..end).unwrap_or_default();
        gather(parts, frame);
        if allow(frame) {
            if let Some(header) = self.buffer.first_chunk_mut() {
                *header = u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes();
            }
            self.start = 0;
            self.end = end;
            self.flush(sink)?;
        }
        Ok(true)
    }

    /// Brings the rest of a frame to `sink`; `true` when nothing is left.
    ///
    /// # Errors
    /// `WriteZero` when the peer is gone, and what `sink` reports.
    pub(crate) fn flush(&mut self, sink: &mut impl Write) -> io::Result<bool> {
        while self.start < self.end {
            let rest = self.buffer.get(self.start..self.end).unwrap_or_default();
            match attempt(|| sink.write(rest))? {
                Some(count) => self.start += count.min(rest.len()),
                None => return Ok(false),
            }
        }
        Ok(true)
    }
}

/// One write; `None` when the stream cannot take anything now.
fn attempt(mut write: impl FnMut() -> io::Result<usize>) -> io::Result<Option<usize>> {
    loop {
        return match write() {
            Ok(0) => Err(ErrorKind::WriteZero.into()),
            Ok(count) => Ok(Some(count)),
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        };
    }
}

/// Bytes in all of `parts`.
pub(crate) fn total(parts: &[VolatileSlice<'_>]) -> usize {
    parts
        .iter()
        .fold(0, |sum: usize, part| sum.saturating_add(part.len()))
}

fn scatter(mut bytes: &[u8], parts: &[VolatileSlice<'_>]) {
    for part in parts {
        part.copy_from(bytes);
        bytes = bytes.get(part.len()..).unwrap_or_default();
    }
}

fn gather(parts: &[VolatileSlice<'_>], mut bytes: &mut [u8]) {
    for part in parts {
        let count = part.copy_to(bytes);
        bytes = bytes.get_mut(count..).unwrap_or_default();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    /// A stream that takes and gives as many bytes at a time as `steps` says; 0 is "not now".
    #[derive(Debug, Default)]
    struct Choppy {
        bytes: VecDeque<u8>,
        steps: VecDeque<usize>,
        closed: bool,
    }

    impl Choppy {
        fn step(&mut self) -> io::Result<usize> {
            match self.steps.pop_front() {
                Some(0) => Err(ErrorKind::WouldBlock.into()),
                Some(1) if self.steps.len() % 7 == 3 => Err(ErrorKind::Interrupted.into()),
                Some(step) => Ok(step),
                None => Ok(usize::MAX),
            }
        }
    }

    impl Read for Choppy {
        fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
            let step = self.step()?.min(to.len());
            if self.bytes.is_empty() && !self.closed {
                return Err(ErrorKind::WouldBlock.into());
            }
            self.bytes.read(&mut to[..step])
        }
    }

    impl Write for Choppy {
        fn write(&mut self, from: &[u8]) -> io::Result<usize> {
            let step = self.step()?.min(from.len());
            self.bytes.extend(&from[..step]);
            Ok(step)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn stream(lengths: &[u32]) -> Choppy {
        let mut stream = Choppy {
            closed: true,
            ..Choppy::default()
        };
        for (fill, length) in lengths.iter().enumerate() {
            stream.bytes.extend(length.to_be_bytes());
            stream.bytes.extend(vec![fill as u8; *length as usize]);
        }
        stream
    }

    #[test]
    fn lengths_at_the_bounds() {
        let mut reader = FrameReader::default();
        let mut source = stream(&[MIN_FRAME as u32, MAX_FRAME as u32, MAX_FRAME as u32, 60]);
        let mut room = vec![0; MAX_FRAME];
        for (fill, length) in [MIN_FRAME, MAX_FRAME, MAX_FRAME, 60]
            .into_iter()
            .enumerate()
        {
            let parts = [VolatileSlice::from(&mut room[..])];
            assert_eq!(reader.read(&mut source, &parts).unwrap(), Some(length));
            assert!(room[..length].iter().all(|&byte| byte == fill as u8));
        }
        let error = reader.read(&mut source, &[]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
    }

    #[test]
    fn hostile_lengths_end_the_stream_for_good() {
        for length in [
            0,
            1,
            MIN_FRAME as u32 - 1,
            MAX_FRAME as u32 + 1,
            1 << 31,
            u32::MAX,
        ] {
            let mut source = Choppy::default();
            source.bytes.extend(length.to_be_bytes());
            source.bytes.extend([0; 64]);
            let mut reader = FrameReader::default();
            for _ in 0..2 {
                let error = reader.read(&mut source, &[]).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::InvalidData, "{length}");
            }
        }
    }

    #[test]
    fn frames_larger_than_the_room_are_lost() {
        let mut reader = FrameReader::default();
        let mut source = stream(&[31, 24, 40]);
        let (mut a, mut b) = ([9; 10], [9; 20]);
        let parts = [VolatileSlice::from(&mut a[..]), (&mut b[..]).into()];
        for length in [31, 24, 40] {
            assert_eq!(reader.read(&mut source, &parts).unwrap(), Some(length));
        }
        assert_eq!(
            (a, &b[..14], &b[14..]),
            ([1; 10], &[1; 14][..], &[9; 6][..])
        );
    }

    #[test]
    fn frames_out_of_bounds_are_not_sent() {
        let mut sink = Choppy::default();
        for length in [0, MIN_FRAME - 1, MAX_FRAME + 1] {
            let mut frame = vec![0; length];
            let parts = [VolatileSlice::from(&mut frame[..])];
            let sent = FrameWriter::default().write(&mut sink, &parts, |_| true);
            assert_eq!(sent.unwrap_err().kind(), ErrorKind::InvalidInput);
        }
        assert!(sink.bytes.is_empty());
    }

    #[test]
    fn what_was_checked_is_what_is_sent() {
        let mut sink = Choppy::default();
        let mut writer = FrameWriter::default();
        let (mut a, mut b) = ([1; 20], [2; 40]);
        let parts = [VolatileSlice::from(&mut a[..]), (&mut b[..]).into()];
        let expected = [&[0, 0, 0, 60][..], &[1; 20], &[2; 40]].concat();
        let change = |frame: &[u8]| {
            parts[0].copy_from(&[7; 20]);
            parts[1].copy_from(&[7; 40]);
            frame == &expected[LENGTH..]
        };
        assert!(writer.write(&mut sink, &parts, change).unwrap());
        assert_eq!(sink.bytes, expected);
        assert!(writer.write(&mut sink, &parts, |_| false).unwrap());
        assert!(writer.flush(&mut sink).unwrap());
        assert_eq!(sink.bytes.len(), expected.len());
    }

    #[test]
    fn a_closed_sink_is_an_error() {
        let mut sink: &mut [u8] = &mut [0; 20];
        let mut frame = [0; 60];
        let parts = [VolatileSlice::from(&mut frame[..])];
        let sent = FrameWriter::default().write(&mut sink, &parts, |_| true);
        assert_eq!(sent.unwrap_err().kind(), ErrorKind::WriteZero);
    }

    proptest! {
        #[test]
        fn frames_survive_any_split(
            frames in prop::collection::vec((MIN_FRAME..3000_usize, 1..40_usize, any::<u8>()), 1..20),
            writes in prop::collection::vec(0..4000_usize, 0..100),
            reads in prop::collection::vec(0..4000_usize, 0..100),
            split in 0..=3000_usize,
        ) {
            let mut pipe = Choppy { steps: writes.into(), ..Choppy::default() };
            let mut writer = FrameWriter::default();
            let mut sent = Vec::new();
            for (length, parts, fill) in frames {
                let mut frame: Vec<u8> = (0..length).map(|i| fill.wrapping_add(i as u8)).collect();
                let parts: Vec<VolatileSlice<'_>> =
                    frame.chunks_mut(length.div_ceil(parts)).map(VolatileSlice::from).collect();
                while !writer.write(&mut pipe, &parts, |_| true).unwrap() {}
                sent.push(frame);
            }
            while !writer.flush(&mut pipe).unwrap() {}

            pipe.steps = reads.into();
            let mut reader = FrameReader::default();
            let mut room = [0; 3000];
            let mut received = Vec::new();
            while received.len() < sent.len() {
                let (a, b) = room.split_at_mut(split);
                if let Some(length) = reader.read(&mut pipe, &[a.into(), b.into()]).unwrap() {
                    received.push(room[..length].to_vec());
                }
            }
            prop_assert_eq!(received, sent);
            prop_assert_eq!(reader.read(&mut pipe, &[]).unwrap(), None);
        }

        #[test]
        fn hostile_streams_never_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..2000),
            short in any::<bool>(),
        ) {
            let mut source = Choppy { closed: true, ..Choppy::default() };
            if short {
                source.bytes.extend([0, 0, 0]);
            }
            source.bytes.extend(&bytes);
            let mut reader = FrameReader::default();
            let mut room = [0; 100];
            let parts = [VolatileSlice::from(&mut room[..])];
            while let Ok(read) = reader.read(&mut source, &parts) {
                prop_assert!(read.is_some_and(|length| length <= bytes.len()));
            }
        }
    }
}
