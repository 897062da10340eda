//! Files that were not closed: their logs against QEMU's carrying them out.

use super::*;

const LOG_AT: u64 = 1 << 20;
const SECTOR: usize = 4096;

/// Puts a CRC-32C where VHDX has it.
fn seal(bytes: &mut [u8]) {
    bytes[4..8].fill(0);
    let sum = crc32c::crc32c(bytes);
    bytes[4..8].copy_from_slice(&sum.to_le_bytes());
}

fn patch(path: &Path, at: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(bytes, at).unwrap();
}

fn bytes_at(path: &Path, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    File::open(path)
        .unwrap()
        .read_exact_at(&mut bytes, at)
        .unwrap();
    bytes
}

/// Says in the header in use that the log's entries with this mark count.
fn set_log_id(path: &Path, id: [u8; 16]) {
    let at = [64 << 10, 128 << 10]
        .into_iter()
        .max_by_key(|at| {
            bytes_at(path, at + 8, 8)
                .iter()
                .rev()
                .copied()
                .collect::<Vec<_>>()
        })
        .unwrap();
    let mut header = bytes_at(path, at, SECTOR);
    header[48..64].copy_from_slice(&id);
    seal(&mut header);
    patch(path, at, &header);
}

/// Where the table of blocks is.
fn bat_at(path: &Path) -> u64 {
    let table = bytes_at(path, 192 << 10, 16 + 2 * 32);
    let entry = table[16..]
        .chunks_exact(32)
        .find(|entry| entry[..4] == [0x66, 0x77, 0xc2, 0x2d]);
    u64::from_le_bytes(entry.unwrap()[16..24].try_into().unwrap())
}

#[derive(Clone)]
enum Change {
    /// A sector at a byte.
    Data(u64, Vec<u8>),
    /// Zeroes at a byte, so many.
    Zero(u64, u64),
}

struct Entry {
    sequence: u64,
    /// Byte of the log where the oldest entry in use is.
    tail: u32,
    file_len: u64,
    changes: Vec<Change>,
}

const ID: [u8; 16] = [9; 16];

impl Entry {
    fn bytes(&self) -> Vec<u8> {
        let data = self
            .changes
            .iter()
            .filter(|it| matches!(it, Change::Data(..)));
        let begin = (64 + 32 * self.changes.len()).next_multiple_of(SECTOR);
        let mut bytes = vec![0; begin + data.count() * SECTOR];
        let len = bytes.len() as u32;
        bytes[..4].copy_from_slice(b"loge");
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.tail.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[24..28].copy_from_slice(&(self.changes.len() as u32).to_le_bytes());
        bytes[32..48].copy_from_slice(&ID);
        bytes[48..56].copy_from_slice(&self.file_len.to_le_bytes());
        bytes[56..64].copy_from_slice(&self.file_len.to_le_bytes());
        let mut sector = begin;
        for (index, change) in self.changes.iter().enumerate() {
            let descriptor = &mut bytes[64 + 32 * index..][..32];
            descriptor[24..32].copy_from_slice(&self.sequence.to_le_bytes());
            match change {
                Change::Zero(at, len) => {
                    descriptor[..4].copy_from_slice(b"zero");
                    descriptor[8..16].copy_from_slice(&len.to_le_bytes());
                    descriptor[16..24].copy_from_slice(&at.to_le_bytes());
                }
                Change::Data(at, data) => {
                    descriptor[..4].copy_from_slice(b"desc");
                    descriptor[4..8].copy_from_slice(&data[SECTOR - 4..]);
                    descriptor[8..16].copy_from_slice(&data[..8]);
                    descriptor[16..24].copy_from_slice(&at.to_le_bytes());
                    let target = &mut bytes[sector..sector + SECTOR];
                    target[..4].copy_from_slice(b"data");
                    target[4..8].copy_from_slice(&((self.sequence >> 32) as u32).to_le_bytes());
                    target[8..SECTOR - 4].copy_from_slice(&data[8..SECTOR - 4]);
                    target[SECTOR - 4..].copy_from_slice(&(self.sequence as u32).to_le_bytes());
                    sector += SECTOR;
                }
            }
        }
        seal(&mut bytes);
        bytes
    }
}

/// Writes entries into the log from `start` on, around its end.
fn write_log(path: &Path, start: usize, entries: &[Entry]) {
    let mut log = bytes_at(path, LOG_AT, 1 << 20);
    let mut at = start;
    for entry in entries {
        for byte in entry.bytes() {
            log[at] = byte;
            at = (at + 1) % log.len();
        }
    }
    patch(path, LOG_AT, &log);
    set_log_id(path, ID);
}

/// What QEMU reads once it has carried out the log.
fn as_qemu_replays(path: &Path) -> PathBuf {
    let (copy, flat) = (path.with_extension("copy"), path.with_extension("flat"));
    std::fs::copy(path, &copy).unwrap();
    run(
        "qemu-img",
        &["check", "-q", "-r", "all", "-f", "vhdx", str(&copy)],
    );
    run(
        "qemu-img",
        &["convert", "-f", "vhdx", "-O", "raw", str(&copy), str(&flat)],
    );
    flat
}

