//! The conversation: keeps requests and answers in step.

use edgevmm_agent::{AnswerError, Framer, answer, sync};
use serde::de::DeserializeOwned;

use super::{ANSWER, AgentError};
use crate::channel::Link;

/// Bytes read at a time.
const PIECE: usize = 16 << 10;

/// Bytes of no use that a request puts up with: an answer that nobody waited for holds the output
/// of a program, of which an agent keeps 32 MiB, in base64.
const STALE: usize = 64 << 20;

/// Lines that may stand in the place of the one that brings the stream in step.
const STRAY_LINES: usize = 100;

/// Both ends of the conversation, as far as is known here.
#[derive(Debug, Default)]
pub(super) struct Session {
    framer: Framer,
    /// Read and not looked at yet, from `start` on.
    piece: Vec<u8>,
    start: usize,
    /// The guest's opening of the channel in which the next line is the answer to the next request.
    in_step: Option<u64>,
    last_sync: u32,
}

impl Session {
    /// Sends a request and reads its answer.
    pub(super) async fn ask<T: DeserializeOwned>(
        &mut self,
        link: &Link,
        request: &[u8],
        longest: usize,
    ) -> Result<T, AgentError> {
        let opening = self.begin(link).await?;
        link.write(opening, request).await?;
        let mut stale = 0;
        let line = self.line(link, opening, longest, &mut stale).await?;
        let answer = answer(&line);
        if matches!(answer, Ok(_) | Err(AnswerError::Refused { .. })) {
            self.end(opening);
        }
        Ok(answer?)
    }

    /// Sends a request that has no answer but a refusal. The next one, which has, tells that it was
    /// taken up; so does an agent that leaves.
    pub(super) async fn tell(&mut self, link: &Link, request: &[u8]) -> Result<(), AgentError> {
        let opening = self.begin(link).await?;
        let id = self.next_sync();
        let next = sync(id);
        // No need to interrupt a request by the first byte.
        let next = next.get(1..).unwrap_or_default();
        let said = async {
            link.write(opening, &[request, next].concat()).await?;
            let mut stale = 0;
            self.line(link, opening, ANSWER, &mut stale).await
        };
        let line = match said.await {
            Err(AgentError::Left) => return Ok(()),
            line => line?,
        };
        match answer::<u32>(&line) {
            Ok(number) if number == id => {
                self.end(opening);
                Ok(())
            }
            Ok(_) => Err(AgentError::Nonsense),
            Err(error) => Err(error.into()),
        }
    }

    /// Gets in step, and out of it for the time of a request: it may never come to its end.
    async fn begin(&mut self, link: &Link) -> Result<u64, AgentError> {
        let opening = link.channel().guest().ok_or(AgentError::NotConnected)?;
        let in_step = self.in_step.take() == Some(opening);
        if !in_step || self.start < self.piece.len() {
            self.sync(link, opening).await?;
        }
        Ok(opening)
    }

    /// The request has its answer.
    fn end(&mut self, opening: u64) {
        self.in_step = Some(opening);
        if self.start >= self.piece.len() {
            (self.piece, self.start) = (Vec::new(), 0);
        }
    }

    fn next_sync(&mut self) -> u32 {
        self.last_sync = self.last_sync.wrapping_add(1);
        self.last_sync
    }

    async fn sync(&mut self, link: &Link, opening: u64) -> Result<(), AgentError> {
        let id = self.next_sync();
        self.framer.skip_to_sentinel();
        link.write(opening, &sync(id)).await?;
        let mut stale = 0;
        for _ in 0..STRAY_LINES {
            let line = self.line(link, opening, ANSWER, &mut stale).await;
            match line {
                Ok(line) if answer::<u32>(&line).is_ok_and(|number| number == id) => return Ok(()),
                // That of an earlier one, which nobody waited for.
                Ok(_) | Err(AgentError::TooLong(_)) => self.framer.skip_to_sentinel(),
                Err(error) => return Err(error),
            }
        }
        Err(AgentError::Nonsense)
    }

    /// The next line.
    async fn line(
        &mut self,
        link: &Link,
        opening: u64,
        longest: usize,
        stale: &mut usize,
    ) -> Result<Vec<u8>, AgentError> {
        loop {
            let mut rest = self.piece.get(self.start..).unwrap_or_default();
            let line = self.framer.line(&mut rest, longest);
            self.start = self.piece.len() - rest.len();
            match line {
                Ok(Some(line)) => return Ok(line),
                Ok(None) => {}
                Err(error) => return Err(AgentError::TooLong(error.limit)),
            }
            if *stale > STALE {
                return Err(AgentError::Nonsense);
            }
            self.piece.resize(PIECE, 0);
            let count = link.read(opening, &mut self.piece).await;
            self.piece.truncate(count.unwrap_or(0));
            self.start = 0;
            *stale = stale.saturating_add(count?);
            // A guest that always has more to say does not keep the process from all else.
            tokio::task::yield_now().await;
        }
    }
}
