//! What a base was like when an overlay was put on it, to tell whether it still is.
//!
//! An overlay over a base that was written since shows its guest a mixture of two disks, and the
//! guest's next writes make that permanent. So an overlay remembers two things of all files below
//! it, in order:
//!
//! - a **stamp**: their lengths, the times of their last writes, and what they begin with. It is all
//!   that is looked at when it is the same, so that a start costs nothing. A kernel counts these
//!   times in steps; a file that was written within the last step is waited for, as it could be
//!   written once more without another time.
//! - their **content**, as a hash. It decides when the stamp is another one: after `touch`, or when
//!   the files were copied, moved to another machine or restored. Files that take up to a GiB
//!   together, as cloud images do, are hashed in whole. Of larger ones, which would hold up a first
//!   start for minutes, only samples are.
//!
//! Inode numbers and names play no part, so that files can be moved and renamed; nor do holes, so
//! that a copy may have others. Samples can tell that a base has changed, but not that it has not:
//! a large base with another stamp is refused in any case, and its user has to vouch for it. A
//! block device has no time of its last write. It is known by its content alone; of a large one
//! that means by samples, and a small change to it goes unnoticed.
//!
//! The hash is no cryptographic one: whoever can change a base at will can do to the guest whatever
//! he likes, with or without another content that has the same hash.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::time::{Duration, SystemTime};

use twox_hash::XxHash3_128;

use crate::host::HostFile;
use crate::map::hole_or_data;

/// Bytes that files may take up to be hashed in whole.
const WHOLE_MAX: u64 = 1 << 30;
/// Unit of hashing. Those that are all zeroes are left out.
const BLOCK: usize = 64 << 10;
/// Samples taken of a large file, beside its first and last block.
const SAMPLES: u64 = 1024;
/// Bytes in a sample.
const SAMPLE: usize = 4 << 10;
/// Longest steps of time in which kernels count, and filesystems that count in seconds.
const STEP: Duration = Duration::from_millis(20);
const COARSE_STEP: Duration = Duration::from_secs(2);

/// Bytes of a fingerprint's record.
pub const RECORD_LEN: usize = 48;
const RECORD_VERSION: u8 = 1;
const FLAG_WHOLE: u8 = 1 << 0;
const FLAG_DEVICES: u8 = 1 << 1;

/// What some files were like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint {
    files: u32,
    /// Sum of their lengths in bytes.
    len: u64,
    stamp: u128,
    content: u128,
    /// The content is that of all bytes, not of samples.
    whole: bool,
    /// Some are block devices, which the stamp says nothing of.
    devices: bool,
}

/// What became of files since their fingerprint was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing.
    Same,
    /// Their content is the same, but their stamp is this one now.
    SameContent(Fingerprint),
    /// They were written or replaced. Whether by something else can't be told.
    Unsure,
    /// They are other ones.
    Changed,
}

impl Fingerprint {
    /// Takes the fingerprint of files, which nobody writes to meanwhile.
    ///
    /// # Errors
    /// A file can't be read.
    pub fn take(files: &[&HostFile]) -> io::Result<Self> {
        wait_for_next_step(files)?;
        let mut allocated = 0_u64;
        for file in files {
            allocated = allocated.saturating_add(allocated_len(file)?);
        }
        Self::take_as(files, allocated <= WHOLE_MAX)
    }

    fn take_as(files: &[&HostFile], whole: bool) -> io::Result<Self> {
        let stamped = Self::stamp(files)?;
        let content = content(files, whole)?;
        Ok(Self {
            content,
            whole,
            ..stamped
        })
    }

    /// A fingerprint without the content.
    fn stamp(files: &[&HostFile]) -> io::Result<Self> {
        let mut hasher = XxHash3_128::new();
        let (mut len, mut devices) = (0_u64, false);
        let mut buffer = vec![0; BLOCK];
        for file in files {
            let own = file.len()?;
            len = len.saturating_add(own);
            hasher.write(&own.to_be_bytes());
            let metadata = file.file().metadata()?;
            if metadata.file_type().is_block_device() {
                devices = true;
            } else {
                hasher.write(&metadata.mtime().to_be_bytes());
                hasher.write(&metadata.mtime_nsec().to_be_bytes());
            }
            hash_block(file, 0, own, &mut buffer, &mut hasher)?;
        }
        Ok(Self {
            files: u32::try_from(files.len()).unwrap_or(u32::MAX),
            len,
            stamp: hasher.finish_128(),
            content: 0,
            whole: false,
            devices,
        })
    }

    /// Tells whether files are those that this was taken of. Nobody writes to them meanwhile.
    ///
    /// # Errors
    /// A file can't be read.
    pub fn verify(&self, files: &[&HostFile]) -> io::Result<Verdict> {
        let now = Self::stamp(files)?;
        if (now.files, now.len) != (self.files, self.len) {
            return Ok(Verdict::Changed);
        }
        let devices = self.devices || now.devices;
        if now.stamp == self.stamp && !devices {
            return Ok(Verdict::Same);
        }
        wait_for_next_step(files)?;
        let now = Self::take_as(files, self.whole)?;
        Ok(if now.content != self.content {
            Verdict::Changed
        } else if self.whole || devices {
            Verdict::SameContent(now)
        } else {
            Verdict::Unsure
        })
    }

