//! Labelled objects of a batch, on the host.

use super::matching::Truth;
use crate::task::yolo::data::batch::Boxes;
use crate::task::yolo::loss::targets::Targets;
use tch::{Device, TchError, Tensor};

/// Labelled objects of each image of a rectangle: of the samples `first..first + count`, on an image of these rows and columns.
///
/// # Errors
/// Offsets that are not those of the boxes.
pub fn truths(
    boxes: &Boxes,
    samples: (usize, usize),
    size: (i64, i64),
    classes: usize,
) -> Result<Vec<Vec<Truth>>, TchError> {
    let targets = Targets::of(boxes, samples, size, classes as i64)?;
    let host = |tensor: &Tensor| tensor.to_device(Device::Cpu).contiguous().flatten(0, -1);
    let corners = Vec::<f32>::try_from(host(&targets.boxes))?;
    let (classes, real) = (Vec::<i64>::try_from(host(&targets.classes))?, Vec::<bool>::try_from(host(&targets.real))?);
    let rows = targets.classes.size()[1] as usize;
    let image = |image: usize| {
        let all = (image * rows..(image + 1) * rows).filter(|row| real[*row]);
        all.map(|row| Truth { corners: corners.as_chunks::<4>().0[row], class: classes[row] as u16 }).collect()
    };
    Ok((0..samples.1).map(image).collect())
}
