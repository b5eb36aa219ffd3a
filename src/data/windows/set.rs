//! The windows of a run's data sets, read through the page cache where there is one.

use super::entries::ChunkEntries;
use super::future::Future;
use super::grain::choose;
use super::index::Windows;
use super::pieces::Pieces;
use crate::data::loader::order_of;
use crate::data::source::Identity;
use crate::data::source::chunks::LruChunks;
use crate::data::source::hdf5::{Reader, Table, Target};
use crate::data::{BatchAhead, DataError, Pages, Scratch, Wake};
use cache::client::{CacheClient, Item};
use spec::config::{CachePolicy, DataConfig};
use std::sync::{Arc, Weak};

/// Rows of a page of a file without chunks.
const PAGE_ROWS: usize = 4096;

/// How the windows of a run are read.
pub struct Reading<'a> {
    /// Order, chunk cache and page cache.
    pub config: &'a DataConfig,
    /// Identity of each table's file, so that a file replaced during the run is never read as the old one.
    pub identities: Vec<Identity>,
    /// Rows of a window.
    pub rows: usize,
    pub seed: u64,
    pub world_size: usize,
    /// The node's page cache, where there is one.
    pub cache: Option<Arc<CacheClient>>,
    /// A sample is one window. Otherwise it reads other windows too, so the order says nothing about next uses.
    pub alone: bool,
}

/// The data sets of a run. They share a reader.
pub struct WindowSets {
    pub reader: Arc<Reader>,
    /// Training, validation, test.
    pub sets: [WindowSet; 3],
    /// A line for the user on what the page cache's entries hold, where that was chosen.
    pub note: Option<String>,
}

/// The windows of one data set.
pub struct WindowSet {
    reader: Arc<Reader>,
    windows: Windows,
    rows: usize,
    cached: Option<Cached>,
}

struct Cached {
    entries: Arc<ChunkEntries>,
    /// Where the policy asks for it, and the order is known.
    future: Option<Future>,
    /// Entries are pieces of this data set's windows.
    by_window: bool,
}

impl Cached {
    fn pieces(&self) -> Option<&Pieces> {
        self.entries.pieces().filter(|_| self.by_window)
    }
}

impl WindowSets {
    /// Windows of `tables` for training, validation and test.
    ///
    /// # Errors
    /// The order that the config asks for does not exist for these windows.
    pub fn open(tables: Vec<Table>, listed: [Windows; 3], reading: Reading) -> Result<Self, DataError> {
        let Reading { config, identities, rows, seed, world_size, cache, alone } = reading;
        let shrunk = cache.as_ref().map(Arc::downgrade);
        let chunks = LruChunks::new(config.chunk_cache_size)
            .small_while(move || shrunk.as_ref().and_then(Weak::upgrade).is_some_and(|cache| cache.is_shrunk()));
        let reader = Arc::new(Reader::new(tables, Arc::new(chunks)).recognising(identities));
        let cache = cache.filter(|_| config.cache != CachePolicy::Off);
        // Validation and test are read in the order of their files, now and then: nothing is known of their next use.
        let sees = matches!(config.cache, CachePolicy::Auto | CachePolicy::NextUse) && alone;
        let train = &listed[0];
        let order = order_of(train.len() as u64, config, seed, || Some(pages(train, &reader)))?;
        let choice =
            cache.as_ref().and_then(|cache| choose(config, rows, train, &reader, (cache.capacity_bytes(), sees)));
        let note = choice.as_ref().map(|choice| choice.line.clone());
        let entries = cache.map(|cache| {
            let entries = ChunkEntries::new(Arc::clone(&reader), cache);
            let pieces = choice.and_then(|choice| choice.kept).and_then(|kept| {
                let team = (world_size, entries.total(), kept);
                Pieces::new(train.clone(), rows, order.clone(), team, &reader)
            });
            Arc::new(entries.with_pieces(pieces))
        });
        let mut future = sees.then(|| Future::new(order, rows));
        let mut by_window = entries.as_ref().is_some_and(|entries| entries.pieces().is_some());
        // Both belong to the first set alone.
        let sets = listed.map(|windows| {
            let (future, by_window) = (future.take(), std::mem::take(&mut by_window));
            let cached = entries.as_ref().map(|entries| Cached { entries: Arc::clone(entries), future, by_window });
            WindowSet { reader: Arc::clone(&reader), windows, rows, cached }
        });
        Ok(Self { reader, sets, note })
    }
}

impl WindowSet {
    pub fn len(&self) -> usize {
        self.windows.len()
    }

