//! The firmware: finds the Linux that the disk would boot and starts it, inside the guest.
//!
//! Started by PVH. Where it can't go on it says why at its control port and halts; the VMM then
//! starts another firmware. Nothing of the disk is ever looked at by the VMM itself.

#![no_std]
#![no_main]
// Addresses and lengths of a 64-bit machine, and registers of their own width.
#![allow(clippy::cast_possible_truncation)]

extern crate alloc;

mod machine;

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt::Write;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicU16, Ordering};

use edgevmm_fast::choice::{Choice, Volumes};
use edgevmm_fast::disk::Disk;
use edgevmm_fast::linux::{ENTRY_64, HEAD_LEN, Header, KERNEL_FLOOR};
use edgevmm_fast::parameters::Parameters;
use edgevmm_fast::start_info::{MapEntry, MemoryMap, StartInfo};
use edgevmm_fast::{Decline, Reason};

use machine::pci::{self, Function};
use machine::port::ControlPort;
use machine::virtio_blk::VirtioBlk;
use machine::{cpu, heap, memory};

/// Where the kernel finds its boot parameters and its command line.
const ZERO_PAGE: u64 = 0x7000;
const COMMAND_LINE: u64 = 0x2_0000;
const COMMAND_LINE_MAX: usize = 0x1_0000;
/// More entries has no machine that starts this.
const MAP_MAX: u32 = 64;

/// The control port, for whoever fails where it is not known.
static PORT: AtomicU16 = AtomicU16::new(0);

// SAFETY: The linker script defines it; only its address is taken.
unsafe extern "C" {
    static __bss_end: u8;
}

/// Called by the entry code with the address of PVH's start info.
pub extern "C" fn start(info: u64) -> ! {
    let info: StartInfo = memory::read(info);
    if let Some(parameters) = parameters(&info) {
        PORT.store(parameters.port, Ordering::Relaxed);
        cpu::guard();
        let Err(decline) = boot(&info, &parameters);
        decline_with(decline.reason, &decline.text);
    }
    cpu::halt()
}

/// Says that this disk is for another firmware, and halts.
fn decline_with(reason: Reason, text: &str) -> ! {
    ControlPort(PORT.load(Ordering::Relaxed)).decline(reason, text);
    cpu::halt()
}

/// An exception has happened.
pub extern "C" fn failed() -> ! {
    decline_with(Reason::Crash, "the firmware crashed")
}

/// The time is up.
pub extern "C" fn late() -> ! {
    decline_with(Reason::Time, "it took longer than a minute")
}

#[panic_handler]
fn panicked(info: &PanicInfo<'_>) -> ! {
    let mut line = Line::default();
    let _ = write!(line, "the firmware failed: {}", info.message());
    decline_with(Reason::Crash, line.text())
}

/// The start of a text, without any heap.
struct Line {
    bytes: [u8; 120],
    len: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self {
            bytes: [0; 120],
            len: 0,
        }
    }
}

impl Line {
    fn text(&self) -> &str {
        let bytes = self.bytes.get(..self.len).unwrap_or_default();
        core::str::from_utf8(bytes).unwrap_or("the firmware failed")
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        for byte in text.bytes() {
            let place = self.bytes.get_mut(self.len).ok_or(core::fmt::Error)?;
            *place = byte;
            self.len += 1;
        }
        Ok(())
    }
}

fn parameters(info: &StartInfo) -> Option<Parameters> {
    if info.magic != StartInfo::MAGIC || info.version == 0 {
        return None;
    }
    set_up_heap(info)?;
    let mut line = Vec::new();
    for address in info.command_line.. {
        match memory::read(address) {
            0_u8 => break,
            byte => line.push(byte),
        }
        if line.len() > COMMAND_LINE_MAX {
            return None;
        }
    }
    Parameters::parse(core::str::from_utf8(&line).ok()?)
}

/// The heap is what is between the firmware and the kernel.
fn set_up_heap(info: &StartInfo) -> Option<()> {
    let start = &raw const __bss_end as u64;
    let entries = map_entries(info);
    let end = entries.filter(|entry| entry.kind == 1 && entry.address <= start);
    let end = end.map(|entry| entry.address + entry.len).max()?;
    // SAFETY: RAM behind the firmware's own, and nothing else was put there.
    (end > start).then(|| unsafe { heap::init(start, end.min(KERNEL_FLOOR)) })
}

