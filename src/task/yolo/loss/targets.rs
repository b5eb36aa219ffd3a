//! Labelled boxes of a batch, as rows of equal number.

use crate::task::yolo::data::batch::Boxes;
use tch::{Kind, TchError, Tensor};

/// Boxes of `B` images, `M` rows each: the most that one of them has.
pub struct Targets {
    /// f32 `[B, M, 4]`: left, top, right, bottom in pixels; zeros where there is no box.
    pub boxes: Tensor,
    /// i64 `[B, M]`.
    pub classes: Tensor,
    /// True where there is a box.
    pub real: Tensor,
}

impl Targets {
    /// The boxes of the samples `first..first + count` of a batch, on an image of these rows and columns. Classes beyond
    /// `classes` count as the last, which only made-up batches have.
    ///
    /// # Errors
    /// Offsets that are not those of the boxes.
    pub fn of(
        boxes: &Boxes,
        (first, count): (usize, usize),
        (height, width): (i64, i64),
        classes: i64,
    ) -> Result<Self, TchError> {
        let offsets = Vec::<i64>::try_from(boxes.offsets)?;
        let device = boxes.values.device();
        let spans: Vec<(i64, i64)> = (first..first + count).map(|at| (offsets[at], offsets[at + 1])).collect();
        let most = spans.iter().map(|(from, to)| to - from).max().unwrap_or(0).max(0);
        let rows = Tensor::f_zeros([count as i64 * most, 5], (Kind::Float, device))?;
        let (from, to) = (spans.first().map_or(0, |span| span.0), spans.last().map_or(0, |span| span.1));
        if to > from {
            let place = |(image, (from, to)): (usize, &(i64, i64))| {
                let start = image as i64 * most;
                (0..to - from).map(move |row| start + row)
            };
            let places: Vec<i64> = spans.iter().enumerate().flat_map(place).collect();
            let values = boxes.values.f_narrow(0, from, to - from)?.to_kind(Kind::Float);
            let _ = rows.shallow_clone().f_index_copy_(0, &Tensor::from_slice(&places).to_device(device), &values)?;
        }
        let rows = rows.f_view([count as i64, most, 5])?;
        let scale = Tensor::from_slice(&[width as f32, height as f32, width as f32, height as f32]).to_device(device);
        let places = rows.f_narrow(2, 1, 4)?.f_mul(&scale)?;
        let corners = corners(&places);
        let real = corners.sum_dim_intlist([2i64].as_slice(), false, Kind::Float).gt(0.0);
        let classes = rows.select(2, 0).to_kind(Kind::Int64).clamp(0, (classes - 1).max(0));
        Ok(Self { boxes: corners, classes, real })
    }
}

/// Left, top, right, bottom of centre, width, height.
pub fn corners(places: &Tensor) -> Tensor {
    let (centre, half) = (places.narrow(-1, 0, 2), places.narrow(-1, 2, 2) / 2.0);
    Tensor::cat(&[&centre - &half, &centre + &half], -1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boxes_become_rows_in_pixels() {
        let values =
            Tensor::from_slice(&[1f32, 0.5, 0.5, 0.25, 0.5, 0.0, 0.25, 0.25, 0.5, 0.5, 7.0, 0.5, 0.5, 1.0, 1.0])
                .view([3, 5]);
        let boxes = Boxes { values: &values, offsets: &Tensor::from_slice(&[0i64, 0, 2, 3]) };
        let targets = Targets::of(&boxes, (0, 3), (80, 160), 3).unwrap();
        assert_eq!(targets.boxes.size(), [3, 2, 4]);
        let row = |image: i64, row: i64| Vec::<f32>::try_from(targets.boxes.get(image).get(row)).unwrap();
        assert_eq!(row(1, 0), [60.0, 20.0, 100.0, 60.0]);
        assert_eq!(row(1, 1), [0.0, 0.0, 80.0, 40.0]);
        assert_eq!(row(0, 0), [0.0; 4]);
        let real: Vec<bool> = Vec::try_from(targets.real.flatten(0, -1)).unwrap();
        assert_eq!(real, [false, false, true, true, true, false]);
        let classes: Vec<i64> = Vec::try_from(targets.classes.flatten(0, -1)).unwrap();
        assert_eq!(classes, [0, 0, 1, 0, 2, 0]);
        let part = Targets::of(&boxes, (2, 1), (80, 160), 3).unwrap();
        assert_eq!((part.boxes.size(), part.classes.int64_value(&[0, 0])), (vec![1, 1, 4], 2));
        assert_eq!(Targets::of(&boxes, (0, 1), (80, 160), 3).unwrap().boxes.size(), [1, 0, 4]);
    }
}