fn image(dir: &TempDir) -> PathBuf {
    let path = dir.path().join("image.vhdx");
    let options = [
        "create",
        "-q",
        "-f",
        "vhdx",
        "-o",
        "block_size=1M",
        str(&path),
        "40M",
    ];
    run("qemu-img", &options);
    run(
        "qemu-io",
        &["-f", "vhdx", "-c", "write -P 1 0 9M", str(&path)],
    );
    path
}

#[test]
fn a_log_of_qemu_that_did_not_reach_the_tables() {
    let dir = TempDir::new().unwrap();
    let path = image(&dir);
    let before = bytes_at(&path, bat_at(&path), 1 << 20);
    run(
        "qemu-io",
        &["-f", "vhdx", "-c", "write -P 2 20M 1M", str(&path)],
    );
    let whole = path.with_extension("whole");
    run(
        "qemu-img",
        &[
            "convert",
            "-f",
            "vhdx",
            "-O",
            "raw",
            str(&path),
            str(&whole),
        ],
    );
    // QEMU starts its log anew each time, with another mark.
    let entry = bytes_at(&path, LOG_AT, SECTOR);
    assert!(entry.starts_with(b"loge"));
    patch(&path, bat_at(&path), &before);
    assert!(try_open(&path, None).unwrap().read(20 << 20, 512).unwrap() == [0; 512]);
    set_log_id(&path, entry[32..48].try_into().unwrap());
    let mut random = Random::new();
    compare_with(&path, ImageFormat::Vhdx, &whole, &mut random);
    compare_with(
        &path,
        ImageFormat::Vhdx,
        &as_qemu_replays(&path),
        &mut random,
    );
}

#[test]
fn sequences_of_entries() {
    let mut random = Random::new();
    for round in 0..30 {
        let dir = TempDir::new().unwrap();
        let path = image(&dir);
        let bat = bat_at(&path);
        let file_len = std::fs::metadata(&path).unwrap().len();
        let table = bytes_at(&path, bat, SECTOR);
        // Entries that swap and drop blocks, some of which are done with and must not count.
        let (start, count) = (random.below(256) as usize * SECTOR, 1 + random.below(6));
        let done_with = random.below(count);
        let (mut at, mut tail, mut entries) = (start as u32, start as u32, Vec::new());
        for number in 0..count {
            let mut table = table.clone();
            for _ in 0..4 {
                let (a, b) = (random.below(40) as usize * 8, random.below(40) as usize * 8);
                for byte in 0..8 {
                    table.swap(a + byte, b + byte);
                }
            }
            let change = match random.below(3) {
                0 => Change::Zero(bat, SECTOR as u64 * (1 + random.below(3))),
                _ => Change::Data(bat, table),
            };
            let more = Change::Data(bat + 8192, vec![0; SECTOR]);
            if number == done_with {
                tail = at;
            }
            let entry = Entry {
                sequence: 1_000_000_000_000 + number,
                tail,
                file_len,
                changes: vec![change, more],
            };
            at = (at + entry.bytes().len() as u32) % (1 << 20);
            entries.push(entry);
        }
        write_log(&path, start, &entries);
        println!("round {round}: {count} entries from {start}, {done_with} done with");
        compare_with(
            &path,
            ImageFormat::Vhdx,
            &as_qemu_replays(&path),
            &mut random,
        );
    }
}

#[test]
fn logs_that_are_refused() {
    let dir = TempDir::new().unwrap();
    let says = |path: &Path, word: &str| {
        let told = try_open(path, None).err().unwrap().to_string();
        assert!(told.contains(word), "{told:?} does not say {word:?}");
    };
    let path = image(&dir);
    let (bat, file_len) = (bat_at(&path), std::fs::metadata(&path).unwrap().len());
    let entry = |file_len, changes| Entry {
        sequence: 5,
        tail: 0,
        file_len,
        changes,
    };
    let (block, sector) = (file_len - (1 << 20), vec![1; SECTOR]);
    write_log(
        &path,
        0,
        &[entry(file_len, vec![Change::Data(block, sector.clone())])],
    );
    says(&path, "more than its tables");
    write_log(
        &path,
        0,
        &[entry(file_len + 1, vec![Change::Data(bat, sector.clone())])],
    );
    says(&path, "cut off");
    write_log(
        &path,
        0,
        &[entry(file_len, vec![Change::Zero(bat, 1 << 40)])],
    );
    says(&path, "too much");
    write_log(
        &path,
        0,
        &[entry(file_len, vec![Change::Zero(bat, 1 << 20); 3000])],
    );
    says(&path, "too much");
    write_log(&path, 0, &[entry(file_len, vec![Change::Zero(bat, 1)])]);
    says(&path, "log is damaged");
    write_log(
        &path,
        0,
        &[entry(file_len, vec![Change::Data(bat + 1, sector.clone())])],
    );
    says(&path, "log is damaged");
    // Nothing of the log is sound.
    patch(&path, LOG_AT, &[0; 1 << 20]);
    says(&path, "log is damaged");
    // Each sector begins an entry that takes the whole log.
    let mut hostile = entry(file_len, vec![Change::Data(bat, sector)]).bytes();
    hostile[8..12].copy_from_slice(&(1_u32 << 20).to_le_bytes());
    patch(&path, LOG_AT, &hostile[..SECTOR].repeat(256));
    says(&path, "log is damaged");
}
