//! Batch slots and the batches in flight: the state that consumer and loader threads share.
//!
//! A slot is free, being filled, ready, or held by a [`HostBatch`](super::HostBatch). Pieces of a slot are owned by whoever
//! writes or reads them, so the lock is held for bookkeeping only, never while a sample is read.

use super::{BatchRequest, LoaderSpec, LoaderStats, Throttle};
use crate::data::{BatchAhead, DataError, Dataset, FieldSpec, LentPart, Wake};
use cache::mapping::Piece;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Fields of a slot start at multiples of this.
const ALIGN_BYTES: usize = 64;

/// Bytes per sample of a ragged field's offsets: room for one more than there are samples.
const OFFSETS_BYTES: usize = 16;

/// Bytes of one slot of `micro_batch` samples: each field `[micro_batch, shape...]`, rounded up to 64. Of a ragged field each
/// sample has room for its most elements, so that threads write side by side.
pub fn slot_bytes(fields: &[FieldSpec], micro_batch: usize) -> usize {
    slot_fields(fields).map(|bytes| field_bytes(bytes, micro_batch)).sum()
}

/// Bytes of one sample in a slot: those of each field, then those of its offsets where it has some.
pub fn slot_fields(fields: &[FieldSpec]) -> impl Iterator<Item = usize> {
    fields
        .iter()
        .flat_map(|field| std::iter::once(field.sample_bytes()).chain(field.has_offsets().then_some(OFFSETS_BYTES)))
}

fn field_bytes(sample_bytes: usize, micro_batch: usize) -> usize {
    sample_bytes.saturating_mul(micro_batch).next_multiple_of(ALIGN_BYTES)
}

/// Room for one micro-batch.
pub(super) struct Slot {
    /// One piece per field; empty while cut into `parts`.
    whole: Vec<Piece>,
    /// Offsets of each field that has some, in their order: i64 `[B + 1]`.
    offsets: Vec<Piece>,
    /// By chunk, then by field. A chunk being filled has left its place empty.
    parts: Vec<Vec<Piece>>,
}

impl Slot {
    /// The bytes of one field, padding included.
    pub(super) fn field(&self, field: usize) -> &[u8] {
        self.whole.get(field).map_or(&[], Piece::bytes)
    }

    /// Offsets number `number` of a batch of `samples`.
    pub(super) fn offsets(&self, number: usize, samples: usize) -> &[u8] {
        self.offsets.get(number).and_then(|piece| piece.bytes().get(..8 * (samples + 1))).unwrap_or_default()
    }

    /// Writes the offsets that follow from `lengths`: per sample, then per field that has some.
    fn write_offsets(&mut self, lengths: &[u32]) {
        let fields = self.offsets.len();
        for (number, piece) in self.offsets.iter_mut().enumerate() {
            let mut at = 0i64;
            let ends = lengths.iter().skip(number).step_by(fields).map(|rows| {
                at += i64::from(*rows);
                at
            });
            for (cell, end) in piece.bytes_mut().as_chunks_mut::<8>().0.iter_mut().zip(std::iter::once(0).chain(ends)) {
                *cell = end.to_ne_bytes();
            }
        }
    }

    /// Gives the memory of its bytes back to the system; they read as zero until they are written again.
    fn give_pages_back(&mut self) {
        self.whole.iter_mut().chain(&mut self.offsets).for_each(Piece::give_pages_back);
    }

    /// Cuts every field into chunks of so many samples; the last takes the padding too.
    fn cut(&mut self, sample_bytes: impl Iterator<Item = usize>, chunk: usize) {
        let last = self.parts.len() - 1;
        for (mut rest, bytes) in self.whole.drain(..).zip(sample_bytes) {
            for part in &mut self.parts[..last] {
                part.push(rest.split_to(chunk * bytes));
            }
            self.parts[last].push(rest);
        }
    }

    /// The inverse of [`Slot::cut`]. False when a chunk never came back.
    fn join(&mut self) -> bool {
        for part in &mut self.parts {
            for (field, piece) in part.drain(..).enumerate() {
                match self.whole.get_mut(field) {
                    None => self.whole.push(piece),
                    Some(whole) => {
                        if whole.unsplit(piece).is_err() {
                            return false;
                        }
                    }
                }
            }
        }
        true
    }
}

