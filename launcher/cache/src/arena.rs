//! Extents of the mapping: best fit, neighbours that are free are joined at once.
//!
//! Entries of a source are mostly of one size, so a freed extent fits the next entry exactly, and best fit leaves it whole
//! for that instead of cutting a larger one.

use std::collections::{BTreeMap, BTreeSet};

/// Extents start on multiples of this, bytes: a cache line, so that two ranks never write to the same one.
pub const ALIGN_BYTES: u64 = 64;

/// Free extents of `0..size`. Lengths are whole multiples of [`ALIGN_BYTES`] within.
#[derive(Debug, Default)]
pub struct Arena {
    size_bytes: u64,
    used_bytes: u64,
    /// Offset → length; no two of them touch.
    free: BTreeMap<u64, u64>,
    /// (length, offset) of the same extents.
    by_len: BTreeSet<(u64, u64)>,
}

impl Arena {
    pub fn new(size_bytes: u64) -> Self {
        let mut arena = Self::default();
        arena.grow(size_bytes);
        arena
    }

    /// Bytes that extents may use in all.
    #[cfg(test)]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Bytes taken, rounded up to whole lines.
    #[cfg(test)]
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes
    }

    /// Makes the arena end at `size_bytes` (rounded down to whole lines) where that is less: no extent is given out
    /// beyond it, and what is taken there is gone for good once it is freed.
    pub fn cut(&mut self, size_bytes: u64) {
        let to = size_bytes / ALIGN_BYTES * ALIGN_BYTES;
        if to >= self.size_bytes {
            return;
        }
        self.size_bytes = to;
        let reaches: Vec<(u64, u64)> =
            self.free.iter().rev().take_while(|(offset, len)| **offset + **len > to).map(|(o, l)| (*o, *l)).collect();
        for (offset, len) in reaches {
            self.take(offset, len);
            if offset < to {
                self.put(offset, to - offset);
            }
        }
    }

    /// Makes the arena end at `size_bytes` (rounded down to whole lines) where that is more. After [`Arena::cut`] nothing
    /// may be taken beyond the cut any longer.
    pub fn grow(&mut self, size_bytes: u64) {
        let (from, to) = (self.size_bytes, size_bytes / ALIGN_BYTES * ALIGN_BYTES);
        if to > from {
            self.size_bytes = to;
            self.join(from, to - from);
        }
    }

    /// Offset of a new extent of at least `bytes`; `None`: no free extent is long enough.
    pub fn alloc(&mut self, bytes: u64) -> Option<u64> {
        let len = rounded(bytes)?;
        let (found, offset) = *self.by_len.range((len, 0)..).next()?;
        self.take(offset, found);
        if found > len {
            self.put(offset + len, found - len);
        }
        self.used_bytes += len;
        debug_assert!(offset + len <= self.size_bytes);
        Some(offset)
    }

    /// Takes back what `alloc(bytes)` gave.
    pub fn free(&mut self, offset: u64, bytes: u64) {
        if let Some(len) = rounded(bytes) {
            debug_assert!(len <= self.used_bytes);
            self.used_bytes = self.used_bytes.saturating_sub(len);
            // Space beyond a cut does not come back.
            let end = (offset + len).min(self.size_bytes);
            if offset < end {
                self.join(offset, end - offset);
            }
        }
    }

    /// Cuts an extent that `alloc(before)` gave to `bytes`, which are no more.
    pub fn shorten(&mut self, offset: u64, before: u64, bytes: u64) {
        if let (Some(from), Some(to)) = (rounded(before), rounded(bytes))
            && to < from
        {
            self.free(offset + to, from - to);
        }
    }

    /// True if the arena could ever hold an extent of `bytes`.
    pub fn can_hold(&self, bytes: u64) -> bool {
        rounded(bytes).is_some_and(|len| len <= self.size_bytes)
    }

    fn join(&mut self, mut offset: u64, mut len: u64) {
        if let Some((&before, &before_len)) = self.free.range(..offset).next_back()
            && before + before_len == offset
        {
            self.take(before, before_len);
            (offset, len) = (before, before_len + len);
        }
        if let Some(&after_len) = self.free.get(&(offset + len)) {
            self.take(offset + len, after_len);
            len += after_len;
        }
        self.put(offset, len);
    }

    fn put(&mut self, offset: u64, len: u64) {
        self.free.insert(offset, len);
        self.by_len.insert((len, offset));
    }

    fn take(&mut self, offset: u64, len: u64) {
        self.free.remove(&offset);
        self.by_len.remove(&(len, offset));
    }
}

