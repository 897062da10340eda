//! A virtio driver that knows how it is done and does it wrong.

use crate::memory::{ARENA, BUFFERS, ECAM, WINDOW, buffer, ring};
use crate::random::Random;
use crate::script::{Kind, Script};

const STATUS: u32 = 0x14;
const QUEUE_SELECT: u32 = 0x16;
const QUEUE_SIZE: u32 = 0x18;
const QUEUE_VECTOR: u32 = 0x1a;
const QUEUE_ENABLE: u32 = 0x1c;
const QUEUE_DESCRIPTORS: u32 = 0x20;
const QUEUE_DRIVER: u32 = 0x28;
const QUEUE_DEVICE: u32 = 0x30;
const DEVICE_CONFIG: u32 = 0x800;
const NOTIFY: u32 = 0x1000;
const MSIX_TABLE: u32 = 0x2000;

const BAR_LEN: u32 = 0x4000;

/// Queue of a device with ports that carries the driver's messages.
const CONTROL_QUEUE: u16 = 3;

/// Length of what the driver has for each queue in the arena.
const QUEUE_MEMORY: u32 = 0x8000;

/// Descriptor flags: another follows, the device writes, it is a table of descriptors.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

const VERSION_1: u64 = 1 << 32;
const RING_FEATURES: u64 = 1 << 28 | 1 << 29;

/// What a device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    Block,
    Net,
    Rng,
    Console,
    Ports,
}

/// A device, and where it is.
#[derive(Debug, Clone, Copy)]
pub struct Device {
    pub kind: Type,
    pub slot: u32,
    pub queues: u16,
    /// What a driver that behaves asks for, apart from VERSION_1.
    pub features: u64,
    /// A disk that still has what it began with.
    pub pristine: bool,
}

/// A virtqueue as the driver sets it up.
#[derive(Debug, Clone, Copy)]
struct Queue {
    index: u16,
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
}

impl Device {
    /// Address of its BAR, where firmware and this test put it.
    pub const fn bar(&self) -> u32 {
        WINDOW + (self.slot - 1) * BAR_LEN
    }

    /// Address of its configuration space.
    pub const fn config(&self) -> u32 {
        ECAM + (self.slot << 15)
    }

    /// A queue in memory of its own.
    fn queue(&self, index: u16) -> Queue {
        let base = u64::from(ARENA.start + (self.slot * 8 + u32::from(index)) * QUEUE_MEMORY);
        Queue {
            index,
            size: if self.kind == Type::Ports { 16 } else { 64 },
            descriptors: base,
            available: base + 0x2000,
            used: base + 0x4000,
        }
    }

    /// Back to where a driver can start, whatever was done to it before.
    pub fn recover(&self, script: &mut Script) {
        script.write16(self.config() + 4, 0);
        script.write32(self.config() + 0x10, self.bar());
        script.write16(self.config() + 4, 6);
        script.write8(self.bar() + STATUS, 0);
        // Vectors masked and MSI-X off; it is the first capability.
        for vector in 0..=u32::from(self.queues) {
            script.write32(self.bar() + MSIX_TABLE + vector * 16 + 12, 1);
        }
        script.write16(self.config() + 0x42, 0);
    }

