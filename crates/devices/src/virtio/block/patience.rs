//! How long a queue's thread looks at its ring before it sleeps.
//!
//! A driver that waits for each request sends the next one soon after it was told of the last. To
//! put a thread to sleep and wake it again takes longer than that, and costs the driver a kick,
//! which is an exit of its vCPU. So the thread looks a little longer while that has paid off
//! lately, and not at all otherwise: an idle disk's thread sleeps after at most [`MISSES_MAX`]
//! looks in vain. Polling is left out while requests are under way, as their ends wake the thread.

use std::time::Duration;

/// Longest look.
const LONGEST: Duration = Duration::from_micros(32);
/// First look, after a driver was seen to send soon.
const FIRST: Duration = Duration::from_micros(8);
/// Looks in vain, one after the other, that are followed by a pause.
const MISSES_MAX: u32 = 2;
/// Waits of the first pause that go by without a look; twice as many in each pause after that.
const FIRST_PAUSE: u32 = 32;
/// Waits of the longest pause.
const LONGEST_PAUSE: u32 = 4096;

/// How long it is worth to look.
#[derive(Debug)]
pub(super) struct Patience {
    allowed: bool,
    look: Duration,
    /// Looks in vain since the last one that was not.
    misses: u32,
    /// Waits until there may be a look again.
    pause: u32,
    next_pause: u32,
}

impl Patience {
    /// That of a thread which has seen nothing yet. Looks only if it is `allowed` to, because the
    /// driver has a CPU to run on meanwhile.
    pub(super) fn new(allowed: bool) -> Self {
        Self {
            allowed,
            look: Duration::ZERO,
            misses: 0,
            pause: 0,
            next_pause: FIRST_PAUSE,
        }
    }

    /// How long to look this time; none if the thread had better sleep at once.
    pub(super) fn look(&self) -> Option<Duration> {
        (self.pause == 0 && !self.look.is_zero()).then_some(self.look)
    }

    /// A request came while the thread looked.
    pub(super) fn hit(&mut self) {
        self.misses = 0;
        self.next_pause = FIRST_PAUSE;
    }

    /// The thread slept after its look, if it had one, and was woken this long after it had
    /// nothing more to do.
    pub(super) fn slept(&mut self, waited: Duration) {
        if self.pause > 0 {
            self.pause -= 1;
            return;
        }
        self.misses += u32::from(!self.look.is_zero());
        if self.misses >= MISSES_MAX {
            self.misses = 0;
            self.look = Duration::ZERO;
            self.pause = self.next_pause;
            self.next_pause = (self.next_pause * 2).min(LONGEST_PAUSE);
        } else if waited <= LONGEST && self.allowed {
            self.look = (self.look * 2).clamp(FIRST, LONGEST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_micros(20);
    const LATE: Duration = Duration::from_micros(100);

    #[test]
    fn a_driver_that_sends_soon_is_waited_for() {
        let mut patience = Patience::new(true);
        assert_eq!(patience.look(), None, "nothing is known yet");
        patience.slept(SOON);
        assert_eq!(patience.look(), Some(FIRST));
        patience.slept(SOON);
        assert!(patience.look() > Some(FIRST), "that was too short");
        for _ in 0..100 {
            patience.hit();
            assert!(patience.look() <= Some(LONGEST));
        }
        assert!(patience.look().is_some());
    }

    #[test]
    fn one_that_does_not_is_not() {
        let mut patience = Patience::new(true);
        for _ in 0..100 {
            patience.slept(LATE);
            assert_eq!(patience.look(), None);
        }
        patience.slept(SOON);
        patience.slept(LATE);
        patience.slept(LATE);
        assert_eq!(patience.look(), None, "twice in vain");
        let mut patience = Patience::new(false);
        patience.slept(SOON);
        assert_eq!(patience.look(), None, "there is no CPU for it");
    }

    /// A driver on the thread's own CPU answers soon, but only once the thread sleeps.
    #[test]
    fn looks_that_never_pay_off_become_rare() {
        let mut patience = Patience::new(true);
        let looks = (0..20_000).filter(|_| {
            let looked = patience.look().is_some();
            patience.slept(SOON);
            looked
        });
        assert!(looks.count() < 40);
    }
}
