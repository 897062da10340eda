//! The items that a firmware configuration device offers, by key and by file name.

use std::collections::BTreeMap;

/// Longest file name in bytes; the directory has room for 56 with the closing zero.
pub const NAME_MAX: usize = 55;

/// Key of the first file; the specification's numbered items are below it.
const FIRST_FILE: u16 = 0x20;
/// First key that no file can have: above are flags of the selector.
const KEYS_END: u16 = 0x4000;
const DIRECTORY: u16 = 0x19;
const DIRECTORY_ENTRY: usize = 64;

/// Why an item can't be offered.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FwCfgError {
    /// The name is empty, too long or not printable ASCII.
    #[error("The fw_cfg file name {0:?} is not 1 to {NAME_MAX} printable ASCII characters")]
    InvalidName(String),
    /// Two files have one name.
    #[error("The fw_cfg file {0:?} exists already")]
    DuplicateName(String),
    /// The content is larger than the directory can say.
    #[error("The fw_cfg file {0:?} has 4 GiB or more")]
    TooLarge(String),
    /// All keys are taken.
    #[error("There are too many fw_cfg files")]
    TooMany,
}

/// The numbered items that firmware asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NumberedItems {
    /// vCPUs at power-on.
    pub cpus: u16,
    /// One more than the highest APIC ID.
    pub max_cpus: u16,
    /// Offer a boot menu, and wait for a key that asks for it.
    pub boot_menu: bool,
}

/// All items of one device.
#[derive(Debug, Clone)]
pub struct FwCfgItems {
    numbered: BTreeMap<u16, Vec<u8>>,
    files: BTreeMap<String, Vec<u8>>,
}

impl FwCfgItems {
    /// The items without any file.
    pub fn new(numbered: NumberedItems) -> Self {
        const DMA_INTERFACE: u32 = 1 << 1;
        const TRADITIONAL_INTERFACE: u32 = 1 << 0;
        let features = (TRADITIONAL_INTERFACE | DMA_INTERFACE).to_le_bytes();
        let items: [(u16, Vec<u8>); 8] = [
            (0x00, b"QEMU".to_vec()),
            (0x01, features.to_vec()),
            // No display: SeaBIOS then speaks through the serial port by itself.
            (0x04, 1_u16.to_le_bytes().to_vec()),
            (0x05, numbered.cpus.to_le_bytes().to_vec()),
            // No NUMA nodes.
            (0x0d, 0_u64.to_le_bytes().to_vec()),
            (0x0e, u16::from(numbered.boot_menu).to_le_bytes().to_vec()),
            (0x0f, numbered.max_cpus.to_le_bytes().to_vec()),
            // The timer's ISA interrupt 0 is at I/O APIC pin 2, as the MADT says.
            (0x8002, vec![1]),
        ];
        Self {
            numbered: items.into(),
            files: BTreeMap::new(),
        }
    }

    /// Adds the file `name`.
    ///
    /// # Errors
    /// Refuses names that are no file names or taken, contents of 4 GiB and too many files.
    pub fn add_file(&mut self, name: &str, content: Vec<u8>) -> Result<(), FwCfgError> {
        let printable = name.bytes().all(|byte| byte.is_ascii_graphic());
        if name.is_empty() || name.len() > NAME_MAX || !printable {
            return Err(FwCfgError::InvalidName(name.to_owned()));
        }
        if self.files.contains_key(name) {
            return Err(FwCfgError::DuplicateName(name.to_owned()));
        }
        if u32::try_from(content.len()).is_err() {
            return Err(FwCfgError::TooLarge(name.to_owned()));
        }
        if self.files.len() >= usize::from(KEYS_END - FIRST_FILE) {
            return Err(FwCfgError::TooMany);
        }
        self.files.insert(name.to_owned(), content);
        Ok(())
    }

    /// Resolves keys: numbered items, the directory, and files by the order of their names.
    pub(super) fn into_table(mut self) -> BTreeMap<u16, Vec<u8>> {
        let directory = self.directory();
        self.numbered.insert(DIRECTORY, directory);
        let files = (FIRST_FILE..KEYS_END).zip(self.files.into_values());
        self.numbered.extend(files);
        self.numbered
    }

    fn directory(&self) -> Vec<u8> {
        let count = u32::try_from(self.files.len()).unwrap_or(u32::MAX);
        let mut directory = count.to_be_bytes().to_vec();
        directory.reserve(self.files.len() * DIRECTORY_ENTRY);
        for (key, (name, content)) in (FIRST_FILE..KEYS_END).zip(&self.files) {
            let len = u32::try_from(content.len()).unwrap_or(u32::MAX);
            directory.extend(len.to_be_bytes());
            directory.extend(key.to_be_bytes());
            directory.extend([0; 2]);
            let mut field = [0; NAME_MAX + 1];
            for (slot, byte) in field.iter_mut().zip(name.bytes()) {
                *slot = byte;
            }
            directory.extend(field);
        }
        directory
    }
}
