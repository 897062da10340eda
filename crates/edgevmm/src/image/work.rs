//! Long work on the terminal: a bar that shows how far it is, and Ctrl-C that ends it cleanly.

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context;
use edgevmm_image::{ImageError, Job};
use nix::sys::signal::{SigSet, Signal, raise};

use crate::exit::Failure;

/// How long a bar is left as it is, at least.
const REDRAW: Duration = Duration::from_millis(100);
/// How many characters wide it is.
const WIDTH: u64 = 30;
/// How long work goes on before it gets a bar.
const PATIENCE: Duration = Duration::from_millis(300);

/// Has long work done: `what` is a word for it. Signals that end a program end the work, and what
/// is unfinished is removed.
///
/// # Errors
///
/// That of the work; for one that a signal ended, with the exit code that says so.
pub fn watched<T>(
    what: &'static str,
    work: impl FnOnce(&Job<'_>) -> Result<T, ImageError>,
) -> Result<T, Failure> {
    let signals = Signals::catch().context("Can't wait for signals")?;
    let result = with_bar(what, &signals.0.cancelled, work);
    result.map_err(|error| match (&error, signals.received()) {
        (ImageError::Cancelled { .. }, Some(signal)) => Failure::signal(error, signal as i32),
        _ => super::failure(error),
    })
}

/// Has long work done that leaves nothing unfinished, so that signals end it at once.
///
/// # Errors
///
/// That of the work.
pub fn shown<T>(
    what: &'static str,
    work: impl FnOnce(&Job<'_>) -> Result<T, ImageError>,
) -> Result<T, Failure> {
    with_bar(what, &AtomicBool::new(false), work).map_err(super::failure)
}

fn with_bar<T>(
    what: &'static str,
    cancelled: &AtomicBool,
    work: impl FnOnce(&Job<'_>) -> Result<T, ImageError>,
) -> Result<T, ImageError> {
    let bar = Bar::new(what);
    let progress = |done, total| bar.show(done, total);
    let result = work(&Job::new(&progress, cancelled));
    bar.clear();
    result
}

/// A bar, if there is a terminal for it and the work takes its time. It is on one line of standard
/// error, which is written anew.
///
/// By hand, as the library for it costs a VMM, which is the same program, more than a bar is worth.
#[derive(Debug)]
struct Bar {
    what: &'static str,
    start: Instant,
    is_seen: bool,
    /// When it was drawn last.
    drawn: Mutex<Option<Instant>>,
}

impl Bar {
    fn new(what: &'static str) -> Self {
        Self {
            what,
            start: Instant::now(),
            is_seen: io::stderr().is_terminal(),
            drawn: Mutex::default(),
        }
    }

    fn show(&self, done: u64, total: u64) {
        let taken = self.start.elapsed();
        if !self.is_seen || taken < PATIENCE {
            return;
        }
        // Another thread is drawing.
        let Ok(mut drawn) = self.drawn.try_lock() else {
            return;
        };
        if drawn.is_none_or(|drawn| drawn.elapsed() >= REDRAW) {
            let _ = write!(
                io::stderr(),
                "\r{}\x1b[K",
                line(self.what, done, total, taken)
            );
            *drawn = Some(Instant::now());
        }
    }

    fn clear(&self) {
        let drawn = self.drawn.lock().is_ok_and(|drawn| drawn.is_some());
        if drawn {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

/// A bar with how far the work is after `taken`, how fast it goes and how long it will still take.
fn line(what: &str, done: u64, total: u64, taken: Duration) -> String {
    let part = |of: u64| {
        let part = u128::from(done.min(total)) * u128::from(of) / u128::from(total.max(1));
        u64::try_from(part).unwrap_or(of)
    };
    let (filled, percent) = (part(WIDTH), part(100));
    let bar: String = (0..WIDTH)
        .map(|i| if i < filled { '=' } else { ' ' })
        .collect();
    let milliseconds = taken.as_millis().max(1);
    let speed = u128::from(done) * 1000 / milliseconds;
    let left = u128::from(total.saturating_sub(done)) / speed.max(1);
    let (done, total) = (mebibytes(done.into()), mebibytes(total.into()));
    let speed = mebibytes(speed);
    let (minutes, seconds) = (left / 60, left % 60);
    format!(
        "{what} [{bar}] {percent:>3}%  {done}/{total} MiB  {speed} MiB/s  {minutes}m{seconds:02}s"
    )
}

fn mebibytes(bytes: u128) -> u128 {
    bytes >> 20
}

/// Signals that would end the program, caught by a thread from now on.
#[derive(Debug)]
struct Signals(Arc<Received>);

#[derive(Debug, Default)]
struct Received {
    cancelled: AtomicBool,
    signal: AtomicI32,
}

impl Signals {
    /// Threads that are started later block the signals, too.
    fn catch() -> io::Result<Self> {
        let mut signals = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            signals.add(signal);
        }
        signals.thread_block()?;
        let received = Arc::new(Received::default());
        let told = Arc::clone(&received);
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || wait(signals, &told))?;
        Ok(Self(received))
    }

    fn received(&self) -> Option<Signal> {
        Signal::try_from(self.0.signal.load(Ordering::Relaxed)).ok()
    }
}

/// Has the first signal cancel the work; another one ends the program at once, in case the host's
/// storage does not answer.
fn wait(signals: SigSet, received: &Received) {
    while let Ok(signal) = signals.wait() {
        if received.cancelled.load(Ordering::Relaxed) {
            let _ = signals.thread_unblock();
            let _ = raise(signal);
        }
        received.signal.store(signal as i32, Ordering::Relaxed);
        received.cancelled.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_tells_how_far_the_work_is() {
        let second = Duration::from_secs(1);
        assert_eq!(
            line("Checking", 100 << 20, 1000 << 20, second),
            "Checking [===                           ]  10%  100/1000 MiB  100 MiB/s  0m09s"
        );
        let done = line("Checking", u64::MAX, u64::MAX, second);
        assert!(
            done.contains(&format!("[{}] 100%", "=".repeat(30))),
            "{done}"
        );
        let nothing = line("Checking", 0, 0, Duration::ZERO);
        assert!(
            nothing.contains("   0%  0/0 MiB  0 MiB/s  0m00s"),
            "{nothing}"
        );
    }
}
