//! Writes to new clusters, of which helpers do several as one.

use std::os::unix::fs::FileExt;

use super::*;
use crate::qcow2::{CreateOptions, create};

/// Bytes of a write: a quarter of a cluster.
const PART: usize = 16 << 10;
const PARTS: usize = 64;

fn qcow2(direct: bool) -> (NamedTempFile, Arc<dyn BlockBackend>) {
    let file = NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let options = CreateOptions {
        size: (PART * PARTS) as u64,
        ..CreateOptions::default()
    };
    create(file.reopen().unwrap(), "new", None, &options).unwrap();
    let disk = reopen(&file, direct);
    (file, disk)
}

fn reopen(file: &NamedTempFile, direct: bool) -> Arc<dyn BlockBackend> {
    let mut options = DiskOptions::new(file.reopen().unwrap(), "disk");
    options.direct = direct;
    open(options).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Parts of the disk that follow each other, in any order, and some not at all.
    #[test]
    fn all_of_it_is_there_after_a_flush(
        direct: bool,
        runs in Just((0..PARTS).collect::<Vec<_>>())
            .prop_map(|parts| parts.chunks(7).map(<[usize]>::to_vec).collect::<Vec<_>>())
            .prop_shuffle(),
        left_out in 0..PARTS,
    ) {
        for kind in KINDS {
            let (file, disk) = qcow2(direct);
            let mut rig = Rig::new(kind, disk);
            let mut memory: Vec<u128> = vec![0; PART * PARTS / 16 + 256];
            let memory: &mut [u8] = zerocopy::IntoBytes::as_mut_bytes(&mut memory[..]);
            let skip = memory.as_ptr().align_offset(4096);
            let memory = &mut memory[skip..skip + PART * PARTS];
            for (part, data) in memory.chunks_mut(PART).enumerate() {
                data.fill(part as u8 + 1);
            }
            let mut pieces: Vec<_> = memory.chunks_mut(PART).collect();
            let mut under_way = 0;
            for part in runs.iter().flatten().filter(|part| **part != left_out) {
                let request = Request {
                    operation: Operation::Write,
                    offset: (part * PART) as u64,
                    len: PART as u64,
                };
                let bufs = [VolatileSlice::from(&mut *pieces[*part])];
                // SAFETY: the memory lives longer than the engine's requests.
                match unsafe { rig.engine.begin(*part, request, &bufs, true) } {
                    Some(result) => result.unwrap(),
                    None => under_way += 1,
                }
            }
            // Without the page cache a write to a new cluster takes time.
            prop_assert!(!direct || under_way > 0);
            while under_way > 0 {
                let (token, ending) = rig.wait_end();
                prop_assert!(matches!(ending, Ending::Done(Ok(()))), "{} {:?}", token, ending);
                under_way -= 1;
            }
            rig.run(Operation::Flush, 0, &mut []).unwrap();
            // What is not in the file now is lost.
            let copy = NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
            let bytes = std::fs::read(file.path()).unwrap();
            copy.as_file().write_all_at(&bytes, 0).unwrap();
            drop(rig);
            let mut back = vec![0xee; PART * PARTS];
            let disk = reopen(&copy, false);
            disk.read_vectored(&[VolatileSlice::from(&mut back[..])], 0).unwrap();
            for (part, data) in back.chunks(PART).enumerate() {
                let expected = if part == left_out { 0 } else { part as u8 + 1 };
                prop_assert!(data.iter().all(|byte| *byte == expected), "part {}", part);
            }
        }
    }
}
