//! The clocks that timekeeping devices read, as a trait so that tests can turn the hands.

use std::fmt::Debug;
use std::time::{Duration, Instant, SystemTime};

/// A clock that moves by itself.
pub trait Clock: Send + Sync + Debug {
    /// Time since the clock's epoch.
    fn now(&self) -> Duration;
}

/// The host's wall clock: UTC since 1970. May be stepped by the host's administrator.
#[derive(Debug, Clone, Copy, Default)]
pub struct WallClock;

impl Clock for WallClock {
    fn now(&self) -> Duration {
        SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default()
    }
}

/// The host's monotonic clock since this value was made.
#[derive(Debug, Clone, Copy)]
pub struct MonotonicClock(Instant);

impl Default for MonotonicClock {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock for MonotonicClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use std::sync::Mutex;
    use std::time::Duration;

    use super::Clock;
    use crate::bus::lock;

    /// A clock that moves when a test says so.
    #[derive(Debug)]
    pub(crate) struct ManualClock(Mutex<Duration>);

    impl ManualClock {
        pub(crate) fn new(now: Duration) -> Self {
            Self(Mutex::new(now))
        }

        pub(crate) fn set(&self, now: Duration) {
            *lock(&self.0) = now;
        }

        pub(crate) fn advance(&self, by: Duration) {
            *lock(&self.0) += by;
        }
    }

    impl Clock for ManualClock {
        fn now(&self) -> Duration {
            *lock(&self.0)
        }
    }
}
