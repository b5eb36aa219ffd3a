//! Copies from a batch slot, and from the page cache, to tensors on the rank's device: at once, or ahead of need on a
//! separate stream.

use super::TrainError;
use super::scaler::tch_error;
use crate::data::FieldSpec;
use crate::data::loader::{BatchStream, HostBatch};
use crate::task::{Batch, outline};
use crate::torch::TorchError;
use crate::torch::device::{Event, HostMemory, HostPart, HostPin, Marks, Stream, Upload, upload_marked};
use crate::torch::host::joined;
use std::collections::VecDeque;
use tch::{Device, Kind, Tensor};

/// Micro-batches on the device at once: one in use, one ready, one on its way.
const SETS: usize = 3;

/// Copies a micro-batch out of its slot, in which all of it is: per field one tensor `[B, shape...]`, or elements and offsets.
pub fn to_tensors(host: &HostBatch, device: Device) -> Batch {
    let mut fields = Vec::new();
    for (index, field) in host.fields().iter().enumerate() {
        let runs: Vec<&[u8]> = if field.is_ragged() { host.runs(index).collect() } else { vec![host.field(index)] };
        fields.push(joined(&runs, &shape(field, host.rows(index)), kind(field)).to_device(device));
        if field.has_offsets() {
            let offsets = Tensor::from_data_size(host.offsets(index), &[host.len() as i64 + 1], Kind::Int64);
            fields.push(offsets.to_device(device));
        }
    }
    Batch::new(fields, host.sample_ids().to_vec())
}

/// Shape of `rows` elements of a field.
fn shape(field: &FieldSpec, rows: usize) -> Vec<i64> {
    std::iter::once(rows as i64).chain(field.shape.iter().map(|&n| n as i64)).collect()
}

/// First extents of the tensors of a batch.
fn extents(host: &HostBatch) -> Vec<i64> {
    let of = |(index, field): (usize, &FieldSpec)| {
        let offsets = field.has_offsets().then_some(host.len() as i64 + 1);
        std::iter::once(host.rows(index) as i64).chain(offsets)
    };
    host.fields().iter().enumerate().flat_map(of).collect()
}

fn kind(field: &FieldSpec) -> Kind {
    outline::kind(field.dtype)
}

impl HostMemory for HostBatch {
    /// Parts of the batch in order: lent ones in the page cache, the others in the slot.
    fn parts(&self) -> Vec<HostPart<'_>> {
        let mut parts = Vec::new();
        let mut lent = self.lent().iter().peekable();
        let mut into = 0;
        for (index, field) in self.fields().iter().enumerate() {
            if field.is_ragged() {
                let mut at = 0;
                for bytes in self.runs(index) {
                    parts.push(HostPart { into, at, bytes });
                    at += bytes.len();
                }
                into += 1;
                if field.has_offsets() {
                    parts.push(HostPart { into, at: 0, bytes: self.offsets(index) });
                    into += 1;
                }
                continue;
            }
            let slot = self.field(index);
            let mut at = 0;
            let from_slot = |at: usize, end: usize, parts: &mut Vec<_>| {
                if let Some(bytes) = slot.get(at..end).filter(|bytes| !bytes.is_empty()) {
                    parts.push(HostPart { into, at, bytes });
                }
            };
            while let Some(part) = lent.next_if(|part| part.field == index) {
                from_slot(at, part.at, &mut parts);
                at = part.at;
                for bytes in part.lent.pieces() {
                    parts.push(HostPart { into, at, bytes });
                    at += bytes.len();
                }
            }
            from_slot(at, slot.len(), &mut parts);
            into += 1;
        }
        parts
    }
}

/// Bytes copied to the device.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Copied {
    pub bytes: u64,
    /// Those among them that came straight from the page cache.
    pub direct_bytes: u64,
    /// Bytes whose copies are done, and the device's time for them, seconds; 0 on a CPU.
    pub timed_bytes: u64,
    pub device_s: f64,
}

/// Room on the device for one micro-batch, used again and again: nothing is allocated in a step.
struct Set {
    fields: Vec<Tensor>,
    /// The step is done with it.
    free: Option<Event>,
}

/// A micro-batch on its way to the device, or there.
struct Ready {
    set: usize,
    /// First extents of its tensors.
    extents: Vec<i64>,
    ids: Vec<u64>,
    copy: Copying,
}

