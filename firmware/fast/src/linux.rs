//! The 64-bit boot protocol of Linux (Documentation/arch/x86/boot.rst): where a bzImage and its
//! RAM disk go, and the zero page that tells the kernel.

use alloc::format;

use crate::decline::{Decline, Reason};
use crate::start_info::MemoryMap;

/// How much of the file holds the setup header.
pub const HEAD_LEN: usize = 4096;
/// Length of the zero page.
pub const ZERO_PAGE_LEN: usize = 4096;

const SECTOR: u64 = 512;
const PAGE: u64 = 4096;
const SETUP_SECTORS: usize = 0x1f1;
const HEADER: usize = 0x1f1;
const JUMP: usize = 0x201;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const LOADER: usize = 0x210;
const LOAD_FLAGS: usize = 0x211;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const COMMAND_LINE: usize = 0x228;
const INITRD_MAX: usize = 0x22c;
const ALIGNMENT: usize = 0x230;
const RELOCATABLE: usize = 0x234;
const EXTENDED_FLAGS: usize = 0x236;
const COMMAND_LINE_SIZE: usize = 0x238;
const PREFERRED: usize = 0x258;
const INIT_SIZE: usize = 0x260;
const HEADER_END_MAX: usize = 0x290;

const ZERO_PAGE_RSDP: usize = 0x70;
const ZERO_PAGE_E820_COUNT: usize = 0x1e8;
const ZERO_PAGE_E820: usize = 0x2d0;
const E820_LEN: usize = 20;
const E820_MAX: usize = 128;

const LOADER_UNDEFINED: u8 = 0xff;
const LOADED_HIGH: u8 = 1;
const PROTOCOL_2_12: u16 = 0x20c;
const XLF_KERNEL_64: u16 = 1;
/// Of the loaded part: the 64-bit entry point.
pub const ENTRY_64: u64 = 0x200;

/// Below is the firmware's own.
pub const KERNEL_FLOOR: u64 = 16 << 20;
/// The firmware's page tables end here, and so does what it can put in place.
pub const CEILING: u64 = 4 << 30;

/// The beginning of a bzImage.
#[derive(Debug)]
pub struct Header<'a> {
    head: &'a [u8],
    file_len: u64,
}

/// Where things go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// Where in the file the part that is loaded begins.
    pub offset: u64,
    /// Its length.
    pub len: u64,
    /// Where in memory it goes.
    pub kernel: u64,
    /// Where the RAM disk goes; 0 when there is none.
    pub initrd: u64,
    /// Length of the RAM disk.
    pub initrd_len: u64,
}

fn kernel(text: &str) -> Decline {
    Decline::new(Reason::Kernel, text)
}

