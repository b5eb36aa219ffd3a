//! Windows as entries of the page cache: a window, or its part in each chunk that it lies in.
//!
//! A piece lies in one chunk, so a decoded chunk holds all that its pieces need. It is used once per epoch, at a position
//! given by the order.

use super::index::Windows;
use crate::data::loader::Order;
use crate::data::source::chunks::Chunk;
use crate::data::source::hdf5::Reader;
use crate::data::{BatchAhead, DataError};
use cache::client::{Item, Offer};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// Offers for each piece that is expected to stay, and beyond: the directory knows better, but each one costs a lookup.
const OFFERS_PER_KEPT: f64 = 3.0;
const OFFERS_MORE: usize = 8;

/// Where a piece lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    pub key: u64,
    pub file: usize,
    pub chunk: u64,
    /// Rows in the chunk.
    pub rows: Range<usize>,
    /// Rows in the window.
    pub into: Range<usize>,
}

/// A chunk that was decoded just now.
pub struct Fresh {
    pub file: usize,
    pub chunk: u64,
    pub bytes: Arc<Chunk>,
}

/// Global positions (epoch × samples + position) of batches that are announced and not retired.
#[derive(Default)]
struct Now {
    /// First position → last.
    batches: BTreeMap<u64, u64>,
    /// Last position of the batch retired last.
    last: u64,
}

/// The windows of one data set as pieces.
pub struct Pieces {
    windows: Windows,
    window_rows: usize,
    order: Order,
    world_size: u64,
    /// Keys before the first piece's.
    base: u64,
    /// Most pieces of a window.
    parts: u64,
    /// Most offers of one decoded chunk.
    offers: usize,
    now: Mutex<Now>,
}

impl Pieces {
    /// Pieces of `windows`, used in `order` by that many ranks together, with keys from `base` on. `kept`: how many of a chunk
    /// are expected to stay. `None`: there are more pieces than keys.
    pub fn new(
        windows: Windows,
        window_rows: usize,
        order: Order,
        (world_size, base, kept): (usize, u64, f64),
        reader: &Reader,
    ) -> Option<Self> {
        let least_rows = (0..reader.tables().len()).map(|file| reader.entry_rows(file)).min().unwrap_or(1).max(1);
        let parts = (window_rows.max(1) - 1) as u64 / least_rows as u64 + 2;
        (windows.len() as u64).checked_mul(parts)?.checked_add(base)?;
        let offers = (OFFERS_PER_KEPT * kept).ceil() as usize + OFFERS_MORE;
        let (world_size, now) = (world_size as u64, Mutex::default());
        Some(Self { windows, window_rows, order, world_size, base, parts, offers, now })
    }

