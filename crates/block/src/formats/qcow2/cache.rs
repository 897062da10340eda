//! Slices of tables kept in memory, within a budget.

use std::collections::HashMap;

/// What the cache has of a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// It is in this slot.
    Ready(usize),
    /// Somebody is reading it.
    Loading,
    /// Nothing.
    Absent,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    Loading,
    Ready,
}

#[derive(Debug)]
struct Slot {
    key: u64,
    state: State,
    /// It was used since the hand last came by.
    used: bool,
    /// Requests that count on finding it again.
    holds: u32,
    /// It is not in the file as it is here.
    dirty: bool,
    /// It is on its way to the file, as it was when that began.
    writing: bool,
    data: Box<[u8]>,
}

/// A cache of slices, each known by its number.
///
/// Slices that differ from the file, or may do so, stay whatever the budget says; whoever changes
/// slices asks [`Cache::is_crowded`] first and has them written if so.
#[derive(Debug)]
pub struct Cache {
    slice_len: usize,
    /// Most slots, unless they can't be emptied.
    budget: usize,
    index: HashMap<u64, usize>,
    slots: Vec<Slot>,
    /// The slot found last, which most often is the next one too.
    last: usize,
    /// Where the search for a slot to empty goes on.
    hand: usize,
    dirty: Vec<usize>,
    writing: Vec<usize>,
}

impl Cache {
    /// A cache of slices of `slice_len` bytes each that takes up to `bytes` of memory.
    pub fn new(slice_len: usize, bytes: usize) -> Self {
        Self {
            slice_len,
            // Of what an image has fewer slices than that, all may wait for a flush.
            budget: (bytes / slice_len).max(8),
            index: HashMap::new(),
            slots: Vec::new(),
            last: 0,
            hand: 0,
            dirty: Vec::new(),
            writing: Vec::new(),
        }
    }

    /// Looks for a slice.
    pub fn find(&mut self, key: u64) -> Found {
        let last = self.slots.get(self.last);
        let at = match last {
            Some(slot) if slot.key == key && slot.state == State::Ready => Some(self.last),
            _ => self.index.get(&key).copied(),
        };
        let Some((at, slot)) = at.and_then(|at| Some((at, self.slots.get_mut(at)?))) else {
            return Found::Absent;
        };
        match slot.state {
            State::Ready => {
                slot.used = true;
                self.last = at;
                Found::Ready(at)
            }
            State::Loading => Found::Loading,
            State::Free => Found::Absent,
        }
    }

    /// Makes room for a slice that is absent, and hands out the buffer to read it into.
    pub fn reserve(&mut self, key: u64) -> (usize, Box<[u8]>) {
        let at = self.empty_slot();
        let slot = &mut self.slots[at];
        slot.key = key;
        slot.state = State::Loading;
        slot.used = true;
        self.index.insert(key, at);
        let data = std::mem::take(&mut slot.data);
        let data = if data.len() == self.slice_len {
            data
        } else {
            vec![0; self.slice_len].into()
        };
        (at, data)
    }

    /// Puts a slice, now read, where [`Self::reserve`] made room for it.
    pub fn fill(&mut self, at: usize, data: Box<[u8]>) {
        if let Some(slot) = self.slots.get_mut(at) {
            slot.data = data;
            slot.state = State::Ready;
        }
    }

    /// Takes back the room for a slice that could not be read.
    pub fn give_up(&mut self, at: usize, data: Box<[u8]>) {
        if let Some(slot) = self.slots.get_mut(at) {
            slot.data = data;
            slot.state = State::Free;
            self.index.remove(&slot.key);
        }
    }

    /// The bytes of a slice that is ready.
    pub fn data(&self, at: usize) -> &[u8] {
        self.slots.get(at).map_or(&[], |slot| &slot.data)
    }

    /// The bytes of a slice that is ready, to be changed.
    pub fn data_mut(&mut self, at: usize) -> &mut [u8] {
        let Some(slot) = self.slots.get_mut(at) else {
            return &mut [];
        };
        if !slot.dirty {
            slot.dirty = true;
            self.dirty.push(at);
        }
        &mut slot.data
    }

    /// Keeps a slice that is ready in its slot until it is [released](Self::release).
    pub fn hold(&mut self, at: usize) {
        if let Some(slot) = self.slots.get_mut(at) {
            slot.holds += 1;
        }
    }

    /// Ends one [`Self::hold`].
    pub fn release(&mut self, at: usize) {
        if let Some(slot) = self.slots.get_mut(at) {
            slot.holds = slot.holds.saturating_sub(1);
        }
    }

