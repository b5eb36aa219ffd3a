//! Clips of one split, read through the page cache where there is one.

use super::Entries;
use super::clips::Clips;
use super::crop::{Crop, Place};
use crate::data::cache::{CachedEntries, Lent, Reading};
use crate::data::loader::Order;
use crate::data::source::video::bits;
use crate::data::source::video::image::ImageSize;
use crate::data::source::video::{Frames, Modality, SpikeForm};
use crate::data::{BatchAhead, DataError, Dataset, Dtype, FieldSpec, LentPart, Pages, ReadRequest, Scratch, Wake};
use std::ops::Range;
use std::sync::{Arc, Weak};

/// Clips: `blur` and `sharp` u8 `[T, h, w, 3]`, and of the spike camera's part of the same crop `spikes` u8
/// `[T, S, h', ceil(w'/8)]`, a bit per spike, lowest first, or `voxels` f32 `[T, K, h', w']` where they are precomputed.
pub struct ClipDataset {
    frames: Arc<Frames>,
    cached: Option<Arc<CachedEntries<Entries>>>,
    clips: Clips,
    crop: Crop,
    /// Seed of random crops; `None`: from the middle.
    random: Option<u64>,
    /// The order in which clips are read in every epoch, where the page cache is told of next uses.
    order: Option<Order>,
    fields: Vec<FieldSpec>,
}

impl ClipDataset {
    pub(super) fn new(
        frames: Arc<Frames>,
        cached: Option<Arc<CachedEntries<Entries>>>,
        clips: Clips,
        crop: Crop,
        random: Option<u64>,
        order: Option<Order>,
    ) -> Self {
        let (size, t) = (crop.size(), clips.clip_len());
        let image = |name| FieldSpec { name, shape: vec![t, size.height, size.width, 3], dtype: Dtype::U8 };
        let mut fields = vec![image("blur"), image("sharp")];
        if let (Some(form), Some(ImageSize { height, width })) = (frames.spikes(), crop.spike_size()) {
            fields.push(match form {
                SpikeForm::Planes(form) => FieldSpec {
                    name: "spikes",
                    shape: vec![t, form.planes, height, bits::row_bytes(width)],
                    dtype: Dtype::U8,
                },
                SpikeForm::Voxels { bins, .. } => {
                    FieldSpec { name: "voxels", shape: vec![t, bins, height, width], dtype: Dtype::F32 }
                }
            });
        }
        Self { frames, cached, clips, crop, random, order, fields }
    }

    /// Where the clip is cut in `epoch`.
    pub fn place(&self, request: ReadRequest) -> Place {
        match self.random {
            Some(seed) => self.crop.random(seed, request.epoch, request.index as u64),
            None => self.crop.centre(),
        }
    }

    /// Copies the part at `place` out of an entry.
    fn cut(&self, modality: Modality, entry: &[u8], place: Place, out: &mut [u8]) {
        let image = self.frames.image();
        match (modality, self.frames.spikes(), self.crop.spike_size()) {
            (Modality::Blur | Modality::Sharp, ..) => {
                copy_rows(entry, image.width * 3, (place.y, place.x * 3), out, self.crop.size().width * 3);
            }
            (Modality::Spikes, Some(SpikeForm::Planes(form)), Some(size)) => {
                let (place, stride) = (self.crop.spike_place(place), bits::row_bytes(form.width));
                let planes = entry.chunks_exact(form.height * stride);
                let width = bits::row_bytes(size.width);
                for (plane, out) in planes.zip(out.chunks_exact_mut(size.height * width)) {
                    for (row, out) in plane.chunks_exact(stride).skip(place.y).zip(out.chunks_exact_mut(width)) {
                        bits::copy_bits(row, place.x, out, size.width);
                    }
                }
            }
            (Modality::Spikes, Some(SpikeForm::Voxels { height, width, .. }), Some(size)) => {
                let place = self.crop.spike_place(place);
                let (planes, from) = (entry.chunks_exact(height * width * 4), (place.y, place.x * 4));
                for (plane, out) in planes.zip(out.chunks_exact_mut(size.height * size.width * 4)) {
                    copy_rows(plane, width * 4, from, out, size.width * 4);
                }
            }
            _ => {}
        }
    }

    /// Where the part at `place` lies in an entry, where it lies there in one piece and as a batch has it.
    fn whole_part(&self, modality: Modality, place: Place) -> Option<Range<usize>> {
        let (image, crop) = (self.frames.image(), self.crop.size());
        match (modality, self.frames.spikes(), self.crop.spike_size()) {
            (Modality::Blur | Modality::Sharp, ..) => {
                let row = 3 * image.width;
                (crop.width == image.width).then(|| place.y * row..(place.y + crop.height) * row)
            }
            (Modality::Spikes, Some(form), Some(size)) => {
                let whole = size == form.size() && self.crop.spike_place(place) == Place::default();
                // What files hold in the bits that fill up a row is cut off on the way into a batch.
                let filled = matches!(form, SpikeForm::Planes(form) if !form.width.is_multiple_of(8));
                (whole && !filled).then(|| 0..self.frames.bytes(modality))
            }
            _ => None,
        }
    }

