//! Bounds on what is held of the server at a time: in all, and by each, so that nobody can keep the
//! others out.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

/// So many slots in all, and so many for each.
#[derive(Debug)]
pub struct Slots<K> {
    most: usize,
    most_each: usize,
    taken: Mutex<HashMap<K, usize>>,
}

/// Why there is no slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Full {
    /// All are taken.
    All,
    /// Whoever asks has too many of them.
    Own,
}

impl<K: Clone + Eq + Hash> Slots<K> {
    /// None is taken.
    pub fn new(most: usize, most_each: usize) -> Arc<Self> {
        Arc::new(Self {
            most,
            most_each,
            taken: Mutex::default(),
        })
    }

    /// One more for `owner`, who has it until it is dropped.
    ///
    /// # Errors
    /// There is none left.
    pub fn take(self: &Arc<Self>, owner: K) -> Result<Slot<K>, Full> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if taken.get(&owner).is_some_and(|own| *own >= self.most_each) {
            return Err(Full::Own);
        }
        if taken.values().sum::<usize>() >= self.most {
            return Err(Full::All);
        }
        *taken.entry(owner.clone()).or_default() += 1;
        drop(taken);
        Ok(Slot {
            slots: Arc::clone(self),
            owner,
        })
    }
}

/// One of them.
#[derive(Debug)]
pub struct Slot<K: Clone + Eq + Hash> {
    slots: Arc<Slots<K>>,
    owner: K,
}

impl<K: Clone + Eq + Hash> Drop for Slot<K> {
    fn drop(&mut self) {
        let taken = &self.slots.taken;
        let mut taken = taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = taken.get_mut(&self.owner) {
            *own = own.saturating_sub(1);
            if *own == 0 {
                taken.remove(&self.owner);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn nobody_keeps_the_others_out() {
        let slots = Slots::new(3, 2);
        let first = slots.take("a").unwrap();
        let _second = slots.take("a").unwrap();
        assert_eq!(slots.take("a").unwrap_err(), Full::Own);
        let third = slots.take("b").unwrap();
        assert_eq!(slots.take("c").unwrap_err(), Full::All);
        drop(first);
        let _fourth = slots.take("c").unwrap();
        drop(third);
        let _fifth = slots.take("a").unwrap();
        assert_eq!(slots.taken.lock().unwrap().len(), 2, "only who has some");
    }
}
