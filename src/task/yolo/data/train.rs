//! Training samples: which images each is made of, and their reading.

use super::augment::draw::{Draws, View};
use super::augment::geometry::Corners;
use super::augment::warp::Rows;
use super::augment::{Source, finish, mix_in, view};
use super::batch::train_fields;
use super::shared::{Shared, write_rows};
use crate::data::loader::Order;
use crate::data::{BatchAhead, DataError, Dataset, FieldSpec, ReadRequest, Scratch, Wake};
use spec::task::yolo::YoloAugment;
use std::sync::{Arc, Weak};

/// Augmented samples `[3, S, S]` with their boxes, a pure function of (seed, epoch, index).
pub struct TrainImages {
    shared: Arc<Shared>,
    /// Numbers of images in the store.
    images: Vec<u32>,
    order: Order,
    recipe: Recipe,
    fields: Vec<FieldSpec>,
}

/// How samples are made.
#[derive(Clone, Debug)]
pub struct Recipe {
    pub augment: YoloAugment,
    pub seed: u64,
    /// First epoch without mosaic and mixup.
    pub closes_at: u64,
    /// Images before one in an epoch's order that partners are drawn from; 0: all.
    pub window: u64,
}

/// Memory of a thread.
#[derive(Default)]
struct Own {
    rows: Rows,
    other: Vec<u8>,
}

/// Samples that a sample is made of, by index: of the view itself, and of the one that is mixed in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    pub main: Vec<u64>,
    pub mixed: Vec<u64>,
}

impl TrainImages {
    pub(super) fn new(shared: Arc<Shared>, images: Vec<u32>, order: Order, recipe: Recipe) -> Self {
        let most = images.iter().map(|number| shared.store.rows(*number as usize).len()).max().unwrap_or(0);
        let views = if recipe.augment.mixup > 0.0 { 2 } else { 1 };
        let layers = if recipe.augment.mosaic > 0.0 { 4 } else { 1 };
        let fields = train_fields(shared.store.imgsz, most * views * layers);
        Self { shared, images, order, recipe, fields }
    }

    fn draws(&self, epoch: u64, index: u64) -> Draws {
        Draws::new(&self.recipe.augment, (self.recipe.seed, epoch, index), epoch < self.recipe.closes_at)
    }

    /// Samples that sample `index` is made of.
    pub fn parts(&self, epoch: u64, index: u64) -> Parts {
        self.parts_of(&self.draws(epoch, index), epoch, index)
    }

    fn parts_of(&self, draws: &Draws, epoch: u64, index: u64) -> Parts {
        let (count, order) = (self.images.len() as u64, self.order.epoch(epoch));
        let window = if self.recipe.window == 0 { count } else { self.recipe.window.min(count) };
        let position = order.position_of(index).unwrap_or(0);
        let first = (position + 1).saturating_sub(window).min(count - window.min(count));
        let drawn = |place: f64| order.at(first + (place * window as f64) as u64).unwrap_or(index);
        let all = |own: u64, view: &View| match &view.mosaic {
            Some((_, partners)) => std::iter::once(own).chain(partners.iter().map(|place| drawn(*place))).collect(),
            None => vec![own],
        };
        let mixed = draws.mixup.as_ref().map(|(place, _, view)| all(drawn(*place), view));
        Parts { main: all(index, &draws.main), mixed: mixed.unwrap_or_default() }
    }

    /// One view of some samples.
    fn make(
        &self,
        samples: &[u64],
        of: &View,
        out: &mut [u8],
        (rows, scratch): (&mut Rows, &mut Scratch),
    ) -> Result<Vec<Corners>, DataError> {
        let numbers: Vec<usize> = samples.iter().map(|sample| self.images[*sample as usize] as usize).collect();
        let store = &self.shared.store;
        let mut pixels = Vec::with_capacity(numbers.len());
        for number in &numbers {
            pixels.push(self.shared.pixels(*number, scratch)?);
        }
        let sources: Vec<Source> = numbers
            .iter()
            .zip(&pixels)
            .map(|(number, pixels)| Source { pixels, size: store.size(*number), rows: store.rows(*number) })
            .collect();
        Ok(view(&sources, of, store.imgsz, out, rows))
    }