/// A batch whose chunks are being read, or all are.
struct Flight {
    /// Unique over all runs of the loader.
    sequence: u64,
    slot: Slot,
    /// Parts that are not in the slot.
    lent: Vec<LentPart>,
    /// Elements of each sample, per field that has offsets.
    lengths: Vec<u32>,
    request: BatchRequest,
    chunks: usize,
    /// Chunks given out; they go out in order.
    claimed: usize,
    returned: usize,
    /// The data set knows that it will not be read any more.
    retired: bool,
    /// Error of the lowest failing chunk: every chunk below it was claimed before, so this does not depend on timing.
    error: Option<(usize, DataError)>,
}

impl Flight {
    fn may_claim(&self) -> bool {
        self.error.is_none() && self.claimed < self.chunks
    }

    fn idle(&self) -> bool {
        self.returned == self.claimed
    }

    fn ready(&self) -> bool {
        self.idle() && !self.may_claim()
    }

    /// Returns, once, the message to the data set when nothing of the batch will be read any more.
    fn retire(&mut self) -> Option<Retired> {
        (!std::mem::replace(&mut self.retired, true)).then(|| Retired::of(&self.request))
    }
}

/// A batch that will not be read any more. The data set is informed without the lock.
pub(super) struct Retired {
    epoch: u64,
    ids: Vec<u64>,
}

impl Retired {
    fn of(request: &BatchRequest) -> Self {
        Self { epoch: request.epoch, ids: request.sample_ids.clone() }
    }
}

/// A range of a batch's samples for one thread to read. Reused by the thread from chunk to chunk.
#[derive(Default)]
pub(super) struct Job {
    sequence: u64,
    chunk: usize,
    pub(super) epoch: u64,
    pub(super) ids: Vec<u64>,
    /// Place of the first of them in the batch.
    pub(super) first: usize,
    /// Parts that were lent instead of written, by their place in the batch.
    pub(super) lent: Vec<LentPart>,
    /// One piece per field, room for at least `ids.len()` samples.
    pub(super) pieces: Vec<Piece>,
    /// Bytes of each ragged field that are written, one sample behind the other; 0 for other fields.
    pub(super) used: Vec<usize>,
    /// Elements of each sample, per field that has offsets.
    pub(super) lengths: Vec<u32>,
}

#[derive(Default)]
pub(super) struct State {
    free: Vec<Slot>,
    /// Requests known ahead of their batches.
    upcoming: VecDeque<BatchRequest>,
    /// Number of batches, from the first, that are not announced: memory is short, and they are announced when they
    /// begin.
    withdrawn: usize,
    /// Batches of the current run, in request order.
    flights: VecDeque<Flight>,
    /// Batches of cancelled runs with chunks still out.
    draining: Vec<Flight>,
    next_sequence: u64,
    /// Why no batch will come any more.
    dead: Option<String>,
    pub(super) closing: bool,
    /// The consumer waits for a batch.
    awaited: bool,
    /// How often the data set said that there is work ahead of need.
    pub(super) wakes: u64,
    pub(super) stats: LoaderStats,
}

pub(super) struct Shared {
    pub(super) dataset: Arc<dyn Dataset>,
    pub(super) fields: Arc<[FieldSpec]>,
    pub(super) micro_batch: usize,
    pub(super) slots: usize,
    /// Most batches that are being filled or wait to be taken.
    pub(super) prefetch: usize,
    threads: usize,
    pub(super) throttle: Arc<Throttle>,
    gives_back: bool,
    /// Batches may have parts that are not in their slots.
    pub(super) lends: bool,
    /// Address and bytes of all slots.
    pub(super) pool: (usize, usize),
    /// Samples that a thread claims at once.
    pub(super) chunk: usize,
    /// Fields with offsets.
    ragged: usize,
    state: Mutex<State>,
    /// There may be a chunk to claim.
    pub(super) work: Condvar,
    /// There may be a batch to take.
    pub(super) ready: Condvar,
}

/// State that the consumer finds.
pub(super) enum Next {
    Batch(Slot, Vec<LentPart>, BatchRequest),
    Failed(DataError),
    /// No request is left.
    End,
    /// The next batch is not ready. `held`: because the consumer's side holds every slot.
    Wait {
        held: bool,
    },
}