    fn negotiate(&self, script: &mut Script, features: u64) {
        let common = self.bar();
        for status in [0, 1, 3] {
            script.write8(common + STATUS, status);
        }
        for (half, bits) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            script.write32(common + 8, half);
            script.write32(common + 0xc, bits as u32);
        }
        script.write8(common + STATUS, 0xb);
    }

    fn set_up(&self, script: &mut Script, queue: &Queue, vector: u16) {
        let common = self.bar();
        script.write16(common + QUEUE_SELECT, queue.index);
        script.write16(common + QUEUE_SIZE, queue.size);
        script.write16(common + QUEUE_VECTOR, vector);
        script.write64(common + QUEUE_DESCRIPTORS, queue.descriptors);
        script.write64(common + QUEUE_DRIVER, queue.available);
        script.write64(common + QUEUE_DEVICE, queue.used);
        script.write16(common + QUEUE_ENABLE, 1);
    }

    fn notify(&self, script: &mut Script, queue: u16) {
        script.write16(self.bar() + NOTIFY + u32::from(queue) * 4, queue);
    }

    /// Drives the device as it is meant to be; comes to an end only if that works. Its slot is what
    /// is printed last if not.
    pub fn use_properly(&self, script: &mut Script) {
        script.say(&self.slot.to_string());
        let queue = self.queue(match self.kind {
            Type::Block | Type::Rng => 0,
            Type::Net | Type::Console => 1,
            Type::Ports => CONTROL_QUEUE,
        });
        self.clear(script, &queue);
        self.negotiate(script, self.features | VERSION_1);
        self.set_up(script, &queue, 0xffff);
        script.write8(self.bar() + STATUS, 0xf);
        let buffer = u64::from(BUFFERS.start);
        let chain: &[(u64, u32, u16)] = match self.kind {
            Type::Block => {
                script.push(Kind::Fill, BUFFERS.start, 0, 0x400);
                script.write8(BUFFERS.start + 0x800, 0xff);
                &[
                    (buffer, 16, 0),
                    (buffer + 0x200, 512, WRITE),
                    (buffer + 0x800, 1, WRITE),
                ]
            }
            Type::Rng => &[(buffer, 64, WRITE)],
            Type::Net => &[(buffer, 12 + 60, 0)],
            Type::Console => &[(buffer, 1, 0)],
            Type::Ports => &[(buffer, 8, 0)],
        };
        for (index, (address, len, flags)) in (0..).zip(chain) {
            let last = usize::from(index) + 1 == chain.len();
            let flags = flags | if last { 0 } else { NEXT };
            descriptor(
                script,
                queue.descriptors,
                index,
                (*address, *len, flags, index + 1),
            );
        }
        script.write32(queue.available as u32 + 4, 0);
        script.write16(queue.available as u32 + 2, 1);
        self.notify(script, queue.index);
        // One used buffer, and the device asks for notifications again as it is done.
        script.push(Kind::Until32, queue.used as u32, 1 << 16, 0);
        if self.kind == Type::Block {
            // The status byte and what follows it, which no device has touched.
            script.expect32(BUFFERS.start + 0x800, 0, "a read failed");
            if self.pristine {
                script.expect32(BUFFERS.start + 0x200, super::DISK_PATTERN, "wrong data");
            }
        }
    }

    /// Turns a disk's write cache off, or fails the run if it is not on.
    pub fn write_cache(&self, script: &mut Script, off: bool) {
        const WRITEBACK: u32 = DEVICE_CONFIG + 32;
        if off {
            script.write8(self.bar() + WRITEBACK, 0);
        } else {
            // With the number of queues.
            let on = 1 | u32::from(self.queues) << 16;
            script.expect32(self.bar() + WRITEBACK, on, "the write cache is off");
        }
    }

    fn clear(&self, script: &mut Script, queue: &Queue) {
        script.push(Kind::Fill, queue.descriptors as u32, 0, QUEUE_MEMORY / 4);
    }
}

fn descriptor(
    script: &mut Script,
    table: u64,
    index: u16,
    (a, len, flags, next): (u64, u32, u16, u16),
) {
    let at = table as u32 + u32::from(index) * 16;
    script.write64(at, a);
    script.write32(at + 8, len);
    script.write32(at + 12, u32::from(flags) | u32::from(next) << 16);
}

/// One attack on a device.
pub fn attack(script: &mut Script, random: &Random, device: &Device) {
    let queues = hostile_queues(random, device);
    for queue in &queues {
        device.clear(script, queue);
        fill_queue(script, random, device, queue);
    }
    device.negotiate(script, features(random, device));
    for queue in &queues {
        let mut shown = *queue;
        if random.one_in(6) {
            spoil(random, &mut shown);
        }
        let vector = if random.one_in(2) {
            queue.index
        } else {
            random.half()
        };
        device.set_up(script, &shown, vector);
    }
    if random.one_in(3) {
        interrupts(script, random, device);
    }
    script.write8(
        device.bar() + STATUS,
        if random.one_in(10) { 4 } else { 0xf },
    );
    for _ in 0..random.below(12) {
        let queue = queues[random.next() as usize % queues.len()];
        disturb(script, random, device, &queue);
    }
}

fn hostile_queues(random: &Random, device: &Device) -> Vec<Queue> {
    let mut queues: Vec<_> = (0..device.queues)
        .map(|index| device.queue(index))
        .collect();
    for queue in &mut queues {
        queue.size = random.pick(&[64, 64, 64, 1, 2, 32, 16]).min(queue.size);
    }
    if random.one_in(8) {
        queues.truncate(1);
    }
    queues
}

