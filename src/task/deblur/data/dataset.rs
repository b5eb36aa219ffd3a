//! Clips of one split, read through the page cache where there is one.

use super::Source;
use super::clips::Clips;
use super::crop::{Corner, Crop};
use super::unreadable::stand_ins;
use crate::data::entries::EntrySource;
use crate::data::loader::Order;
use crate::data::source::video::bits;
use crate::data::source::video::image::ImageSize;
use crate::data::source::video::{Frames, Modality, SpikeForm};
use crate::data::{BatchAhead, DataError, Dataset, Dtype, FieldSpec, LentPart, Pages, ReadRequest, Scratch, Wake};
use cache::client::{Lent, Reading};
use std::cell::Cell;
use std::ops::Range;
use std::sync::Weak;

/// Clips: `blur` and `sharp` u8 `[T, h, w, 3]`, and of the spike camera's part of the same crop `spikes` u8
/// `[T, S, h', ceil(w'/8)]`, a bit per spike, lowest first, or `voxels` f32 `[T, K, h', w']` where they are precomputed.
pub struct ClipDataset {
    source: Source,
    clips: Clips,
    crop: Crop,
    /// Seed of random crops, in training; `None`: from the middle, in evaluation.
    random: Option<u64>,
    /// Order in which clips are read, in training the same way in every epoch, where the page cache receives next uses.
    order: Option<Order>,
    /// Content of `fields`, in their order.
    modalities: &'static [Modality],
    fields: Vec<FieldSpec>,
}

/// A clip that takes another's place in a batch without an announcement to the page cache.
#[derive(Clone, Copy)]
struct StandIn {
    epoch: u64,
    /// Global position of the clip that was asked for.
    position: u64,
}

/// Where a sample's bytes go: written, but for large parts that a reader takes from the page cache itself.
struct Sink<'a, 'b> {
    fields: &'a mut [&'b mut [u8]],
    lent: Option<&'a mut Vec<LentPart>>,
}

impl ClipDataset {
    pub(super) fn new(source: Source, clips: Clips, crop: Crop, random: Option<u64>, order: Option<Order>) -> Self {
        let (size, t) = (crop.size(), clips.clip_len());
        let frames = &source.entries.frames;
        let image = |name| FieldSpec::new(name, &[t, size.height, size.width, 3], Dtype::U8);
        let modalities = frames.modalities();
        let mut fields = vec![image("blur"), image("sharp")];
        if let (Some(form), Some(ImageSize { height, width })) = (frames.spikes(), crop.spike_size()) {
            fields.push(match form {
                SpikeForm::Planes(form) => {
                    FieldSpec::new("spikes", &[t, form.planes, height, bits::row_bytes(width)], Dtype::U8)
                }
                SpikeForm::Voxels { bins, .. } => FieldSpec::new("voxels", &[t, bins, height, width], Dtype::F32),
            });
        }
        Self { source, clips, crop, random, order, modalities, fields }
    }

    /// Clips without their sharp frames, in order and whole, for prediction: `blur`, and `spikes` or `voxels`.
    pub(super) fn blurred(source: Source, clips: Clips, crop: Crop) -> Self {
        let mut clips = Self::new(source, clips, crop, None, None);
        clips.fields.remove(1);
        let has_spikes = clips.fields.len() > 1;
        clips.modalities = if has_spikes { &[Modality::Blur, Modality::Spikes] } else { &[Modality::Blur] };
        clips
    }

    /// Which frames each clip has.
    pub fn clips(&self) -> &Clips {
        &self.clips
    }

    fn frames(&self) -> &Frames {
        &self.source.entries.frames
    }

    /// Where the clip is cut in `epoch`.
    pub fn place(&self, request: ReadRequest) -> Corner {
        match self.random {
            Some(seed) => self.crop.random(seed, request.epoch, request.index as u64),
            None => self.crop.centre(),
        }
    }

