//! Cells of one split, read through the page cache where there is one.

use super::members::Members;
use super::store::{Place, Store, UNLABELLED};
use crate::data::entries::CachedEntries;
use crate::data::loader::Order;
use crate::data::{BatchAhead, DataError, Dataset, Dtype, FieldSpec, Pages, ReadRequest, Scratch, Wake};
use cache::client::Reading;
use spec::config::{DataConfig, ShuffleMode};
use spec::contract::CacheMode;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Cells: `ids` `[N]` and `values` `[N]`, which are ragged, and `label` i64 `[]`, -1 where there is none. Genes are columns of
/// the model's input; bits of u16 in i16, or i32. Values are counts as bits of u16 in i16, or f32.
pub struct CellDataset {
    store: Arc<Store>,
    cached: Option<Arc<Cached>>,
    members: Members,
    /// All cells in use, by whose order they are numbered.
    all: Members,
    fields: [FieldSpec; 3],
    /// Order in which cells are read in every epoch, where the page cache is told next uses.
    order: Option<Order>,
}

/// The entries of all splits in the page cache.
pub struct Cached {
    entries: CachedEntries<Store>,
    /// Entries stay once they are there, so each is announced once and never retired: a cell costs no message then.
    kept: Option<Kept>,
}

impl Cached {
    /// `stay`: the cache's policy evicts nothing.
    pub fn new(entries: CachedEntries<Store>, stay: bool) -> Self {
        Self { entries, kept: stay.then(Kept::default) }
    }
}

/// The policy of the cache that `data.cache: auto` stands for. In blocks an entry is read for a while and not again before the
/// next epoch; else every entry is as good as any other.
pub fn policy_of(data: &DataConfig) -> CacheMode {
    let in_blocks = data.shuffle && data.shuffle_mode != ShuffleMode::Global;
    if in_blocks { CacheMode::Lru } else { CacheMode::Pin }
}

/// Entries that were announced.
#[derive(Default)]
struct Kept(Mutex<Vec<u64>>);

impl Kept {
    /// Those of `keys` that were not announced before.
    fn new_ones(&self, keys: impl FnOnce() -> Vec<u64>) -> Vec<u64> {
        let mut keys = keys();
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        keys.retain(|key| {
            let (word, bit) = ((key / 64) as usize, 1 << (key % 64));
            if known.len() <= word {
                known.resize(word + 1, 0);
            }
            let is_new = known[word] & bit == 0;
            known[word] |= bit;
            is_new
        });
        keys
    }
}

/// Fields of cells with at most `most` values.
pub fn fields(store: &Store, most: usize) -> [FieldSpec; 3] {
    let (ids, values) = (store.short_ids, store.short_values);
    let ids = FieldSpec::ragged("ids", &[], if ids { Dtype::I16 } else { Dtype::I32 }, most.max(1));
    let values = FieldSpec::along("values", &[], if values { Dtype::I16 } else { Dtype::F32 }, (0, &ids));
    [ids, values, FieldSpec::new("label", &[], Dtype::I64)]
}

impl CellDataset {
    pub fn new(
        store: Arc<Store>,
        cached: Option<Arc<Cached>>,
        (members, all): (Members, Members),
        fields: [FieldSpec; 3],
        order: Option<Order>,
    ) -> Self {
        Self { store, cached, members, all, fields, order }
    }

    /// Number of cell `index` among all cells in use, in the order of files and rows.
    pub fn number(&self, index: u64) -> Option<u64> {
        self.members.row(index).map(|row| self.all.rank(row))
    }

    /// Row of cell `index` through all files.
    pub fn row(&self, index: u64) -> Option<u64> {
        self.members.row(index)
    }

    fn place(&self, index: u64) -> Option<Place> {
        self.members.row(index).and_then(|row| self.store.place(row))
    }