/// What the driver asks for: what was offered, less, or more.
fn features(random: &Random, device: &Device) -> u64 {
    match random.below(6) {
        0 => random.next(),
        1 => VERSION_1 | random.next() & 0xffff_ffff,
        2 => VERSION_1 | device.features & random.next(),
        3 => VERSION_1 | RING_FEATURES & random.next(),
        _ => VERSION_1 | device.features | RING_FEATURES,
    }
}

/// A queue that is not where or what it should be.
fn spoil(random: &Random, queue: &mut Queue) {
    match random.below(6) {
        0 => queue.size = random.pick(&[0, 3, 255, 257, 512, 0x8000, 0xffff]),
        1 => queue.descriptors = ring(random),
        2 => queue.available = ring(random),
        3 => queue.used = ring(random),
        // Rings that the device writes are rings that it reads.
        4 => queue.used = random.pick(&[queue.descriptors, queue.available, queue.available + 4]),
        _ => queue.index = random.half(),
    }
}

/// Descriptors and available chains, some of them sound.
fn fill_queue(script: &mut Script, random: &Random, device: &Device, queue: &Queue) {
    let count = 1 + random.below(12) as u16;
    let mut heads = Vec::new();
    let mut index = 0;
    while index < count {
        heads.push(index);
        index += request(script, random, device, queue, index);
    }
    let available = queue.available as u32;
    let entries = random.below(8);
    for entry in 0..entries {
        let head = if random.one_in(8) {
            random.half()
        } else {
            random.pick(&heads)
        };
        script.write16(available + 4 + entry * 2, head);
    }
    // The flags, and where the driver wants to be told.
    script.write16(available, random.below(3) as u16);
    script.write16(available + 4 + u32::from(queue.size) * 2, random.half());
    let index = if random.one_in(6) {
        random.half()
    } else {
        entries as u16
    };
    script.write16(available + 2, index);
}

/// One chain from descriptor `first` on; returns how many descriptors it takes.
fn request(
    script: &mut Script,
    random: &Random,
    device: &Device,
    queue: &Queue,
    first: u16,
) -> u16 {
    let header = u64::from(BUFFERS.start + 0x1_0000 + u32::from(first) * 16);
    let mut chain = Vec::new();
    match device.kind {
        Type::Block => {
            let kind = random.pick(&[0, 0, 1, 1, 4, 8, 11, 13, random.word()]);
            let sector = random.pick(&[0, 7, 2047, 2048, u64::MAX, u64::MAX / 512, random.next()]);
            script.write32(header as u32, kind);
            script.write64(header as u32 + 8, sector);
            chain.push((header, 16, 0));
            let writes = if matches!(kind, 0 | 8) { WRITE } else { 0 };
            for _ in 0..random.below(4) {
                let (address, len) = buffer(random);
                chain.push((address, len, writes));
            }
            if matches!(kind, 11 | 13) {
                let range = header + 0x1000;
                script.write64(range as u32, random.pick(&[0, 2047, random.next()]));
                script.write64(range as u32 + 8, random.pick(&[1, 8, random.next()]));
                chain = vec![(header, 16, 0), (range, 16, 0)];
            }
            chain.push((header + 0x2000, 1, WRITE));
        }
        Type::Ports if queue.index == CONTROL_QUEUE => {
            let port = random.pick(&[0, 1, 1, 1, 2, random.word()]);
            let event = random.pick(&[0, 3, 3, 6, 6, random.word() & 0xffff]);
            script.write32(header as u32, port);
            script.write32(header as u32 + 4, event | random.below(2) << 16);
            chain.push((header, 8, 0));
        }
        Type::Net | Type::Console | Type::Ports => {
            let writes = if queue.index.is_multiple_of(2) {
                WRITE
            } else {
                0
            };
            for _ in 0..=random.below(3) {
                let (address, len) = buffer(random);
                chain.push((address, len, writes));
            }
        }
        Type::Rng => {
            let (address, len) = buffer(random);
            chain.push((address, len, WRITE));
        }
    }
    let count = chain.len() as u16;
    for (position, (address, len, flags)) in (0..).zip(chain) {
        let index = first + position;
        let more = if position + 1 < count { NEXT } else { 0 };
        let mut whole = (address, len, flags | more, index + 1);
        if random.one_in(10) {
            mutate(random, &mut whole);
        }
        descriptor(script, queue.descriptors, index, whole);
        if whole.2 & INDIRECT != 0 {
            indirect_table(script, random, whole.0);
        }
    }
    count
}

