use super::{Entries, Policy};
use lru::LruCache;
use spec::contract::cache::Item;

/// Hit rate where an epoch reads each entry once, in a new random order, with the share `f` cached:
/// `f + (1-f)·ln(1-f)`.
pub struct Lru {
    /// Keys of all entries, the one used last at the front.
    order: LruCache<u64, ()>,
}

impl Lru {
    pub fn new() -> Self {
        Self { order: LruCache::unbounded() }
    }
}

impl Policy for Lru {
    fn used(&mut self, key: u64) {
        // No allocation for a key that is known.
        if self.order.get(&key).is_none() {
            self.order.put(key, ());
        }
    }

    fn removed(&mut self, key: u64) {
        self.order.pop(&key);
    }

    fn victim(&mut self, item: &Item, entries: &dyn Entries) -> Option<u64> {
        // The past says nothing about an offer, so it displaces nothing.
        if item.offer {
            return None;
        }
        // Entries with references were used lately, so few are skipped.
        self.order.iter().rev().map(|(key, ())| *key).find(|key| entries.evictable(*key).is_some())
    }
}
