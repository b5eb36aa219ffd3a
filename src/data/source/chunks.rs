//! Where decoded chunks are kept: by bytes, one decode per chunk however many threads want it.
//!
//! [`ChunkStore`] is the seat of the node's shared page cache; [`LruChunks`] is what one rank keeps for itself
//! (`data.chunk_cache_size`).

use crate::data::DataError;
use crate::ledger::{self, Holding, Part};
use lru::LruCache;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

/// Names a chunk: the file's place in the data set, the chunk's place in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkKey {
    pub file: u32,
    pub chunk: u32,
}

/// A decoded chunk: the columns in use, one after the other, in the file's own types.
#[derive(Debug, PartialEq, Eq)]
pub struct Chunk {
    pub bytes: Box<[u8]>,
}

/// Counters of a store. `hits + misses` is the number of lookups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreStats {
    pub hits: u64,
    pub misses: u64,
    pub evictions: u64,
    pub used_bytes: u64,
    pub capacity_bytes: u64,
    pub items: u64,
}

/// Gives a chunk, decoding it by `fill` when it is not there.
pub trait ChunkStore: Send + Sync {
    /// # Errors
    /// Whatever `fill` says; nothing is kept then, and other threads that waited for this chunk try for themselves.
    fn get(&self, key: ChunkKey, fill: &mut dyn FnMut() -> Result<Chunk, DataError>) -> Result<Arc<Chunk>, DataError>;
    fn stats(&self) -> StoreStats;
    /// Lets go of every chunk that is kept; one that a thread is reading lives until it is done.
    fn clear(&self);
}

/// Where threads that wait for a chunk find it, kept or passed through. Still empty when they wake: the fill failed.
type Awaited = Arc<OnceLock<Arc<Chunk>>>;

enum Slot {
    /// A thread decodes it; others wait on the condition variable.
    Filling(Awaited),
    Ready(Arc<Chunk>),
}

struct State {
    slots: LruCache<ChunkKey, Slot>,
    used_bytes: u64,
    held: Holding,
}

/// While memory is short a store keeps this part of its capacity, one in so many.
const SHORT: u64 = 16;

/// Least recently used chunks leave first. A chunk larger than the whole store is passed through, not kept.
pub struct LruChunks {
    capacity_bytes: u64,
    is_short: Box<dyn Fn() -> bool + Send + Sync>,
    state: Mutex<State>,
    filled: Condvar,
    hits: AtomicU64,
    misses: AtomicU64,
    evictions: AtomicU64,
}

impl LruChunks {
    pub fn new(capacity_bytes: u64) -> Self {
        Self {
            capacity_bytes,
            is_short: Box::new(|| false),
            state: Mutex::new(State {
                slots: LruCache::unbounded(),
                used_bytes: 0,
                held: ledger::hold(Part::Chunks, 0),
            }),
            filled: Condvar::new(),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            evictions: AtomicU64::new(0),
        }
    }

    /// While `is_short` a sixteenth of the capacity is kept: what a shrunken page cache gave back is not to come to rest
    /// here, once per rank.
    pub fn small_while(self, is_short: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        Self { is_short: Box::new(is_short), ..self }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing under this lock can panic half-way through an update.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The chunk, or the mark that the caller is to fill it under.
    fn look_up(&self, key: ChunkKey) -> Result<Arc<Chunk>, FillMark<'_>> {
        let mut state = self.lock();
        loop {
            let awaited = match state.slots.get(&key) {
                Some(Slot::Ready(chunk)) => return Ok(chunk.clone()),
                Some(Slot::Filling(awaited)) => awaited.clone(),
                None => {
                    let awaited = Awaited::default();
                    state.slots.put(key, Slot::Filling(awaited.clone()));
                    return Err(FillMark { store: self, key, awaited });
                }
            };
            state = self.filled.wait(state).unwrap_or_else(PoisonError::into_inner);
            if let Some(chunk) = awaited.get() {
                return Ok(chunk.clone());
            }
        }
    }

