//! Keeps a guest from filling the log: a message that it can cause over and over again is written
//! so many times a minute and no more.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::callsite::Identifier;
use tracing::{Level, Metadata};

/// Messages of one place in the program within [`WINDOW`].
const BURST: u32 = 20;
const WINDOW: Duration = Duration::from_secs(60);

#[derive(Debug)]
struct Window {
    start: Instant,
    messages: u32,
}

/// Counts messages by the place in the program that they come from.
#[derive(Debug, Default)]
pub struct RateLimit {
    windows: Mutex<HashMap<Identifier, Window>>,
}

impl RateLimit {
    /// Whether a message may be written. Those for finding faults, debug and trace, always may:
    /// somebody has asked for them.
    pub fn admits(&self, message: &Metadata<'_>) -> bool {
        *message.level() > Level::INFO || self.count(message.callsite(), Instant::now()) <= BURST
    }

    fn count(&self, place: Identifier, now: Instant) -> u32 {
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        let window = windows.entry(place).or_insert(Window {
            start: now,
            messages: 0,
        });
        if now.duration_since(window.start) >= WINDOW {
            *window = Window {
                start: now,
                messages: 0,
            };
        }
        window.messages = window.messages.saturating_add(1);
        window.messages
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tracing_subscriber::Layer as _;
    use tracing_subscriber::filter::DynFilterFn;
    use tracing_subscriber::layer::{Context, SubscriberExt};

    use super::*;

    #[derive(Default)]
    struct Counter(Arc<AtomicUsize>);

    impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for Counter {
        fn on_event(&self, _: &tracing::Event<'_>, _: Context<'_, S>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_flood_is_cut_and_other_messages_are_not() {
        let counter = Counter::default();
        let written = counter.0.clone();
        let limit = RateLimit::default();
        let filter = DynFilterFn::new(move |message, _| limit.admits(message));
        let subscriber = tracing_subscriber::registry().with(counter.with_filter(filter));
        tracing::subscriber::with_default(subscriber, || {
            for _ in 0..1000 {
                tracing::warn!("flood");
            }
            assert_eq!(written.load(Ordering::Relaxed), 20);
            tracing::warn!("another");
            assert_eq!(written.load(Ordering::Relaxed), 21);
            for _ in 0..100 {
                tracing::debug!("asked for");
            }
            assert_eq!(written.load(Ordering::Relaxed), 121);
        });
    }
}