    /// Copies the part at `place` out of an entry.
    fn cut(&self, modality: Modality, entry: &[u8], place: Corner, out: &mut [u8]) {
        let image = self.frames().image();
        match (modality, self.frames().spikes(), self.crop.spike_size()) {
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
    fn whole_part(&self, modality: Modality, place: Corner) -> Option<Range<usize>> {
        let (image, crop) = (self.frames().image(), self.crop.size());
        match (modality, self.frames().spikes(), self.crop.spike_size()) {
            (Modality::Blur | Modality::Sharp, ..) => {
                let row = 3 * image.width;
                (crop.width == image.width).then(|| place.y * row..(place.y + crop.height) * row)
            }
            (Modality::Spikes, Some(form), Some(size)) => {
                let whole = size == form.size() && self.crop.spike_place(place) == Corner::default();
                // Bits that fill up a row in the files are cut off on the way into a batch.
                let filled = matches!(form, SpikeForm::Planes(form) if !form.width.is_multiple_of(8));
                (whole && !filled).then(|| 0..self.frames().bytes(modality))
            }
            _ => None,
        }
    }

    /// One frame's part of one field: written, or lent.
    fn read_entry(
        &self,
        key: u64,
        modality: Modality,
        (place, stand_in): (Corner, Option<StandIn>),
        (out, lends): (&mut [u8], bool),
        scratch: &mut Scratch,
    ) -> Result<Option<Lent>, DataError> {
        if let Some(cached) = &self.source.cached {
            // The cache already knows the next use of announced entries.
            let next_use = stand_in.map_or(u64::MAX, |by| self.next_use(key, by.epoch, by.position));
            // A part that is empty is never lent.
            let part = if lends { self.whole_part(modality, place).unwrap_or_default() } else { 0..0 };
            match cached.read_or_lend(key, (part, next_use), scratch)? {
                Reading::Held(entry) => {
                    self.cut(modality, &entry, place, out);
                    return Ok(None);
                }
                Reading::Lent(lent) => return Ok(Some(lent)),
                Reading::Bypass => {}
            }
        }
        // No room in the cache: decoded for this clip alone.
        let mut entry = std::mem::take(&mut scratch.decoded);
        entry.resize(self.frames().bytes(modality), 0);
        let read = self.source.entries.fill_entry(key, &mut entry, scratch);
        if read.is_ok() {
            self.cut(modality, &entry, place, out);
        }
        scratch.decoded = entry;
        read.map(|()| None)
    }

    /// All of a clip. False, where frames that cannot be decoded are skipped: it has one.
    fn read_clip(
        &self,
        clip: u64,
        cut: (Corner, Option<StandIn>),
        sink: &mut Sink,
        scratch: &mut Scratch,
    ) -> Result<bool, DataError> {
        let frames = self.clip_frames(clip)?;
        let before = sink.lent.as_ref().map_or(0, |lent| lent.len());
        let fields = self.modalities.iter().zip(&self.fields).zip(sink.fields.iter_mut());
        for (number, ((modality, field), out)) in fields.enumerate() {
            let bytes = field.sample_bytes() / self.clips.clip_len();
            for (t, (frame, out)) in frames.clone().zip(out.chunks_exact_mut(bytes.max(1))).enumerate() {
                let key = Frames::key(frame, *modality);
                match self.read_entry(key, *modality, cut, (out, sink.lent.is_some()), scratch) {
                    Ok(part) => {
                        if let (Some(lent), Some(parts)) = (part, &mut sink.lent) {
                            parts.push(LentPart { field: number, at: t * bytes, lent });
                        }
                    }
                    Err(error @ DataError::Content { .. }) if self.source.skip_bad => {
                        self.source.entries.unreadable.tell(key, || self.left_out_line(frame, clip, &error));
                        // Another clip takes its place: nothing of this one is to be copied.
                        sink.lent.iter_mut().for_each(|lent| lent.truncate(before));
                        return Ok(false);
                    }
                    Err(DataError::Content { path, problem }) => {
                        let problem = format!("{problem} (data.skip_bad: true drops such frames)");
                        return Err(DataError::Content { path, problem });
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(true)
    }

    fn read_sample(&self, request: ReadRequest, mut sink: Sink, scratch: &mut Scratch) -> Result<(), DataError> {
        if sink.fields.len() != self.fields.len() {
            return Err(DataError::Fields { asked: sink.fields.len(), count: self.fields.len() });
        }
        if self.read_clip(request.index as u64, (self.place(request), None), &mut sink, scratch)? {
            return Ok(());
        }
        match self.random {
            Some(seed) => self.read_stand_in((seed, request), &mut sink, scratch),
            // Nobody looks at it: see `is_left_out`.
            None => {
                sink.fields.iter_mut().for_each(|field| field.fill(0));
                Ok(())
            }
        }
    }

    fn left_out_line(&self, frame: usize, clip: u64, error: &DataError) -> String {
        let clips = self.clips.with_frame(frame);
        let (count, plural) = (clips.end - clips.start, if clips.end - clips.start == 1 { "" } else { "s" });
        let fate = if self.random.is_some() { "replaced by others" } else { "left out of the metrics" };
        let (name, stem) = (self.clips.name(clip), self.frames().stem(frame));
        format!("clip {name} frame {stem}: {error}: {count} clip{plural} with it {fate}")
    }

    /// Another clip in the place of `request`'s, cut where that one would have been.
    fn read_stand_in(
        &self,
        (seed, request): (u64, ReadRequest),
        sink: &mut Sink,
        scratch: &mut Scratch,
    ) -> Result<(), DataError> {
        let ReadRequest { epoch, index } = request;
        let position = self.last_position(BatchAhead { epoch, ids: &[index as u64] });
        let cut = (self.place(request), Some(StandIn { epoch, position }));
        for clip in stand_ins(&self.clips, seed, epoch, index as u64) {
            if self.read_clip(clip, cut, sink, scratch)? {
                return Ok(());
            }
        }
        let len = self.clips.len();
        let first = self.source.entries.unreadable.first();
        let first =
            first.map(|(path, problem)| format!("; the first: {}: {problem}", path.display())).unwrap_or_default();
        Err(DataError::NothingUsable(format!(
            "every one of {len} training clips has a frame that cannot be decoded{first}"
        )))
    }

    pub(super) fn clip_frames(&self, clip: u64) -> Result<Range<usize>, DataError> {
        let count = self.clips.len() as u64;
        self.clips.frames(clip).ok_or(DataError::OutOfRange { what: "clip", index: clip, place: "the data set", count })
    }

    /// Entries of the clips `ids`, each once, in rising order; ids out of range have none.
    fn keys(&self, ids: &[u64]) -> Vec<u64> {
        let frames = ids.iter().filter_map(|id| self.clips.frames(*id)).flatten();
        let modalities = self.modalities;
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
        if self.random.is_none() {
            // The next evaluation is an epoch away, in a separate count.
            return u64::MAX;
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
        self.read_sample(request, Sink { fields: out, lent: None }, scratch)
    }

    fn read_or_lend(
        &self,
        request: ReadRequest,
        out: &mut [&mut [u8]],
        lent: &mut Vec<LentPart>,
        scratch: &mut Scratch,
    ) -> Result<(), DataError> {
        self.read_sample(request, Sink { fields: out, lent: Some(lent) }, scratch)
    }

    fn is_left_out(&self, index: u64) -> bool {
        self.random.is_none() && self.source.entries.unreadable.any(self.keys(&[index]).into_iter())
    }

    fn take_left_out(&self) -> Option<Vec<String>> {
        self.source.skip_bad.then(|| self.source.entries.unreadable.take_news())
    }

    fn describe(&self, index: usize) -> String {
        match self.clips.frames(index as u64) {
            Some(frames) => {
                let (first, last) = (self.frames().stem(frames.start), self.frames().stem(frames.end - 1));
                format!("clip {} frames {first}..{last}", self.clips.name(index as u64))
            }
            None => format!("clip {index} of {}", self.clips.len()),
        }
    }

    fn announce(&self, batch: BatchAhead) {
        if let Some(cached) = &self.source.cached {
            let after = self.last_position(batch);
            // Keys rise, and those of one frame are needed together: worked out once for them.
            let last = Cell::new((u64::MAX, 0));
            cached.announce(&self.keys(batch.ids), |key| {
                if last.get().0 != key / 3 {
                    last.set((key / 3, self.next_use(key, batch.epoch, after)));
                }
                last.get().1
            });
        }
    }

    fn retire(&self, batch: BatchAhead) {
        if let Some(cached) = &self.source.cached {
            cached.retire(&self.keys(batch.ids));
        }
    }

    fn work_ahead(&self, scratch: &mut Scratch) -> bool {
        self.source.cached.as_ref().is_some_and(|cached| cached.work_ahead(scratch))
    }

    fn wake_by(&self, waker: Weak<dyn Wake>) {
        if let Some(cached) = &self.source.cached {
            cached.wake_by(waker);
        }
    }

    fn pages(&self) -> Option<Pages> {
        Some(self.clips.pages())
    }
}