    /// As bytes, to be kept.
    pub fn to_record(self) -> [u8; RECORD_LEN] {
        let mut record = [0; RECORD_LEN];
        let flags = if self.whole { FLAG_WHOLE } else { 0 };
        let devices = if self.devices { FLAG_DEVICES } else { 0 };
        record[0] = RECORD_VERSION;
        record[1] = flags | devices;
        record[4..8].copy_from_slice(&self.files.to_be_bytes());
        record[8..16].copy_from_slice(&self.len.to_be_bytes());
        record[16..32].copy_from_slice(&self.stamp.to_be_bytes());
        record[32..48].copy_from_slice(&self.content.to_be_bytes());
        record
    }

    /// From the bytes that [`Self::to_record`] made; none if they are not such.
    pub fn from_record(record: &[u8; RECORD_LEN]) -> Option<Self> {
        let (_, rest) = record.split_first_chunk::<4>()?;
        let (files, rest) = rest.split_first_chunk()?;
        let (len, rest) = rest.split_first_chunk()?;
        let (stamp, rest) = rest.split_first_chunk()?;
        let content = rest.first_chunk()?;
        (record[0] == RECORD_VERSION).then(|| Self {
            files: u32::from_be_bytes(*files),
            len: u64::from_be_bytes(*len),
            stamp: u128::from_be_bytes(*stamp),
            content: u128::from_be_bytes(*content),
            whole: record[1] & FLAG_WHOLE != 0,
            devices: record[1] & FLAG_DEVICES != 0,
        })
    }
}

/// Waits until a write to one of `files` would give it another time than it has.
fn wait_for_next_step(files: &[&HostFile]) -> io::Result<()> {
    for file in files {
        let metadata = file.file().metadata()?;
        let step = if metadata.mtime_nsec() == 0 {
            COARSE_STEP
        } else {
            STEP
        };
        // A time to come is none that a write would give.
        let age = SystemTime::now().duration_since(metadata.modified()?);
        let left = age.map(|age| step.saturating_sub(age));
        std::thread::sleep(left.unwrap_or_default());
    }
    Ok(())
}

fn allocated_len(file: &HostFile) -> io::Result<u64> {
    let metadata = file.file().metadata()?;
    if metadata.file_type().is_block_device() {
        return file.len();
    }
    Ok(metadata.blocks().saturating_mul(512))
}

fn content(files: &[&HostFile], whole: bool) -> io::Result<u128> {
    let mut hasher = XxHash3_128::new();
    let mut buffer = vec![0; BLOCK];
    for file in files {
        let len = file.len()?;
        hasher.write(&len.to_be_bytes());
        if whole {
            hash_whole(file, len, &mut buffer, &mut hasher)?;
        } else {
            hash_samples(file, len, &mut buffer, &mut hasher)?;
        }
    }
    Ok(hasher.finish_128())
}

fn hash_whole(
    file: &HostFile,
    len: u64,
    buffer: &mut [u8],
    hasher: &mut XxHash3_128,
) -> io::Result<()> {
    let mut at = 0;
    while at < len {
        let (hole, reach) = hole_or_data(file.file(), at, len - at);
        // To the last block that begins in the hole, and at least to the end of this one.
        let reach = at.saturating_add(reach) / BLOCK as u64 * BLOCK as u64;
        if hole && reach > at {
            at = reach;
            continue;
        }
        hash_block(file, at, len, buffer, hasher)?;
        at += BLOCK as u64;
    }
    Ok(())
}

fn hash_samples(
    file: &HostFile,
    len: u64,
    buffer: &mut [u8],
    hasher: &mut XxHash3_128,
) -> io::Result<()> {
    hash_block(file, 0, len, buffer, hasher)?;
    hash_block(file, len.saturating_sub(BLOCK as u64), len, buffer, hasher)?;
    let sample = SAMPLE as u64;
    for number in 0..SAMPLES {
        let at = len / SAMPLES * number / sample * sample;
        hash_block(file, at, len, &mut buffer[..SAMPLE], hasher)?;
    }
    Ok(())
}