impl Shared {
    pub(super) fn new(dataset: Arc<dyn Dataset>, spec: &LoaderSpec) -> Result<Self, DataError> {
        let LoaderSpec { micro_batch, slots, threads, gives_back, lends, .. } = *spec;
        let fields: Arc<[FieldSpec]> = dataset.fields().into();
        let sample_bytes: usize = fields.iter().map(FieldSpec::sample_bytes).sum();
        let chunk = chunk_samples(micro_batch, threads, sample_bytes);
        let ragged = fields.iter().filter(|field| field.has_offsets()).count();
        let mut pool = Piece::allocate(slot_bytes(&fields, micro_batch).saturating_mul(slots))?;
        let pool_range = (pool.bytes().as_ptr() as usize, pool.bytes().len());
        let free = (0..slots)
            .map(|_| Slot {
                whole: fields
                    .iter()
                    .map(|field| pool.split_to(field_bytes(field.sample_bytes(), micro_batch)))
                    .collect(),
                offsets: (0..ragged).map(|_| pool.split_to(field_bytes(OFFSETS_BYTES, micro_batch))).collect(),
                parts: (0..micro_batch.div_ceil(chunk)).map(|_| Vec::with_capacity(fields.len())).collect(),
            })
            .collect();
        // Two slots are for the batch in use and the one being handed over. Without threads nothing is read ahead.
        let prefetch = if threads == 0 { 1 } else { slots.saturating_sub(2).max(1) };
        Ok(Self {
            dataset,
            pool: pool_range,
            fields,
            micro_batch,
            slots,
            prefetch,
            threads,
            throttle: Arc::clone(&spec.throttle),
            gives_back,
            lends,
            chunk,
            ragged,
            state: Mutex::new(State { free, ..State::default() }),
            work: Condvar::new(),
            ready: Condvar::new(),
        })
    }

    /// A thread that panicked with the lock leaves consistent state: `dead` is set before anyone trusts it.
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Requests wanted ahead: enough for every slot. Without threads none is read ahead, so one is announced at a time.
    pub(super) fn wanted(&self) -> usize {
        let ahead = if self.threads == 0 || self.throttle.is_paused() { 1 } else { 2 * self.slots };
        ahead.saturating_sub(self.lock().upcoming.len())
    }

    /// Withdraws the announcements of batches that have not begun; they are announced again as they begin.
    fn withdraw(&self) {
        let mut state = self.lock();
        let announced: Vec<Retired> = state.upcoming.iter().skip(state.withdrawn).map(Retired::of).collect();
        state.withdrawn = state.upcoming.len();
        drop(state);
        self.retire(announced);
    }

    fn announce(&self, request: &BatchRequest) {
        self.dataset.announce(BatchAhead { epoch: request.epoch, ids: &request.sample_ids });
    }

    fn retire(&self, batches: impl IntoIterator<Item = Retired>) {
        for Retired { epoch, ids } in batches {
            self.dataset.retire(BatchAhead { epoch, ids: &ids });
        }
    }

    pub(super) fn add_requests(&self, requests: &mut Vec<BatchRequest>) {
        if !requests.is_empty() {
            let mut state = self.lock();
            // In the order of batches; no thread may begin one of these meanwhile.
            let withdrawn = std::mem::take(&mut state.withdrawn);
            state.upcoming.iter().take(withdrawn).for_each(|request| self.announce(request));
            drop(state);
            requests.iter().for_each(|request| self.announce(request));
            self.lock().upcoming.extend(requests.drain(..));
            self.work.notify_all();
        }
    }

    /// The next chunk of the earliest batch that has one; begins a batch when none has. False: nothing to do now.
    pub(super) fn claim(&self, state: &mut State, job: &mut Job) -> bool {
        if state.dead.is_some() {
            return false;
        }
        let position = match state.flights.iter().position(Flight::may_claim) {
            Some(position) => position,
            None => match self.begin(state) {
                Some(position) => position,
                None => return false,
            },
        };
        let flight = &mut state.flights[position];
        let first = flight.claimed * self.chunk;
        let last = (first + self.chunk).min(flight.request.sample_ids.len());
        job.sequence = flight.sequence;
        job.chunk = flight.claimed;
        job.epoch = flight.request.epoch;
        job.first = first;
        job.ids.clear();
        job.ids.extend_from_slice(&flight.request.sample_ids[first..last]);
        job.lengths.clear();
        job.used.clear();
        job.used.resize(self.fields.len(), 0);
        // The job's empty list takes the place of the chunk's: no list is ever allocated again.
        std::mem::swap(&mut job.pieces, &mut flight.slot.parts[flight.claimed]);
        flight.claimed += 1;
        true
    }

