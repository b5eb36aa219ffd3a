//! Augmentation of a training sample: mosaic, affine, mixup, colours, flips. Random numbers come from [`draw`], places from
//! [`geometry`], pixels from [`mod@warp`] and [`colour`].

pub mod colour;
pub mod draw;
pub mod geometry;
pub mod warp;

use crate::data::source::video::image::ImageSize;
use draw::{Draws, View};
use geometry::{Corners, Matrix, Placed, inverse, mosaic, moved, on_canvas, row_of, transform};
use warp::{Layer, Rows, warp};

/// An image with its boxes, ready to be placed.
pub struct Source<'a> {
    pub pixels: &'a [u8],
    pub size: ImageSize,
    pub rows: &'a [[f32; 5]],
}

/// Makes one view: four sources are a mosaic, one fills the canvas alone. Pixels go to `out`, planes `[3, side, side]`; its boxes
/// are returned in pixels.
pub fn view(sources: &[Source], of: &View, side: usize, out: &mut [u8], rows: &mut Rows) -> Vec<Corners> {
    let (placed, canvas) = placed(sources, of, side);
    let canvas_size = canvas.map(|pixels| pixels as f64);
    let forward = transform(of, canvas_size, side as f64);
    // A transform without inverse maps all to a line: nothing of the images is left.
    let Some(back) = inverse(&forward) else {
        out.fill(super::letterbox::BORDER);
        return Vec::new();
    };
    let layers: Vec<Layer> =
        placed.iter().zip(sources).map(|(placed, source)| Layer { placed: *placed, pixels: source.pixels }).collect();
    warp(&layers, canvas, &snapped(back, of), side, out, rows);
    let boxes = placed.iter().zip(sources).flat_map(|(placed, source)| on_canvas(source.rows, placed, canvas_size));
    boxes.filter_map(|corners| moved(&corners, &forward, of.scale, side as f64)).collect()
}

fn placed(sources: &[Source], of: &View, side: usize) -> (Vec<Placed>, [usize; 2]) {
    match (sources, &of.mosaic) {
        ([a, b, c, d], Some((centre, _))) => {
            let centre = centre.map(|share| (share * 2.0 * side as f64) as usize);
            (mosaic(centre, [a.size, b.size, c.size, d.size]).to_vec(), [2 * side; 2])
        }
        ([alone, ..], _) => (vec![Placed { left: 0, top: 0, size: alone.size }], [alone.size.width, alone.size.height]),
        ([], _) => (Vec::new(), [1, 1]),
    }
}

/// Without rotation, shear and perspective the inverse has exact zeros.
fn snapped(mut back: Matrix, of: &View) -> Matrix {
    if of.angle == 0.0 && of.shear == [0.0; 2] && of.perspective == [0.0; 2] {
        (back[0][1], back[1][0], back[2]) = (0.0, 0.0, [0.0, 0.0, 1.0]);
    }
    back
}

/// Mixes `other` into `out`, which keeps `share` of itself.
pub fn mix_in(out: &mut [u8], other: &[u8], share: f64) {
    let kept = (share * 256.0).round() as u16;
    let taken = 256 - kept;
    for (out, other) in out.iter_mut().zip(other) {
        // Shares add up to 256: no sum overflows.
        *out = (u16::from(*out).wrapping_mul(kept).wrapping_add(u16::from(*other).wrapping_mul(taken)) >> 8) as u8;
    }
}

/// Colours and flips; the last steps, after which boxes are rows of a batch.
pub fn finish(draws: &Draws, boxes: Vec<Corners>, side: usize, out: &mut [u8]) -> Vec<[f32; 5]> {
    colour::change(out, draws.hsv);
    let area = side * side;
    if draws.bgr {
        let (red, rest) = out.split_at_mut(area);
        red.swap_with_slice(&mut rest[area..]);
    }
    let [upside, mirrored] = draws.flips;
    for plane in out.chunks_exact_mut(area) {
        if upside {
            let (upper, lower) = plane.split_at_mut(side / 2 * side);
            let lower = lower.chunks_exact_mut(side).rev();
            upper.chunks_exact_mut(side).zip(lower).for_each(|(a, b)| a.swap_with_slice(b));
        }
        if mirrored {
            plane.chunks_exact_mut(side).for_each(<[u8]>::reverse);
        }
    }
    let flipped = |corners: &Corners| {
        let [class, x, y, w, h] = row_of(corners, side as f64);
        [class, if mirrored { 1.0 - x } else { x }, if upside { 1.0 - y } else { y }, w, h]
    };
    boxes.iter().map(flipped).collect()
}

#[cfg(test)]
mod tests;
