//! Long work on the terminal: a bar that shows how far it is, and Ctrl-C that ends it cleanly.

use std::io::{self, IsTerminal};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::Duration;

use anyhow::Context;
use edgevmm_image::{ImageError, Job};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use nix::sys::signal::{SigSet, Signal, raise};

use crate::exit::Failure;

/// How often the bar is drawn, at most, in a second.
const DRAWS: u8 = 10;
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

/// A bar, if there is a terminal for it and the work takes its time.
#[derive(Debug)]
struct Bar {
    bar: ProgressBar,
    start: std::time::Instant,
}

impl Bar {
    fn new(what: &'static str) -> Self {
        let bar = ProgressBar::hidden();
        let style = "{msg} [{bar:30}] {percent:>3}%  {binary_bytes}/{binary_total_bytes}  \
                     {binary_bytes_per_sec}  {eta}";
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(what);
        Self {
            bar,
            start: std::time::Instant::now(),
        }
    }

    fn show(&self, done: u64, total: u64) {
        if self.bar.is_hidden() {
            if self.start.elapsed() < PATIENCE || !io::stderr().is_terminal() {
                return;
            }
            self.bar
                .set_draw_target(ProgressDrawTarget::stderr_with_hz(DRAWS));
        }
        self.bar.set_length(total);
        self.bar.set_position(done);
    }

    fn clear(&self) {
        self.bar.finish_and_clear();
    }
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
