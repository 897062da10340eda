//! The key that gets one out of a guest's console: Ctrl-A and a letter.

/// Ctrl-A.
const ESCAPE: u8 = 0x01;

/// What was typed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Typed {
    /// Bytes for the guest.
    Input(Vec<u8>),
    /// Ctrl-A x.
    Quit,
    /// Ctrl-A h.
    Help,
}

/// Finds commands in what is typed, in whatever pieces it comes.
#[derive(Debug, Default)]
pub struct Escape {
    /// Ctrl-A came last.
    pending: bool,
}

impl Escape {
    /// Splits `bytes` into input and commands. Ctrl-A followed by something that isn't a command
    /// goes to the guest together with it; two of them go as one.
    pub fn feed(&mut self, bytes: &[u8]) -> Vec<Typed> {
        let mut typed = Vec::new();
        let mut input = Vec::with_capacity(bytes.len() + 1);
        for &byte in bytes {
            let command = match (std::mem::take(&mut self.pending), byte) {
                (false, ESCAPE) => {
                    self.pending = true;
                    continue;
                }
                (true, b'x' | b'X') => Typed::Quit,
                (true, b'h' | b'H' | b'?') => Typed::Help,
                (true, ESCAPE) | (false, _) => {
                    input.push(byte);
                    continue;
                }
                (true, _) => {
                    input.extend([ESCAPE, byte]);
                    continue;
                }
            };
            if !input.is_empty() {
                typed.push(Typed::Input(std::mem::take(&mut input)));
            }
            typed.push(command);
        }
        if !input.is_empty() {
            typed.push(Typed::Input(input));
        }
        typed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input(bytes: &[u8]) -> Typed {
        Typed::Input(bytes.to_vec())
    }

    #[test]
    fn plain_bytes_pass() {
        let all: Vec<u8> = (0..=255).filter(|byte| *byte != ESCAPE).collect();
        assert_eq!(Escape::default().feed(&all), [input(&all)]);
        assert_eq!(Escape::default().feed(b""), []);
    }

    #[test]
    fn commands_stand_between_input() {
        let typed = Escape::default().feed(b"ab\x01hc\x01xd");
        assert_eq!(
            typed,
            [
                input(b"ab"),
                Typed::Help,
                input(b"c"),
                Typed::Quit,
                input(b"d")
            ]
        );
    }

    #[test]
    fn a_command_may_come_in_pieces() {
        let mut escape = Escape::default();
        assert_eq!(escape.feed(b"a\x01"), [input(b"a")]);
        assert_eq!(escape.feed(b""), []);
        assert_eq!(escape.feed(b"x"), [Typed::Quit]);
        assert_eq!(escape.feed(b"x"), [input(b"x")]);
    }

    #[test]
    fn two_escapes_are_one_and_others_go_through() {
        let mut escape = Escape::default();
        assert_eq!(escape.feed(b"\x01\x01x"), [input(b"\x01x")]);
        assert_eq!(
            escape.feed(b"\x01e\x01\x01\x01x"),
            [input(b"\x01e\x01"), Typed::Quit]
        );
    }
}
