//! The state of a machine beside its memory and its disks: what another VMM goes on from.

use std::time::Duration;

use edgevmm_devices::bus::lock;
use edgevmm_devices::legacy::clock::{Clock, WallClock};
use edgevmm_devices::pci::PciHostState;
use edgevmm_devices::pci::config_space::ConfigSpaceState;
use edgevmm_devices::state::same;
use serde::{Deserialize, Serialize};

use super::Machine;
use super::functions::FunctionState;
use super::legacy::LegacyState;
use crate::kvm::vcpu_state::VcpuState;
use crate::kvm::{ChipState, KvmError};

/// State of a [`Machine`].
#[derive(Debug, Serialize, Deserialize)]
pub struct MachineState {
    vcpus: Vec<VcpuState>,
    chips: ChipState,
    /// The paravirtual clock in nanoseconds.
    clock: u64,
    /// When that was, by the host's wall clock: time since 1970.
    time: Duration,
    legacy: LegacyState,
    pci: PciHostState,
    /// Registers of the LPC bridge, where there is one.
    lpc: Option<ConfigSpaceState>,
    /// How many ways to start the guest were given up.
    given_up: u32,
    /// Of the functions by rising slot.
    functions: Vec<FunctionState>,
}

impl Machine {
    /// The machine's state. The vCPUs must be paused; until [`Machine::resume`] nothing but the
    /// caller changes guest memory.
    ///
    /// # Errors
    /// Fails when KVM refuses.
    pub fn suspend(&self) -> Result<MachineState, KvmError> {
        // Devices first: the interrupts that they raise on the way show in the controllers.
        Ok(MachineState {
            functions: (self.functions.iter())
                .map(|function| function.suspend())
                .collect(),
            given_up: self.boot.given_up(),
            pci: self.pci.state(),
            lpc: self.lpc.as_ref().map(|lpc| lock(lpc).state()),
            legacy: self.legacy.state(),
            chips: self.vm.chips()?,
            clock: self.vm.clock()?,
            time: WallClock.now(),
            vcpus: self.vcpus.states()?,
        })
    }

