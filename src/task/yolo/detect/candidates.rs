//! Cells and classes above a confidence, brought to the host.

use super::{Choice, Detection};
use tch::{Device, Kind, TchError, Tensor};

/// Candidates of one image, of falling confidence, equal ones in the order of cells: probabilities f32 `[A, C]`, boxes f32
/// `[A, 4]` in pixels. Only candidates leave the device.
///
/// # Errors
/// libtorch refuses.
pub fn candidates(scores: &Tensor, boxes: &Tensor, choice: &Choice) -> Result<Vec<Detection>, TchError> {
    let (cells, classes) = scores.size2()?;
    if cells == 0 || classes == 0 {
        return Ok(Vec::new());
    }
    // Number of the pair (cell, class) and its probability.
    let (numbers, likely) = if choice.every_class {
        let flat = scores.f_reshape([-1])?;
        let numbers = flat.f_gt(choice.confidence)?.f_nonzero()?.f_squeeze_dim(1)?;
        let likely = flat.f_index_select(0, &numbers)?;
        (numbers, likely)
    } else {
        let (most, class) = scores.f_max_dim(1, false)?;
        let cells = most.f_gt(choice.confidence)?.f_nonzero()?.f_squeeze_dim(1)?;
        let likely = most.f_index_select(0, &cells)?;
        (&cells * classes + class.f_index_select(0, &cells)?, likely)
    };
    let order = likely.f_argsort_stable(true, 0, true)?;
    let order = order.f_narrow(0, 0, order.size()[0].min(choice.candidates as i64))?;
    let (numbers, likely) = (numbers.f_index_select(0, &order)?, likely.f_index_select(0, &order)?);
    let corners = boxes.f_index_select(0, &numbers.f_floor_divide_scalar(classes)?)?;
    let numbers = Vec::<i64>::try_from(numbers.f_to_device(Device::Cpu)?)?;
    let host = |tensor: Tensor| {
        Vec::<f32>::try_from(tensor.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?.f_contiguous()?.f_reshape([-1])?)
    };
    let (likely, corners) = (host(likely)?, host(corners)?);
    let all = numbers.iter().zip(likely).zip(corners.as_chunks::<4>().0);
    let object = |((number, confidence), corners): ((&i64, f32), &[f32; 4])| Detection {
        corners: *corners,
        confidence,
        class: (number % classes) as u16,
    };
    Ok(all.map(object).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::yolo::detect::Suppression;

    fn of(every_class: bool, candidates: usize) -> Vec<(f32, u16, f32)> {
        let scores = Tensor::from_slice(&[0.3f32, 0.6, 0.25, 0.1, 0.5, 0.5]).view([3, 2]);
        let boxes = Tensor::from_slice(&[0f32, 0., 1., 1., 10., 0., 11., 1., 20., 0., 21., 1.]).view([3, 4]);
        let suppression = Suppression { overlap: 0.7, most: 10, across_classes: false };
        let choice = Choice { confidence: 0.25, every_class, candidates, suppression };
        let all = super::candidates(&scores, &boxes, &choice).unwrap();
        all.into_iter().map(|object| (object.corners[0], object.class, object.confidence)).collect()
    }

    #[test]
    fn classes_above_the_confidence_are_candidates() {
        assert_eq!(of(true, 10), [(0.0, 1, 0.6), (20.0, 0, 0.5), (20.0, 1, 0.5), (0.0, 0, 0.3)]);
        assert_eq!(of(true, 2), [(0.0, 1, 0.6), (20.0, 0, 0.5)]);
    }

    #[test]
    fn a_prediction_has_the_most_likely_class_alone() {
        assert_eq!(of(false, 10), [(0.0, 1, 0.6), (20.0, 0, 0.5)]);
    }

    #[test]
    fn an_image_without_cells_has_none() {
        let (scores, boxes) =
            (Tensor::zeros([0, 3], (Kind::Float, Device::Cpu)), Tensor::zeros([0, 4], (Kind::Float, Device::Cpu)));
        let suppression = Suppression { overlap: 0.7, most: 10, across_classes: false };
        let choice = Choice { confidence: 0.25, every_class: true, candidates: 10, suppression };
        assert!(super::candidates(&scores, &boxes, &choice).unwrap().is_empty());
    }
}