    /// Most batches that may be in flight now.
    fn most_ahead(&self, state: &State) -> usize {
        if self.throttle.is_paused() { usize::from(state.awaited) } else { self.prefetch }
    }

    /// The consumer begins, or ends, to wait for a batch.
    pub(super) fn await_one(&self, awaited: bool) {
        self.lock().awaited = awaited;
        if awaited && self.throttle.is_paused() {
            self.work.notify_all();
        }
    }

    /// Gives back what is kept for speed alone. Threads follow when they next look.
    pub(super) fn give_memory_back(&self) {
        self.throttle.trim();
        if self.throttle.is_paused() {
            self.withdraw();
        }
        self.dataset.give_back();
        if self.gives_back {
            self.lock().free.iter_mut().for_each(Slot::give_pages_back);
        }
        self.work.notify_all();
    }

    /// Puts upcoming requests into free slots until one has a chunk to claim; its place in flight.
    fn begin(&self, state: &mut State) -> Option<usize> {
        while state.flights.len() < self.most_ahead(state) && state.flights.iter().all(|flight| flight.error.is_none())
        {
            if state.upcoming.is_empty() {
                return None;
            }
            let mut slot = state.free.pop()?;
            let request = state.upcoming.pop_front()?;
            if state.withdrawn > 0 {
                state.withdrawn -= 1;
                self.announce(&request);
            }
            slot.cut(self.fields.iter().map(FieldSpec::sample_bytes), self.chunk);
            let error = self.refuse(&request).map(|error| (0, error));
            let chunks = request.sample_ids.len().div_ceil(self.chunk);
            let flight = Flight {
                sequence: state.next_sequence,
                slot,
                lent: Vec::new(),
                lengths: vec![0; request.sample_ids.len() * self.ragged],
                request,
                chunks,
                claimed: 0,
                returned: 0,
                retired: false,
                error,
            };
            state.next_sequence += 1;
            let claimable = flight.may_claim();
            state.flights.push_back(flight);
            state.stats.most_ahead = state.stats.most_ahead.max(state.flights.len());
            if claimable {
                return Some(state.flights.len() - 1);
            }
            self.ready.notify_all();
        }
        None
    }

    fn refuse(&self, request: &BatchRequest) -> Option<DataError> {
        let (ids, samples) = (&request.sample_ids, self.dataset.len());
        if ids.len() > self.micro_batch {
            return Some(DataError::BatchTooLarge { samples: ids.len(), room: self.micro_batch });
        }
        let id = ids.iter().find(|&&id| usize::try_from(id).map_or(true, |id| id >= samples))?;
        let (index, count) = (*id, samples as u64);
        Some(DataError::OutOfRange { what: "sample", index, place: "the data set", count })
    }

    /// Takes a chunk back, read or failed.
    pub(super) fn finish(&self, job: &mut Job, result: Result<(), DataError>) {
        let mut retired = None;
        let mut state = self.lock();
        state.stats.samples_read += if result.is_ok() { job.ids.len() as u64 } else { 0 };
        if let Some(index) = state.draining.iter().position(|flight| flight.sequence == job.sequence) {
            take_back(&mut state.draining[index], job, result);
            if state.draining[index].idle() {
                let mut flight = state.draining.swap_remove(index);
                retired = flight.retire();
                self.free(&mut state, flight.slot);
            }
        } else if let Some(index) = state.flights.iter().position(|flight| flight.sequence == job.sequence) {
            take_back(&mut state.flights[index], job, result);
            if state.flights[index].ready() {
                retired = state.flights[index].retire();
            }
            if index == 0 && state.flights[0].ready() {
                self.ready.notify_all();
            }
        }
        drop(state);
        self.retire(retired);
    }

