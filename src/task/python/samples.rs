//! A data set of the user, read through decode workers and the page cache.

use super::lane::{Lanes, Request, Work};
use super::layout::{LENGTH_BYTES, Layout, lost};
use crate::data::entries::{CachedEntries, EntrySource};
use crate::data::loader::Order;
use crate::data::{BatchAhead, DataError, Dataset, FieldSpec, ReadRequest, Scratch, Wake};
use cache::client::{CacheClient, Reading};
use std::sync::{Arc, Weak};

/// Samples as `dataset[i]` gives them. The key of an entry is `base` and the sample's index.
pub struct Source {
    pub lanes: Arc<Lanes>,
    pub split: u64,
    pub base: u64,
    pub len: u64,
    pub layout: Layout,
}

impl Source {
    /// Has a worker do `work`, and writes its answer to the beginning of `out`; its bytes.
    fn ask(&self, (work, index, epoch): (Work, u64, u64), sample: &[u8], out: &mut [u8]) -> Result<usize, DataError> {
        let request = Request { work, split: self.split, index, epoch };
        let room = out.len();
        self.lanes.ask(&request, sample, |bytes, read| {
            let fits = if self.layout.most.is_some() { bytes <= room } else { bytes == room };
            if !fits {
                return Err(DataError::User(format!(
                    "dataset[{index}] has {bytes} bytes, and there is room for {room}: set python.sample_bytes={bytes} or more"
                )));
            }
            read(&mut out[..bytes]).map_err(lost)?;
            Ok(bytes)
        })
    }

    /// Writes an entry of the page cache: the sample, with its length before it where samples differ.
    fn decode(&self, index: u64, entry: &mut [u8]) -> Result<(), DataError> {
        let work = (Work::Decode, index, 0);
        if self.layout.most.is_none() {
            return self.ask(work, &[], entry).map(drop);
        }
        let (length, sample) = entry.split_at_mut(LENGTH_BYTES.min(entry.len()));
        let bytes = self.ask(work, &[], sample)?;
        // Nothing reads what lies behind, but entries are checked as wholes.
        sample[bytes..].fill(0);
        length.copy_from_slice(&(bytes as u64).to_le_bytes());
        Ok(())
    }

    /// The sample in an entry.
    fn sample<'a>(&self, entry: &'a [u8]) -> &'a [u8] {
        if self.layout.most.is_none() {
            return entry;
        }
        let (length, sample) = entry.split_at(LENGTH_BYTES.min(entry.len()));
        let length = length.try_into().map_or(0, u64::from_le_bytes);
        sample.get(..usize::try_from(length).unwrap_or(0)).unwrap_or_default()
    }
}

/// All data sets of a user, in the order of their keys. An entry that was granted ahead of need is filled by the loader that has
/// time, which may be another data set's.
pub struct Sources(pub Vec<Arc<Source>>);

impl Sources {
    fn of(&self, key: u64) -> Option<&Source> {
        self.0.iter().map(Arc::as_ref).find(|source| (source.base..source.base + source.len).contains(&key))
    }
}

impl EntrySource for Sources {
    fn entry_bytes(&self, key: u64) -> u64 {
        self.of(key).map_or(0, |source| source.layout.stored_bytes() as u64)
    }

    fn fill_entry(&self, key: u64, out: &mut [u8], _: &mut Scratch) -> Result<(), DataError> {
        let count = self.0.iter().map(|source| source.len).sum();
        let missing = DataError::OutOfRange { what: "entry", index: key, place: "the data sets", count };
        let source = self.of(key).ok_or(missing)?;
        source.decode(key - source.base, out)
    }
}

/// A data set.
pub struct Samples {
    name: String,
    pub source: Arc<Source>,
    /// `None`: there is no page cache, or samples differ from reading to reading.
    cached: Option<CachedEntries<Sources>>,
    transforms: bool,
    /// Order in which samples are read in every epoch, where it is known.
    pub order: Option<Order>,
}

impl Samples {
    /// `all` has `source` among its data sets.
    pub fn new(
        name: String,
        (source, all): (Arc<Source>, &Arc<Sources>),
        cache: Option<Arc<CacheClient>>,
        transforms: bool,
    ) -> Self {
        let cache = cache.filter(|_| !source.layout.is_random);
        let cached = cache.map(|cache| CachedEntries::new(Arc::clone(all), cache));
        Self { name, source, cached, transforms, order: None }
    }