    /// Whether there are slices to be written.
    pub fn is_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// Whether so many slices wait to be written that it is time to.
    pub fn is_crowded(&self) -> bool {
        self.dirty.len() > self.budget / 4 * 3
    }

    /// Hands each changed slice to `take` and counts it as on its way to the file.
    pub fn take_dirty(&mut self, mut take: impl FnMut(u64, &[u8])) {
        for at in self.dirty.drain(..) {
            let Some(slot) = self.slots.get_mut(at) else {
                continue;
            };
            take(slot.key, &slot.data);
            slot.dirty = false;
            slot.writing = true;
            self.writing.push(at);
        }
    }

    /// Ends what [`Self::take_dirty`] began; without success the slices count as changed again.
    pub fn written(&mut self, success: bool) {
        for at in std::mem::take(&mut self.writing) {
            if let Some(slot) = self.slots.get_mut(at) {
                slot.writing = false;
                if !success && !slot.dirty {
                    slot.dirty = true;
                    self.dirty.push(at);
                }
            }
        }
    }

    /// A slot that has nothing in it.
    fn empty_slot(&mut self) -> usize {
        if self.slots.len() >= self.budget {
            // Twice around: the first time takes the marks of use away.
            for _ in 0..self.slots.len() * 2 {
                let at = self.hand;
                self.hand = (self.hand + 1) % self.slots.len();
                let slot = &mut self.slots[at];
                match slot.state {
                    State::Free => return at,
                    State::Loading => {}
                    State::Ready if slot.dirty || slot.writing || slot.holds > 0 => {}
                    State::Ready if slot.used => slot.used = false,
                    State::Ready => {
                        slot.state = State::Free;
                        self.index.remove(&slot.key);
                        return at;
                    }
                }
            }
        }
        self.slots.push(Slot {
            key: 0,
            state: State::Free,
            used: false,
            holds: 0,
            dirty: false,
            writing: false,
            data: Box::default(),
        });
        self.slots.len() - 1
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn load(cache: &mut Cache, key: u64) -> usize {
        let (at, mut data) = cache.reserve(key);
        assert_eq!(cache.find(key), Found::Loading);
        data.fill(u8::try_from(key).unwrap());
        cache.fill(at, data);
        at
    }

    #[test]
    fn the_longest_unused_goes_first() {
        let mut cache = Cache::new(512, 8 * 512);
        for key in 0..8 {
            load(&mut cache, key);
        }
        load(&mut cache, 8);
        assert_eq!(cache.find(0), Found::Absent);
        assert!(matches!(cache.find(1), Found::Ready(_)));
        load(&mut cache, 9);
        assert_eq!(cache.find(2), Found::Absent);
        assert!(matches!(cache.find(1), Found::Ready(_)));
    }

    #[test]
    fn what_is_changed_or_held_stays() {
        let mut cache = Cache::new(512, 8 * 512);
        let held = load(&mut cache, 0);
        cache.hold(held);
        let changed = load(&mut cache, 1);
        cache.data_mut(changed)[0] = 77;
        for key in 2..50 {
            load(&mut cache, key);
        }
        assert_eq!(cache.find(0), Found::Ready(held));
        assert_eq!(cache.find(1), Found::Ready(changed));
        assert_eq!(cache.slots.len(), 8);

        let mut taken = Vec::new();
        cache.take_dirty(|key, data| taken.push((key, data[0])));
        assert_eq!(taken, [(1, 77)]);
        assert!(!cache.is_dirty());
        cache.written(false);
        assert!(cache.is_dirty());
        cache.take_dirty(|_, _| {});
        for key in 50..90 {
            load(&mut cache, key);
        }
        assert_eq!(cache.find(1), Found::Ready(changed), "it is being written");
        cache.written(true);
        cache.release(held);
        for key in 90..110 {
            load(&mut cache, key);
        }
        assert_eq!(
            (cache.find(0), cache.find(1)),
            (Found::Absent, Found::Absent)
        );
    }

    #[test]
    fn more_than_the_budget_if_nothing_can_go() {
        let mut cache = Cache::new(512, 8 * 512);
        for key in 0..20 {
            let at = load(&mut cache, key);
            cache.data_mut(at)[0] = 1;
        }
        assert!(cache.is_crowded());
        assert_eq!(cache.slots.len(), 20);
        let (at, data) = cache.reserve(30);
        cache.give_up(at, data);
        assert_eq!(cache.find(30), Found::Absent);
    }
}
