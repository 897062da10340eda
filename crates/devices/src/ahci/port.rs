//! A port: its registers, the drive on it and the thread that serves it.

use std::sync::Arc;

use super::drive::Drive;
use super::interrupts::Interrupts;
use super::registers::{IS_HOST_FATAL, PortState, Registers, offset};
use super::worker::Worker;
use crate::GuestMemory;
use crate::state::{StateError, same};

/// A port of an adapter.
#[derive(Debug)]
pub struct Port {
    registers: Arc<Registers>,
    drive: Option<Arc<Drive>>,
    memory: Arc<GuestMemory>,
    worker: Option<Worker>,
}

impl Port {
    pub fn new(
        index: usize,
        drive: Option<Drive>,
        interrupts: Arc<Interrupts>,
        memory: Arc<GuestMemory>,
    ) -> Self {
        let signature = drive.as_ref().map(Drive::signature);
        Self {
            registers: Arc::new(Registers::new(index, signature, interrupts, memory.clone())),
            drive: drive.map(Arc::new),
            memory,
            worker: None,
        }
    }

    pub fn read(&self, register: u64) -> u32 {
        self.registers.read(register)
    }

    pub fn write(&mut self, register: u64, value: u32) {
        match register {
            offset::CMD => {
                let start = self.registers.write_command(value);
                let started = self.registers.lock().is_started();
                if start && !started {
                    self.registers.start();
                    self.run();
                } else if started && !start {
                    self.stop();
                }
            }
            offset::SCTL => {
                if Registers::unlinks(value) {
                    self.stop();
                }
                self.registers.write_control(value);
                self.run();
            }
            _ => {
                self.registers.write(register, value);
                if let (offset::CI, Some(worker)) = (register, &self.worker) {
                    worker.wake();
                }
            }
        }
    }

    /// Raises the port's interrupt again if it has one.
    pub fn raise(&self) {
        self.registers.raise(&self.registers.lock());
    }

    /// Returns to the state after power-on; `by_driver` resets the adapter only.
    pub fn reset(&mut self, by_driver: bool) {
        self.halt();
        self.registers.reset(by_driver);
        if let (Some(drive), false) = (&self.drive, by_driver) {
            drive.power_on();
        }
    }

    /// Stops with nothing in flight and gives the state. Nothing touches guest memory until
    /// [`Port::resume`].
    pub fn suspend(&mut self) -> PortState {
        self.halt();
        let state = self.registers.lock().clone();
        PortState {
            drive: self.drive.as_ref().map(|drive| drive.state()),
            ..state
        }
    }

    /// Takes up a saved state, suspended.
    ///
    /// # Errors
    /// Refuses a state that this port can't be in.
    pub fn restore(&mut self, saved: &PortState) -> Result<(), StateError> {
        self.halt();
        let present = |there: bool| u8::from(there);
        let (there, here) = (saved.drive.is_some(), self.drive.is_some());
        same(
            "number of drives on a SATA port",
            present(there),
            present(here),
        )?;
        self.registers.restore(saved)?;
        match (&self.drive, &saved.drive) {
            (Some(drive), Some(state)) => drive.restore(state),
            _ => Ok(()),
        }
    }

    /// Goes on after [`Port::suspend`] or [`Port::restore`].
    pub fn resume(&mut self) {
        self.run();
    }

    /// The driver takes its commands back.
    fn stop(&mut self) {
        self.halt();
        self.registers.stop();
    }

    /// Serves commands, if there is a drive and they are to be taken.
    fn run(&mut self) {
        let Some(drive) = &self.drive else {
            return;
        };
        if self.worker.is_some() || !self.registers.may_run() {
            return;
        }
        match Worker::start(drive, &self.registers, &self.memory) {
            Ok(worker) => {
                drive.shared().activate(None, vec![worker.waker()]);
                worker.wake();
                self.worker = Some(worker);
            }
            Err(error) => {
                let device = drive.name();
                tracing::error!(device, %error, "Failed to start a SATA port");
                let mut state = self.registers.lock();
                state.faulted = true;
                self.registers.interrupt(&mut state, IS_HOST_FATAL);
            }
        }
    }

    fn halt(&mut self) {
        if let (Some(drive), Some(worker)) = (&self.drive, self.worker.take()) {
            drive.shared().deactivate();
            drop(worker);
        }
    }
}