    /// Puts a slot back whole. One that lost a piece to a dying thread is given up.
    fn free(&self, state: &mut State, mut slot: Slot) {
        if slot.join() {
            if self.gives_back && self.throttle.is_paused() {
                slot.give_pages_back();
            }
            state.free.push(slot);
            self.work.notify_all();
            self.ready.notify_all();
        }
    }

    pub(super) fn give_back(&self, slot: Slot) {
        let mut state = self.lock();
        self.free(&mut state, slot);
    }

    pub(super) fn next(&self, state: &mut State) -> Next {
        if let Some(reason) = &state.dead {
            return Next::Failed(DataError::LoaderEnded(reason.clone()));
        }
        if !state.flights.front().is_some_and(Flight::ready) {
            return match state.flights.is_empty() {
                true if state.upcoming.is_empty() => Next::End,
                empty => Next::Wait { held: empty && state.free.is_empty() && state.draining.is_empty() },
            };
        }
        let Some(mut flight) = state.flights.pop_front() else {
            return Next::End;
        };
        self.work.notify_all();
        // Empty and refused batches, of which no chunk ever came back.
        self.retire(flight.retire());
        if let Some((_, error)) = flight.error {
            self.free(state, flight.slot);
            return Next::Failed(error);
        }
        if !flight.slot.join() {
            return Next::Failed(DataError::LoaderEnded("a loader thread lost part of a batch".into()));
        }
        flight.slot.write_offsets(&flight.lengths);
        state.stats.batches += 1;
        flight.lent.sort_unstable_by_key(|part| (part.field, part.at));
        Next::Batch(flight.slot, flight.lent, flight.request)
    }

    /// Forgets every request and batch of the current run; chunks still out come back by themselves.
    pub(super) fn cancel(&self) {
        let mut state = self.lock();
        let withdrawn = std::mem::take(&mut state.withdrawn);
        let mut retired: Vec<Retired> = state.upcoming.drain(..).skip(withdrawn).map(|r| Retired::of(&r)).collect();
        while let Some(mut flight) = state.flights.pop_front() {
            if flight.idle() {
                retired.extend(flight.retire());
                self.free(&mut state, flight.slot);
            } else {
                state.draining.push(flight);
            }
        }
        drop(state);
        self.retire(retired);
    }

    /// Ends this and all later runs.
    pub(super) fn die(&self, reason: String) {
        self.lock().dead.get_or_insert(reason);
        self.ready.notify_all();
        self.work.notify_all();
    }

    pub(super) fn close(&self) {
        self.lock().closing = true;
        self.work.notify_all();
    }

    pub(super) fn reopen(&self) {
        self.lock().closing = false;
    }

    pub(super) fn stats(&self) -> LoaderStats {
        let state = self.lock();
        let queued = state.flights.iter().filter(|flight| flight.ready()).count();
        LoaderStats { queued, free_slots: state.free.len(), ..state.stats.clone() }
    }
}

impl Wake for Shared {
    fn wake(&self) {
        self.lock().wakes += 1;
        self.work.notify_all();
    }
}

fn take_back(flight: &mut Flight, job: &mut Job, result: Result<(), DataError>) {
    std::mem::swap(&mut job.pieces, &mut flight.slot.parts[job.chunk]);
    flight.lent.append(&mut job.lent);
    let first = job.first * (job.lengths.len() / job.ids.len().max(1));
    if let (Ok(()), Some(cells)) = (&result, flight.lengths.get_mut(first..first + job.lengths.len())) {
        cells.copy_from_slice(&job.lengths);
    }
    flight.returned += 1;
    if let Err(error) = result
        && flight.error.as_ref().is_none_or(|(chunk, _)| job.chunk < *chunk)
    {
        flight.error = Some((job.chunk, error));
    }
}

/// Samples of one claim: a few, so that all threads share the first batch; at least 64 KiB, so that the lock costs nothing.
fn chunk_samples(micro_batch: usize, threads: usize, sample_bytes: usize) -> usize {
    let share = micro_batch.div_ceil(2 * threads.max(1));
    if threads == 0 { micro_batch } else { share.clamp(1, 8.max(65_536 / sample_bytes.max(1))) }
}