    /// One frame's part of one field: written, or lent.
    fn read_entry(
        &self,
        frame: usize,
        modality: Modality,
        place: Place,
        (out, lends): (&mut [u8], bool),
        scratch: &mut Scratch,
    ) -> Result<Option<Lent>, DataError> {
        let key = Frames::key(frame, modality);
        if let Some(cached) = &self.cached {
            let cut = &mut |entry: &[u8]| self.cut(modality, entry, place, out);
            // A part that is empty is never lent.
            let part = if lends { self.whole_part(modality, place).unwrap_or_default() } else { 0..0 };
            match cached.read_or_lend(key, part, scratch, cut)? {
                Reading::Taken => return Ok(None),
                Reading::Lent(lent) => return Ok(Some(lent)),
                Reading::Bypass => {}
            }
        }
        // No room in the cache: decoded for this clip alone.
        let mut entry = std::mem::take(&mut scratch.decoded);
        entry.resize(self.frames.bytes(modality), 0);
        let read = self.frames.fill_entry(key, &mut entry, scratch);
        if read.is_ok() {
            self.cut(modality, &entry, place, out);
        }
        scratch.decoded = entry;
        read.map(|()| None)
    }

    fn read_clip(
        &self,
        request: ReadRequest,
        out: &mut [&mut [u8]],
        mut lent: Option<&mut Vec<LentPart>>,
        scratch: &mut Scratch,
    ) -> Result<(), DataError> {
        if out.len() != self.fields.len() {
            let problem = format!("{} fields asked for, there are {}", out.len(), self.fields.len());
            return Err(DataError::Other(problem));
        }
        let frames = self.clips.frames(request.index as u64).ok_or_else(|| {
            DataError::Other(format!("clip {} asked for, there are {}", request.index, self.clips.len()))
        })?;
        let place = self.place(request);
        for (number, ((modality, field), out)) in self.frames.modalities().iter().zip(&self.fields).zip(out).enumerate()
        {
            let bytes = field.sample_bytes() / self.clips.clip_len();
            for (t, (frame, out)) in frames.clone().zip(out.chunks_exact_mut(bytes.max(1))).enumerate() {
                let part = self.read_entry(frame, *modality, place, (out, lent.is_some()), scratch)?;
                if let (Some(part), Some(lent)) = (part, &mut lent) {
                    lent.push(LentPart { field: number, at: t * bytes, lent: part });
                }
            }
        }
        Ok(())
    }

    /// Entries of the clips `ids`, each once, in rising order; ids out of range have none.
    fn keys(&self, ids: &[u64]) -> Vec<u64> {
        let frames = ids.iter().filter_map(|id| self.clips.frames(*id)).flatten();
        let modalities = self.frames.modalities();
        let mut keys: Vec<u64> =
            frames.flat_map(|frame| modalities.iter().map(move |modality| Frames::key(frame, *modality))).collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    /// When an entry is needed next after global position `after` of `epoch`; `u64::MAX`: not known.
    pub(super) fn next_use(&self, key: u64, epoch: u64, after: u64) -> u64 {
        let Some(order) = &self.order else { return u64::MAX };
        let clips = self.clips.with_frame((key / 3) as usize);
        let first_in = |epoch: u64, from: u64| {
            let order = order.epoch(epoch);
            clips.clone().filter_map(|clip| order.position_of(clip)).filter(|position| *position >= from).min()
        };
        let base = epoch.saturating_mul(order.len);
        if let Some(position) = first_in(epoch, after.saturating_sub(base) + 1) {
            return base + position;
        }
        first_in(epoch + 1, 0).map_or(u64::MAX, |position| base + order.len + position)
    }

    /// Global position of the last of `ids`.
    pub(super) fn last_position(&self, batch: BatchAhead) -> u64 {
        let Some(order) = &self.order else { return 0 };
        let keyed = order.epoch(batch.epoch);
        let last = batch.ids.iter().filter_map(|id| keyed.position_of(*id)).max().unwrap_or(0);
        batch.epoch.saturating_mul(order.len).saturating_add(last)
    }
}

/// Fills `out`, rows of `bytes`, from row `y` and byte `at` on of a picture whose rows have `stride` bytes.
fn copy_rows(source: &[u8], stride: usize, (y, at): (usize, usize), out: &mut [u8], bytes: usize) {
    for (row, out) in source.chunks_exact(stride).skip(y).zip(out.chunks_exact_mut(bytes)) {
        out.copy_from_slice(&row[at..at + bytes]);
    }
}

impl Dataset for ClipDataset {
    fn len(&self) -> usize {
        self.clips.len()
    }

    fn fields(&self) -> &[FieldSpec] {
        &self.fields
    }

    fn read(&self, request: ReadRequest, out: &mut [&mut [u8]], scratch: &mut Scratch) -> Result<(), DataError> {
        self.read_clip(request, out, None, scratch)
    }

    fn read_or_lend(
        &self,
        request: ReadRequest,
        out: &mut [&mut [u8]],
        lent: &mut Vec<LentPart>,
        scratch: &mut Scratch,
    ) -> Result<(), DataError> {
        self.read_clip(request, out, Some(lent), scratch)
    }

    fn describe(&self, index: usize) -> String {
        match self.clips.frames(index as u64) {
            Some(frames) => {
                let (first, last) = (self.frames.stem(frames.start), self.frames.stem(frames.end - 1));
                format!("clip {} frames {first}..{last}", self.clips.name(index as u64))
            }
            None => format!("clip {index} of {}", self.clips.len()),
        }
    }

    fn announce(&self, batch: BatchAhead) {
        if let Some(cached) = &self.cached {
            let after = self.last_position(batch);
            cached.announce(&self.keys(batch.ids), |key| self.next_use(key, batch.epoch, after));
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

    fn pages(&self) -> Option<Pages> {
        Some(self.clips.pages())
    }
}
