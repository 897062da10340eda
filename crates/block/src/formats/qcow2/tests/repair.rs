//! The power fails while an image is repaired, or made larger: the next repair goes well, and
//! nothing is lost.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::power_cut::{SIZE, host, open};
use super::replay::{Disk, crash};
use super::setup::{Image, Random, Shape, qemu, shapes, stamp_of, stamped};
use crate::formats::qcow2::check::mend_refcounts;
use crate::host::record::{Recorder, Recording};
use crate::{BlockBackend, VolatileSlice};

/// An image full of data whose refcounts are wrong, and that says so.
fn damaged(shape: &Shape, random: &mut Random) -> Image {
    let image = Image::new(shape);
    let disk = open(&image, None).unwrap();
    let mut data: Vec<u8> = (0..SIZE / 512).flat_map(|at| stamped(at + 1)).collect();
    let bufs = [VolatileSlice::from(&mut data[..])];
    disk.write_vectored(&bufs, 0).unwrap();
    drop(disk);
    let mut bytes = Disk::of(&image.file).bytes;
    let number = |bytes: &[u8], at: usize| u64::from_be_bytes(*bytes[at..].first_chunk().unwrap());
    let table = number(&bytes, 48) as usize;
    let block = number(&bytes, table) as usize;
    bytes[79] |= 1;
    match random.below(3) {
        // The block is lost, or what is in it is anything.
        0 => bytes[table..table + 8].fill(0),
        1 => bytes[block..block + 512].fill(0),
        _ => {
            for _ in 0..40 {
                bytes[block + random.below(512) as usize] = random.below(3) as u8;
            }
        }
    }
    image.file.write_all_at(&bytes, 0).unwrap();
    image
}

fn check(image: &Image, says: &str) {
    let text = qemu("qemu-img", &["check"], &image.path("image"));
    assert!(text.contains("No errors"), "{says}: {text}");
    let disk = open(image, None).unwrap();
    let mut bytes = vec![0; SIZE as usize];
    let bufs = [VolatileSlice::from(&mut bytes[..])];
    disk.read_vectored(&bufs, 0).unwrap();
    for (at, sector) in (1..).zip(bytes.chunks_exact(512)) {
        assert_eq!(stamp_of(sector), Some(at), "{says}");
    }
}

#[test]
fn a_repair_may_be_interrupted() {
    let mut random = Random::new();
    for shape in shapes(SIZE) {
        // Version 2 can't say that it was not closed, and the others keep no refcounts of data.
        if shape.options.version < 3 || shape.external || shape.snapshot {
            continue;
        }
        let image = damaged(&shape, &mut random);
        let before = [Disk::of(&image.file)];
        let recorder = Arc::new(Recorder::default());
        let recording = Recording {
            recorder: Arc::clone(&recorder),
            file: 0,
        };
        mend_refcounts(&host(&image.file, Some(recording))).unwrap();
        check(&image, shape.name);
        let events = recorder.take();
        for _ in 0..4 {
            let count = random.below(events.len() as u64 + 1) as usize;
            let left = crash(&before, &events[..count], &mut random).remove(0);
            image.file.set_len(0).unwrap();
            image.file.write_all_at(&left.bytes, 0).unwrap();
            let says = format!("{}, {count} of {} events", shape.name, events.len());
            // It still says that it was not closed, or is whole.
            drop(open(&image, None).unwrap_or_else(|error| panic!("{says}: {error}")));
            check(&image, &says);
        }
    }
}