struct Copying {
    upload: Upload<HostBatch>,
    bytes: u64,
}

/// A micro-batch that a step works on; give it back by [`Input::release`].
pub struct Taken {
    pub batch: Batch,
    set: usize,
}

impl Taken {
    /// The same with a batch that knows more of its step.
    pub fn map(self, change: impl FnOnce(Batch) -> Batch) -> Self {
        Self { batch: change(self.batch), ..self }
    }
}

/// Brings micro-batches to the device ahead of need.
///
/// A batch is copied on a separate stream during the previous step. Its slot goes back to the loader when the
/// copy's event has passed. On a CPU the same code copies at once.
pub struct Input {
    device: Device,
    micro_batch: usize,
    /// The step's stream and the copies'; absent on a CPU.
    streams: Option<(Stream, Stream)>,
    sets: Vec<Set>,
    next_set: usize,
    ready: VecDeque<Ready>,
    /// Copies whose slots are not back yet.
    copying: Vec<Copying>,
    /// Marks of copies that are done.
    marks: Vec<Marks>,
    pin: Option<((usize, usize), HostPin)>,
    /// Time spent waiting for the loader since last asked, seconds.
    waited_s: f64,
    /// Since last asked.
    copied: Copied,
}

impl Input {
    /// Without room for any sample yet: see [`Input::begin`].
    ///
    /// # Errors
    /// No CUDA.
    pub fn new(device: Device) -> Result<Input, TrainError> {
        let streams = match device {
            Device::Cuda(index) => Some((Stream::current(index)?, Stream::new(index, false)?)),
            _ => None,
        };
        Ok(Input {
            device,
            micro_batch: 0,
            streams,
            sets: Vec::new(),
            next_set: 0,
            ready: VecDeque::new(),
            copying: Vec::new(),
            marks: Vec::new(),
            pin: None,
            waited_s: 0.0,
            copied: Copied::default(),
        })
    }

    /// Registers the loader's slots with the device, so that copies from them need no staging and no waiting. Returns a
    /// line where that fails: training continues, more slowly.
    pub fn pin(&mut self, range: (usize, usize)) -> Option<String> {
        self.streams?;
        if self.pin.as_ref().is_some_and(|(pinned, _)| *pinned == range) {
            return None;
        }
        // In one piece: a copy must not cross from one registration into the next.
        match HostPin::new(range.0, range.1, usize::MAX) {
            Ok(pin) => {
                self.pin = Some((range, pin));
                None
            }
            Err(error) => {
                Some(format!("batch slots are not page-locked ({error}): copies to the device will be slower"))
            }
        }
    }

    /// Ends all copies and gives the slots and their registration back; before the loader ends.
    pub fn unpin(&mut self) {
        self.clear();
        self.pin = None;
    }

    /// A new stream of batches begins, of at most `micro_batch` samples each: what was fetched ahead of the former one is
    /// forgotten. Another size takes new room, and registered slots, which will go, are given back. True for another size.
    pub fn begin(&mut self, micro_batch: usize) -> bool {
        self.clear();
        let resized = self.micro_batch != micro_batch;
        if resized {
            self.pin = None;
            self.sets.clear();
            (self.micro_batch, self.next_set) = (micro_batch, 0);
        }
        resized
    }

    /// Ends all copies: nothing of slots and page cache is held from here on.
    pub fn clear(&mut self) {
        // Those that are done are counted; what went wrong with others shows where their bytes are used.
        let _ = self.give_back();
        self.ready.clear();
        self.copying.clear();
    }

    /// Returns the next micro-batch, or `None` at the end of the stream. Waits for the loader where none was fetched
    /// ahead.
    ///
    /// # Errors
    /// A batch cannot be read, or the device refuses.
    pub fn take(&mut self, batches: &mut BatchStream) -> Result<Option<Taken>, TrainError> {
        if self.ready.is_empty() && !self.fetch(batches)? {
            return Ok(None);
        }
        let Some(Ready { set, extents, ids, copy }) = self.ready.pop_front() else { return Ok(None) };
        if let Some((compute, _)) = self.streams {
            copy.upload.before(compute)?;
            self.copying.push(copy);
        }
        let fields = views(&self.sets[set].fields, &extents)?;
        Ok(Some(Taken { batch: Batch::new(fields, ids), set }))
    }

