//! A data set of the user, read through decode workers and the page cache.

use super::lane::{Lanes, Request, Work};
use super::layout::{Layout, lost};
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
    /// Has a worker do `work`, and writes all bytes of its answer to `out`.
    fn ask(&self, (work, index, epoch): (Work, u64, u64), sample: &[u8], out: &mut [u8]) -> Result<(), DataError> {
        let request = Request { work, split: self.split, index, epoch };
        self.lanes.ask(&request, sample, |bytes, read| {
            if bytes != out.len() {
                return Err(DataError::User(format!("dataset[{index}] has {bytes} bytes, expected {}", out.len())));
            }
            read(out).map_err(lost)
        })
    }
}

impl EntrySource for Source {
    fn entry_bytes(&self, _: u64) -> u64 {
        self.layout.stored_bytes() as u64
    }

    fn fill_entry(&self, key: u64, out: &mut [u8], _: &mut Scratch) -> Result<(), DataError> {
        self.ask((Work::Decode, key - self.base, 0), &[], out)
    }
}

/// A data set.
pub struct Samples {
    name: String,
    pub source: Arc<Source>,
    /// `None`: there is no page cache, or samples differ from reading to reading.
    cached: Option<CachedEntries<Source>>,
    transforms: bool,
    /// Order in which samples are read in every epoch, where it is known.
    pub order: Option<Order>,
}

impl Samples {
    pub fn new(name: String, source: Arc<Source>, cache: Option<Arc<CacheClient>>, transforms: bool) -> Self {
        let cache = cache.filter(|_| !source.layout.is_random);
        let cached = cache.map(|cache| CachedEntries::new(Arc::clone(&source), cache));
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

    /// A sample as the model gets it, packed into `given`; `stored` is room for an entry.
    fn packed(&self, request: ReadRequest, given: &mut [u8], scratch: &mut Scratch) -> Result<(), DataError> {
        let (index, epoch) = (request.index as u64, request.epoch);
        let Some(cached) = &self.cached else {
            return self.source.ask((Work::Read, index, epoch), &[], given);
        };
        let key = self.source.base + index;
        match cached.read_or_lend(key, (0..0, self.next_use(index, epoch)), scratch)? {
            Reading::Held(entry) if self.transforms => self.source.ask((Work::Use, index, epoch), &entry, given),
            Reading::Held(entry) => {
                given.copy_from_slice(&entry);
                Ok(())
            }
            // Seeded as an entry is filled, so that a sample is the same in the cache and beside it.
            _ if !self.transforms => self.source.ask((Work::Decode, index, 0), &[], given),
            _ => {
                let mut stored = std::mem::take(&mut scratch.decoded);
                stored.resize(self.source.layout.stored_bytes(), 0);
                let done = self.source.ask((Work::Decode, index, 0), &[], &mut stored);
                let done = done.and_then(|()| self.source.ask((Work::Use, index, epoch), &stored, given));
                scratch.decoded = stored;
                done
            }
        }
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
        if done.is_ok() {
            let mut rest = given.as_slice();
            for field in out.iter_mut() {
                let (own, behind) = rest.split_at(field.len());
                field.copy_from_slice(own);
                rest = behind;
            }
        }
        scratch.raw = given;
        scratch.count();
        done
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