    fn publish(&self, key: ChunkKey, chunk: &Arc<Chunk>) {
        let bytes = chunk.bytes.len() as u64;
        let is_short = (self.is_short)();
        let room = if is_short { self.capacity_bytes / SHORT } else { self.capacity_bytes };
        let kept = bytes <= room;
        if !kept && !is_short {
            return;
        }
        let mut state = self.lock();
        let mut marks = Vec::new();
        while state.used_bytes + if kept { bytes } else { 0 } > room {
            match state.slots.pop_lru() {
                Some((_, Slot::Ready(old))) => {
                    state.used_bytes -= old.bytes.len() as u64;
                    self.evictions.fetch_add(1, Ordering::Relaxed);
                }
                Some(filling) => marks.push(filling),
                None => break,
            }
        }
        for (filling, slot) in marks {
            state.slots.put(filling, slot);
        }
        if kept {
            state.used_bytes += bytes;
            state.slots.put(key, Slot::Ready(chunk.clone()));
        }
        let used = state.used_bytes;
        state.held.set(used);
    }
}

/// Takes a `Filling` mark back when the fill did not publish (error, pass-through or panic) and wakes the waiting threads.
struct FillMark<'a> {
    store: &'a LruChunks,
    key: ChunkKey,
    awaited: Awaited,
}

impl Drop for FillMark<'_> {
    fn drop(&mut self) {
        let mut state = self.store.lock();
        if matches!(state.slots.peek(&self.key), Some(Slot::Filling(_))) {
            state.slots.pop(&self.key);
        }
        drop(state);
        self.store.filled.notify_all();
    }
}

impl ChunkStore for LruChunks {
    fn get(&self, key: ChunkKey, fill: &mut dyn FnMut() -> Result<Chunk, DataError>) -> Result<Arc<Chunk>, DataError> {
        let mark = match self.look_up(key) {
            Ok(chunk) => {
                self.hits.fetch_add(1, Ordering::Relaxed);
                return Ok(chunk);
            }
            Err(mark) => mark,
        };
        self.misses.fetch_add(1, Ordering::Relaxed);
        let chunk = Arc::new(fill()?);
        self.publish(key, &chunk);
        // The mark was made here, so it is still empty.
        let _ = mark.awaited.set(chunk.clone());
        Ok(chunk)
    }

    fn clear(&self) {
        let mut state = self.lock();
        let keys: Vec<ChunkKey> = state.slots.iter().map(|(key, _)| *key).collect();
        for key in keys {
            if matches!(state.slots.peek(&key), Some(Slot::Ready(_))) {
                state.slots.pop(&key);
            }
        }
        state.used_bytes = 0;
        state.held.set(0);
    }

