//! When an entry is needed next: the order of samples is a pure function, so the future can be looked up.

use super::entries::ChunkEntries;
use super::index::Windows;
use crate::data::loader::{EpochOrder, Order};
use lru::LruCache;
use std::sync::{Mutex, PoisonError};

/// Memory for positions of windows, bytes; entries that were not asked about for longest are forgotten first.
const POSITIONS_BYTES: usize = 64 << 20;

/// Positions at which an epoch uses an entry.
struct Uses {
    epoch: u64,
    /// In rising order.
    positions: Vec<u32>,
    /// The first position in the epoch after; `u32::MAX`: none.
    then: u32,
}

struct Known {
    epoch: u64,
    orders: [EpochOrder; 2],
    uses: LruCache<u64, Uses>,
    /// Positions held.
    held: usize,
}

/// Next uses of the entries of one data set.
pub struct Future {
    order: Order,
    window_rows: u64,
    known: Mutex<Known>,
}

impl Future {
    /// `order`: the one in which the data set is read, in every epoch.
    pub fn new(order: Order, window_rows: usize) -> Self {
        let known = Known { epoch: 0, orders: [order.epoch(0), order.epoch(1)], uses: LruCache::unbounded(), held: 0 };
        Self { order, window_rows: window_rows as u64, known: Mutex::new(known) }
    }

    /// Global position (epoch × samples + position) of the last of `ids` in `epoch`.
    pub fn position(&self, epoch: u64, ids: &[u64]) -> u64 {
        let order = self.order.epoch(epoch);
        let last = ids.iter().filter_map(|id| order.position_of(*id)).max();
        epoch.saturating_mul(self.order.len).saturating_add(last.unwrap_or(0))
    }

    /// First global position after `after`, which lies in `epoch`, at which some window that touches entry `key` is used.
    /// Exact; only in data sets of more than 2³² windows, or when the positions of one entry alone pass the memory for all,
    /// it is the mean distance.
    pub fn next_use(&self, key: u64, epoch: u64, after: u64, pages: &ChunkEntries, windows: &Windows) -> u64 {
        let (file, _) = pages.locate(key);
        let touching = || windows.touching(file as u32, pages.rows(key), self.window_rows).flatten();
        let len = self.order.len;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.epoch != epoch {
            known.epoch = epoch;
            known.orders = [epoch, epoch + 1].map(|epoch| self.order.epoch(epoch));
        }
        let Known { orders, uses, held, .. } = &mut *known;
        if uses.get(&key).is_none_or(|uses| uses.epoch != epoch) {
            let count: u64 =
                windows.touching(file as u32, pages.rows(key), self.window_rows).map(|r| r.end - r.start).sum();
            if len > u64::from(u32::MAX) || count > (POSITIONS_BYTES / 4) as u64 {
                return after.saturating_add(len / count.max(1));
            }
            if let Some(old) = uses.pop(&key) {
                *held -= old.positions.len();
            }
            // Both below 2³², checked above.
            let mut positions: Vec<u32> =
                touching().filter_map(|id| orders[0].position_of(id)).map(|position| position as u32).collect();
            positions.sort_unstable();
            let then = touching().filter_map(|id| orders[1].position_of(id)).min();
            let then = then.map_or(u32::MAX, |position| position as u32);
            *held += positions.len();
            uses.put(key, Uses { epoch, positions, then });
            while *held * 4 > POSITIONS_BYTES
                && let Some((_, old)) = uses.pop_lru()
            {
                *held -= old.positions.len();
            }
        }
        let Some(uses) = uses.get(&key) else {
            return u64::MAX;
        };
        let base = epoch * len;
        let later = uses.positions.partition_point(|position| base + u64::from(*position) <= after);
        match uses.positions.get(later) {
            Some(position) => base + u64::from(*position),
            None if uses.then == u32::MAX => u64::MAX,
            None => base + len + u64::from(uses.then),
        }
    }
}
