//! Reading of chunks: the body of a loader thread, and of the caller's thread where there are no threads.

use super::slots::{Job, Shared};
use crate::data::{DataError, FieldSpec, ReadRequest, Rows, Scratch};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;

/// Fields up to this many need no list on the heap.
const FEW_FIELDS: usize = 8;

/// A loader thread named `hr-load-<id>`.
pub(super) struct Worker {
    pub(super) id: u64,
    thread: JoinHandle<()>,
}

impl Worker {
    pub(super) fn spawn(id: u64, place: usize, shared: Arc<Shared>) -> Result<Self, DataError> {
        let thread = std::thread::Builder::new()
            .name(format!("hr-load-{id}"))
            .spawn(move || {
                let _guard = DeathGuard { id, shared: Arc::clone(&shared) };
                work(&shared, place);
            })
            .map_err(|source| DataError::Thread { id, source })?;
        Ok(Self { id, thread })
    }

    /// Waits for the thread's end. Its death by panic is known already, from its guard.
    pub(super) fn join(self) {
        let _ = self.thread.join();
    }
}

/// Reports to the consumer that the thread died of anything but closing: it would wait forever.
struct DeathGuard {
    id: u64,
    shared: Arc<Shared>,
}

impl Drop for DeathGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.shared.die(format!("loader thread {} died of a panic outside a sample", self.id));
        }
    }
}

/// Claims and reads chunks until the loader closes; works ahead of need while there is nothing to claim. `place`: which
/// of the loader's threads this is.
fn work(shared: &Shared, place: usize) {
    let (mut job, mut scratch, mut wakes) = (Job::default(), Scratch::default(), 0);
    let mut trims = shared.throttle.trims();
    loop {
        let mut state = shared.lock();
        loop {
            if state.closing {
                return;
            }
            let idle = !shared.throttle.may_read(place);
            if idle || shared.throttle.trims() != trims {
                trims = shared.throttle.trims();
                scratch = Scratch::default();
            }
            if idle {
                state = shared.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            if shared.claim(&mut state, &mut job) {
                break;
            }
            if state.wakes != wakes {
                // With nothing to read, work ahead, one piece at a time. Paused or not: another rank may be waiting for
                // an entry that this one was granted.
                let heard = state.wakes;
                drop(state);
                if !shared.dataset.work_ahead(&mut scratch) {
                    wakes = heard;
                }
                state = shared.lock();
                continue;
            }
            state = shared.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        let result = read_chunk(shared, &mut job, &mut scratch);
        shared.finish(&mut job, result);
    }
}

/// Reads the job's samples into its pieces, one behind the other. A panic of the data set becomes an error.
pub(super) fn read_chunk(shared: &Shared, job: &mut Job, scratch: &mut Scratch) -> Result<(), DataError> {
    let mut at = 0;
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        while at < job.ids.len() {
            read_sample(shared, job, at, scratch)?;
            at += 1;
        }
        Ok(())
    }));
    let error = match outcome {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(error)) => error,
        Err(panic) => {
            // Whatever the data set kept in there may be half done.
            *scratch = Scratch::default();
            DataError::Panicked(panic_message(panic.as_ref()).to_string())
        }
    };
    let index = job.ids[at];
    let place = catch_unwind(AssertUnwindSafe(|| shared.dataset.describe(index as usize)))
        .unwrap_or_else(|_| "of unknown origin".into());
    Err(DataError::Sample { index, place, error: Box::new(error) })
}

fn read_sample(shared: &Shared, job: &mut Job, at: usize, scratch: &mut Scratch) -> Result<(), DataError> {
    let request = ReadRequest { epoch: job.epoch, index: job.ids[at] as usize };
    let mut slices = job.pieces.iter_mut().zip(shared.fields.iter()).zip(&job.used).map(|((piece, field), used)| {
        let bytes = field.sample_bytes();
        let first = if field.is_ragged() { *used } else { at * bytes };
        &mut piece.bytes_mut()[first..first + bytes]
    });
    let fields = shared.fields.len();
    let lent = shared.lends.then_some(&mut job.lent);
    let before = lent.as_ref().map_or(0, |lent| lent.len());
    let read = |out: &mut [&mut [u8]]| match lent {
        Some(lent) => shared.dataset.read_or_lend(request, out, lent, scratch),
        None => shared.dataset.read(request, out, scratch),
    };
    if fields > FEW_FIELDS {
        let mut many = slices.collect::<Vec<_>>();
        read(&mut many)?;
        take_lengths(&shared.fields, &many, &mut job.lengths, &mut job.used)?;
    } else {
        let mut few: [&mut [u8]; FEW_FIELDS] = std::array::from_fn(|_| slices.next().unwrap_or_default());
        read(&mut few[..fields])?;
        take_lengths(&shared.fields, &few[..fields], &mut job.lengths, &mut job.used)?;
    }
    // From places in the sample to places in the batch.
    for part in &mut job.lent[before..] {
        part.at += (job.first + at) * shared.fields.get(part.field).map_or(0, FieldSpec::sample_bytes);
    }
    Ok(())
}

/// Counts what was written of each ragged field: the data set left the beginnings of its slices in `out`.
fn take_lengths(
    fields: &[FieldSpec],
    out: &[&mut [u8]],
    lengths: &mut Vec<u32>,
    used: &mut [usize],
) -> Result<(), DataError> {
    for (number, field) in fields.iter().enumerate().filter(|(_, field)| field.is_ragged()) {
        let (bytes, row) = (out[number].len(), field.row_bytes().max(1));
        let others = match field.rows {
            Rows::As { field, .. } => fields.get(field).map(|of| out[field].len() / of.row_bytes().max(1)),
            _ => Some(bytes / row),
        };
        if others != Some(bytes / row) || !bytes.is_multiple_of(row) || bytes > field.sample_bytes() {
            return Err(DataError::Length { field: field.name, bytes });
        }
        used[number] += bytes;
        if field.has_offsets() {
            lengths.push((bytes / row) as u32);
        }
    }
    Ok(())
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}