impl<'a> Header<'a> {
    /// Takes the first bytes of a kernel of `file_len` bytes.
    ///
    /// # Errors
    /// It is no bzImage with a 64-bit entry point.
    pub fn new(head: &'a [u8], file_len: u64) -> Result<Self, Decline> {
        let header = Self { head, file_len };
        if head.len() < HEADER_END_MAX || header.bytes(MAGIC) != *b"HdrS" {
            return Err(kernel("the kernel is no bzImage"));
        }
        let version = header.word(VERSION);
        if version < PROTOCOL_2_12 || header.word(EXTENDED_FLAGS) & XLF_KERNEL_64 == 0 {
            return Err(kernel("the kernel is too old or not for x86-64"));
        }
        Ok(header)
    }

    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        let bytes = self.head.get(at..at + N).and_then(|b| b.try_into().ok());
        bytes.unwrap_or([0; N])
    }

    fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes(at))
    }

    fn dword(&self, at: usize) -> u64 {
        u64::from(u32::from_le_bytes(self.bytes(at)))
    }

    /// Decides where kernel and RAM disk go.
    ///
    /// # Errors
    /// They don't fit, or the command line is too long.
    pub fn plan(
        &self,
        map: &MemoryMap,
        initrd_len: u64,
        command_line: usize,
    ) -> Result<Plan, Decline> {
        let [setup] = self.bytes(SETUP_SECTORS);
        let setup = if setup == 0 { 4 } else { u64::from(setup) };
        let offset = (setup + 1) * SECTOR;
        let len = self
            .file_len
            .checked_sub(offset)
            .filter(|len| *len > ENTRY_64);
        let len = len.ok_or_else(|| kernel("the kernel is cut short"))?;
        if command_line as u64 > self.dword(COMMAND_LINE_SIZE) {
            return Err(kernel("the command line is longer than the kernel takes"));
        }
        // It unpacks itself over this from where it is.
        let room = self.dword(INIT_SIZE).max(len);
        let start = self.place(map, room)?;
        let mut plan = Plan {
            offset,
            len,
            kernel: start,
            initrd: 0,
            initrd_len,
        };
        if initrd_len > 0 {
            let end = (self.dword(INITRD_MAX) + 1).min(CEILING);
            plan.initrd = place_high(map, start + room, end, initrd_len)?;
        }
        Ok(plan)
    }

    /// Where the kernel has room: where it wants to be, or else the first place that will do.
    fn place(&self, map: &MemoryMap, room: u64) -> Result<u64, Decline> {
        let wanted = u64::from_le_bytes(self.bytes(PREFERRED));
        let fits = |start: u64| {
            let end = start.checked_add(room).filter(|end| *end <= CEILING);
            start >= KERNEL_FLOOR && end.is_some_and(|end| map.is_ram(start, end))
        };
        if fits(wanted) {
            return Ok(wanted);
        }
        let [relocatable] = self.bytes::<1>(RELOCATABLE);
        let alignment = self.dword(ALIGNMENT);
        let movable = relocatable != 0 && alignment.is_power_of_two();
        let mut starts = map.ram().map(|(start, _)| start.max(KERNEL_FLOOR));
        let found = starts.find_map(|start| {
            let start = start.checked_next_multiple_of(alignment.max(PAGE))?;
            (movable && fits(start)).then_some(start)
        });
        found.ok_or_else(|| no_room("kernel", room))
    }

    /// The zero page for a kernel that is loaded as planned, with its command line at `line`.
    #[must_use]
    pub fn zero_page(
        &self,
        plan: &Plan,
        map: &MemoryMap,
        rsdp: u64,
        line: u32,
    ) -> [u8; ZERO_PAGE_LEN] {
        let mut page = [0; ZERO_PAGE_LEN];
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(place) = page.get_mut(at..at + bytes.len()) {
                place.copy_from_slice(bytes);
            }
        };
        // The jump at the header's start says where it ends.
        let [jump] = self.bytes::<1>(JUMP);
        let end = (MAGIC + usize::from(jump)).min(HEADER_END_MAX);
        put(HEADER, self.head.get(HEADER..end).unwrap_or_default());
        let [flags] = self.bytes::<1>(LOAD_FLAGS);
        put(LOADER, &[LOADER_UNDEFINED, flags | LOADED_HIGH]);
        put(COMMAND_LINE, &line.to_le_bytes());
        let low = |value: u64| u32::try_from(value).unwrap_or(0).to_le_bytes();
        put(RAMDISK_IMAGE, &low(plan.initrd));
        put(RAMDISK_SIZE, &low(plan.initrd_len));
        put(ZERO_PAGE_RSDP, &rsdp.to_le_bytes());
        let entries = map.entries().iter().take(E820_MAX);
        let count = u8::try_from(entries.len()).unwrap_or(0);
        put(ZERO_PAGE_E820_COUNT, &[count]);
        for (index, entry) in entries.enumerate() {
            let at = ZERO_PAGE_E820 + index * E820_LEN;
            put(at, &entry.address.to_le_bytes());
            put(at + 8, &entry.len.to_le_bytes());
            put(at + 16, &entry.kind.to_le_bytes());
        }
        page
    }
}

/// The highest place for `len` bytes in `floor..ceiling`.
fn place_high(map: &MemoryMap, floor: u64, ceiling: u64, len: u64) -> Result<u64, Decline> {
    let places = map.ram().filter_map(|(start, end)| {
        let place = end.min(ceiling).checked_sub(len)? / PAGE * PAGE;
        (place >= start.max(floor)).then_some(place)
    });
    places.max().ok_or_else(|| no_room("initial RAM disk", len))
}