    fn read_sample(
        &self,
        request: ReadRequest,
        image: &mut [u8],
        own: &mut Own,
        scratch: &mut Scratch,
    ) -> Result<Vec<[f32; 5]>, DataError> {
        let (epoch, index) = (request.epoch, request.index as u64);
        let draws = self.draws(epoch, index);
        let parts = self.parts_of(&draws, epoch, index);
        let mut boxes = self.make(&parts.main, &draws.main, image, (&mut own.rows, scratch))?;
        if let Some((_, share, of)) = &draws.mixup {
            own.other.resize(image.len(), 0);
            boxes.append(&mut self.make(&parts.mixed, of, &mut own.other, (&mut own.rows, scratch))?);
            mix_in(image, &own.other, *share);
        }
        Ok(finish(&draws, boxes, self.shared.store.imgsz, image))
    }

    /// Numbers of the images that a batch is made of, each once.
    fn numbers(&self, batch: BatchAhead) -> Vec<u64> {
        let known = batch.ids.iter().filter(|id| **id < self.images.len() as u64);
        let samples = known.flat_map(|id| {
            let Parts { main, mixed } = self.parts(batch.epoch, *id);
            main.into_iter().chain(mixed)
        });
        let mut numbers: Vec<u64> = samples.map(|sample| u64::from(self.images[sample as usize])).collect();
        numbers.sort_unstable();
        numbers.dedup();
        numbers
    }
}

impl Dataset for TrainImages {
    fn len(&self) -> usize {
        self.images.len()
    }

    fn fields(&self) -> &[FieldSpec] {
        &self.fields
    }

    fn read(&self, request: ReadRequest, out: &mut [&mut [u8]], scratch: &mut Scratch) -> Result<(), DataError> {
        let [image, boxes] = out else { return Err(DataError::Fields { asked: out.len(), count: 2 }) };
        let (index, count) = (request.index as u64, self.images.len() as u64);
        if index >= count {
            return Err(DataError::OutOfRange { what: "image", index, place: "the data set", count });
        }
        let mut own: Box<Own> = match scratch.extra.take().map(|extra| extra.downcast()) {
            Some(Ok(own)) => own,
            _ => Box::default(),
        };
        let mut read = self.read_sample(request, image, &mut own, scratch);
        // Another sample takes the place of one that cannot be decoded; which one depends on files alone.
        for step in 1..count {
            let Err(DataError::Content { .. }) = &read else { break };
            if !self.shared.skips(read.as_ref().err()) {
                break;
            }
            let index = ((index + step) % count) as usize;
            read = self.read_sample(ReadRequest { index, ..request }, image, &mut own, scratch);
        }
        let bytes = own.rows.bytes() + own.other.capacity();
        scratch.extra = Some(own);
        scratch.count_with(bytes);
        write_rows(&read?, boxes);
        Ok(())
    }

    fn take_left_out(&self) -> Option<Vec<String>> {
        self.shared.take_news()
    }

    fn describe(&self, index: usize) -> String {
        self.shared.describe(self.images.get(index).copied(), index)
    }

    fn announce(&self, batch: BatchAhead) {
        if let Some(cached) = &self.shared.cached {
            cached.announce(&self.numbers(batch), |_| u64::MAX);
        }
    }

    fn retire(&self, batch: BatchAhead) {
        if let Some(cached) = &self.shared.cached {
            cached.retire(&self.numbers(batch));
        }
    }

    fn work_ahead(&self, scratch: &mut Scratch) -> bool {
        self.shared.cached.as_ref().is_some_and(|cached| cached.work_ahead(scratch))
    }

    fn give_back(&self) {
        self.shared.store.give_back();
    }

    fn wake_by(&self, waker: Weak<dyn Wake>) {
        if let Some(cached) = &self.shared.cached {
            cached.wake_by(waker);
        }
    }
}