    /// Begins to copy the batch after the one in use, so that it is there before the step ends.
    ///
    /// # Errors
    /// As [`Input::take`].
    pub fn prefetch(&mut self, batches: &mut BatchStream) -> Result<(), TrainError> {
        // On a CPU there is nothing to overlap with.
        if self.streams.is_some() && self.ready.is_empty() {
            self.fetch(batches)?;
        }
        Ok(())
    }

    /// The step has been given all its work on this batch.
    ///
    /// # Errors
    /// CUDA refuses.
    pub fn release(&mut self, taken: Taken) -> Result<(), TrainError> {
        if let Some((compute, _)) = self.streams {
            let free = &mut self.sets[taken.set].free;
            let event = match free {
                Some(event) => event,
                None => free.insert(Event::new(false)?),
            };
            event.record(compute)?;
        }
        Ok(())
    }

    /// Seconds that were spent waiting for the loader since the last call.
    pub fn take_waited_s(&mut self) -> f64 {
        std::mem::take(&mut self.waited_s)
    }

    /// Copies since the last call.
    pub fn take_copied(&mut self) -> Copied {
        std::mem::take(&mut self.copied)
    }

    /// False: the stream has ended.
    fn fetch(&mut self, batches: &mut BatchStream) -> Result<bool, TrainError> {
        // Slots whose copies are done go back first: the loader may wait for one.
        self.give_back()?;
        let next = batches.next();
        self.waited_s += batches.last_wait_s();
        let Some(host) = next.transpose()? else { return Ok(false) };
        if self.sets.is_empty() {
            self.sets = self.allocate(host.fields())?;
        }
        let set = self.next_set;
        self.next_set = (set + 1) % SETS;
        if let (Some((_, copies)), Some(free)) = (self.streams, &self.sets[set].free) {
            free.block(copies)?;
        }
        let (extents, ids) = (extents(&host), host.sample_ids().to_vec());
        let into = views(&self.sets[set].fields, &extents)?;
        let bytes = into.iter().map(|field| (field.numel() * field.kind().elt_size_in_bytes()) as u64).sum();
        self.copied.bytes += bytes;
        self.copied.direct_bytes += host.lent().iter().map(|part| part.lent.bytes().len() as u64).sum::<u64>();
        let upload = upload_marked(host, &into, self.streams.map(|(_, copies)| copies), self.marks.pop())?;
        self.ready.push_back(Ready { set, extents, ids, copy: Copying { upload, bytes } });
        Ok(true)
    }

    fn give_back(&mut self) -> Result<(), TorchError> {
        let mut pending = Vec::new();
        for mut copy in self.copying.drain(..) {
            if !copy.upload.is_done()? {
                pending.push(copy);
                continue;
            }
            if let Some(seconds) = copy.upload.copied_s()? {
                self.copied.timed_bytes += copy.bytes;
                self.copied.device_s += seconds;
            }
            self.marks.extend(copy.upload.take_marks());
        }
        self.copying = pending;
        Ok(())
    }

    fn allocate(&self, fields: &[FieldSpec]) -> Result<Vec<Set>, TrainError> {
        let of = |field: &FieldSpec| {
            let room = (shape(field, self.micro_batch * field.most_rows()), kind(field));
            let offsets = field.has_offsets().then(|| (vec![self.micro_batch as i64 + 1], Kind::Int64));
            std::iter::once(room).chain(offsets)
        };
        let zeros = |(shape, kind): (Vec<i64>, Kind)| Tensor::f_zeros(shape, (kind, self.device)).map_err(tch_error);
        let set = |_| {
            let fields = fields.iter().flat_map(of).map(zeros).collect::<Result<_, TrainError>>()?;
            Ok(Set { fields, free: None })
        };
        let sets = (0..SETS).map(set).collect::<Result<Vec<_>, TrainError>>()?;
        if let Some((compute, copies)) = self.streams {
            // The zeros are written by the step's stream: no copy may come before them.
            let mut written = Event::new(false)?;
            written.record(compute)?;
            written.block(copies)?;
        }
        Ok(sets)
    }
}

/// The beginnings of tensors that a batch fills.
fn views(tensors: &[Tensor], extents: &[i64]) -> Result<Vec<Tensor>, TrainError> {
    tensors.iter().zip(extents).map(|(tensor, extent)| tensor.f_narrow(0, 0, *extent).map_err(tch_error)).collect()
}
