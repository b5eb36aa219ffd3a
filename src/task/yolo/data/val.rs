//! Validation samples: whole images in rectangles.

use super::batch::{Shape, val_fields};
use super::letterbox::{moved, pad};
use super::shared::{Shared, write_rows};
use crate::data::{BatchAhead, DataError, Dataset, FieldSpec, ReadRequest, Scratch, Wake};
use std::sync::{Arc, Weak};

/// Whole images with their boxes, each padded to its rectangle; in the order of rectangles.
pub struct ValImages {
    shared: Arc<Shared>,
    images: Vec<u32>,
    shapes: Vec<Shape>,
    fields: Vec<FieldSpec>,
}

impl ValImages {
    /// `shapes`: of each image in turn.
    pub(super) fn new(shared: Arc<Shared>, images: Vec<u32>, shapes: Vec<Shape>) -> Self {
        let most = images.iter().map(|number| shared.store.rows(*number as usize).len()).max().unwrap_or(0);
        let fields = val_fields(shared.store.imgsz, most);
        Self { shared, images, shapes, fields }
    }

    fn read_sample(&self, index: usize, out: &mut [&mut [u8]], scratch: &mut Scratch) -> Result<(), DataError> {
        let [image, shape, boxes] = out else { return Err(DataError::Fields { asked: out.len(), count: 3 }) };
        let (number, of) = (self.images[index] as usize, self.shapes[index]);
        let store = &self.shared.store;
        let inner = store.size(number);
        let bytes = 3 * of.height * of.width;
        let whole = std::mem::take(image);
        let length = whole.len();
        let (written, _) =
            whole.split_at_mut_checked(bytes).ok_or(DataError::Length { field: "image", bytes: length })?;
        let pixels = store.pixels(number, self.shared.cached.as_ref(), false, scratch);
        let read = match pixels {
            Ok(pixels) => {
                pad(&pixels, inner, &of, written);
                Ok(())
            }
            // Nobody looks at it: see `is_left_out`.
            Err(error) if self.shared.skips(Some(&error)) => {
                written.fill(0);
                Ok(())
            }
            Err(error) => Err(error),
        };
        *image = written;
        read?;
        for (number, out) in of.numbers().iter().zip(shape.chunks_exact_mut(8)) {
            out.copy_from_slice(&number.to_ne_bytes());
        }
        let rows: Vec<[f32; 5]> = store.rows(number).iter().map(|row| moved(*row, inner, &of)).collect();
        write_rows(&rows, boxes);
        scratch.count();
        Ok(())
    }

    fn numbers(&self, batch: BatchAhead) -> Vec<u64> {
        let known = batch.ids.iter().filter_map(|id| self.images.get(*id as usize));
        let mut numbers: Vec<u64> = known.map(|number| u64::from(*number)).collect();
        numbers.sort_unstable();
        numbers.dedup();
        numbers
    }
}

impl Dataset for ValImages {
    fn len(&self) -> usize {
        self.images.len()
    }

    fn fields(&self) -> &[FieldSpec] {
        &self.fields
    }

    fn read(&self, request: ReadRequest, out: &mut [&mut [u8]], scratch: &mut Scratch) -> Result<(), DataError> {
        let (index, count) = (request.index as u64, self.images.len() as u64);
        if index >= count {
            return Err(DataError::OutOfRange { what: "image", index, place: "the data set", count });
        }
        self.read_sample(request.index, out, scratch)
    }

    fn is_left_out(&self, index: u64) -> bool {
        self.images.get(index as usize).is_some_and(|number| self.shared.is_damaged(*number as usize))
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
