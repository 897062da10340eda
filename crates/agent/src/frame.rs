//! Lines in the stream of bytes that comes from a guest.

/// Byte that begins a delimited answer: what came before it is void.
pub const SENTINEL: u8 = 0xff;

/// A buffer that grew beyond this for an answer is given back after it.
const KEEP: usize = 16 << 10;

/// A line is longer than allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("The answer is longer than {limit} bytes")]
pub struct LineTooLong {
    /// The limit.
    pub limit: usize,
}

/// Puts lines together. Holds one line at most, and none beyond the limit.
#[derive(Debug, Default)]
pub struct Framer {
    line: Vec<u8>,
    /// Nothing counts before the next sentinel.
    skipping: bool,
}

impl Framer {
    /// Forgets what has come, and all that comes before the next sentinel.
    pub fn skip_to_sentinel(&mut self) {
        self.line = Vec::new();
        self.skipping = true;
    }

    /// Takes bytes off the front of `input` until a line is whole, and gives that line without its
    /// end; none when `input` has no end of a line. Lines of nothing are passed over.
    ///
    /// # Errors
    /// The line is longer than `limit`; the framer skips to the next sentinel then.
    pub fn line(
        &mut self,
        input: &mut &[u8],
        limit: usize,
    ) -> Result<Option<Vec<u8>>, LineTooLong> {
        while !input.is_empty() {
            let end = input
                .iter()
                .position(|&byte| byte == b'\n' || byte == SENTINEL);
            let (part, rest) = input.split_at(end.unwrap_or(input.len()));
            let mark = rest.first().copied();
            *input = rest.get(1..).unwrap_or_default();
            if mark == Some(SENTINEL) {
                self.line.clear();
                self.skipping = false;
                continue;
            }
            if self.skipping {
                continue;
            }
            if part.len() > limit.saturating_sub(self.line.len()) {
                self.skip_to_sentinel();
                return Err(LineTooLong { limit });
            }
            self.line.extend_from_slice(part);
            if mark.is_some() && !self.line.trim_ascii().is_empty() {
                return Ok(Some(std::mem::take(&mut self.line)));
            }
            if mark.is_some() {
                self.line.clear();
                self.line.shrink_to(KEEP);
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    fn lines(framer: &mut Framer, mut input: &[u8], limit: usize) -> Vec<Result<String, ()>> {
        let mut lines = Vec::new();
        loop {
            match framer.line(&mut input, limit) {
                Ok(Some(line)) => lines.push(Ok(String::from_utf8(line).unwrap())),
                Ok(None) => return lines,
                Err(_) => lines.push(Err(())),
            }
        }
    }

    fn ok(lines: &[&str]) -> Vec<Result<String, ()>> {
        lines.iter().map(|line| Ok((*line).to_owned())).collect()
    }

    #[test]
    fn a_sentinel_voids_what_came_before() {
        let mut framer = Framer::default();
        assert_eq!(lines(&mut framer, b"a\nb\r\n\n \nc", 10), ok(&["a", "b\r"]));
        assert_eq!(lines(&mut framer, b"d\nstale\xffe\n", 10), ok(&["cd", "e"]));
        framer.skip_to_sentinel();
        assert_eq!(
            lines(&mut framer, b"old\nold\n\xff\xffnew\n", 10),
            ok(&["new"])
        );
    }

    #[test]
    fn a_line_has_a_limit() {
        let mut framer = Framer::default();
        assert_eq!(lines(&mut framer, b"12345", 5), []);
        assert_eq!(
            lines(&mut framer, b"\n123456\nlost\n", 5),
            [Ok("12345".into()), Err(())]
        );
        assert_eq!(lines(&mut framer, b"lost\n\xff1\n", 5), ok(&["1"]));
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(
            input in proptest::collection::vec(prop_oneof![Just(b'\n'), Just(b'x'), Just(SENTINEL)], 0..60),
            cut in 0..60_usize,
        ) {
            let (first, second) = input.split_at(cut.min(input.len()));
            let mut whole = Framer::default();
            let all = lines(&mut whole, &input, 8);
            let mut framer = Framer::default();
            let mut pieces = lines(&mut framer, first, 8);
            pieces.extend(lines(&mut framer, second, 8));
            prop_assert_eq!(pieces, all);
        }
    }
}
