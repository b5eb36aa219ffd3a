//! Pixels: one resampling from the images of a mosaic to the sample, without the canvas between.
//!
//! ```text
//! row y of the sample ─► two rows of the canvas, copied from the images that lie there ─► mixed by y (u16)
//!                     ─► columns mixed by x ─► three planes
//! ```
//! This is for transforms without rotation, shear and perspective, the usual ones. Others have their canvas painted, and each
//! pixel mixes four of it.

use super::super::letterbox::BORDER;
use super::geometry::{Matrix, Placed, through};

/// Bits of a weight.
const BITS: u32 = 8;
const ONE: i32 = 1 << BITS;

/// An image on the canvas: pixels `[h, w, 3]`.
#[derive(Clone, Copy)]
pub struct Layer<'a> {
    pub placed: Placed,
    pub pixels: &'a [u8],
}

/// Memory of a thread.
#[derive(Default)]
pub struct Rows {
    upper: Vec<u8>,
    lower: Vec<u8>,
    mixed: Vec<u16>,
    columns: Vec<Column>,
    canvas: Vec<u8>,
}

impl Rows {
    /// Bytes of all buffers.
    pub fn bytes(&self) -> usize {
        let of_taps = self.columns.capacity() * size_of::<Column>();
        self.upper.capacity() + self.lower.capacity() + 2 * self.mixed.capacity() + of_taps + self.canvas.capacity()
    }
}

/// A place between two pixels: the first one, and the weight of the second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tap {
    at: i64,
    weight: i32,
}

impl Tap {
    fn of(place: f64) -> Self {
        let fixed = (place.clamp(-1e9, 1e9) * f64::from(ONE)).round() as i64;
        Self { at: fixed >> BITS, weight: (fixed & i64::from(ONE - 1)) as i32 }
    }
}

/// Two neighbours in a row that make a column of the sample: the first one's place among numbers, and their weights.
#[derive(Clone, Copy)]
struct Column {
    at: usize,
    left: u32,
    right: u32,
}

/// Fills the planes `[3, side, side]`. `back`: from the sample to the canvas of `canvas` (width, height) pixels.
pub fn warp(layers: &[Layer], canvas: [usize; 2], back: &Matrix, side: usize, out: &mut [u8], rows: &mut Rows) {
    let straight = back[0][1] == 0.0 && back[1][0] == 0.0 && back[2] == [0.0, 0.0, 1.0];
    if straight {
        straightly(layers, canvas, back, side, out, rows);
    } else {
        freely(layers, canvas, back, side, out, rows);
    }
}

fn straightly(layers: &[Layer], canvas: [usize; 2], back: &Matrix, side: usize, out: &mut [u8], rows: &mut Rows) {
    let Rows { upper, lower, mixed, columns, .. } = rows;
    let place = |x: usize| Tap::of(back[0][0] * x as f64 + back[0][2]);
    // A straight line: the ends have the outermost places. Beyond one pixel outside of the canvas all is border.
    let (one, other) = (place(0).at, place(side.saturating_sub(1)).at);
    let (least, most) = (one.min(other), one.max(other) + 1);
    let (first, last) = (least.clamp(-1, canvas[0] as i64), most.clamp(-1, canvas[0] as i64));
    columns.clear();
    columns.extend((0..side).map(|x| {
        let tap = place(x);
        let inside = tap.at.clamp(first, last.max(first + 1) - 1);
        let right = if inside == tap.at { tap.weight } else { i32::from(tap.at > inside) * ONE };
        Column { at: 3 * (inside - first) as usize, left: (ONE - right) as u32, right: right as u32 }
    }));
    let width = (last - first + 1).max(2) as usize;
    [&mut *upper, &mut *lower].into_iter().for_each(|row| row.resize(3 * width, 0));
    mixed.resize(3 * width, 0);
    let area = side * side;
    let mut known = [i64::MIN; 2];
    for y in 0..side {
        let tap = Tap::of(back[1][1] * y as f64 + back[1][2]);
        if known[1] == tap.at {
            std::mem::swap(upper, lower);
            known = [tap.at, i64::MIN];
        }
        for (row, (known, at)) in [&mut *upper, &mut *lower].into_iter().zip(known.iter_mut().zip([tap.at, tap.at + 1]))
        {
            if *known != at {
                canvas_row(layers, canvas, (at, first), row);
                *known = at;
            }
        }
        mix_rows(upper, lower, tap.weight, mixed);
        let (red, rest) = out.split_at_mut(area);
        let (green, blue) = rest.split_at_mut(area);
        let line = y * side..(y + 1) * side;
        mix_columns(mixed, columns, [&mut red[line.clone()], &mut green[line.clone()], &mut blue[line]]);
    }
}

