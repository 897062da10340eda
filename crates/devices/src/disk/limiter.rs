//! Rate limits of a disk: token buckets without a clock of their own.
//!
//! A bucket is one number: when it will be full again. It fills as time passes, so nothing has to
//! run for it, and a queue that has to wait is told for how long. A request may begin while there
//! is one byte or request in the bucket, and takes it into debt if it needs more: so no request is too
//! large, and those that follow wait for longer.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Bytes or requests a second, at least 1.
    pub per_second: u64,
    /// Bytes or requests at once after a rest; a tenth of a second's worth if absent.
    pub burst: Option<u64>,
}

/// Limits of one kind: on reads and writes together, and on each.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rates {
    /// On reads and writes together.
    pub total: Option<Rate>,
    /// On reads.
    pub read: Option<Rate>,
    /// On writes, discards and zeroing.
    pub write: Option<Rate>,
}

/// The limits of a disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RateLimits {
    /// On bytes. Discarded and zeroed ones do not count.
    pub bytes: Rates,
    /// On requests.
    pub requests: Rates,
}

/// What a request takes from the buckets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cost {
    pub(crate) write: bool,
    pub(crate) bytes: u64,
}

#[derive(Debug)]
struct Bucket {
    per_second: u64,
    /// How long an empty bucket takes to fill.
    depth: Duration,
    /// When it is full.
    full_at: Duration,
    /// Whether it is about bytes rather than requests.
    bytes: bool,
    /// Only about writes, or only about reads.
    only: Option<bool>,
}

/// The buckets of a disk, for all its queues.
#[derive(Debug)]
pub(crate) struct Limiter {
    epoch: Instant,
    buckets: Mutex<Vec<Bucket>>,
}

impl Limiter {
    /// None if nothing is limited.
    pub(crate) fn new(limits: &RateLimits) -> Option<Self> {
        let mut buckets = Vec::new();
        for (rates, bytes) in [(&limits.bytes, true), (&limits.requests, false)] {
            for (rate, only) in [
                (rates.total, None),
                (rates.read, Some(false)),
                (rates.write, Some(true)),
            ] {
                buckets.extend(rate.map(|rate| Bucket::new(rate, bytes, only)));
            }
        }
        (!buckets.is_empty()).then(|| Self {
            epoch: Instant::now(),
            buckets: Mutex::new(buckets),
        })
    }

    /// Lets a request begin, or tells how long it has to wait before it asks again.
    pub(crate) fn admit(&self, cost: Cost) -> Result<(), Duration> {
        self.admit_at(cost, self.epoch.elapsed())
    }

    fn admit_at(&self, cost: Cost, now: Duration) -> Result<(), Duration> {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let applies = |bucket: &Bucket| bucket.only.is_none_or(|write| write == cost.write);
        let waits = buckets.iter().filter(|bucket| applies(bucket));
        let wait = waits.map(|bucket| bucket.wait(now)).max();
        match wait {
            Some(wait) if !wait.is_zero() => Err(wait),
            _ => {
                for bucket in buckets.iter_mut().filter(|bucket| applies(bucket)) {
                    bucket.take(if bucket.bytes { cost.bytes } else { 1 }, now);
                }
                Ok(())
            }
        }
    }
}

impl Bucket {
    fn new(rate: Rate, bytes: bool, only: Option<bool>) -> Self {
        let per_second = rate.per_second.max(1);
        let burst = rate.burst.unwrap_or(per_second / 10).max(1);
        Self {
            per_second,
            depth: time_for(burst, per_second),
            full_at: Duration::ZERO,
            bytes,
            only,
        }
    }

    /// How long it takes until it holds one byte or request.
    fn wait(&self, now: Duration) -> Duration {
        let to_full = self.full_at.saturating_sub(now);
        let one = time_for(1, self.per_second);
        to_full.saturating_add(one).saturating_sub(self.depth)
    }

    fn take(&mut self, amount: u64, now: Duration) {
        let time = time_for(amount, self.per_second);
        self.full_at = self.full_at.max(now).saturating_add(time);
    }
}