    /// Pieces of window `index`, in the order of rows; none: there is no such window.
    pub fn of<'a>(&self, index: u64, reader: &'a Reader) -> impl Iterator<Item = Piece> + use<'a> {
        let (window, first_key) = (self.window_rows as u64, self.base + index.saturating_mul(self.parts));
        let found = usize::try_from(index).ok().and_then(|index| self.windows.get(index));
        found.into_iter().flat_map(move |(file, row)| {
            let entry_rows = (reader.entry_rows(file as usize) as u64).max(1);
            let chunks = row / entry_rows..(row + window).div_ceil(entry_rows);
            let first = chunks.start;
            chunks.map(move |chunk| {
                let base = chunk * entry_rows;
                let rows = row.max(base)..(row + window).min(base + entry_rows);
                Piece {
                    key: first_key + (chunk - first),
                    file: file as usize,
                    chunk,
                    rows: (rows.start - base) as usize..(rows.end - base) as usize,
                    into: (rows.start - row) as usize..(rows.end - row) as usize,
                }
            })
        })
    }

    /// The piece of a key.
    ///
    /// # Errors
    /// No piece has this key.
    pub fn locate(&self, key: u64, reader: &Reader) -> Result<Piece, DataError> {
        let index = key.saturating_sub(self.base) / self.parts;
        let found = self.of(index, reader).find(|piece| piece.key == key);
        found.ok_or(DataError::OutOfRange {
            what: "page cache entry",
            index: key,
            place: "the windows",
            count: self.base + self.windows.len() as u64 * self.parts,
        })
    }

    /// Entries that a batch needs, each once; [`Pieces::retire`] is the inverse.
    pub fn announce(&self, batch: BatchAhead, reader: &Reader) -> Vec<Item> {
        if let Some((first, last)) = self.span(batch) {
            self.lock().batches.insert(first, last);
        }
        let then = self.order.epoch(batch.epoch + 1);
        let mut wants = Vec::with_capacity(2 * batch.ids.len());
        for id in batch.ids {
            let position = then.position_of(*id).unwrap_or(0);
            let next_use = (batch.epoch + 1).saturating_mul(self.order.len).saturating_add(position);
            wants.extend(self.of(*id, reader).map(|piece| Item {
                key: piece.key,
                bytes: bytes_of(&piece, reader),
                next_use,
                offer: false,
            }));
        }
        wants.sort_unstable_by_key(|want| want.key);
        wants.dedup_by_key(|want| want.key);
        wants
    }

    /// Keys of a batch that was read, each once.
    pub fn retire(&self, batch: BatchAhead, reader: &Reader) -> Vec<u64> {
        if let Some((first, last)) = self.span(batch) {
            let mut now = self.lock();
            now.batches.remove(&first);
            now.last = last;
        }
        let mut keys: Vec<u64> = batch.ids.iter().flat_map(|id| self.of(*id, reader).map(|piece| piece.key)).collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    /// Positions of the first and the last sample of a batch: its ids follow the order.
    fn span(&self, batch: BatchAhead) -> Option<(u64, u64)> {
        let order = self.order.epoch(batch.epoch);
        let global = |id: Option<&u64>| {
            let position = order.position_of(*id?)?;
            Some(batch.epoch.saturating_mul(self.order.len).saturating_add(position))
        };
        Some((global(batch.ids.first())?, global(batch.ids.last())?))
    }

    /// Pieces of a chunk that was decoded just now, the one needed soonest first.
    pub fn offers(&self, fresh: &Fresh, reader: &Reader) -> Vec<Offer> {
        let len = self.order.len.max(1);
        let (from, last) = {
            let now = self.lock();
            now.batches.first_key_value().map_or((now.last, now.last), |(first, last)| (*first, *last))
        };
        let (now, then) = (self.order.epoch(from / len), self.order.epoch(from / len + 1));
        let next_use = |index: u64| {
            let epoch = from / len * len;
            let this = now.position_of(index).map(|position| epoch + position).filter(|position| *position >= from);
            this.or_else(|| then.position_of(index).map(|position| epoch.saturating_add(len).saturating_add(position)))
        };
        let rows = reader.entry_rows(fresh.file) as u64;
        let rows = fresh.chunk * rows..(fresh.chunk + 1) * rows;
        let touching = self.windows.touching(fresh.file as u32, rows, self.window_rows as u64).flatten();
        let mut soonest: Vec<(u64, u64)> =
            touching.filter_map(|index| next_use(index).map(|next_use| (next_use, index))).collect();
        soonest.sort_unstable();
        soonest.truncate(self.offers);
        let offer = |(next_use, index): (u64, u64)| {
            let piece = self.of(index, reader).find(|piece| piece.chunk == fresh.chunk)?;
            let bytes = bytes_of(&piece, reader);
            let item = Item { key: piece.key, bytes, next_use, offer: true };
            Some(Offer { item, due: next_use <= last.saturating_add(self.world_size) })
        };
        soonest.into_iter().filter_map(offer).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn bytes_of(piece: &Piece, reader: &Reader) -> u64 {
    let row_bytes = reader.tables().get(piece.file).map_or(0, |table| table.used_row_bytes());
    (piece.rows.len() * row_bytes) as u64
}