    /// Entries of the cells `ids`, each once, in rising order; ids out of range have none.
    fn keys(&self, ids: &[u64]) -> Vec<u64> {
        let mut keys: Vec<u64> = ids.iter().filter_map(|id| self.place(*id)).map(|place| place.key).collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    /// First global position after `after` at which a cell of the entry is read; `u64::MAX`: not known.
    fn next_use(&self, key: u64, epoch: u64, after: u64) -> u64 {
        let Some(order) = &self.order else { return u64::MAX };
        let rows = self.store.entry_rows_of(key);
        let cells = self.members.rank(rows.start)..self.members.rank(rows.end);
        let first_in = |epoch: u64, from: u64| {
            let order = order.epoch(epoch);
            cells.clone().filter_map(|cell| order.position_of(cell)).filter(|position| *position >= from).min()
        };
        let base = epoch.saturating_mul(order.len);
        let here = first_in(epoch, after.saturating_sub(base) + 1).map(|position| base + position);
        here.or_else(|| first_in(epoch + 1, 0).map(|position| base + order.len + position)).unwrap_or(u64::MAX)
    }

    /// Global position of the last of `ids`.
    fn last_position(&self, batch: BatchAhead) -> u64 {
        let Some(order) = &self.order else { return 0 };
        let keyed = order.epoch(batch.epoch);
        let last = batch.ids.iter().filter_map(|id| keyed.position_of(*id)).max().unwrap_or(0);
        batch.epoch.saturating_mul(order.len).saturating_add(last)
    }
}

impl Dataset for CellDataset {
    fn len(&self) -> usize {
        self.members.len() as usize
    }

    fn fields(&self) -> &[FieldSpec] {
        &self.fields
    }

    fn read(&self, request: ReadRequest, out: &mut [&mut [u8]], scratch: &mut Scratch) -> Result<(), DataError> {
        let [ids, values, label] = out else { return Err(DataError::Fields { asked: out.len(), count: 3 }) };
        let (index, count) = (request.index as u64, self.members.len());
        let missing = || DataError::OutOfRange { what: "cell", index, place: "the data set", count };
        let row = self.members.row(index).ok_or_else(missing)?;
        let place = self.store.place(row).ok_or_else(missing)?;
        let of = match self.store.labels.get(row as usize) {
            Some(label) if *label != UNLABELLED => i64::from(*label),
            _ => -1,
        };
        label.copy_from_slice(&of.to_ne_bytes());
        let held = match &self.cached {
            Some(cached) => Some(cached.entries.read_or_lend(place.key, (0..0, u64::MAX), scratch)?),
            None => None,
        };
        let into = (&mut **ids, &mut **values);
        let (id_bytes, value_bytes) = match held {
            Some(Reading::Held(entry)) => self.store.from_entry(place, &entry, into)?,
            _ => self.store.from_file(place, scratch, into)?,
        };
        *ids = &mut std::mem::take(ids)[..id_bytes];
        *values = &mut std::mem::take(values)[..value_bytes];
        self.store.count(scratch);
        Ok(())
    }

    fn describe(&self, index: usize) -> String {
        match self.place(index as u64) {
            Some(Place { file, row, .. }) => {
                format!("{} cell {row}", super::name(&self.store.reader.sources()[file].path))
            }
            None => format!("cell {index} of {}", self.members.len()),
        }
    }

    fn announce(&self, batch: BatchAhead) {
        let Some(cached) = &self.cached else { return };
        match &cached.kept {
            Some(kept) => {
                let new = kept.new_ones(|| self.keys(batch.ids));
                if !new.is_empty() {
                    cached.entries.announce(&new, |_| u64::MAX);
                }
            }
            None => {
                let after = self.last_position(batch);
                cached.entries.announce(&self.keys(batch.ids), |key| self.next_use(key, batch.epoch, after));
            }
        }
    }

    fn retire(&self, batch: BatchAhead) {
        if let Some(cached) = self.cached.as_ref().filter(|cached| cached.kept.is_none()) {
            cached.entries.retire(&self.keys(batch.ids));
        }
    }

    fn work_ahead(&self, scratch: &mut Scratch) -> bool {
        let done = self.cached.as_ref().is_some_and(|cached| cached.entries.work_ahead(scratch));
        if done {
            self.store.count(scratch);
        }
        done
    }

    fn give_back(&self) {
        self.store.reader.reader().give_back();
    }

    fn wake_by(&self, waker: Weak<dyn Wake>) {
        if let Some(cached) = &self.cached {
            cached.entries.wake_by(waker);
        }
    }

    fn pages(&self) -> Option<Pages> {
        Some(pages(&self.store, &self.members))
    }
}

/// Cells of an entry are a page, those of a file a sequence.
pub fn pages(store: &Store, members: &Members) -> Pages {
    let ranks = |rows: &mut dyn Iterator<Item = u64>| {
        let mut starts: Vec<u64> = rows.map(|row| members.rank(row)).collect();
        starts.dedup();
        starts
    };
    Pages { pages: ranks(&mut store.entry_starts()), sequences: ranks(&mut store.rows.iter().copied()) }
}
