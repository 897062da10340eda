//! What the payload does: a list of steps, made here and carried out by its interpreter.

/// Bytes of one step in the payload's memory.
pub const STEP_LEN: u32 = 16;

const COM1: u16 = 0x3f8;
const DEBUG: u16 = 0x402;

/// A step's handler, by its place in the interpreter's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    Out8,
    Out16,
    Out32,
    In8,
    In16,
    In32,
    Write8,
    Write16,
    Write32,
    Read8,
    Read16,
    Read32,
    /// Writes the 16-bit value b to a, c times.
    Storm,
    /// Fills c dwords at a with b.
    Fill,
    /// Copies c dwords to a from b.
    Copy,
    /// Writes c bytes at b to port a with one string instruction.
    OutString,
    /// Reads c bytes to b from port a with one string instruction.
    InString,
    /// Turns a loop a times.
    Spin,
    /// Until the 32 bits at a are b.
    Until32,
    /// Until a bit of b is set in port a.
    UntilPort,
    /// Adds b to the 32 bits at a.
    Add32,
    /// Goes on at address a.
    Jump,
    /// Goes on at address c if the 32 bits at a are b.
    JumpIf,
    /// As [`Kind::JumpIf`], if they are not.
    JumpUnless,
    /// Ends in a triple fault, with EAX as read from a, EDX as a and ECX as b.
    Crash,
}

impl Kind {
    pub const COUNT: usize = Self::Crash as usize + 1;
}

/// How a payload talks to the test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Voice {
    /// By the serial port.
    Serial,
    /// By the firmware's debug port, line by line.
    Debug,
}

/// One step: a kind and its operands.
type Step = (Kind, [u32; 3]);

/// Steps for one processor, which begin at an address that is known beforehand.
#[derive(Debug, Clone)]
pub struct Script {
    start: u32,
    voice: Voice,
    steps: Vec<Step>,
}

impl Script {
    pub const fn new(start: u32, voice: Voice) -> Self {
        Self {
            start,
            voice,
            steps: Vec::new(),
        }
    }

    pub fn push(&mut self, kind: Kind, a: u32, b: u32, c: u32) {
        self.steps.push((kind, [a, b, c]));
    }

    /// The address of the next step.
    pub fn here(&self) -> u32 {
        self.after(0)
    }

    /// The address of the step that follows the next `count` ones.
    pub fn after(&self, count: u32) -> u32 {
        self.start + (self.steps.len() as u32 + count) * STEP_LEN
    }

    pub fn bytes(&self) -> Vec<u8> {
        let words = self
            .steps
            .iter()
            .flat_map(|(kind, [a, b, c])| [*kind as u32, *a, *b, *c]);
        words.flat_map(u32::to_le_bytes).collect()
    }

    pub fn out8(&mut self, port: u16, value: u8) {
        self.push(Kind::Out8, port.into(), value.into(), 0);
    }

    pub fn out16(&mut self, port: u16, value: u16) {
        self.push(Kind::Out16, port.into(), value.into(), 0);
    }

    pub fn out32(&mut self, port: u16, value: u32) {
        self.push(Kind::Out32, port.into(), value, 0);
    }

    pub fn write8(&mut self, address: u32, value: u8) {
        self.push(Kind::Write8, address, value.into(), 0);
    }

    pub fn write16(&mut self, address: u32, value: u16) {
        self.push(Kind::Write16, address, value.into(), 0);
    }

    pub fn write32(&mut self, address: u32, value: u32) {
        self.push(Kind::Write32, address, value, 0);
    }

    pub fn write64(&mut self, address: u32, value: u64) {
        self.write32(address, (value & 0xffff_ffff) as u32);
        self.write32(address + 4, (value >> 32) as u32);
    }

    pub fn read32(&mut self, address: u32) {
        self.push(Kind::Read32, address, 0, 0);
    }

    /// Fails the run unless the 32 bits at `address` are `value`: the machine ends and shows its
    /// registers.
    pub fn expect32(&mut self, address: u32, value: u32, what: &str) {
        self.unless(Kind::JumpIf, address, value, |report| {
            report.say(&format!("FAILED: {what}"));
            report.push(Kind::Crash, address, value, 0);
        });
    }

    /// Adds `body` behind a jump over it: [`Kind::JumpIf`] or [`Kind::JumpUnless`] the 32 bits at
    /// `address` are `value`.
    pub fn unless(&mut self, jump: Kind, address: u32, value: u32, body: impl FnOnce(&mut Self)) {
        let mut inner = Self::new(self.after(1), self.voice);
        body(&mut inner);
        self.push(jump, address, value, inner.here());
        self.steps.append(&mut inner.steps);
    }

    /// Prints a line, whatever was printed before and whatever state the serial port is in.
    pub fn say(&mut self, text: &str) {
        let port = match self.voice {
            Voice::Serial => {
                // 8n1 without the divisor latch, no interrupts, no loopback.
                self.out8(COM1 + 3, 3);
                self.out8(COM1 + 1, 0);
                self.out8(COM1 + 4, 3);
                COM1
            }
            Voice::Debug => DEBUG,
        };
        for byte in format!("\n{text}\n").bytes() {
            self.out8(port, byte);
        }
    }

    pub fn power_off(&mut self) {
        const PM1A_CONTROL: u16 = 0x604;
        const SLEEP_ENABLE: u16 = 1 << 13;
        self.out16(PM1A_CONTROL, SLEEP_ENABLE);
        self.push(Kind::Jump, self.here(), 0, 0);
    }
}
