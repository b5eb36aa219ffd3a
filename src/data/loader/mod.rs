//! Sampler, loader threads, batch slots.
//!
//! ```text
//! BatchPlanner::requests ─► BatchStream ─► threads: Dataset::read into chunks of a slot ─► HostBatch, in order
//! ```
//!
//! Threads claim a few samples of the earliest unfinished batch, so all of them work on the first batch, then on
//! the next free slots. A batch's bytes are fixed by its request: they never depend on the number of threads.
//!
//! Architecture invariant: the loader reads samples by [`Dataset::read`] alone and knows no files.

mod order;
mod ramp;
mod sampler;
mod slots;
#[cfg(test)]
mod tests;
mod throttle;
mod worker;

pub use order::{order_of, train_order};
pub use ramp::{Ramp, locate, steps_of};
pub use sampler::{BatchPlanner, Cut, EpochOrder, Order, Paged, Shuffle, mix};
pub use slots::{slot_bytes, slot_fields};
pub use throttle::Throttle;

use super::{DataError, Dataset, FieldSpec, LentPart, Rows, Scratch, Wake};
use host::machine::awake::Stopwatch;
use slots::{Job, Next, Shared, Slot};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};
use worker::Worker;

/// One micro-batch to make, and its place in the epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BatchRequest {
    pub epoch: u64,
    pub step: u64,
    /// Which micro-batch of the step on this rank, and of how many.
    pub micro: u64,
    pub micros: u64,
    pub sample_ids: Vec<u64>,
}

/// Sizes of a loader.
#[derive(Clone, Debug)]
pub struct LoaderSpec {
    /// Loader threads; 0: batches are made on the consumer's thread.
    pub threads: usize,
    /// Batch slots, `prefetch_factor × threads + 2`: two are for the batch in use and the one handed over.
    pub slots: usize,
    /// Samples that a slot holds.
    pub micro_batch: usize,
    /// Keep threads over epochs; else every run starts its own.
    pub persistent: bool,
    /// How long [`BatchStream::next`] waits while the consumer's side holds every slot, in seconds.
    pub held_timeout_s: f64,
    /// Limits that memory sets; the same for all loaders of a rank.
    pub throttle: Arc<Throttle>,
    /// Slots may give their pages back to the system. Not where a device knows their addresses.
    pub gives_back: bool,
    /// Large parts of batches may stay in the page cache ([`HostBatch::lent`]) instead of being copied into slots.
    pub lends: bool,
}

impl Default for LoaderSpec {
    fn default() -> Self {
        Self {
            threads: 2,
            slots: 6,
            micro_batch: 64,
            persistent: true,
            held_timeout_s: 60.0,
            throttle: Arc::default(),
            gives_back: true,
            lends: false,
        }
    }
}

/// Counters of a loader since it was made.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LoaderStats {
    /// Time the consumer waited for batches.
    pub data_wait_s: f64,
    pub samples_read: u64,
    /// Batches handed out.
    pub batches: u64,
    /// Batches ready and not taken, now.
    pub queued: usize,
    /// Most batches ever being filled or ready at once.
    pub most_ahead: usize,
    pub free_slots: usize,
}

/// Loader threads and batch slots over one data set.
pub struct Loader {
    shared: Arc<Shared>,
    spec: LoaderSpec,
    workers: Vec<Worker>,
    next_worker: u64,
    /// Buffers of the consumer's thread, where it reads itself.
    scratch: Scratch,
    job: Job,
}

impl Loader {
    /// Allocates every slot and, when persistent, starts the threads.
    ///
    /// # Errors
    /// A size of 0, no memory for the slots, or a thread that does not start.
    pub fn new(dataset: Arc<dyn Dataset>, spec: LoaderSpec) -> Result<Self, DataError> {
        if spec.slots == 0 || spec.micro_batch == 0 {
            let (slots, micro) = (spec.slots, spec.micro_batch);
            let problem = format!("a loader needs slots and samples in them, found {slots} slots of {micro} samples");
            return Err(DataError::setting("train.prefetch_factor", problem));
        }
        let shared = Arc::new(Shared::new(dataset, &spec)?);
        let waker: Arc<dyn Wake> = shared.clone();
        shared.dataset.wake_by(Arc::downgrade(&waker));
        let (scratch, job) = (Scratch::default(), Job::default());
        let mut loader = Self { shared, spec, workers: Vec::new(), next_worker: 0, scratch, job };
        if loader.spec.persistent {
            loader.start_workers()?;
        }
        Ok(loader)
    }