    pub fn is_empty(&self) -> bool {
        self.windows.is_empty()
    }

    /// Reads window `index` into `targets`.
    ///
    /// # Errors
    /// There is no such window; its file cannot be read or holds what it must not; the page cache is gone.
    pub fn read(&self, index: usize, targets: &mut [Target], scratch: &mut Scratch) -> Result<(), DataError> {
        let read = self.read_rows(index, targets, scratch);
        scratch.count();
        read
    }

    fn read_rows(&self, index: usize, targets: &mut [Target], scratch: &mut Scratch) -> Result<(), DataError> {
        let found = self.windows.get(index).map(|(file, row)| (file as usize, row));
        let count = self.windows.len() as u64;
        let missing = || DataError::OutOfRange { what: "window", index: index as u64, place: "the data set", count };
        let (file, row) = found.ok_or_else(missing)?;
        let Some(cached) = &self.cached else {
            return self.reader.read(file, row, self.rows, targets, scratch);
        };
        match cached.pieces() {
            Some(pieces) => cached.entries.read_pieces(pieces, (index, file, row, self.rows), targets, scratch),
            None => cached.entries.read(file, row, self.rows, targets, scratch),
        }
    }

    /// A batch will be read, and the windows `others` with it; to be retired by [`WindowSet::retire`].
    pub fn announce(&self, batch: BatchAhead, others: &[u64]) {
        let Some(cached @ Cached { entries, future, .. }) = &self.cached else { return };
        if let Some(pieces) = cached.pieces() {
            return entries.cache().announce_stored(&pieces.announce(batch, entries.reader()));
        }
        let after = future.as_ref().map(|future| (future, future.position(batch.epoch, batch.ids)));
        let want = |key| {
            let next_use = after
                .map_or(u64::MAX, |(future, after)| future.next_use(key, batch.epoch, after, entries, &self.windows));
            Item { key, bytes: entries.bytes(key), next_use, offer: false }
        };
        let wants: Vec<Item> = self.keys(entries, batch.ids, others).into_iter().map(want).collect();
        entries.cache().announce(&wants);
    }

    /// The inverse of [`WindowSet::announce`].
    pub fn retire(&self, batch: BatchAhead, others: &[u64]) {
        let Some(cached @ Cached { entries, .. }) = &self.cached else { return };
        if let Some(pieces) = cached.pieces() {
            entries.cache().retire(pieces.retire(batch, entries.reader()).into_iter());
        } else {
            entries.cache().retire(self.keys(entries, batch.ids, others).into_iter());
        }
    }

    /// Entries that the windows lie in, each once, in rising order; ids out of range have none.
    fn keys(&self, entries: &ChunkEntries, ids: &[u64], others: &[u64]) -> Vec<u64> {
        let mut keys = Vec::with_capacity(2 * (ids.len() + others.len()));
        for id in ids.iter().chain(others).filter(|id| **id < self.windows.len() as u64) {
            if let Some((file, row)) = self.windows.get(*id as usize) {
                keys.extend(entries.keys(file as usize, row, self.rows));
            }
        }
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    /// Fills one entry that this rank was granted ahead of need. False means that there was no such entry.
    pub fn work_ahead(&self, scratch: &mut Scratch) -> bool {
        let done = self.cached.as_ref().is_some_and(|cached| cached.entries.work_ahead(scratch));
        scratch.count();
        done
    }

    /// Gives back decoded bytes that are kept for speed alone.
    pub fn give_back(&self) {
        self.reader.give_back();
    }

    /// Wakes `waker` when there is something for [`WindowSet::work_ahead`].
    pub fn wake_by(&self, waker: Weak<dyn Wake>) {
        if let Some(cached) = &self.cached {
            cached.entries.cache().wake_by(waker);
        }
    }

    /// File and rows of window `index`, as messages name it.
    pub fn describe(&self, index: usize) -> String {
        match self.windows.get(index) {
            Some((file, row)) => {
                let path = &self.reader.tables()[file as usize].path;
                let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
                format!("{name} rows {row}..{}", row + self.rows as u64)
            }
            None => format!("window {index} of {}", self.windows.len()),
        }
    }

    /// Windows that one read serves.
    pub fn pages(&self) -> Pages {
        pages(&self.windows, &self.reader)
    }
}

/// Windows that start in the same chunk, or in the same page of a file without chunks.
fn pages(windows: &Windows, reader: &Reader) -> Pages {
    windows.pages(|file| reader.tables()[file as usize].chunk_rows().unwrap_or(PAGE_ROWS) as u64)
}