fn no_room(what: &str, len: u64) -> Decline {
    let text = format!("the {what} of {} MiB does not fit into memory", len >> 20);
    Decline::new(Reason::Memory, text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;
    use crate::start_info::MapEntry;

    fn map(ram: &[(u64, u64)]) -> MemoryMap {
        let entry = |(start, end): &(u64, u64)| MapEntry {
            address: *start,
            len: end - start,
            kind: 1,
            reserved: 0,
        };
        MemoryMap::new(ram.iter().map(entry).collect())
    }

    fn head() -> Vec<u8> {
        let mut head = vec![0; HEAD_LEN];
        let fields: [(usize, &[u8]); 10] = [
            (SETUP_SECTORS, &[39]),
            (JUMP, &[0x6a]),
            (MAGIC, b"HdrS\x0f\x02"),
            (INITRD_MAX, &0x7fff_ffff_u32.to_le_bytes()),
            (ALIGNMENT, &0x20_0000_u32.to_le_bytes()),
            (RELOCATABLE, &[1]),
            (EXTENDED_FLAGS, &[0x7f]),
            (COMMAND_LINE_SIZE, &2047_u32.to_le_bytes()),
            (PREFERRED, &0x100_0000_u64.to_le_bytes()),
            (INIT_SIZE, &0x300_0000_u32.to_le_bytes()),
        ];
        for (at, bytes) in fields {
            head[at..at + bytes.len()].copy_from_slice(bytes);
        }
        head
    }

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_kernel_goes_where_it_wants_and_its_ram_disk_high() {
        let head = head();
        let header = Header::new(&head, 10 * MIB).unwrap();
        let map = map(&[(0, 0x9_fc00), (MIB, 256 * MIB)]);
        let plan = header.plan(&map, 20 * MIB + 1, 100).unwrap();
        assert_eq!((plan.offset, plan.len), (40 * 512, 10 * MIB - 40 * 512));
        assert_eq!(plan.kernel, 16 * MIB);
        assert_eq!(plan.initrd, 236 * MIB - 4096);
        let page = header.zero_page(&plan, &map, 0xe_0000, 0x2_0000);
        assert_eq!(page[MAGIC..MAGIC + 4], *b"HdrS");
        assert_eq!(
            page[RAMDISK_IMAGE..RAMDISK_IMAGE + 4],
            (236 * MIB - 4096).to_le_bytes()[..4]
        );
        assert_eq!(page[ZERO_PAGE_E820_COUNT], 2);
        assert_eq!(page[ZERO_PAGE_E820 + 28..][..8], (255 * MIB).to_le_bytes());
    }

    #[test]
    fn what_does_not_fit_is_declined() {
        let head = head();
        let header = Header::new(&head, 10 * MIB).unwrap();
        let reason = |ram: &[(u64, u64)], initrd, line| {
            header.plan(&map(ram), initrd, line).map_err(|e| e.reason)
        };
        assert_eq!(reason(&[(MIB, 60 * MIB)], 0, 0), Err(Reason::Memory));
        assert_eq!(reason(&[(MIB, 70 * MIB)], 7 * MIB, 0), Err(Reason::Memory));
        assert!(reason(&[(MIB, 70 * MIB)], 5 * MIB, 0).is_ok());
        assert_eq!(reason(&[(MIB, 256 * MIB)], 0, 2048), Err(Reason::Kernel));
        // Moved when its place is taken.
        let moved = reason(&[(MIB, 17 * MIB), (33 * MIB, 256 * MIB)], 0, 0);
        assert_eq!(moved.map(|plan| plan.kernel), Ok(34 * MIB));
    }

    proptest! {
        #[test]
        fn any_header_is_planned_within_ram_or_declined(
            changes in prop::collection::vec((HEADER..HEADER_END_MAX, any::<u8>()), 0..20),
            len in 0..64 * MIB,
            initrd in 0..300 * MIB,
        ) {
            let mut head = head();
            for (at, byte) in changes {
                head[at] = byte;
            }
            let map = map(&[(0, 0x9_fc00), (MIB, 256 * MIB)]);
            let Ok(header) = Header::new(&head, len) else { return Ok(()) };
            let Ok(plan) = header.plan(&map, initrd, 0) else { return Ok(()) };
            prop_assert!(plan.kernel >= KERNEL_FLOOR);
            prop_assert!(map.is_ram(plan.kernel, plan.kernel + plan.len));
            prop_assert!(plan.offset + plan.len <= len);
            if initrd > 0 {
                prop_assert!(map.is_ram(plan.initrd, plan.initrd + initrd));
                prop_assert!(plan.initrd >= plan.kernel + plan.len);
            }
            let _ = header.zero_page(&plan, &map, 0, 0);
        }
    }
}
