//! Work on files that storage may hold up for ever, such as those of a claim whose server is gone: it
//! is done on a thread of its own, so that calls about the pod's other containers are answered meanwhile.
//! Whoever makes a container holds the pod's creation lock all the while (`Tasks::create`): calls that make
//! another one, delete one that is not there yet or end the shim wait until the time is over.

use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::ttrpc::{CallError, Code};

/// How long storage may take; less than the two minutes for which a kubelet waits for a container.
const PATIENCE: Duration = Duration::from_secs(100);
/// Threads that wait for storage: each new try of the kubelet's would else add one.
static PLACES: Semaphore = Semaphore::const_new(4);

/// Does such work.
///
/// # Errors
///
/// What the work returns, or that its time is over; then it goes on by itself if it can.
pub async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, CallError> + Send + 'static,
) -> Result<T, CallError> {
    within(PATIENCE, &PLACES, work).await
}

async fn within<T: Send + 'static>(
    patience: Duration,
    places: &'static Semaphore,
    work: impl FnOnce() -> Result<T, CallError> + Send + 'static,
) -> Result<T, CallError> {
    let silent = |code| {
        let message = "The storage of the container's volumes does not answer: look after it, or take the \
                       volume out of the pod";
        CallError::new(code, message)
    };
    let Ok(place) = places.try_acquire() else {
        return Err(silent(Code::ResourceExhausted));
    };
    let work = tokio::task::spawn_blocking(move || {
        let _place = place;
        work()
    });
    match timeout(patience, work).await {
        Ok(Ok(result)) => result,
        Ok(Err(error)) => Err(CallError::new(Code::Unknown, error.to_string())),
        Err(_) => Err(silent(Code::DeadlineExceeded)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::mpsc::{Receiver, channel};

    use super::*;

    const MOMENT: Duration = Duration::from_millis(50);
    static FEW: Semaphore = Semaphore::const_new(1);

    #[tokio::test]
    async fn storage_that_is_silent_holds_up_nobody_and_fills_no_memory() {
        let (answer, storage) = channel::<()>();
        let wait = move |storage: Receiver<()>| move || Ok(storage.recv().is_ok());
        let error = within(MOMENT, &FEW, wait(storage)).await.unwrap_err();
        assert_eq!(error.code, Code::DeadlineExceeded);
        let error = within(MOMENT, &FEW, || Ok(())).await.unwrap_err();
        assert_eq!(error.code, Code::ResourceExhausted);
        answer.send(()).unwrap();
        drop(FEW.acquire().await.unwrap());
        within(PATIENCE, &FEW, || Ok(())).await.unwrap();
    }
}