/// In what time `amount` comes together.
fn time_for(amount: u64, per_second: u64) -> Duration {
    let nanos = u128::from(amount) * 1_000_000_000 / u128::from(per_second);
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)).max(Duration::from_nanos(1))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn rate(per_second: u64, burst: u64) -> Option<Rate> {
        let burst = Some(burst);
        Some(Rate { per_second, burst })
    }

    fn limiter(bytes: Rates, requests: Rates) -> Limiter {
        Limiter::new(&RateLimits { bytes, requests }).unwrap()
    }

    const READ: Cost = Cost {
        write: false,
        bytes: 4096,
    };
    const WRITE: Cost = Cost {
        write: true,
        bytes: 4096,
    };

    /// Requests that begin in the time given, each as soon as it may.
    fn count(limiter: &Limiter, cost: Cost, from: Duration, to: Duration) -> u64 {
        let (mut now, mut count) = (from, 0);
        while now < to {
            match limiter.admit_at(cost, now) {
                Ok(()) => count += 1,
                Err(wait) => now += wait,
            }
        }
        count
    }

    #[test]
    fn a_burst_and_then_the_rate() {
        let total = rate(100, 20);
        let requests = Rates {
            total,
            ..Rates::default()
        };
        let limiter = limiter(Rates::default(), requests);
        assert_eq!(count(&limiter, READ, ms(0), ms(1)), 20);
        assert_eq!(count(&limiter, READ, ms(1), ms(1001)), 100);
        // A long rest fills the bucket and no more.
        assert_eq!(count(&limiter, WRITE, ms(100_000), ms(100_001)), 20);
    }

    #[test]
    fn waiting_for_as_long_as_told_is_enough() {
        let total = rate(3, 1);
        let limiter = limiter(
            Rates::default(),
            Rates {
                total,
                ..Rates::default()
            },
        );
        let mut now = ms(5);
        for _ in 0..100 {
            limiter.admit_at(READ, now).unwrap();
            let wait = limiter.admit_at(READ, now).unwrap_err();
            assert!(wait <= ms(334), "{wait:?}");
            limiter.admit_at(READ, now + wait / 2).unwrap_err();
            now += wait;
        }
    }

    #[test]
    fn a_request_larger_than_the_bucket_makes_others_wait() {
        let total = rate(1 << 20, 4096);
        let bytes = Rates {
            total,
            ..Rates::default()
        };
        let limiter = limiter(bytes, Rates::default());
        let large = Cost {
            write: true,
            bytes: 10 << 20,
        };
        limiter.admit_at(large, ms(0)).unwrap();
        let wait = limiter.admit_at(READ, ms(0)).unwrap_err();
        assert!((ms(9990)..=ms(10_000)).contains(&wait), "{wait:?}");
        limiter.admit_at(READ, wait).unwrap();
    }

    #[test]
    fn reads_and_writes_may_have_limits_of_their_own() {
        let bytes = Rates {
            read: rate(409_600, 4096),
            write: rate(40_960, 4096),
            ..Rates::default()
        };
        let limiter = limiter(bytes, Rates::default());
        // And one that takes the bucket into debt.
        assert_eq!(count(&limiter, READ, ms(0), ms(1000)), 101);
        assert_eq!(count(&limiter, WRITE, ms(0), ms(1000)), 11);
    }

    #[test]
    fn all_limits_hold_at_once_and_a_refusal_takes_nothing() {
        let bytes = Rates {
            total: rate(4096 * 1000, 4096),
            ..Rates::default()
        };
        let requests = Rates {
            read: rate(10, 1),
            ..Rates::default()
        };
        let limiter = limiter(bytes, requests);
        assert_eq!(count(&limiter, READ, ms(0), ms(999)), 10);
        for _ in 0..1000 {
            limiter.admit_at(READ, ms(999)).unwrap_err();
        }
        assert_eq!(count(&limiter, WRITE, ms(1000), ms(1100)), 101);
    }

    #[test]
    fn extremes_do_not_overflow() {
        let total = Some(Rate {
            per_second: 1,
            burst: Some(u64::MAX),
        });
        let bytes = Rates {
            total,
            read: Some(Rate {
                per_second: u64::MAX,
                burst: None,
            }),
            ..Rates::default()
        };
        let limiter = limiter(bytes, bytes);
        let cost = Cost {
            write: false,
            bytes: u64::MAX,
        };
        for _ in 0..3 {
            let _ = limiter.admit_at(cost, Duration::MAX / 2);
        }
        assert!(Limiter::new(&RateLimits::default()).is_none());
    }
}
