//! Threads that come and go while a guest runs.
//!
//! A thread inherits the limits of the one that starts it. So in a sandbox none of those that a
//! guest keeps busy starts another: one thread does nothing else, and may do what any of them may.

use std::cell::Cell;
use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::{Builder, JoinHandle};

use crate::{Kind, enter};

/// It only starts others.
const STACK: usize = 64 << 10;

type Order = Box<dyn FnOnce() + Send>;

thread_local! {
    static STARTED: Cell<bool> = const { Cell::new(false) };
}

/// Whether the calling thread has what a thread inherits from the one that starts others.
pub(crate) fn was_started() -> bool {
    STARTED.get()
}

static STARTER: OnceLock<Mutex<Sender<Order>>> = OnceLock::new();

/// Starts a thread that has not entered the sandbox yet: it does so itself by [`enter`] when it has
/// what it may not make later.
///
/// # Errors
/// There are no more threads to be had.
pub fn spawn<T: Send + 'static>(
    name: String,
    stack: usize,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let builder = Builder::new().name(name).stack_size(stack);
    let Some(starter) = STARTER.get() else {
        return builder.spawn(body);
    };
    let start = move || {
        builder.spawn(move || {
            STARTED.set(true);
            body()
        })
    };
    let (answer, started) = channel();
    let order: Order = Box::new(move || {
        let _ = answer.send(start());
    });
    let gone = |_| io::Error::other("the thread that starts others is gone");
    let starter = starter.lock().unwrap_or_else(PoisonError::into_inner);
    starter.send(order).map_err(|_| gone(()))?;
    drop(starter);
    started.recv().map_err(|_| gone(()))?
}

pub(crate) fn start_starter() -> io::Result<()> {
    let (sender, orders): (_, Receiver<Order>) = channel();
    let body = move || {
        enter(Kind::Starter);
        orders.iter().for_each(|order| order());
    };
    Builder::new()
        .name("starter".into())
        .stack_size(STACK)
        .spawn(body)?;
    let _ = STARTER.set(Mutex::new(sender));
    Ok(())
}
