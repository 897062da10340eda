//! Frame information structures: what goes between the adapter and its drives (Serial ATA 3.x,
//! 10.5), as the driver sees it in memory.

/// A register FIS from the host, of 20 bytes.
const HOST_TO_DEVICE: u8 = 0x27;
const DEVICE_TO_HOST: u8 = 0x34;
const PIO_SETUP: u8 = 0x5f;
const SET_DEVICE_BITS: u8 = 0xa1;

const INTERRUPT: u8 = 1 << 6;
/// Of a PIO setup: the data goes to the host.
const TO_HOST: u8 = 1 << 5;

/// Status: an error, see the error register.
pub const ERR: u8 = 1 << 0;
/// Status: data is to be moved.
pub const DRQ: u8 = 1 << 3;
/// Status: a command is under way.
pub const BSY: u8 = 1 << 7;
/// Status of a drive that waits for commands.
pub const READY: u8 = 0x50;

/// Error: the command was aborted.
pub const ABORTED: u8 = 1 << 2;
/// Error: there is no such sector.
pub const NOT_FOUND: u8 = 1 << 4;
/// Error: data can't be read.
pub const UNCORRECTABLE: u8 = 1 << 6;

/// Bytes of a block of PIO data.
const BLOCK: u16 = 512;

/// Bytes of a register FIS.
pub const REGISTER_LEN: usize = 20;

/// What the host asks of a drive.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Command {
    /// Whether there is a command; otherwise only `control` counts.
    pub is_command: bool,
    pub command: u8,
    pub features: u16,
    /// 48 bits; a command of 28 takes four of them from `device`.
    pub lba: u64,
    pub count: u16,
    pub device: u8,
    pub control: u8,
}

impl Command {
    /// Reads a FIS; `None` if it is of another kind.
    pub fn parse(bytes: &[u8; REGISTER_LEN]) -> Option<Self> {
        let [
            kind,
            flags,
            command,
            features,
            l0,
            l1,
            l2,
            device,
            rest @ ..,
        ] = *bytes;
        let [
            l3,
            l4,
            l5,
            features_high,
            count,
            count_high,
            _icc,
            control,
            ..,
        ] = rest;
        (kind == HOST_TO_DEVICE).then(|| Self {
            is_command: flags & 0x80 != 0,
            command,
            features: u16::from_le_bytes([features, features_high]),
            lba: u64::from_le_bytes([l0, l1, l2, l3, l4, l5, 0, 0]),
            count: u16::from_le_bytes([count, count_high]),
            device,
            control,
        })
    }
}

/// The registers that a drive shows when a command has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TaskFile {
    pub status: u8,
    pub error: u8,
    pub lba: u64,
    pub count: u16,
    pub device: u8,
}

impl TaskFile {
    /// Of a command that went well.
    pub fn good(command: &Command) -> Self {
        Self {
            status: READY,
            error: 0,
            lba: command.lba,
            count: command.count,
            device: command.device,
        }
    }

    /// Of a command that failed with these bits.
    pub fn failed(command: &Command, error: u8) -> Self {
        Self {
            status: READY | ERR,
            error,
            ..Self::good(command)
        }
    }

    /// Of a drive that was reset and has this signature.
    pub fn signature(signature: u32) -> Self {
        let [count, low, mid, high] = signature.to_le_bytes();
        Self {
            status: READY,
            error: 1,
            lba: u64::from_le_bytes([low, mid, high, 0, 0, 0, 0, 0]),
            count: count.into(),
            device: 0,
        }
    }

    /// Whether the command failed.
    pub fn is_error(&self) -> bool {
        self.status & ERR != 0
    }

    /// As a register FIS to the host.
    pub fn to_host(self) -> [u8; REGISTER_LEN] {
        let mut fis = self.layout(DEVICE_TO_HOST);
        fis[1] = INTERRUPT;
        fis
    }

    /// As the PIO setup that goes before the last block to the host, after which the command is
    /// done.
    pub fn pio_setup(self) -> [u8; REGISTER_LEN] {
        let mut fis = self.layout(PIO_SETUP);
        fis[1] = INTERRUPT | TO_HOST;
        fis[2] |= DRQ;
        fis[15] = self.status;
        [fis[16], fis[17]] = BLOCK.to_le_bytes();
        fis
    }

    fn layout(self, kind: u8) -> [u8; REGISTER_LEN] {
        let [l0, l1, l2, l3, l4, l5, ..] = self.lba.to_le_bytes();
        let [c0, c1] = self.count.to_le_bytes();
        let (status, error) = (self.status, self.error);
        [
            kind,
            0,
            status,
            error,
            l0,
            l1,
            l2,
            self.device,
            l3,
            l4,
            l5,
            0,
            c0,
            c1,
            0,
            0,
            0,
            0,
            0,
            0,
        ]
    }
}

/// Tells of queued commands that are `done`, by tag.
pub fn set_device_bits(status: u8, error: u8, done: u32) -> [u8; 8] {
    let [a, b, c, d] = done.to_le_bytes();
    // Busy and data request are no part of it.
    [SET_DEVICE_BITS, INTERRUPT, status & 0x77, error, a, b, c, d]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn fields_are_where_they_belong() {
        let mut bytes = [0; REGISTER_LEN];
        for (index, byte) in (1..).zip(&mut bytes) {
            *byte = index;
        }
        assert_eq!(Command::parse(&bytes), None);
        bytes[0] = HOST_TO_DEVICE;
        let command = Command::parse(&bytes).unwrap();
        assert!(!command.is_command);
        assert_eq!((command.command, command.features), (3, 0x0c04));
        assert_eq!((command.lba, command.count), (0x0b0a_0907_0605, 0x0e0d));
        assert_eq!((command.device, command.control), (8, 16));
        let fis = TaskFile::good(&command).to_host();
        assert_eq!(fis[..4], [DEVICE_TO_HOST, INTERRUPT, READY, 0]);
        assert_eq!(fis[4..14], [5, 6, 7, 8, 9, 10, 11, 0, 13, 14]);
        let fis = TaskFile::good(&command).pio_setup();
        assert_eq!((fis[2], fis[15], fis[17]), (0x58, READY, 2));
        assert_eq!(
            set_device_bits(0xd1, 4, 0x8000_0001)[2..],
            [0x51, 4, 1, 0, 0, 0x80]
        );
    }
}
