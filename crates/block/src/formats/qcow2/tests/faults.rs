//! Requests of the host that fail, as on a full disk: the image stays sound, nothing is lost that
//! was not being written, and once the host is well again everything works as before.

use super::power_cut::{SIZE, first_stamp, open};
use super::setup::{Image, Random, Shape, shapes, stamp_of, stamped};
use crate::formats::qcow2::check::{Repair, check};
use crate::host::record::Recorder;
use crate::{BlockBackend, VolatileSlice};

/// Whatever each sector may be.
type Possible = Vec<Vec<u64>>;

fn act(disk: &crate::formats::qcow2::Qcow2Disk, possible: &mut Possible, random: &mut Random) {
    let start = random.below(SIZE / 512);
    let longest = (SIZE / 512 - start).min(if random.below(6) == 0 { 700 } else { 20 });
    let count = 1 + random.below(longest);
    let sectors = start as usize..(start + count) as usize;
    let (offset, len) = (start * 512, count * 512);
    // What they may be afterwards, and whether also what they were.
    let (stamp, done, keeps) = match random.below(12) {
        0..=1 => {
            let _ = disk.flush();
            return;
        }
        2..=3 => (0, disk.discard(offset, len), true),
        4..=5 => (
            0,
            disk.write_zeroes(offset, len, random.below(2) == 0),
            false,
        ),
        _ => {
            let stamp = 1 + random.below(1 << 30);
            let mut data = stamped(stamp).repeat(count as usize);
            let bufs = [VolatileSlice::from(&mut data[..])];
            (stamp, disk.write_vectored(&bufs, offset), false)
        }
    };
    for sector in &mut possible[sectors] {
        if done.is_ok() && !keeps {
            sector.clear();
        }
        sector.push(stamp);
    }
}

fn check_content(disk: &dyn BlockBackend, possible: &Possible, says: &str) {
    let mut bytes = vec![0xee; SIZE as usize];
    disk.read_vectored(&[VolatileSlice::from(&mut bytes[..])], 0)
        .unwrap_or_else(|error| panic!("{says}: {error:?}"));
    for (sector, (content, possible)) in bytes.chunks_exact(512).zip(possible).enumerate() {
        let stamp = stamp_of(content);
        assert!(
            stamp.is_some_and(|stamp| possible.contains(&stamp)),
            "{says}: sector {sector} is {stamp:x?}, not of {possible:x?}"
        );
    }
}

fn fail_at_times(shape: &Shape, random: &mut Random) {
    let image = Image::new(shape);
    let mut possible: Possible = (0..SIZE / 512)
        .map(|sector| vec![first_stamp(shape, sector)])
        .collect();
    for session in 0..2 {
        let says = format!("{}, session {session}", shape.name);
        let recorder = std::sync::Arc::new(Recorder::default());
        let disk = open(&image, Some(&recorder)).unwrap();
        for _ in 0..25 {
            recorder.fail_after(random.below(12).cast_signed());
            for _ in 0..=random.below(4) {
                act(&disk, &mut possible, random);
            }
            recorder.fail_after(i64::MAX);
            for _ in 0..random.below(3) {
                act(&disk, &mut possible, random);
            }
        }
        check_content(&disk, &possible, &says);
        disk.flush().unwrap();
        drop(disk);
        let file = std::fs::File::open(image.path("image")).unwrap();
        let report = check(file, "image", Repair::No, &mut |_, _| {}).unwrap();
        assert!(report.is_clean(), "{says}: {:?}", report.messages);
        let disk = open(&image, None).unwrap();
        check_content(&disk, &possible, &says);
    }
}

#[test]
fn failures_of_the_host_do_no_harm() {
    let mut random = Random::new();
    let rounds = std::env::var("ROUNDS").map_or(1, |rounds| rounds.parse().unwrap());
    for _ in 0..rounds {
        for shape in shapes(SIZE) {
            fail_at_times(&shape, &mut random);
        }
    }
}
