//! A data set's entries in the page cache: what every data set that reads through the cache needs, in one place.

use super::{DataError, Scratch, Wake};
use cache::client::{CacheClient, Item, Reading};
use std::ops::Range;
use std::sync::{Arc, Weak};

/// Whoever knows how large an entry is and how its bytes are made. Keys are the same on every rank.
pub trait EntrySource: Send + Sync {
    /// Bytes of the entry, the same at every call.
    fn entry_bytes(&self, key: u64) -> u64;
    /// Writes all bytes of the entry.
    ///
    /// # Errors
    /// Its file cannot be read, or holds what it must not.
    fn fill_entry(&self, key: u64, out: &mut [u8], scratch: &mut Scratch) -> Result<(), DataError>;
}

/// The entries of a source in the node's page cache.
pub struct CachedEntries<S> {
    source: Arc<S>,
    cache: Arc<CacheClient>,
}

impl<S: EntrySource> CachedEntries<S> {
    pub fn new(source: Arc<S>, cache: Arc<CacheClient>) -> Self {
        Self { source, cache }
    }

    /// A batch will need `keys`, each once; `next_use` tells when an entry is needed after it ([`Item::next_use`]).
    pub fn announce(&self, keys: &[u64], next_use: impl Fn(u64) -> u64) {
        let want = |key| Item { key, bytes: self.source.entry_bytes(key), next_use: next_use(key), offer: false };
        let wants: Vec<Item> = keys.iter().copied().map(want).collect();
        self.cache.announce(&wants);
    }

    /// The inverse of [`CachedEntries::announce`].
    pub fn retire(&self, keys: &[u64]) {
        self.cache.retire(keys.iter().copied());
    }

    /// The bytes of an entry, or `part` of it lent; [`Reading::Bypass`]: the cache has no room for it. `next_use` counts
    /// where the entry was not announced.
    ///
    /// # Errors
    /// As [`CacheClient::read`].
    pub fn read_or_lend(
        &self,
        key: u64,
        (part, next_use): (Range<usize>, u64),
        scratch: &mut Scratch,
    ) -> Result<Reading<'_>, DataError> {
        let want = Item { key, bytes: self.source.entry_bytes(key), next_use, offer: false };
        self.cache.read_or_lend(want, part, &mut |key, out| self.source.fill_entry(key, out, scratch))
    }

    /// Fills one entry that this rank was granted ahead of need. False means that there was no such entry.
    pub fn work_ahead(&self, scratch: &mut Scratch) -> bool {
        self.cache.work_ahead(&mut |key, out| self.source.fill_entry(key, out, scratch))
    }

    /// Wakes `waker` when there is something for [`CachedEntries::work_ahead`].
    pub fn wake_by(&self, waker: Weak<dyn Wake>) {
        self.cache.wake_by(waker);
    }
}