/// Row `y` of the canvas from column `first` on. Layers stand from left to right in every row.
fn canvas_row(layers: &[Layer], canvas: [usize; 2], (y, first): (i64, i64), out: &mut [u8]) {
    if y < 0 || y >= canvas[1] as i64 {
        return out.fill(BORDER);
    }
    let (end, mut done) = (first + (out.len() / 3) as i64, first);
    for Layer { placed, pixels } in layers {
        let row = y - placed.top;
        let from = placed.left.max(first).max(0);
        let to = (placed.left + placed.size.width as i64).min(end).min(canvas[0] as i64);
        if row < 0 || row >= placed.size.height as i64 || from >= to {
            continue;
        }
        if from > done {
            out[3 * (done - first) as usize..3 * (from - first) as usize].fill(BORDER);
        }
        let start = 3 * (row as usize * placed.size.width + (from - placed.left) as usize);
        let bytes = 3 * (to - from) as usize;
        out[3 * (from - first) as usize..][..bytes].copy_from_slice(&pixels[start..start + bytes]);
        done = done.max(to);
    }
    out[3 * (done - first) as usize..].fill(BORDER);
}

/// `a · left + b · right`, which never overflows here: sums of weights are [`ONE`], or its square. Checked arithmetic would keep
/// loops from running in vectors.
fn blend(a: u32, left: u32, b: u32, right: u32) -> u32 {
    a.wrapping_mul(left).wrapping_add(b.wrapping_mul(right))
}

fn mix_rows(upper: &[u8], lower: &[u8], weight: i32, out: &mut [u16]) {
    let (high, low) = ((ONE - weight) as u16, weight as u16);
    for ((out, a), b) in out.iter_mut().zip(upper).zip(lower) {
        *out = u16::from(*a).wrapping_mul(high).wrapping_add(u16::from(*b).wrapping_mul(low));
    }
}

fn mix_columns(mixed: &[u16], columns: &[Column], out: [&mut [u8]; 3]) {
    let [red, green, blue] = out;
    for (((column, red), green), blue) in columns.iter().zip(red).zip(green).zip(blue) {
        let Column { at, left, right } = *column;
        let Some([r0, g0, b0, r1, g1, b1]) = mixed.get(at..).and_then(|pixels| pixels.first_chunk::<6>()) else {
            continue;
        };
        let mix = |a: &u16, b: &u16| {
            (blend(u32::from(*a), left, u32::from(*b), right).wrapping_add(1 << (2 * BITS - 1)) >> (2 * BITS)) as u8
        };
        (*red, *green, *blue) = (mix(r0, r1), mix(g0, g1), mix(b0, b1));
    }
}

fn freely(layers: &[Layer], canvas: [usize; 2], back: &Matrix, side: usize, out: &mut [u8], rows: &mut Rows) {
    // A border of two pixels spares all questions about what lies outside.
    let (width, height) = (canvas[0] + 4, canvas[1] + 4);
    rows.canvas.resize(3 * width * height, 0);
    for (y, row) in rows.canvas.chunks_exact_mut(3 * width).enumerate() {
        canvas_row(layers, canvas, (y as i64 - 2, -2), row);
    }
    let is_affine = back[2] == [0.0, 0.0, 1.0];
    let area = side * side;
    let (red, rest) = out.split_at_mut(area);
    let (green, blue) = rest.split_at_mut(area);
    let planes = red.chunks_exact_mut(side).zip(green.chunks_exact_mut(side)).zip(blue.chunks_exact_mut(side));
    for (y, ((red, green), blue)) in planes.enumerate() {
        let line = Line { back, y: y as f64, is_affine };
        for (x, ((red, green), blue)) in red.iter_mut().zip(green).zip(blue).enumerate() {
            let [u, v] = line.at(x as f64);
            let ((column, right), (row, below)) = (clamped(u, canvas[0]), clamped(v, canvas[1]));
            let at = 3 * (row * width + column);
            let upper = rows.canvas.get(at..).and_then(|pixels| pixels.first_chunk::<6>());
            let lower = rows.canvas.get(at + 3 * width..).and_then(|pixels| pixels.first_chunk::<6>());
            let (Some(upper), Some(lower)) = (upper, lower) else { continue };
            let (left, above) = (ONE as u32 - right, ONE as u32 - below);
            let mix = |plane: usize| {
                let along = |pair: &[u8; 6]| blend(pair[plane].into(), left, pair[plane + 3].into(), right);
                let mixed = blend(along(upper), above, along(lower), below);
                (mixed.wrapping_add(1 << (2 * BITS - 1)) >> (2 * BITS)) as u8
            };
            (*red, *green, *blue) = (mix(0), mix(1), mix(2));
        }
    }
}

/// A row of a sample on the canvas.
struct Line<'a> {
    back: &'a Matrix,
    y: f64,
    is_affine: bool,
}

impl Line<'_> {
    fn at(&self, x: f64) -> [f64; 2] {
        let [a, b, _] = self.back;
        if self.is_affine {
            return [a[0] * x + (a[1] * self.y + a[2]), b[0] * x + (b[1] * self.y + b[2])];
        }
        through(self.back, x, self.y)
    }
}

/// Place on the canvas with its border, and the weight of the next pixel. Whatever lies outside, or nowhere, is border.
fn clamped(place: f64, most: usize) -> (usize, u32) {
    let inside = place.max(-2.0).min(most as f64);
    let fixed = ((inside + 2.0) * f64::from(ONE) + 0.5) as u32;
    ((fixed >> BITS) as usize, fixed & (ONE as u32 - 1))
}

