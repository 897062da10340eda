//! SeaBIOS' debug port (0x402, as QEMU's debugcon): a log line by line.
//!
//! Reads answer 0xe9, by which firmware knows that the port is there. What is written is gathered
//! to lines, made printable and handed to a [`LineSink`]. Both a line's length and the number of
//! lines until the next reset are bounded: a guest can't fill the host's log.

use std::fmt::Debug;
use std::sync::Arc;

use crate::bus::BusDevice;

/// Longest line in bytes; longer ones are broken.
const LINE_MAX: usize = 256;
/// Lines passed on between two resets; firmware writes a few hundred.
const LINES_MAX: u32 = 8192;
/// What reads answer.
const PRESENT: u8 = 0xe9;

/// Takes the guest's debug lines. Never blocks.
pub trait LineSink: Send + Sync + Debug {
    /// Takes a line of at most 256 printable ASCII characters, without its line end.
    fn line(&self, line: &str);
}

/// The debug port. It has no state that a restored machine would miss.
#[derive(Debug)]
pub struct DebugPort {
    sink: Arc<dyn LineSink>,
    line: String,
    lines_left: u32,
}

impl DebugPort {
    /// A port that passes its lines to `sink`.
    pub fn new(sink: Arc<dyn LineSink>) -> Self {
        Self {
            sink,
            line: String::with_capacity(LINE_MAX),
            lines_left: LINES_MAX,
        }
    }

    /// Ends the line in progress and allows a full log again.
    pub fn reset(&mut self) {
        self.flush();
        self.lines_left = LINES_MAX;
    }

    fn flush(&mut self) {
        if self.line.is_empty() {
            return;
        }
        if self.lines_left > 0 {
            self.lines_left -= 1;
            self.sink.line(&self.line);
        }
        self.line.clear();
    }

    fn push(&mut self, byte: u8) {
        match byte {
            b'\n' => self.flush(),
            b'\r' => {}
            b' '..=b'~' => self.line.push(char::from(byte)),
            b'\t' => self.line.push(' '),
            _ => self.line.push('?'),
        }
        if self.line.len() >= LINE_MAX {
            self.flush();
        }
    }
}

impl BusDevice for DebugPort {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(PRESENT);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        for byte in data {
            self.push(*byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::bus::lock;

    #[derive(Debug, Default)]
    struct Lines(Mutex<Vec<String>>);

    impl Lines {
        fn take(&self) -> Vec<String> {
            std::mem::take(&mut *lock(&self.0))
        }
    }

    impl LineSink for Lines {
        fn line(&self, line: &str) {
            lock(&self.0).push(line.to_owned());
        }
    }

    fn port() -> (DebugPort, Arc<Lines>) {
        let lines = Arc::<Lines>::default();
        (DebugPort::new(lines.clone()), lines)
    }

    fn print(port: &mut DebugPort, text: &[u8]) {
        for byte in text {
            port.write(0, &[*byte]);
        }
    }

    #[test]
    fn lines_arrive_whole_and_printable() {
        let (mut port, lines) = port();
        let mut data = [0];
        port.read(0, &mut data);
        assert_eq!(data, [0xe9]);
        print(&mut port, b"SeaBIOS (version 1.16)\r\n\nx\x1b[2J\xff\npart");
        assert_eq!(lines.take(), ["SeaBIOS (version 1.16)", "x?[2J?"]);
        port.reset();
        assert_eq!(lines.take(), ["part"]);
    }

    #[test]
    fn a_flood_is_bounded() {
        let (mut port, lines) = port();
        for _ in 0..LINES_MAX * 2 {
            print(&mut port, b"flood\n");
        }
        print(&mut port, b"unheard\n");
        let heard = lines.take();
        assert_eq!(heard.len(), LINES_MAX as usize);
        assert!(heard.iter().all(|line| line == "flood"));
        port.reset();
        print(&mut port, &[b'a'; LINE_MAX * 2 + 1]);
        let heard = lines.take();
        assert!(heard.len() == 2 && heard.iter().all(|line| line.len() == LINE_MAX));
        assert!(port.line.capacity() <= LINE_MAX * 2);
    }
}