    /// Takes up a state of a machine of the same config, whose memory the caller has restored. Its
    /// clocks show that time has passed since, as they do after a pause.
    /// The vCPUs must be paused; all goes on with [`Machine::resume`].
    ///
    /// # Errors
    /// Refuses a state that this machine can't be in, and fails when KVM does. The machine must
    /// not run then before it was reset.
    pub fn restore(&mut self, state: &MachineState) -> Result<(), KvmError> {
        let what = "number of PCI functions";
        same(what, state.functions.len(), self.functions.len())?;
        self.boot.start_over();
        while self.boot.given_up() < state.given_up && self.boot.fall_back() {}
        let what = "number of firmwares given up";
        same(what, state.given_up, self.boot.given_up())?;
        let boot = self.boot.current();
        self.pci.set_face(boot.bridge(), boot.config_ports());
        self.pci.reset_all();
        self.legacy.reset(false);
        // Devices last: a line that they raise anew must not be overwritten in the controllers,
        // where one that is up already changes nothing.
        self.vm.restore_chips(&state.chips)?;
        // Of two hosts the wall clocks may differ: a guest's time never goes back.
        let gap = WallClock.now().saturating_sub(state.time);
        let nanoseconds = u64::try_from(gap.as_nanos()).unwrap_or(u64::MAX);
        self.vm.set_clock(state.clock.saturating_add(nanoseconds))?;
        self.vcpus.restore(&state.vcpus, gap)?;
        for (function, state) in self.functions.iter().zip(&state.functions) {
            function.restore(state)?;
        }
        same(
            "number of LPC bridges",
            u64::from(state.lpc.is_some()),
            u64::from(self.lpc.is_some()),
        )?;
        if let (Some(lpc), Some(state)) = (&self.lpc, &state.lpc) {
            lock(lpc).restore(state)?;
        }
        self.pci.restore(&state.pci)?;
        self.legacy.restore(&state.legacy)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::Write;

    use edgevmm_config::{BootConfig, ByteSize, VmConfig};
    use edgevmm_devices::pci::config_memory::SLOT_LEN;
    use tempfile::NamedTempFile;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::lifecycle::Mailbox;

    const RAM: usize = 4 << 20;
    const AWAY: Duration = Duration::from_secs(3600);
    const RNG: u64 = SLOT_LEN as u64;

    /// mov al, 0x40; out 0x70, al; mov al, 0x55; out 0x71, al; mov dx, 0x3f8
    /// again: inc bl; mov al, bl; out dx, al; jmp again
    const COUNT: &[u8] =
        b"\xb0\x40\xe6\x70\xb0\x55\xe6\x71\xba\xf8\x03\xfe\xc3\x88\xd8\xee\xeb\xf9";

    /// A BIOS that counts on the serial port.
    fn bios() -> NamedTempFile {
        let mut image = vec![0; 128 << 10];
        let (code, entry) = (image.len() - 0x100, image.len() - 0x10);
        image[code..][..COUNT.len()].copy_from_slice(COUNT);
        // jmp to the code, which is 0xf3 before the next instruction.
        image[entry..][..3].copy_from_slice(&[0xe9, 0x0d, 0xff]);
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(&image).unwrap();
        file
    }

    struct Running {
        machine: Machine,
        _mailbox: Mailbox,
    }

    impl Running {
        fn new(bios: &NamedTempFile) -> Self {
            let mut config = VmConfig {
                boot: BootConfig {
                    bios: Some(bios.path().to_path_buf()),
                    ..BootConfig::default()
                },
                nets: Vec::new(),
                ..VmConfig::default()
            };
            config.memory.size = ByteSize(RAM as u64);
            let mailbox = Mailbox::default();
            let machine = Machine::build(&config, &mailbox).unwrap();
            let _mailbox = mailbox;
            Self { machine, _mailbox }
        }

        /// Runs the machine until it has printed; first and last byte.
        fn count(&self) -> (u8, u8) {
            let console = self.machine.console();
            let mut reader = console.reader(0);
            self.machine.resume();
            let mut all = Vec::new();
            let mut bytes = [0; 4096];
            let chunk = reader.read_blocking(&mut bytes);
            all.extend(&bytes[..chunk.len]);
            self.machine.pause();
            // What came meanwhile, and the reader did not wait for.
            console.close();
            loop {
                let chunk = reader.read_blocking(&mut bytes);
                assert_eq!(chunk.dropped, 0);
                if chunk.closed {
                    break;
                }
                all.extend(&bytes[..chunk.len]);
            }
            (all[0], all[all.len() - 1])
        }
    }

    #[test]
    fn another_machine_goes_on_where_one_was() {
        let bios = bios();
        let first = Running::new(&bios);
        let (_, last) = first.count();
        // As firmware would: the entropy source's BAR, decoding and interrupt line.
        for (offset, value) in [(0x10, 0xc123_4000_u32), (4, 6), (0x3c, 11)] {
            let bytes = value.to_le_bytes();
            first.machine.pci.config_write(RNG + offset, &bytes);
        }
        first.machine.pci.window_write(0xc123_4014, &[3]);

        let state = first.machine.suspend().unwrap();
        let text = serde_json::to_string(&state).unwrap();
        let mut bytes = vec![0; RAM];
        let memory = &first.machine.memory;
        memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        drop(first);

        let mut second = Running::new(&bios);
        let memory = &second.machine.memory;
        memory.write_slice(&bytes, GuestAddress(0)).unwrap();
        let mut state: MachineState = serde_json::from_str(&text).unwrap();
        state.time = state.time.saturating_sub(AWAY);
        second.machine.restore(&state).unwrap();
        // Its clock did not stand still while it was nowhere.
        let clock = Duration::from_nanos(second.machine.vm.clock().unwrap());
        let then = Duration::from_nanos(state.clock);
        assert!(clock - then >= AWAY, "{clock:?} after {then:?}");
        let mut status = [0];
        second.machine.pci.window_read(0xc123_4014, &mut status);
        assert_eq!(status, [3]);
        let again = serde_json::to_value(second.machine.suspend().unwrap()).unwrap();
        assert_eq!(again["legacy"]["cmos"]["cells"][0x40], 0x55);
        let functions = serde_json::to_value(&state).unwrap()["functions"].take();
        assert_eq!(again["functions"], functions);
        assert_eq!(second.count().0, last.wrapping_add(1));
    }

    #[test]
    fn states_of_other_machines_are_refused() {
        let bios = bios();
        let mut first = Running::new(&bios);
        first.count();
        let mut state = first.machine.suspend().unwrap();
        state.functions.clear();
        let error = first.machine.restore(&state).unwrap_err();
        assert!(error.to_string().contains("PCI functions"), "{error}");
    }
}