#[cfg(test)]
mod tests {
    use super::super::geometry::{inverse, mosaic};
    use super::*;
    use crate::data::source::video::image::ImageSize;
    use crate::task::sample::Random;

    fn size(height: usize, width: usize) -> ImageSize {
        ImageSize { height, width }
    }

    fn noise(size: ImageSize, seed: u64) -> Vec<u8> {
        let mut random = Random(seed);
        (0..size.bytes()).map(|_| random.draw() as u8).collect()
    }

    /// The sample as the mean of four pixels of a painted canvas, in f64.
    fn expected(layers: &[Layer], canvas: [usize; 2], back: &Matrix, side: usize) -> Vec<f64> {
        let pixel = |x: i64, y: i64, plane: usize| {
            let inside = x >= 0 && y >= 0 && x < canvas[0] as i64 && y < canvas[1] as i64;
            let of = layers.iter().rev().filter(|_| inside).find_map(|Layer { placed, pixels }| {
                let (column, row) = (x - placed.left, y - placed.top);
                let (width, height) = (placed.size.width as i64, placed.size.height as i64);
                let here = (0..width).contains(&column) && (0..height).contains(&row);
                here.then(|| pixels[3 * (row * width + column) as usize + plane])
            });
            f64::from(of.unwrap_or(BORDER))
        };
        let mut out = Vec::new();
        for plane in 0..3 {
            for y in 0..side {
                for x in 0..side {
                    let [u, v] = through(back, x as f64, y as f64);
                    let (a, b) = (u - u.floor(), v - v.floor());
                    let (x, y) = (u.floor() as i64, v.floor() as i64);
                    let row = |y: i64| pixel(x, y, plane) * (1.0 - a) + pixel(x + 1, y, plane) * a;
                    out.push(row(y) * (1.0 - b) + row(y + 1) * b);
                }
            }
        }
        out
    }

    fn check(layers: &[Layer], canvas: [usize; 2], forward: &Matrix) {
        let side = 32;
        let back = inverse(forward).unwrap();
        let mut out = vec![0; 3 * side * side];
        let mut rows = Rows::default();
        warp(layers, canvas, &back, side, &mut out, &mut rows);
        let wanted = expected(layers, canvas, &back, side);
        let apart = out.iter().zip(&wanted).map(|(found, wanted)| (f64::from(*found) - wanted).abs());
        // Weights have 8 bits.
        let worst = apart.fold(0.0, f64::max);
        assert!(worst < 2.6, "{worst} {forward:?}");
    }

    #[test]
    fn samples_are_the_warped_canvas() {
        let sizes = [size(32, 20), size(24, 32), size(32, 32), size(30, 32)];
        let pixels: Vec<Vec<u8>> = sizes.iter().zip(1..).map(|(size, seed)| noise(*size, seed)).collect();
        for centre in [[32, 32], [17, 45]] {
            let placed = mosaic(centre, sizes);
            let layers: Vec<Layer> =
                placed.iter().zip(&pixels).map(|(placed, pixels)| Layer { placed: *placed, pixels }).collect();
            for (scale, x, y) in
                [(1.0, -16.0, -16.0), (0.5, 0.0, 0.0), (1.5, -40.3, -30.9), (0.7, 9.0, -20.25), (1.2, 31.0, 2.0)]
            {
                check(&layers, [64, 64], &[[scale, 0.0, x], [0.0, scale, y], [0.0, 0.0, 1.0]]);
            }
            check(&layers, [64, 64], &[[0.8, 0.3, -12.0], [-0.3, 0.8, 2.0], [0.0, 0.0, 1.0]]);
            check(&layers, [64, 64], &[[0.8, 0.0, -12.0], [0.1, 0.9, 2.0], [1e-3, 5e-4, 1.0]]);
        }
        // Wholly outside.
        let alone = [Layer { placed: Placed { left: 0, top: 0, size: sizes[0] }, pixels: &pixels[0] }];
        check(&alone, [20, 32], &[[1.0, 0.0, 100.0], [0.0, 1.0, -100.0], [0.0, 0.0, 1.0]]);
        check(&alone, [20, 32], &[[0.5, 0.0, 10.0], [0.0, 0.5, 8.0], [0.0, 0.0, 1.0]]);
    }

    #[test]
    fn a_shift_by_whole_pixels_copies() {
        let pixels = noise(size(32, 32), 9);
        let layers = [Layer { placed: Placed { left: 0, top: 0, size: size(32, 32) }, pixels: &pixels }];
        let back = [[1.0, 0.0, 3.0], [0.0, 1.0, 5.0], [0.0, 0.0, 1.0]];
        let mut out = vec![0; 3 * 32 * 32];
        warp(&layers, [32, 32], &back, 32, &mut out, &mut Rows::default());
        assert_eq!(out[32 * 32 + 2 * 32 + 4], pixels[3 * (7 * 32 + 7) + 1]);
        assert_eq!((out[31], out[31 * 32]), (BORDER, BORDER));
    }
}
