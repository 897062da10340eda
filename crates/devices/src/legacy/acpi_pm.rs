//! ACPI fixed hardware (ACPI 6.5, section 4.8): PM1a event and control blocks and the PM timer,
//! in one range of twelve ports.
//!
//! The machine is always in ACPI mode (SCI_EN reads as one, there is no SMI command port). The
//! only event is the fixed power button; the only sleeping state is S5. Left out: the timer's
//! carry event (TMR_STS never rises; no operating system waits for it when the timer has 32 bits),
//! the global lock and wake events.
//!
//! UEFI built for Cloud Hypervisor (edk2's OvmfPkg/CloudHv) powers off as hardware-reduced ACPI
//! does, by a byte of its own to the first port, which no other software writes there.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::clock::Clock;
use crate::bus::BusDevice;
use crate::platform::{IrqLine, MachineControl, MachineRequest};
use crate::state::{StateError, ensure};

/// Length of the port range.
pub const PORT_RANGE: u64 = REGISTERS as u64;
/// Offset of the PM1a event block: status, then enable, two bytes each.
pub const EVENT_BLOCK: u16 = 0;
/// Offset of the PM1a control block, two bytes.
pub const CONTROL_BLOCK: u16 = 4;
/// Offset of the PM timer, four bytes.
pub const TIMER_BLOCK: u16 = 8;
/// SLP_TYP of S5, which `\_S5` must name. SeaBIOS powers off with this very value.
pub const S5_SLEEP_TYPE: u8 = 0;

const REGISTERS: usize = 12;
const TIMER_HZ: u128 = 3_579_545;

const POWER_BUTTON: u16 = 1 << 8;
const ENABLE_MASK: u16 = 0x0721;

/// Sleep control of hardware-reduced ACPI: S5 as 5, and the bit that enters it. As status it would
/// acknowledge an event that is reserved.
const REDUCED_S5: u8 = 5 << 2 | 1 << 5;

const SCI_ENABLED: u16 = 1 << 0;
const BUS_MASTER_RELOAD: u16 = 1 << 1;
const SLEEP_TYPE_SHIFT: u32 = 10;
const SLEEP_TYPE_MASK: u16 = 7 << SLEEP_TYPE_SHIFT;
const SLEEP_ENABLE: u16 = 1 << 13;
/// Bits of the control register that keep what is written.
const CONTROL_MASK: u16 = BUS_MASTER_RELOAD | SLEEP_TYPE_MASK;

/// State of an [`AcpiPm`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcpiPmState {
    status: u16,
    enable: u16,
    control: u16,
    /// What the timer counted before this instance's clock started.
    timer_base: u32,
}

/// What the power management block is connected to.
#[derive(Debug, Clone)]
pub struct AcpiPmConfig {
    /// The system control interrupt, level-triggered.
    pub sci: Arc<dyn IrqLine>,
    /// Takes the power-off request.
    pub control: Arc<dyn MachineControl>,
    /// Drives the PM timer: a monotonic clock.
    pub clock: Arc<dyn Clock>,
}

/// The power management block.
#[derive(Debug)]
pub struct AcpiPm {
    config: AcpiPmConfig,
    started: Duration,
    state: AcpiPmState,
}

impl AcpiPm {
    /// A block after power-on.
    pub fn new(config: AcpiPmConfig) -> Self {
        Self {
            started: config.clock.now(),
            config,
            state: AcpiPmState::default(),
        }
    }

    /// Takes up a saved state; the timer goes on from where it stood.
    ///
    /// # Errors
    /// Refuses a state that no block gets into.
    pub fn restore(&mut self, state: &AcpiPmState) -> Result<(), StateError> {
        for (what, saved, possible) in [
            ("PM1 status", state.status, POWER_BUTTON),
            ("PM1 enable", state.enable, ENABLE_MASK),
            ("PM1 control", state.control, CONTROL_MASK),
        ] {
            ensure(saved & !possible == 0, what, saved)?;
        }
        self.started = self.config.clock.now();
        self.state = state.clone();
        self.update_sci();
        Ok(())
    }

    /// The state to go on from.
    pub fn state(&self) -> AcpiPmState {
        AcpiPmState {
            timer_base: self.timer(),
            ..self.state.clone()
        }
    }

    /// Returns to the state after power-on. The timer keeps counting.
    pub fn reset(&mut self) {
        self.state = AcpiPmState {
            timer_base: self.state.timer_base,
            ..AcpiPmState::default()
        };
        self.update_sci();
    }

