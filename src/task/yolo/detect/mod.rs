//! From raw outputs to objects: candidates above a confidence, then non-maximum suppression.

mod candidates;
mod nms;

pub use candidates::candidates;
pub use nms::{Suppression, iou, suppress};

use super::model::{Raw, boxes_from_sides, expected_sides};
use tch::{Device, Kind, TchError, Tensor};

/// Numbers of an object in a tensor: left, top, right, bottom, confidence, class.
pub const NUMBERS: i64 = 6;

/// An object that was found. Its place is in pixels of the image as the model sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Detection {
    /// Left, top, right, bottom.
    pub corners: [f32; 4],
    /// Above 0.
    pub confidence: f32,
    pub class: u16,
}

/// How objects are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// Confidence that a candidate exceeds.
    pub confidence: f64,
    /// Every class above it makes a candidate of a cell; otherwise the most likely one.
    pub every_class: bool,
    /// Most candidates of an image: those of highest confidence.
    pub candidates: usize,
    pub suppression: Suppression,
}

/// Objects of each image, of falling confidence.
///
/// # Errors
/// libtorch refuses.
pub fn detections(raw: &Raw, choice: &Choice) -> Result<Vec<Vec<Detection>>, TchError> {
    let anchors = raw.anchors();
    let sides = expected_sides(&raw.boxes.transpose(1, 2));
    let boxes = boxes_from_sides(&sides, &anchors.centres) * &anchors.strides;
    let scores = raw.classes.sigmoid().transpose(1, 2).contiguous();
    let of = |image: i64| {
        let found = candidates(&scores.f_get(image)?, &boxes.f_get(image)?, choice)?;
        Ok(suppress(found, &choice.suppression))
    };
    (0..scores.size()[0]).map(of).collect()
}

/// Objects as a tensor f32 `[B, most, NUMBERS]` on the host; rows of confidence 0 are none.
pub fn to_tensor(images: &[Vec<Detection>], most: usize) -> Tensor {
    let width = NUMBERS as usize;
    let mut flat = vec![0f32; images.len() * most * width];
    for (image, found) in images.iter().enumerate() {
        for (row, object) in found.iter().take(most).enumerate() {
            let at = (image * most + row) * width;
            flat[at..at + 4].copy_from_slice(&object.corners);
            flat[at + 4] = object.confidence;
            flat[at + 5] = f32::from(object.class);
        }
    }
    Tensor::from_slice(&flat).view([images.len() as i64, most as i64, NUMBERS])
}

/// The inverse of [`to_tensor`].
///
/// # Errors
/// A tensor of another shape.
pub fn from_tensor(objects: &Tensor) -> Result<Vec<Vec<Detection>>, TchError> {
    let (images, most, width) = objects.size3()?;
    let flat = Vec::<f32>::try_from(objects.to_device(Device::Cpu).to_kind(Kind::Float).contiguous().flatten(0, -1))?;
    let object =
        |row: &[f32]| Detection { corners: [row[0], row[1], row[2], row[3]], confidence: row[4], class: row[5] as u16 };
    let rows = flat.chunks_exact(width.max(1) as usize).map(object);
    let rows: Vec<Detection> = rows.collect();
    let image = |image: i64| {
        let own = &rows[(image * most) as usize..((image + 1) * most) as usize];
        own.iter().copied().take_while(|object| object.confidence > 0.0).collect()
    };
    Ok((0..images).map(image).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(left: f32, confidence: f32, class: u16) -> Detection {
        Detection { corners: [left, 0.0, left + 10.0, 10.0], confidence, class }
    }

    #[test]
    fn objects_travel_as_tensors() {
        let all = vec![vec![object(1.0, 0.9, 3), object(2.0, 0.5, 70)], vec![], vec![object(0.0, 0.1, 0)]];
        let tensor = to_tensor(&all, 4);
        assert_eq!(tensor.size(), [3, 4, 6]);
        assert_eq!(from_tensor(&tensor).unwrap(), all);
        assert_eq!(from_tensor(&to_tensor(&all, 1)).unwrap()[0], all[0][..1]);
        assert!(from_tensor(&Tensor::from_slice(&[1f32])).is_err());
    }

    #[test]
    fn a_confident_cell_becomes_an_object() {
        let cells = [(2, 2), (1, 1), (1, 1)];
        let boxes = Tensor::zeros([1, 64, 6], (Kind::Float, Device::Cpu));
        let classes = Tensor::full([1, 2, 6], -20.0, (Kind::Float, Device::Cpu));
        // Cell 3 of the first level, centre (12, 12) px: each side certain at bin 1, that is 8 px.
        for side in 0..4 {
            let _ = boxes.get(0).get(side * 16 + 1).narrow(0, 3, 1).fill_(100.0);
        }
        let _ = classes.get(0).get(1).narrow(0, 3, 1).fill_(2.0);
        let suppression = Suppression { overlap: 0.7, most: 10, across_classes: false };
        let choice = Choice { confidence: 0.25, every_class: true, candidates: 100, suppression };
        let found = detections(&Raw { boxes, classes, cells }, &choice).unwrap();
        assert_eq!(found[0].len(), 1);
        let Detection { corners, confidence, class } = found[0][0];
        assert_eq!((corners, class), ([4.0, 4.0, 20.0, 20.0], 1));
        assert!((confidence - 0.880_797).abs() < 1e-5);
    }
}
