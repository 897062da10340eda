//! Disks in memory, for tests.

#![allow(clippy::unwrap_used)]

use std::cell::Cell;
use std::rc::Rc;

use crate::disk::{Disk, SECTOR, SECTOR_LEN, Sectors};

impl Sectors for Vec<u8> {
    fn count(&self) -> u64 {
        self.len() as u64 / SECTOR
    }

    fn read(&mut self, first: u64, into: &mut [u8]) -> bool {
        assert!(into.len().is_multiple_of(SECTOR_LEN));
        let start = usize::try_from(first * SECTOR).unwrap();
        into.copy_from_slice(&self[start..start + into.len()]);
        true
    }
}

/// A disk of these bytes.
pub fn disk_of(bytes: Vec<u8>) -> Disk {
    Disk::new(Box::new(bytes))
}

/// A disk that counts how often it is read.
pub struct Counted(Vec<u8>, Rc<Cell<u32>>);

impl Counted {
    pub fn sectors(bytes: Vec<u8>) -> (Box<dyn Sectors>, Rc<Cell<u32>>) {
        let count = Rc::<Cell<u32>>::default();
        (Box::new(Self(bytes, Rc::clone(&count))), count)
    }
}

impl Sectors for Counted {
    fn count(&self) -> u64 {
        self.0.count()
    }

    fn read(&mut self, first: u64, into: &mut [u8]) -> bool {
        self.1.set(self.1.get() + 1);
        self.0.read(first, into)
    }
}