    fn stats(&self) -> StoreStats {
        let state = self.lock();
        let items = state.slots.iter().filter(|(_, slot)| matches!(slot, Slot::Ready(_))).count();
        StoreStats {
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
            evictions: self.evictions.load(Ordering::Relaxed),
            used_bytes: state.used_bytes,
            capacity_bytes: self.capacity_bytes,
            items: items as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(chunk: u32) -> ChunkKey {
        ChunkKey { file: 0, chunk }
    }

    fn chunk(bytes: usize) -> Result<Chunk, DataError> {
        Ok(Chunk { bytes: vec![7; bytes].into() })
    }

    #[test]
    fn a_cleared_store_holds_nothing_and_fills_again() {
        let store = LruChunks::new(100);
        for n in 0..2 {
            store.get(key(n), &mut || chunk(40)).unwrap();
        }
        store.clear();
        assert_eq!((store.stats().used_bytes, store.stats().items), (0, 0));
        store.get(key(1), &mut || chunk(60)).unwrap();
        assert_eq!((store.stats().used_bytes, store.stats().items, store.stats().misses), (60, 1, 3));
    }

    #[test]
    fn bytes_never_exceed_the_capacity_and_the_oldest_leaves_first() {
        let store = LruChunks::new(100);
        for n in 0..3 {
            store.get(key(n), &mut || chunk(40)).unwrap();
            assert!(store.stats().used_bytes <= 100);
        }
        store.get(key(1), &mut || panic!("kept")).unwrap();
        store.get(key(2), &mut || panic!("kept")).unwrap();
        let mut decoded = false;
        store
            .get(key(0), &mut || {
                decoded = true;
                chunk(40)
            })
            .unwrap();
        assert!(decoded, "chunk 0 was the least recently used");
        let stats = store.stats();
        assert_eq!((stats.hits, stats.misses, stats.evictions, stats.items), (2, 4, 2, 2));
    }

    #[test]
    fn a_chunk_larger_than_the_store_passes_through() {
        let store = LruChunks::new(10);
        store.get(key(0), &mut || chunk(5)).unwrap();
        assert_eq!(store.get(key(1), &mut || chunk(11)).unwrap().bytes.len(), 11);
        assert_eq!(store.stats().used_bytes, 5);
        store.get(key(0), &mut || panic!("kept")).unwrap();
    }

    #[test]
    fn a_sixteenth_is_kept_while_memory_is_short() {
        let short = Arc::new(AtomicU64::new(0));
        let now = Arc::clone(&short);
        let store = LruChunks::new(320).small_while(move || now.load(Ordering::Relaxed) > 0);
        (0..20).for_each(|n| drop(store.get(key(n), &mut || chunk(16)).unwrap()));
        assert_eq!(store.stats().used_bytes, 320);
        short.store(1, Ordering::Relaxed);
        store.get(key(30), &mut || chunk(16)).unwrap();
        assert_eq!((store.stats().used_bytes, store.stats().items), (16, 1));
        store.get(key(30), &mut || panic!("kept")).unwrap();
        // Too large for what is left of the store: what is there may stay.
        store.get(key(31), &mut || chunk(21)).unwrap();
        assert_eq!(store.stats().used_bytes, 16);
        short.store(0, Ordering::Relaxed);
        (0..20).for_each(|n| drop(store.get(key(n), &mut || chunk(16)).unwrap()));
        assert_eq!(store.stats().used_bytes, 320);
    }

    #[test]
    fn a_failed_fill_keeps_nothing() {
        let store = LruChunks::new(10);
        let error = store.get(key(0), &mut || Err(DataError::Other("broken".into()))).unwrap_err();
        assert_eq!(error.to_string(), "broken");
        assert_eq!(store.get(key(0), &mut || chunk(3)).unwrap().bytes.len(), 3);
    }

    #[test]
    fn threads_that_want_the_same_chunk_decode_it_once() {
        let store = LruChunks::new(1000);
        let fills = AtomicU64::new(0);
        let start = std::sync::Barrier::new(8);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    start.wait();
                    for n in 0..50 {
                        let mut fill = || {
                            fills.fetch_add(1, Ordering::Relaxed);
                            std::thread::yield_now();
                            chunk(8)
                        };
                        store.get(key(n), &mut fill).unwrap();
                    }
                });
            }
        });
        assert_eq!(fills.load(Ordering::Relaxed), 50);
        let stats = store.stats();
        assert_eq!((stats.hits, stats.misses), (350, 50));
    }

    #[test]
    fn threads_that_wait_share_a_chunk_that_is_passed_through() {
        let store = LruChunks::new(0);
        let (fills, waiting) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    waiting.fetch_add(1, Ordering::SeqCst);
                    let mut fill = || {
                        // Decodes until all others have asked, or are about to.
                        while waiting.load(Ordering::SeqCst) < 4 {
                            std::thread::yield_now();
                        }
                        fills.fetch_add(1, Ordering::Relaxed);
                        chunk(8)
                    };
                    assert_eq!(store.get(key(0), &mut fill).unwrap().bytes.len(), 8);
                });
            }
        });
        let stats = store.stats();
        assert_eq!(stats.hits + stats.misses, 4);
        assert_eq!(stats.misses, fills.load(Ordering::Relaxed));
        assert_eq!((stats.used_bytes, stats.items), (0, 0));
    }
}