/// Whole lines; an entry without bytes still has a separate place.
fn rounded(bytes: u64) -> Option<u64> {
    bytes.max(1).checked_next_multiple_of(ALIGN_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_exact_fit_is_taken_before_a_longer_one_is_cut() {
        let mut arena = Arena::new(64 * 64);
        let places: Vec<u64> = (0..8).map(|_| arena.alloc(128).unwrap()).collect();
        arena.free(places[3], 128);
        assert_eq!(arena.alloc(100), Some(places[3]));
        assert_eq!(arena.alloc(64 * 64), None);
        assert!(!arena.can_hold(64 * 64 + 1) && !arena.can_hold(u64::MAX));
    }

    #[test]
    fn growth_joins_the_free_end() {
        let mut arena = Arena::new(100);
        assert_eq!((arena.size_bytes(), arena.alloc(65)), (64, None));
        arena.grow(192);
        assert_eq!((arena.alloc(192), arena.used_bytes()), (Some(0), 192));
        arena.grow(64);
        assert_eq!(arena.size_bytes(), 192);
    }

    #[test]
    fn what_is_cut_off_is_given_out_no_more_and_comes_back_by_growth() {
        let mut arena = Arena::new(64 * 8);
        let places: Vec<u64> = (0..4).map(|_| arena.alloc(128).unwrap()).collect();
        arena.free(places[1], 128);
        arena.free(places[3], 128);
        // Through the middle of a free extent and below a taken one: 0 taken, 128 free, 256 taken (beyond), 384 gone.
        arena.cut(192);
        assert_eq!((arena.size_bytes(), arena.alloc(128)), (192, None));
        assert_eq!(arena.alloc(64), Some(128));
        arena.free(places[2], 128);
        assert_eq!((arena.used_bytes(), arena.alloc(64)), (192, None));
        arena.cut(4096);
        assert_eq!(arena.size_bytes(), 192);
        arena.grow(64 * 8);
        assert_eq!(arena.alloc(320), Some(192));
        // A taken extent across the cut gives back its lower part only.
        arena.cut(256);
        arena.free(192, 320);
        assert_eq!((arena.alloc(128), arena.alloc(64)), (None, Some(192)));
    }

    proptest! {
        /// Against a map of lines: extents never overlap, all is one extent again when all are freed.
        #[test]
        fn extents_never_overlap_and_join_again(ops in prop::collection::vec((any::<bool>(), 0u64..700, any::<prop::sample::Index>()), 1..200)) {
            let size = 64 * 64;
            let mut arena = Arena::new(size);
            let mut held: Vec<(u64, u64)> = Vec::new();
            let mut lines = [false; 64];
            for (take, bytes, at) in ops {
                let span = |offset: u64, bytes: u64| (offset / 64) as usize..((offset + bytes.max(1)).div_ceil(64)) as usize;
                if take || held.is_empty() {
                    if let Some(offset) = arena.alloc(bytes) {
                        prop_assert!(offset % 64 == 0 && lines[span(offset, bytes)].iter().all(|used| !used));
                        lines[span(offset, bytes)].fill(true);
                        held.push((offset, bytes));
                    } else {
                        // Refused only where no run of free lines is long enough.
                        let need = bytes.max(1).div_ceil(64) as usize;
                        prop_assert!(!lines.windows(need).any(|run| run.iter().all(|used| !used)));
                    }
                } else {
                    let (offset, bytes) = held.swap_remove(at.index(held.len()));
                    lines[span(offset, bytes)].fill(false);
                    arena.free(offset, bytes);
                }
                prop_assert_eq!(arena.used_bytes(), 64 * lines.iter().filter(|used| **used).count() as u64);
            }
            held.iter().for_each(|(offset, bytes)| arena.free(*offset, *bytes));
            prop_assert_eq!(arena.alloc(size), Some(0));
        }
    }

    /// Share of the arena that entries of unequal sizes leave unused when any of them may be evicted.
    #[test]
    fn waste_stays_small_when_one_entry_in_eight_is_shorter() {
        let (size, mut state) = (64 << 20, 1u64);
        let mut random = move || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            state >> 33
        };
        let mut arena = Arena::new(size);
        let (mut held, mut waste, mut rounds) = (Vec::new(), 0.0, 0);
        for _ in 0..20_000 {
            let bytes = if random() % 8 == 0 { 1000 + random() % 450_000 } else { 463_872 };
            let mut offset = arena.alloc(bytes);
            while offset.is_none() {
                let (at, len): (u64, u64) = held.swap_remove(random() as usize % held.len());
                arena.free(at, len);
                waste += 1.0 - arena.used_bytes() as f64 / size as f64;
                rounds += 1;
                offset = arena.alloc(bytes);
            }
            held.extend(offset.map(|offset| (offset, bytes)));
        }
        let waste = waste / f64::from(rounds);
        println!("unused share of the arena while evicting: {:.2} %", 100.0 * waste);
        assert!(waste < 0.06, "{waste}");
    }
}