    /// Makes the batches of `requests` ahead of the consumer, as many as slots allow. Requests are drawn on the
    /// consumer's thread, in order, twice as many as there are slots ahead of need, and announced to the data set.
    ///
    /// # Errors
    /// A thread that does not start.
    pub fn run<'a>(
        &'a mut self,
        requests: impl Iterator<Item = BatchRequest> + Send + 'a,
    ) -> Result<BatchStream<'a>, DataError> {
        if self.workers.is_empty() {
            self.start_workers()?;
        }
        let mut stream = BatchStream {
            loader: self,
            requests: Box::new(requests.fuse()),
            drawn: Vec::new(),
            last_wait_s: 0.0,
            ended: false,
        };
        stream.draw();
        Ok(stream)
    }

    /// Samples that a slot holds.
    pub fn micro_batch(&self) -> usize {
        self.spec.micro_batch
    }

    /// Address and bytes of the memory that all slots lie in, for a device that wants to have it page-locked.
    pub fn pool_range(&self) -> (usize, usize) {
        self.shared.pool
    }

    /// Bytes of all slots.
    pub fn pool_bytes(&self) -> usize {
        slot_bytes(&self.shared.fields, self.spec.micro_batch) * self.spec.slots
    }

    /// Ids of the threads running now; a thread is named `hr-load-<id>`.
    pub fn worker_ids(&self) -> Vec<u64> {
        self.workers.iter().map(|worker| worker.id).collect()
    }

    pub fn stats(&self) -> LoaderStats {
        self.shared.stats()
    }

    fn start_workers(&mut self) -> Result<(), DataError> {
        self.shared.reopen();
        for place in 0..self.spec.threads {
            match Worker::spawn(self.next_worker, place, Arc::clone(&self.shared)) {
                Ok(worker) => self.workers.push(worker),
                Err(error) => {
                    self.stop_workers();
                    return Err(error);
                }
            }
            self.next_worker += 1;
        }
        Ok(())
    }

    fn stop_workers(&mut self) {
        self.shared.close();
        self.workers.drain(..).for_each(Worker::join);
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.stop_workers();
    }
}

/// Batches of one run, in the order of their requests. Dropping it cancels what is left; the loader can run again.
/// After an error it ends.
pub struct BatchStream<'a> {
    loader: &'a mut Loader,
    requests: Box<dyn Iterator<Item = BatchRequest> + Send + 'a>,
    drawn: Vec<BatchRequest>,
    last_wait_s: f64,
    ended: bool,
}

impl BatchStream<'_> {
    /// Time the last call of `next` took to have its batch.
    pub fn last_wait_s(&self) -> f64 {
        self.last_wait_s
    }

    /// Samples differ in length, and so do the tensors of batches.
    pub fn is_ragged(&self) -> bool {
        self.loader.shared.fields.iter().any(FieldSpec::is_ragged)
    }

    /// The loader's counters, this run included.
    pub fn stats(&self) -> LoaderStats {
        self.loader.stats()
    }

    /// Ids of the threads that serve this run.
    pub fn worker_ids(&self) -> Vec<u64> {
        self.loader.worker_ids()
    }

    /// Gives back what is kept for speed alone: the pages of free slots, the threads' buffers, the data set's own
    /// decoded bytes. What is needed again is made anew.
    pub fn give_back(&self) {
        self.loader.shared.give_memory_back();
    }

    /// Tops up the requests known ahead.
    fn draw(&mut self) {
        let wanted = self.loader.shared.wanted();
        self.drawn.extend(self.requests.by_ref().take(wanted));
        self.loader.shared.add_requests(&mut self.drawn);
    }

    fn await_batch(&mut self) -> Option<Result<HostBatch, DataError>> {
        let shared = Arc::clone(&self.loader.shared);
        shared.await_one(true);
        let item = self.await_ready(&shared);
        shared.await_one(false);
        item
    }

    fn await_ready(&mut self, shared: &Arc<Shared>) -> Option<Result<HostBatch, DataError>> {
        let mut held_since = None;
        loop {
            if self.loader.spec.threads == 0 {
                self.read_here(shared);
            }
            let mut state = shared.lock();
            match shared.next(&mut state) {
                Next::Batch(slot, lent, request) => {
                    drop(state);
                    return Some(Ok(HostBatch { shared: Arc::clone(shared), slot: Some(slot), lent, request }));
                }
                Next::Failed(error) => return Some(Err(error)),
                Next::End => return None,
                Next::Wait { held: false } => {
                    held_since = None;
                    if self.loader.spec.threads > 0 {
                        drop(shared.ready.wait(state).unwrap_or_else(PoisonError::into_inner));
                    }
                }
                Next::Wait { held: true } => {
                    let limit = Duration::from_secs_f64(self.loader.spec.held_timeout_s);
                    let waited = held_since.get_or_insert_with(Instant::now).elapsed();
                    if waited >= limit {
                        return Some(Err(self.all_held()));
                    }
                    drop(shared.ready.wait_timeout(state, limit - waited));
                }
            }
        }
    }

    /// Reads on this thread until a batch is done or nothing can be claimed.
    fn read_here(&mut self, shared: &Shared) {
        let Loader { job, scratch, .. } = &mut *self.loader;
        loop {
            let claimed = shared.claim(&mut shared.lock(), job);
            if !claimed {
                return;
            }
            let result = worker::read_chunk(shared, job, scratch);
            shared.finish(job, result);
        }
    }

    fn all_held(&self) -> DataError {
        let LoaderSpec { slots, held_timeout_s, .. } = self.loader.spec;
        DataError::SlotsHeld { slots, after_s: held_timeout_s }
    }
}