    /// Presses and releases the power button; the guest sees it if it enabled the event.
    pub fn press_power_button(&mut self) {
        self.state.status |= POWER_BUTTON;
        self.update_sci();
    }

    fn timer(&self) -> u32 {
        let elapsed = self.config.clock.now().saturating_sub(self.started);
        let ticks = elapsed.as_nanos() * TIMER_HZ / 1_000_000_000;
        // The counter has 32 bits and wraps.
        let low = u32::try_from(ticks & u128::from(u32::MAX)).unwrap_or(0);
        self.state.timer_base.wrapping_add(low)
    }

    fn update_sci(&self) {
        let asserted = self.state.status & self.state.enable != 0;
        self.config.sci.set_level(asserted);
    }

    fn registers(&self) -> [u8; REGISTERS] {
        let mut registers = [0; REGISTERS];
        registers[0..2].copy_from_slice(&self.state.status.to_le_bytes());
        registers[2..4].copy_from_slice(&self.state.enable.to_le_bytes());
        registers[4..6].copy_from_slice(&(self.state.control | SCI_ENABLED).to_le_bytes());
        registers[8..12].copy_from_slice(&self.timer().to_le_bytes());
        registers
    }

    fn write_byte(&mut self, offset: u64, byte: u8) {
        let (low, high) = (u16::from(byte), u16::from(byte) << 8);
        match offset {
            0 => self.state.status &= !low,
            1 => self.state.status &= !high,
            2 => self.state.enable = (self.state.enable & 0xff00) | (low & ENABLE_MASK),
            3 => self.state.enable = (self.state.enable & 0x00ff) | (high & ENABLE_MASK),
            4 => self.state.control = (self.state.control & 0xff00) | (low & BUS_MASTER_RELOAD),
            5 => self.write_sleep(high),
            _ => {}
        }
    }

    /// Takes the control register's high byte: the sleep type and the bit that enters it.
    fn write_sleep(&mut self, high: u16) {
        self.state.control = (self.state.control & 0x00ff) | (high & SLEEP_TYPE_MASK);
        let sleep_type = (high & SLEEP_TYPE_MASK) >> SLEEP_TYPE_SHIFT;
        if high & SLEEP_ENABLE != 0 && sleep_type == u16::from(S5_SLEEP_TYPE) {
            self.config.control.request(MachineRequest::PowerOff);
        }
    }
}