    pub fn is_random(&self) -> bool {
        self.source.layout.is_random
    }

    /// Global position at which a sample is needed in the next epoch; `u64::MAX`: not known.
    fn next_use(&self, index: u64, epoch: u64) -> u64 {
        let next = epoch.saturating_add(1);
        let position = self.order.as_ref().and_then(|order| order.position_of(next, index));
        position.map_or(u64::MAX, |position| next.saturating_mul(self.source.len).saturating_add(position))
    }

    fn keys(&self, ids: &[u64]) -> Vec<u64> {
        let mut keys: Vec<u64> =
            ids.iter().filter(|id| **id < self.source.len).map(|id| self.source.base + id).collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    /// A sample as the model gets it, packed into the beginning of `given`; its bytes.
    fn packed(&self, request: ReadRequest, given: &mut [u8], scratch: &mut Scratch) -> Result<usize, DataError> {
        let (index, epoch) = (request.index as u64, request.epoch);
        let Some(cached) = &self.cached else {
            return self.source.ask((Work::Read, index, epoch), &[], given);
        };
        let key = self.source.base + index;
        let held = cached.read_or_lend(key, (0..0, self.next_use(index, epoch)), scratch)?;
        if let Reading::Held(entry) = held {
            return self.used((index, epoch), self.source.sample(&entry), given);
        }
        // Seeded as an entry is filled, so that a sample is the same in the cache and beside it.
        let mut stored = std::mem::take(&mut scratch.decoded);
        stored.resize(self.source.layout.stored_bytes(), 0);
        let done = self.source.decode(index, &mut stored);
        let done = done.and_then(|()| self.used((index, epoch), self.source.sample(&stored), given));
        scratch.decoded = stored;
        done
    }

    /// The transform of a stored sample, or the sample itself.
    fn used(&self, (index, epoch): (u64, u64), sample: &[u8], given: &mut [u8]) -> Result<usize, DataError> {
        if self.transforms {
            return self.source.ask((Work::Use, index, epoch), sample, given);
        }
        let place = given.get_mut(..sample.len());
        place.ok_or(DataError::Length { field: "sample", bytes: sample.len() })?.copy_from_slice(sample);
        Ok(sample.len())
    }
}

impl Dataset for Samples {
    fn len(&self) -> usize {
        self.source.len as usize
    }

    fn fields(&self) -> &[FieldSpec] {
        &self.source.layout.given
    }

    fn read(&self, request: ReadRequest, out: &mut [&mut [u8]], scratch: &mut Scratch) -> Result<(), DataError> {
        let (index, count) = (request.index as u64, self.source.len);
        if index >= count {
            return Err(DataError::OutOfRange { what: "sample", index, place: "the data set", count });
        }
        if out.len() != self.fields().len() {
            return Err(DataError::Fields { asked: out.len(), count: self.fields().len() });
        }
        let mut given = std::mem::take(&mut scratch.raw);
        given.resize(self.source.layout.given_bytes(), 0);
        let done = self.packed(request, &mut given, scratch);
        if let Ok(bytes) = done {
            let mut rest = &given[..bytes];
            for field in out.iter_mut() {
                let (own, behind) = rest.split_at(field.len().min(rest.len()));
                // Shorter where samples differ in size.
                let place = &mut std::mem::take(field)[..own.len()];
                place.copy_from_slice(own);
                (*field, rest) = (place, behind);
            }
        }
        scratch.raw = given;
        scratch.count();
        done.map(drop)
    }

    fn describe(&self, index: usize) -> String {
        format!("{}[{index}]", self.name)
    }

    fn announce(&self, batch: BatchAhead) {
        if let Some(cached) = &self.cached {
            cached.announce(&self.keys(batch.ids), |key| self.next_use(key - self.source.base, batch.epoch));
        }
    }

    fn retire(&self, batch: BatchAhead) {
        if let Some(cached) = &self.cached {
            cached.retire(&self.keys(batch.ids));
        }
    }

    fn work_ahead(&self, scratch: &mut Scratch) -> bool {
        self.cached.as_ref().is_some_and(|cached| cached.work_ahead(scratch))
    }

    fn wake_by(&self, waker: Weak<dyn Wake>) {
        if let Some(cached) = &self.cached {
            cached.wake_by(waker);
        }
    }
}
