//! The shared device thread: one epoll loop for every device that needs no thread of its own.

use std::fmt::{self, Debug};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};

use edgevmm_devices::platform::{DeviceLoop, LoopHandler};
use event_manager::{EventManager, RemoteEndpoint, SubscriberId, SubscriberOps};

/// Stack of the device thread.
const STACK: usize = 256 << 10;

/// The thread; it ends when this is dropped.
#[derive(Debug)]
pub struct DeviceThread {
    endpoint: Arc<Endpoint>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

struct Endpoint(RemoteEndpoint<LoopHandler>);

impl Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Endpoint")
    }
}

impl DeviceThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// Fails when the process is out of threads or descriptors.
    pub fn start() -> io::Result<DeviceThread> {
        let mut manager = EventManager::<LoopHandler>::new().map_err(other)?;
        let endpoint = Arc::new(Endpoint(manager.remote_endpoint()));
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let body = move || {
            edgevmm_sandbox::enter(edgevmm_sandbox::Kind::Devices);
            while !stopped.load(Ordering::Acquire) {
                if let Err(error) = manager.run() {
                    tracing::error!(%error, "The device thread can't wait for events");
                    return;
                }
            }
        };
        let thread = Builder::new()
            .name("devices".into())
            .stack_size(STACK)
            .spawn(body)?;
        Ok(DeviceThread {
            endpoint,
            stop,
            thread: Some(thread),
        })
    }

    /// The way for devices to reach the thread.
    pub fn handle(&self) -> Arc<dyn DeviceLoop> {
        Arc::clone(&self.endpoint) as Arc<dyn DeviceLoop>
    }
}

impl Drop for DeviceThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let _ = self.endpoint.0.kick();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl DeviceLoop for Endpoint {
    fn add(&self, handler: LoopHandler) -> io::Result<SubscriberId> {
        let add = move |ops: &mut dyn SubscriberOps<Subscriber = LoopHandler>| {
            Ok::<_, event_manager::Error>(ops.add_subscriber(handler))
        };
        self.0.call_blocking(add).map_err(other)
    }

    fn remove(&self, id: SubscriberId) -> io::Result<()> {
        let remove = move |ops: &mut dyn SubscriberOps<Subscriber = LoopHandler>| {
            ops.remove_subscriber(id).map(drop)
        };
        self.0.call_blocking(remove).map_err(other)
    }
}

fn other(error: event_manager::Error) -> io::Error {
    io::Error::other(error)
}