impl BusDevice for AcpiPm {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let registers = self.registers();
        let offset = usize::try_from(offset).unwrap_or(REGISTERS);
        for (byte, register) in data.iter_mut().zip(registers.iter().skip(offset)) {
            *byte = *register;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == 0 && data == [REDUCED_S5] {
            self.config.control.request(MachineRequest::PowerOff);
            return;
        }
        for (offset, byte) in (offset..).zip(data) {
            self.write_byte(offset, *byte);
        }
        self.update_sci();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;
    use crate::legacy::clock::testing::ManualClock;
    use crate::testing::{MockControl, MockIrq};

    struct Machine {
        pm: AcpiPm,
        sci: Arc<MockIrq>,
        control: Arc<MockControl>,
        clock: Arc<ManualClock>,
        config: AcpiPmConfig,
    }

    fn machine() -> Machine {
        let sci = Arc::<MockIrq>::default();
        let control = Arc::<MockControl>::default();
        let clock = Arc::new(ManualClock::new(Duration::from_secs(100)));
        let config = AcpiPmConfig {
            sci: sci.clone(),
            control: control.clone(),
            clock: clock.clone(),
        };
        let pm = AcpiPm::new(config.clone());
        Machine {
            pm,
            sci,
            control,
            clock,
            config,
        }
    }

    fn inw(pm: &mut AcpiPm, offset: u64) -> u16 {
        let mut data = [0xff; 2];
        pm.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    fn timer(pm: &mut AcpiPm) -> u32 {
        let mut data = [0xff; 4];
        pm.read(TIMER_BLOCK.into(), &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn power_button_raises_sci_until_acknowledged() {
        let mut m = machine();
        m.pm.press_power_button();
        assert!(!m.sci.level(), "not enabled yet");
        m.pm.write(2, &POWER_BUTTON.to_le_bytes());
        assert!(m.sci.level());
        assert_eq!(inw(&mut m.pm, 0), POWER_BUTTON);
        m.pm.write(0, &0x00ff_u16.to_le_bytes());
        assert!(m.sci.level(), "other bits don't clear it");
        m.pm.write(1, &[1]);
        assert!(!m.sci.level());
        assert_eq!(inw(&mut m.pm, 0), 0);
    }

    #[test]
    fn dword_access_reaches_status_and_enable() {
        let mut m = machine();
        m.pm.press_power_button();
        m.pm.write(0, &[0, 1, 0, 1]);
        let mut data = [0xff; 4];
        m.pm.read(0, &mut data);
        assert_eq!(data, [0, 0, 0, 1]);
        assert_eq!(m.sci.rises(), 0);
    }

    #[test]
    fn only_s5_powers_off_and_sci_en_stays_one() {
        let mut m = machine();
        let s1 = (1 << SLEEP_TYPE_SHIFT) | SLEEP_ENABLE;
        m.pm.write(4, &s1.to_le_bytes());
        assert_eq!(m.control.requests(), []);
        assert_eq!(inw(&mut m.pm, 4), (1 << SLEEP_TYPE_SHIFT) | SCI_ENABLED);
        m.pm.write(4, &0_u16.to_le_bytes());
        assert_eq!(inw(&mut m.pm, 4), SCI_ENABLED);
        // The value that SeaBIOS' APM shutdown writes.
        m.pm.write(4, &0x2000_u16.to_le_bytes());
        assert_eq!(m.control.requests(), [MachineRequest::PowerOff]);
        assert_eq!(inw(&mut m.pm, 4) & SLEEP_ENABLE, 0, "write-only");
    }

    #[test]
    fn the_byte_of_uefi_powers_off_and_no_other_does() {
        let mut m = machine();
        for bytes in [&[0x30][..], &[0x34, 0], &[0x20]] {
            m.pm.write(0, bytes);
        }
        assert_eq!(m.control.requests(), []);
        m.pm.write(0, &[0x34]);
        assert_eq!(m.control.requests(), [MachineRequest::PowerOff]);
    }

    #[test]
    fn timer_counts_at_its_frequency_wraps_and_restores() {
        let mut m = machine();
        assert_eq!(timer(&mut m.pm), 0);
        m.clock.advance(Duration::from_secs(1));
        assert_eq!(timer(&mut m.pm), 3_579_545);
        m.pm.write(8, &[0; 4]);
        assert_eq!(timer(&mut m.pm), 3_579_545, "read-only");
        let state = m.pm.state();
        m.clock.advance(Duration::from_secs(1000));
        let mut restored = AcpiPm::new(m.config.clone());
        restored.restore(&state).unwrap();
        assert_eq!(timer(&mut restored), 3_579_545);
        m.clock.advance(Duration::from_secs(1200));
        let expected = (1201_u64 * 3_579_545) & u64::from(u32::MAX);
        assert_eq!(u64::from(timer(&mut restored)), expected);
    }

    #[test]
    fn pending_button_survives_restore_and_reset_drops_it() {
        let mut m = machine();
        m.pm.write(2, &POWER_BUTTON.to_le_bytes());
        m.pm.press_power_button();
        let json = serde_json::to_string(&m.pm.state()).unwrap();
        m.pm.reset();
        assert!(!m.sci.level());
        assert_eq!(inw(&mut m.pm, 2), 0);
        let mut restored = AcpiPm::new(m.config.clone());
        restored
            .restore(&serde_json::from_str(&json).unwrap())
            .unwrap();
        assert!(m.sci.level());
        assert_eq!(inw(&mut restored, 0), POWER_BUTTON);
        restored.write(1, &[1]);
        assert!(!m.sci.level());
    }

    #[test]
    fn states_that_can_not_be_are_refused() {
        let mut m = machine();
        let change: [fn(&mut AcpiPmState); 3] = [
            |state| state.status = 1,
            |state| state.enable = 2,
            |state| state.control = SLEEP_ENABLE,
        ];
        for change in change {
            let mut state = m.pm.state();
            change(&mut state);
            let error = m.pm.restore(&state).unwrap_err();
            assert!(matches!(error, StateError::Impossible { .. }), "{error}");
        }
        assert_eq!(inw(&mut m.pm, 2), 0);
    }

    proptest! {
        #[test]
        fn any_access_is_survived(
            accesses in proptest::collection::vec((0u64..16, any::<bool>(), any::<[u8; 8]>(), 1usize..9), 0..200)
        ) {
            let mut m = machine();
            for (offset, write, mut bytes, len) in accesses {
                if write {
                    m.pm.write(offset, &bytes[..len]);
                } else {
                    m.pm.read(offset, &mut bytes[..len]);
                }
                prop_assert_eq!(inw(&mut m.pm, 4) & SCI_ENABLED, SCI_ENABLED);
                prop_assert_eq!(m.sci.level(), m.pm.state.status & m.pm.state.enable != 0);
            }
        }
    }
}