impl Iterator for BatchStream<'_> {
    type Item = Result<HostBatch, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        self.draw();
        let start = Stopwatch::start();
        let item = self.await_batch();
        self.last_wait_s = start.elapsed().as_secs_f64();
        self.loader.shared.lock().stats.data_wait_s += self.last_wait_s;
        self.ended = !matches!(item, Some(Ok(_)));
        if self.ended {
            self.loader.shared.cancel();
        }
        item
    }
}

impl Drop for BatchStream<'_> {
    fn drop(&mut self) {
        self.loader.shared.cancel();
        if !self.loader.spec.persistent {
            self.loader.stop_workers();
        }
    }
}

/// A micro-batch in host memory. It holds a slot of the pool until dropped, and may outlive stream and loader.
pub struct HostBatch {
    shared: Arc<Shared>,
    /// Taken on drop alone.
    slot: Option<Slot>,
    lent: Vec<LentPart>,
    request: BatchRequest,
}

impl HostBatch {
    /// Samples in the batch, `B`.
    pub fn len(&self) -> usize {
        self.request.sample_ids.len()
    }

    pub fn is_empty(&self) -> bool {
        self.request.sample_ids.is_empty()
    }

    pub fn sample_ids(&self) -> &[u64] {
        &self.request.sample_ids
    }

    /// The request: epoch, step, micro-batch and samples.
    pub fn request(&self) -> &BatchRequest {
        &self.request
    }

    pub fn fields(&self) -> &[FieldSpec] {
        &self.shared.fields
    }

    /// Parts of fields that are not in the slot, by field and place. Empty unless the loader lends.
    pub fn lent(&self) -> &[LentPart] {
        &self.lent
    }

    /// The bytes of field `index`, but for those that are lent, contiguous `[B, shape...]` in native byte order, starting at a
    /// multiple of 64; empty when there is no such field, or samples differ in length: see [`HostBatch::runs`].
    pub fn field(&self, index: usize) -> &[u8] {
        let field = self.shared.fields.get(index).filter(|field| !field.is_ragged());
        let bytes = field.map_or(0, FieldSpec::sample_bytes) * self.len();
        self.slot.as_ref().and_then(|slot| slot.field(index).get(..bytes)).unwrap_or_default()
    }

    /// Offsets of ragged field `index`, i64 `[B + 1]` in native byte order; empty for other fields.
    pub fn offsets(&self, index: usize) -> &[u8] {
        let fields = &self.shared.fields;
        let index = match fields.get(index).map(|field| field.rows) {
            Some(Rows::Ragged { .. }) => index,
            Some(Rows::As { field, .. }) => field,
            _ => return &[],
        };
        let number = fields[..index].iter().filter(|field| field.has_offsets()).count();
        self.slot.as_ref().map(|slot| slot.offsets(number, self.len())).unwrap_or_default()
    }

    /// Elements of field `index` in the batch.
    pub fn rows(&self, index: usize) -> usize {
        match self.shared.fields.get(index) {
            Some(field) if field.is_ragged() => offset(self.offsets(index), self.len()),
            _ => self.len(),
        }
    }

    /// The bytes of ragged field `index` in a few runs, which follow each other.
    pub fn runs(&self, index: usize) -> impl Iterator<Item = &[u8]> {
        let field = self.shared.fields.get(index).filter(|field| field.is_ragged());
        let (row, sample) = field.map_or((0, 0), |field| (field.row_bytes(), field.sample_bytes()));
        let (bytes, offsets) =
            (self.slot.as_ref().map(|slot| slot.field(index)).unwrap_or_default(), self.offsets(index));
        let chunks = (0..if field.is_some() { self.len() } else { 0 }).step_by(self.shared.chunk);
        chunks.filter_map(move |first| {
            let last = (first + self.shared.chunk).min(self.len());
            let rows = offset(offsets, last) - offset(offsets, first);
            bytes.get(first * sample..first * sample + rows * row).filter(|run| !run.is_empty())
        })
    }
}

/// Number `n` of i64 offsets.
fn offset(offsets: &[u8], n: usize) -> usize {
    offsets.as_chunks::<8>().0.get(n).map_or(0, |cell| i64::from_ne_bytes(*cell) as usize)
}

impl Drop for HostBatch {
    fn drop(&mut self) {
        if let Some(slot) = self.slot.take() {
            self.shared.give_back(slot);
        }
    }
}