fn mutate(random: &Random, (address, len, flags, next): &mut (u64, u32, u16, u16)) {
    match random.below(6) {
        0 => *next = random.pick(&[0, *next - 1, 0x3f, 0xffff, random.half()]),
        1 => *flags |= NEXT,
        2 => *flags ^= WRITE,
        3 => {
            *flags |= INDIRECT;
            *address = u64::from(BUFFERS.start + 0x8_0000 + random.below(0x100) * 8);
            *len = random.pick(&[16, 64, 17, 0, 4096, 0x10_0000, 0xffff_fff0]);
        }
        4 => *flags = random.half(),
        _ => (*address, *len) = buffer(random),
    }
}

/// What a descriptor may point to as a table: chains, loops and tables in tables.
fn indirect_table(script: &mut Script, random: &Random, table: u64) {
    let room = u64::from(BUFFERS.start)..u64::from(BUFFERS.end - 0x1000);
    if !room.contains(&table) {
        return;
    }
    for index in 0..random.below(6) as u16 {
        let (address, len) = buffer(random);
        let flags = random.pick(&[NEXT, NEXT | WRITE, WRITE, INDIRECT | NEXT, 0]);
        let next = random.pick(&[index + 1, index, 0, 0xffff]);
        descriptor(script, table, index, (address, len, flags, next));
    }
}

/// MSI-X on, with messages to anywhere. None of them is an INIT, a SIPI or an SMI: those would end
/// the payload, and are for the kernel to handle.
fn interrupts(script: &mut Script, random: &Random, device: &Device) {
    let table = device.bar() + MSIX_TABLE;
    for vector in 0..=u32::from(device.queues) {
        let address = random.pick(&[0xfee0_0000, 0xfee0_1000, random.next(), u64::MAX]);
        let mode = random.pick(&[0, 1, 4, 7]);
        script.write64(table + vector * 16, address);
        script.write32(table + vector * 16 + 8, random.word() & !0x700 | mode << 8);
        script.write32(table + vector * 16 + 12, random.below(4));
    }
    let control = random.pick(&[0x8000, 0x8000, 0xc000, 0xffff]);
    script.write16(device.config() + 0x42, control);
    script.write16(device.bar() + 0x10, random.pick(&[0, 1, 0xffff, 0x100]));
}

/// Something that a driver does not do while its device is at work.
fn disturb(script: &mut Script, random: &Random, device: &Device, queue: &Queue) {
    let bar = device.bar();
    match random.below(16) {
        0 => script.write8(bar + STATUS, 0),
        1 => script.write8(bar + STATUS, (random.word() & 0xff) as u8),
        2 => script.push(
            Kind::Storm,
            bar + NOTIFY + u32::from(queue.index) * 4,
            0,
            200,
        ),
        3 => script.write16(queue.available as u32 + 2, random.half()),
        4 => {
            let mut moved = *queue;
            spoil(random, &mut moved);
            device.set_up(script, &moved, random.half());
        }
        5 => script.write32(device.config() + 4, random.below(8)),
        6 => interrupts(script, random, device),
        // Any register at any width.
        7 | 8 => {
            let offset = random.pick(&[0, 0, 0x100, DEVICE_CONFIG, NOTIFY, 0x3000]);
            let address = bar + offset + random.below(0x48);
            let kind = random.pick(&[Kind::Write8, Kind::Write16, Kind::Write32]);
            // Queues must not come to lie on the payload.
            let value = if offset == 0 {
                ring(random) as u32
            } else {
                random.word()
            };
            script.push(kind, address, value, 0);
        }
        9 | 10 => {
            let kind = random.pick(&[Kind::Read8, Kind::Read16, Kind::Read32]);
            script.push(kind, bar + random.below(BAR_LEN), 0, 0);
        }
        11 => script.push(Kind::Spin, 1 + random.below(2000), 0, 0),
        12 => {
            // Descriptors that change while the device walks them.
            let at = queue.descriptors as u32 + random.below(8) * 16;
            script.write32(at + 12, random.word() & 0x3f_0007);
        }
        _ => device.notify(script, queue.index),
    }
}
