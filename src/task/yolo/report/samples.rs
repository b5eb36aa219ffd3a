//! The first samples of training with their boxes, as the model sees them.

use super::canvas::Canvas;
use super::pictures::{Marked, boxed};
use crate::data::{DataError, Dataset, ReadRequest, Scratch};

/// Columns of the sheet.
const COLUMNS: usize = 3;
/// Most columns of a sample on it.
const WIDTH: usize = 320;
const GAP: i32 = 8;

/// A sample `[3, side, side]` with its boxes.
struct Sample {
    side: usize,
    image: Vec<u8>,
    boxes: Vec<[f32; 5]>,
}

/// Draws these samples of the first epoch as a PNG.
///
/// # Errors
/// They cannot be read or drawn.
pub fn samples(data: &dyn Dataset, indices: &[u64], names: &[String]) -> Result<Vec<u8>, String> {
    let mut scratch = Scratch::default();
    let mut read = |index: &u64| sample(data, *index as usize, &mut scratch).map_err(|error| error.to_string());
    let Some(first) = indices.first() else { return Err("there is no sample".into()) };
    let side = read(first)?.side;
    // An image is shrunk by a whole number.
    let step = side.div_ceil(WIDTH).max(1);
    let shown = (side / step) as i32;
    let tall = indices.len().div_ceil(COLUMNS) as i32;
    let mut canvas = Canvas::new(COLUMNS as i32 * (shown + GAP) + GAP, tall * (shown + GAP) + GAP);
    for (at, index) in indices.iter().enumerate() {
        let sample = read(index)?;
        let [column, row] = [at % COLUMNS, at / COLUMNS].map(|at| GAP + at as i32 * (shown + GAP));
        canvas.paste((column, row), shown, &shrunk(&sample, step));
        let marked: Vec<Marked> = sample.boxes.iter().map(|one| marked(one, side, names)).collect();
        boxed(&mut canvas, (column, row), 1.0 / step as f64, &marked)?;
    }
    canvas.png()
}

fn sample(data: &dyn Dataset, index: usize, scratch: &mut Scratch) -> Result<Sample, DataError> {
    let mut fields: Vec<Vec<u8>> = data.fields().iter().map(|field| vec![0; field.sample_bytes()]).collect();
    let mut out: Vec<&mut [u8]> = fields.iter_mut().map(Vec::as_mut_slice).collect();
    data.read(ReadRequest { epoch: 0, index }, &mut out, scratch)?;
    let [_, boxes] = out.as_slice() else { return Err(DataError::Fields { asked: out.len(), count: 2 }) };
    let numbers: Vec<f32> = boxes.as_chunks::<4>().0.iter().map(|bytes| f32::from_ne_bytes(*bytes)).collect();
    let boxes = numbers.as_chunks::<5>().0.to_vec();
    let image = fields.swap_remove(0);
    Ok(Sample { side: (image.len() / 3).isqrt(), image, boxes })
}

/// Bytes `[h, w, 3]`, each the mean of a square of `step` pixels.
fn shrunk(sample: &Sample, step: usize) -> Vec<u8> {
    let Sample { side, image, .. } = sample;
    let shown = side / step;
    let mut out = Vec::with_capacity(3 * shown * shown);
    for place in 0..shown * shown {
        let (row, column) = (place / shown * step, place % shown * step);
        for plane in image.chunks_exact(side * side) {
            let rows = (row..row + step).flat_map(|row| &plane[row * side + column..row * side + column + step]);
            out.push((rows.map(|byte| usize::from(*byte)).sum::<usize>() / (step * step)) as u8);
        }
    }
    out
}

/// A box of a sample in pixels.
fn marked([class, x, y, width, height]: &[f32; 5], side: usize, names: &[String]) -> Marked {
    let class = *class as usize;
    let words = names.get(class).cloned().unwrap_or_else(|| class.to_string());
    let corners = [x - width / 2.0, y - height / 2.0, x + width / 2.0, y + height / 2.0];
    Marked { corners: corners.map(|share| share * side as f32), class, words }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn squares_are_averaged_and_boxes_are_in_pixels() {
        let image: Vec<u8> = (0..3 * 16).map(|n| n as u8).collect();
        let sample = Sample { side: 4, image, boxes: Vec::new() };
        // The first square of the first plane has 0, 1, 4 and 5.
        assert_eq!(shrunk(&sample, 2)[..6], [2, 18, 34, 4, 20, 36]);
        let one = marked(&[1.0, 0.5, 0.5, 0.5, 1.0], 64, &["a".into(), "b".into()]);
        assert_eq!((one.corners, one.class, one.words.as_str()), ([16.0, 0.0, 48.0, 64.0], 1, "b"));
    }
}
