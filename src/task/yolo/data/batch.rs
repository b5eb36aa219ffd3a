//! Fields of a batch, and how a model takes them apart.
//!
//! Training: `image` u8 `[B, 3, S, S]`, `boxes` f32 `[N, 5]` with offsets i64 `[B + 1]`. Validation and prediction, where
//! shapes differ: `image` u8, the bytes of `[3, H, W]` of each, with offsets; `shape` i64 `[B, 6]`; `boxes` as in training.
//! A box is `class, cx, cy, w, h`; its place is a share of the image as the model sees it, padding included.

use crate::data::{Dtype, FieldSpec};
use crate::task::Batch;
use std::ops::Range;
use tch::{Kind, Tensor};

/// Numbers of a box.
pub const BOX: usize = 5;
/// Numbers of a shape: see [`Shape`].
pub const SHAPE: usize = 6;
/// Coarsest stride of the model.
pub const STRIDE: usize = 32;

/// A validation image as the model sees it, and where it comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// Rows and columns with padding.
    pub height: usize,
    pub width: usize,
    /// Rows and columns of the picture itself, upright.
    pub original_height: usize,
    pub original_width: usize,
    /// Padding left of and above the image, whose longest side without it is `imgsz`.
    pub left: usize,
    pub top: usize,
}

impl Shape {
    /// As the field `shape` has it.
    pub fn numbers(&self) -> [i64; SHAPE] {
        [self.height, self.width, self.original_height, self.original_width, self.left, self.top].map(|n| n as i64)
    }

    /// The inverse of [`Shape::numbers`].
    pub fn of(numbers: [i64; SHAPE]) -> Self {
        let [height, width, original_height, original_width, left, top] = numbers.map(|n| n.max(0) as usize);
        Self { height, width, original_height, original_width, left, top }
    }
}

/// Fields of training samples of `side` pixels with at most `most` boxes.
pub fn train_fields(side: usize, most: usize) -> Vec<FieldSpec> {
    vec![FieldSpec::new("image", &[3, side, side], Dtype::U8), boxes(most)]
}

/// Fields of validation samples whose longest side is `imgsz` without padding.
pub fn val_fields(imgsz: usize, most: usize) -> Vec<FieldSpec> {
    let side = largest_side(imgsz);
    vec![
        FieldSpec::ragged("image", &[], Dtype::U8, 3 * side * side),
        FieldSpec::new("shape", &[SHAPE], Dtype::I64),
        boxes(most),
    ]
}

fn boxes(most: usize) -> FieldSpec {
    FieldSpec::ragged("boxes", &[BOX], Dtype::F32, most.max(1))
}

/// Longest side of a padded validation image.
pub fn largest_side(imgsz: usize) -> usize {
    (imgsz.div_ceil(STRIDE) + 1) * STRIDE
}

/// Boxes of a batch.
pub struct Boxes<'a> {
    /// f32 `[N, 5]`.
    pub values: &'a Tensor,
    /// i64 `[B + 1]`: where each sample's begin.
    pub offsets: &'a Tensor,
}

/// A training batch's images u8 `[B, 3, S, S]`, and its boxes; `None` for a batch of validation.
pub fn squares(batch: &Batch) -> Option<(&Tensor, Boxes<'_>)> {
    match batch.fields.as_slice() {
        [image, values, offsets] if image.dim() == 4 => Some((image, Boxes { values, offsets })),
        _ => None,
    }
}

/// Consecutive samples of a validation batch that have one shape.
pub struct Rectangle {
    /// Their places in the batch.
    pub places: Range<usize>,
    /// u8 `[n, 3, H, W]`.
    pub images: Tensor,
    pub shapes: Vec<Shape>,
}

/// A validation batch as rectangles, and its boxes. Samples of a batch have mostly one shape; with some numbers of ranks
/// the borders of shapes are not those of batches.
pub fn rectangles(batch: &Batch) -> Option<(Vec<Rectangle>, Boxes<'_>)> {
    let [bytes, ends, shape, values, offsets] = batch.fields.as_slice() else { return None };
    let ends: Vec<i64> = Vec::try_from(&ends.to_kind(Kind::Int64)).ok()?;
    let numbers: Vec<i64> = Vec::try_from(&shape.flatten(0, -1)).ok()?;
    let shapes: Vec<Shape> = numbers.as_chunks::<SHAPE>().0.iter().map(|numbers| Shape::of(*numbers)).collect();
    let shape_at = |place: usize| {
        let (shape, bytes) = (shapes[place], (ends[place + 1] - ends[place]) as usize);
        // Made-up batches of a plan have no shapes: squares.
        let side = (bytes / 3).isqrt();
        if 3 * shape.height * shape.width == bytes { shape } else { Shape { height: side, width: side, ..shape } }
    };
    let mut found: Vec<Rectangle> = Vec::new();
    let mut start = 0;
    while start < shapes.len() {
        let first = shape_at(start);
        let alike = |place: &usize| {
            let shape = shape_at(*place);
            (shape.height, shape.width) == (first.height, first.width)
        };
        let end = (start..shapes.len()).take_while(alike).last().unwrap_or(start) + 1;
        let size = [(end - start) as i64, 3, first.height as i64, first.width as i64];
        let images = bytes.narrow(0, ends[start], size.iter().product()).view(size);
        found.push(Rectangle { places: start..end, images, shapes: (start..end).map(shape_at).collect() });
        start = end;
    }
    Some((found, Boxes { values, offsets }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::outline::made_up;
    use tch::Device;

    #[test]
    fn batches_are_taken_apart() {
        let made = made_up(&train_fields(64, 7), 2, Device::Cpu).unwrap();
        let (images, boxes) = squares(&made).unwrap();
        assert_eq!((images.size(), boxes.values.size()), (vec![2, 3, 64, 64], vec![14, 5]));
        assert!(rectangles(&made).is_none());
        let made = made_up(&val_fields(64, 7), 2, Device::Cpu).unwrap();
        assert!(squares(&made).is_none());
        let (all, _) = rectangles(&made).unwrap();
        assert_eq!((all.len(), all[0].images.size()), (1, vec![2, 3, 96, 96]));
    }

    #[test]
    fn shapes_of_a_batch_may_differ() {
        let shapes: Vec<i64> = [(32, 64), (32, 64), (64, 32)]
            .iter()
            .flat_map(|(height, width)| Shape { height: *height, width: *width, ..Shape::default() }.numbers())
            .collect();
        let bytes = 3 * 32 * 64;
        let fields = vec![
            Tensor::arange(3 * bytes, (Kind::Int64, Device::Cpu)).remainder(256).to_kind(Kind::Uint8),
            Tensor::from_slice(&[0, bytes, 2 * bytes, 3 * bytes]),
            Tensor::from_slice(&shapes).view([3, 6]),
            Tensor::zeros([0, 5], (Kind::Float, Device::Cpu)),
            Tensor::from_slice(&[0i64; 4]),
        ];
        let batch = Batch::new(fields, vec![0, 1, 2]);
        let (all, _) = rectangles(&batch).unwrap();
        let sizes: Vec<_> = all.iter().map(|of| (of.places.clone(), of.images.size())).collect();
        assert_eq!(sizes, [(0..2, vec![2, 3, 32, 64]), (2..3, vec![1, 3, 64, 32])]);
        assert_eq!(all[1].images.get(0).get(0).get(0).int64_value(&[1]), (2 * bytes + 1) % 256);
    }
}