fn map_entries(info: &StartInfo) -> impl Iterator<Item = MapEntry> + use<> {
    let first = info.memory_map;
    let count = info.memory_map_entries.min(MAP_MAX);
    let entry = move |index| memory::read(first + u64::from(index) * size_of::<MapEntry>() as u64);
    (0..count).map(entry)
}

/// Starts the kernel, or says why not.
fn boot(info: &StartInfo, parameters: &Parameters) -> Result<core::convert::Infallible, Decline> {
    let map = MemoryMap::new(map_entries(info).collect());
    if !map.is_ram(ZERO_PAGE, COMMAND_LINE + COMMAND_LINE_MAX as u64) {
        return Err(Decline::new(Reason::Memory, "there is no low memory"));
    }
    pci::place_bars(parameters.ecam, parameters.window);
    let choice = Volumes::find(&disks(parameters)?)?.choose()?;
    let name = choice.name.clone();
    let entry = load(choice, &map, info.rsdp)?;
    // All files are closed, and so all disks are reset.
    ControlPort(parameters.port).booting(&name);
    cpu::unguard();
    // SAFETY: `load` has put a kernel there and its boot parameters here.
    unsafe { cpu::enter(entry, ZERO_PAGE) }
}

fn disks(parameters: &Parameters) -> Result<Vec<Disk>, Decline> {
    let mut disks = Vec::new();
    for slot in &parameters.disks {
        let function = Function::find(parameters.ecam, *slot);
        match function.and_then(VirtioBlk::new) {
            Some(disk) => disks.push(Disk::new(Box::new(disk))),
            None if disks.is_empty() => {
                let text = "the first disk is no virtio disk";
                return Err(Decline::new(Reason::Disk, text));
            }
            None => {}
        }
    }
    Ok(disks)
}

/// Puts all in place; gives the kernel's entry point.
fn load(mut choice: Choice, map: &MemoryMap, rsdp: u64) -> Result<u64, Decline> {
    let kernel = &mut choice.kernel;
    let mut head = vec![0; HEAD_LEN.min(kernel.piece.len as usize)];
    kernel.file.read_at(kernel.piece.offset, &mut head)?;
    let header = Header::new(&head, kernel.piece.len)?;
    // Each RAM disk begins at a multiple of 4 bytes.
    let padded = |len: u64| len.next_multiple_of(4);
    let lens = choice.initrds.iter().map(|initrd| padded(initrd.piece.len));
    let plan = header.plan(map, lens.sum(), choice.command_line.len())?;

    // SAFETY: RAM above the firmware and its heap, by the plan.
    let place = unsafe { memory::slice(plan.kernel, plan.len as usize) };
    kernel
        .file
        .read_at(kernel.piece.offset + plan.offset, place)?;
    let mut at = plan.initrd;
    for initrd in &mut choice.initrds {
        let len = initrd.piece.len;
        // SAFETY: RAM above the kernel, by the plan; the next begins behind it.
        let place = unsafe { memory::slice(at, padded(len) as usize) };
        let (content, padding) = place.split_at_mut(len as usize);
        initrd.file.read_at(initrd.piece.offset, content)?;
        padding.fill(0);
        at += padded(len);
    }

    let line = choice.command_line.as_bytes();
    // SAFETY: Low memory that was checked to be RAM, where the firmware is not.
    let place = unsafe { memory::slice(COMMAND_LINE, COMMAND_LINE_MAX) };
    let Some((text, rest)) = place.split_at_mut_checked(line.len()) else {
        return Err(Decline::new(Reason::Kernel, "the command line is too long"));
    };
    text.copy_from_slice(line);
    rest.iter_mut().take(1).for_each(|byte| *byte = 0);
    let page = header.zero_page(&plan, map, rsdp, COMMAND_LINE as u32);
    // SAFETY: As for the command line, and apart from it.
    unsafe { memory::slice(ZERO_PAGE, page.len()) }.copy_from_slice(&page);
    Ok(plan.kernel + ENTRY_64)
}
