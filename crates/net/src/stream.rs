//! Ethernet frames on a byte stream: each behind its length, 4 bytes, big-endian. This is what
//! QEMU's `-netdev stream` and passt speak.
//!
//! The peer is not trusted: a length out of bounds ends the stream with an error.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};

/// Shortest frame: an Ethernet header.
pub const MIN_FRAME: usize = 14;
/// Longest frame: an Ethernet header and the largest IP packet.
pub const MAX_FRAME: usize = MIN_FRAME + 65_535;

const LENGTH: usize = 4;
/// Room for the longest frame and as much again, so that one read takes in many frames.
const READ_BUFFER: usize = 2 * (LENGTH + MAX_FRAME);
/// Parts of a frame that go out without being copied together first.
const MAX_PARTS: usize = 32;

/// Takes frames from a stream.
#[derive(Debug)]
pub struct FrameReader {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

/// Puts frames on a stream.
#[derive(Debug)]
pub struct FrameWriter {
    /// The rest of a frame of which the stream took a part.
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
    /// `UnexpectedEof` when the peer has closed the stream, `InvalidData` when it announces a frame
    /// shorter than [`MIN_FRAME`] or longer than [`MAX_FRAME`] (the stream is then useless), and
    /// what `source` reports.
    pub fn peek(&mut self, source: &mut impl Read) -> io::Result<Option<&[u8]>> {
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
    pub fn consume(&mut self) {
        if let Ok(Some(length)) = self.announced() {
            self.start = self.end.min(self.start + LENGTH + length);
        }
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
    }

    /// Moves the next frame of `source` into `parts` and returns its length, or `None` until all of
    /// it is there. Frames that do not fit are dropped.
    ///
    /// # Errors
    /// As for [`FrameReader::peek`].
    pub fn read(
        &mut self,
        source: &mut impl Read,
        parts: &mut [IoSliceMut<'_>],
    ) -> io::Result<Option<usize>> {
        let room: usize = parts.iter().map(|part| part.len()).sum();
        loop {
            let Some(frame) = self.peek(source)? else {
                return Ok(None);
            };
            let length = frame.len();
            if length <= room {
                scatter(frame, parts);
            }
            self.consume();
            if length <= room {
                return Ok(Some(length));
            }
        }
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
    /// Puts a frame, given in parts, on `sink`. Returns `false` when `sink` cannot take any of it
    /// now; offer it again when `sink` is writable. After `true` the frame is on its way, though
    /// [`FrameWriter::flush`] may have to bring the rest of it.
    ///
    /// # Errors
    /// `InvalidInput` when the frame is shorter than [`MIN_FRAME`] or longer than [`MAX_FRAME`],
    /// `WriteZero` when the peer is gone, and what `sink` reports.
    pub fn write(&mut self, sink: &mut impl Write, parts: &[IoSlice<'_>]) -> io::Result<bool> {
        let length = parts
            .iter()
            .fold(0, |sum: usize, part| sum.saturating_add(part.len()));
        if !(MIN_FRAME..=MAX_FRAME).contains(&length) {
            return Err(ErrorKind::InvalidInput.into());
        }
        if !self.flush(sink)? {
            return Ok(false);
        }
        let header = u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes();
        let mut sent = 0;
        if parts.len() < MAX_PARTS {
            let mut all = [IoSlice::new(&[]); MAX_PARTS];
            for (to, from) in all
                .iter_mut()
                .zip([IoSlice::new(&header)].iter().chain(parts))
            {
                *to = *from;
            }
            let used = all.get(..=parts.len()).unwrap_or_default();
            match attempt(|| sink.write_vectored(used))? {
                Some(count) => sent = count,
                None => return Ok(false),
            }
        }
        if sent < LENGTH + length {
            self.keep(&header, parts, sent);
            self.flush(sink)?;
        }
        Ok(true)
    }

    /// Brings the rest of a frame to `sink`; `true` when nothing is left.
    ///
    /// # Errors
    /// `WriteZero` when the peer is gone, and what `sink` reports.
    pub fn flush(&mut self, sink: &mut impl Write) -> io::Result<bool> {
        while self.start < self.end {
            let rest = self.buffer.get(self.start..self.end).unwrap_or_default();
            match attempt(|| sink.write(rest))? {
                Some(count) => self.start += count.min(rest.len()),
                None => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Whether [`FrameWriter::flush`] is due when the stream is writable again.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.start < self.end
    }

    /// Keeps a frame from its byte `sent` on.
    fn keep(&mut self, header: &[u8], parts: &[IoSlice<'_>], sent: usize) {
        let mut at = 0;
        for part in std::iter::once(header).chain(parts.iter().map(|part| &**part)) {
            if let Some(to) = self.buffer.get_mut(at..at + part.len()) {
                to.copy_from_slice(part);
            }
            at += part.len();
        }
        self.start = sent;
        self.end = at;
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

fn scatter(mut bytes: &[u8], parts: &mut [IoSliceMut<'_>]) {
    for part in parts {
        let count = bytes.len().min(part.len());
        let (now, later) = bytes.split_at(count);
        if let Some(to) = part.get_mut(..count) {
            to.copy_from_slice(now);
        }
        bytes = later;
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

        fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
            self.write(
                &parts
                    .iter()
                    .flat_map(|part| part.iter().copied())
                    .collect::<Vec<_>>(),
            )
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
            let parts = &mut [IoSliceMut::new(&mut room)];
            assert_eq!(reader.read(&mut source, parts).unwrap(), Some(length));
            assert!(room[..length].iter().all(|&byte| byte == fill as u8));
        }
        let error = reader.peek(&mut source).unwrap_err();
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
                let error = reader.peek(&mut source).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::InvalidData, "{length}");
                reader.consume();
            }
        }
    }

    #[test]
    fn frames_larger_than_the_room_are_dropped() {
        let mut reader = FrameReader::default();
        let (mut a, mut b) = ([9; 10], [9; 20]);
        let parts = &mut [IoSliceMut::new(&mut a), IoSliceMut::new(&mut b)];
        assert_eq!(
            reader.read(&mut stream(&[31, 24, 40]), parts).unwrap(),
            Some(24)
        );
        assert_eq!(
            (a, &b[..14], &b[14..]),
            ([1; 10], &[1; 14][..], &[9; 6][..])
        );
    }

    #[test]
    fn frames_out_of_bounds_are_not_sent() {
        let mut sink = Choppy::default();
        for length in [0, MIN_FRAME - 1, MAX_FRAME + 1] {
            let frame = vec![0; length];
            let sent = FrameWriter::default().write(&mut sink, &[IoSlice::new(&frame)]);
            assert_eq!(sent.unwrap_err().kind(), ErrorKind::InvalidInput);
        }
        assert!(sink.bytes.is_empty());
    }

    #[test]
    fn a_closed_sink_is_an_error() {
        let mut sink: &mut [u8] = &mut [0; 20];
        let frame = [IoSlice::new(&[0; 60])];
        let error = FrameWriter::default().write(&mut sink, &frame).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WriteZero);
    }

    proptest! {
        #[test]
        fn frames_survive_any_split(
            frames in prop::collection::vec((MIN_FRAME..3000_usize, 1..40_usize, any::<u8>()), 1..20),
            writes in prop::collection::vec(0..4000_usize, 0..100),
            reads in prop::collection::vec(0..4000_usize, 0..100),
        ) {
            let mut pipe = Choppy { steps: writes.into(), ..Choppy::default() };
            let mut writer = FrameWriter::default();
            let mut sent = Vec::new();
            for (length, parts, fill) in frames {
                let frame: Vec<u8> = (0..length).map(|i| fill.wrapping_add(i as u8)).collect();
                let parts: Vec<IoSlice<'_>> =
                    frame.chunks(length.div_ceil(parts)).map(IoSlice::new).collect();
                while !writer.write(&mut pipe, &parts).unwrap() {}
                sent.push(frame);
            }
            while !writer.flush(&mut pipe).unwrap() {
                assert!(writer.is_pending());
            }
            assert!(!writer.is_pending());

            pipe.steps = reads.into();
            let mut reader = FrameReader::default();
            let mut received = Vec::new();
            while received.len() < sent.len() {
                if let Some(frame) = reader.peek(&mut pipe).unwrap() {
                    received.push(frame.to_vec());
                    reader.consume();
                }
            }
            prop_assert_eq!(received, sent);
            prop_assert!(reader.peek(&mut pipe).unwrap().is_none());
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
            let parts = &mut [IoSliceMut::new(&mut room)];
            while let Ok(read) = reader.read(&mut source, parts) {
                prop_assert!(read.is_some_and(|length| length <= 100));
            }
        }
    }
}