/// Hashes what there is from `at` on, as much as fits `buffer`, unless it is zeroes.
fn hash_block(
    file: &HostFile,
    at: u64,
    len: u64,
    buffer: &mut [u8],
    hasher: &mut XxHash3_128,
) -> io::Result<()> {
    let left = usize::try_from(len.saturating_sub(at)).unwrap_or(usize::MAX);
    let fits = left.min(buffer.len());
    let block = &mut buffer[..fits];
    file.read_buf(block, at)?;
    if block.iter().any(|byte| *byte != 0) {
        hasher.write(&at.to_be_bytes());
        hasher.write(block);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs::{File, FileTimes, OpenOptions};
    use std::os::unix::fs::FileExt;
    use std::path::Path;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn open(path: &Path) -> HostFile {
        HostFile::new(File::open(path).unwrap(), "base", false).unwrap()
    }

    fn write(path: &Path, at: u64, data: &[u8]) {
        let file = OpenOptions::new().write(true).open(path).unwrap();
        file.write_all_at(data, at).unwrap();
    }

    fn touch(path: &Path) {
        let times = FileTimes::new().set_modified(SystemTime::now() - Duration::from_secs(9));
        let file = OpenOptions::new().write(true).open(path).unwrap();
        file.set_times(times).unwrap();
    }

    /// A file of 3 MiB and a few bytes with a hole in the middle.
    fn base(dir: &Path) -> std::path::PathBuf {
        let path = dir.join("base");
        let file = File::create(&path).unwrap();
        file.set_len(3 * MIB + 5).unwrap();
        file.write_all_at(&[1; 100], 0).unwrap();
        file.write_all_at(&[2; 100], 2 * MIB + 70).unwrap();
        path
    }

    #[test]
    fn records_are_read_as_they_were_written() {
        for (whole, devices) in [(true, false), (false, true), (false, false)] {
            let fingerprint = Fingerprint {
                files: 3,
                len: 1 << 40,
                stamp: 1 << 100 | 5,
                content: 2 << 100 | 7,
                whole,
                devices,
            };
            let mut record = fingerprint.to_record();
            assert_eq!(Fingerprint::from_record(&record), Some(fingerprint));
            record[0] += 1;
            assert_eq!(Fingerprint::from_record(&record), None);
        }
    }

    #[test]
    fn touching_and_copying_are_no_changes() {
        let dir = tempfile::tempdir().unwrap();
        let path = base(dir.path());
        let taken = Fingerprint::take(&[&open(&path)]).unwrap();
        assert_eq!(taken.verify(&[&open(&path)]).unwrap(), Verdict::Same);
        touch(&path);
        let Verdict::SameContent(now) = taken.verify(&[&open(&path)]).unwrap() else {
            panic!()
        };
        assert_eq!(now.verify(&[&open(&path)]).unwrap(), Verdict::Same);
        // A copy without holes.
        let copy = dir.path().join("copy");
        std::fs::write(&copy, std::fs::read(&path).unwrap()).unwrap();
        let verdict = taken.verify(&[&open(&copy)]).unwrap();
        assert!(matches!(verdict, Verdict::SameContent(_)), "{verdict:?}");
    }

    #[test]
    fn one_byte_anywhere_is_a_change() {
        let dir = tempfile::tempdir().unwrap();
        let path = base(dir.path());
        let taken = Fingerprint::take(&[&open(&path)]).unwrap();
        for at in [0, 99, 100, MIB, 2 * MIB + 169, 3 * MIB + 4] {
            let mut before = [0];
            File::open(&path)
                .unwrap()
                .read_exact_at(&mut before, at)
                .unwrap();
            write(&path, at, &[before[0] ^ 1]);
            assert_eq!(taken.verify(&[&open(&path)]).unwrap(), Verdict::Changed);
            write(&path, at, &before);
            let verdict = taken.verify(&[&open(&path)]).unwrap();
            assert!(matches!(verdict, Verdict::SameContent(_)), "{verdict:?}");
        }
        write(&path, 3 * MIB + 5, &[0]);
        assert_eq!(taken.verify(&[&open(&path)]).unwrap(), Verdict::Changed);
    }

    #[test]
    fn a_write_right_after_the_stamp_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = base(dir.path());
        for round in 0..20 {
            write(&path, 10, &[round]);
            let taken = Fingerprint::take(&[&open(&path)]).unwrap();
            write(&path, 10, &[round + 1]);
            assert_eq!(taken.verify(&[&open(&path)]).unwrap(), Verdict::Changed);
        }
    }

    #[test]
    fn of_a_large_file_a_new_stamp_is_enough_to_doubt() {
        let dir = tempfile::tempdir().unwrap();
        let path = base(dir.path());
        let file = open(&path);
        let taken = Fingerprint::take_as(&[&file], false).unwrap();
        assert_eq!(taken.verify(&[&file]).unwrap(), Verdict::Same);
        touch(&path);
        assert_eq!(taken.verify(&[&file]).unwrap(), Verdict::Unsure);
        write(&path, 50, &[0xee]);
        assert_eq!(taken.verify(&[&file]).unwrap(), Verdict::Changed);
    }

    #[test]
    fn files_count_in_their_order() {
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (dir.path().join("one"), dir.path().join("other"));
        std::fs::write(&one, "1").unwrap();
        std::fs::write(&other, "2").unwrap();
        let (one, other) = (open(&one), open(&other));
        let taken = Fingerprint::take(&[&one, &other]).unwrap();
        assert_eq!(taken.verify(&[&one, &other]).unwrap(), Verdict::Same);
        assert_eq!(taken.verify(&[&other, &one]).unwrap(), Verdict::Changed);
        assert_eq!(taken.verify(&[&one]).unwrap(), Verdict::Changed);
    }
}
