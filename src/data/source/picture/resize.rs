//! Bilinear resizing of u8 pixels, bit by bit as OpenCV's `INTER_LINEAR`, whose pixels detectors are validated on.
//!
//! Weights have 11 bits; a row is widened to 32 bits, four of which are dropped before rows are mixed. At exactly half the size
//! pixels are means of four.

use super::super::video::image::ImageSize;

const BITS: u32 = 11;
const ONE: f32 = (1 << BITS) as f32;

/// Place and weights of an output row or column: it mixes `at` and `next`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tap {
    at: usize,
    next: usize,
    weights: [i32; 2],
}

/// Resizes `[h, w, 3]` to `[H, W, 3]`.
pub fn resize(source: &[u8], from: ImageSize, to: ImageSize, out: &mut Vec<u8>) {
    out.clear();
    if from == to {
        out.extend_from_slice(source);
        return;
    }
    if (from.height, from.width) == (2 * to.height, 2 * to.width) {
        return halve(source, from, out);
    }
    out.resize(to.bytes(), 0);
    let (columns, rows) = (taps(from.width, to.width, true), taps(from.height, to.height, false));
    let stride = 3 * from.width;
    let mut kept: [(usize, Vec<i32>); 2] = [(usize::MAX, vec![0; 3 * to.width]), (usize::MAX, vec![0; 3 * to.width])];
    for (tap, out) in rows.iter().zip(out.chunks_exact_mut(3 * to.width)) {
        // The lower row of the last one is the upper row of this one as a rule.
        if kept[1].0 == tap.at {
            kept.swap(0, 1);
        }
        for (slot, row) in kept.iter_mut().zip([tap.at, tap.next]) {
            if slot.0 != row {
                widen(&source[row * stride..(row + 1) * stride], &columns, &mut slot.1);
                slot.0 = row;
            }
        }
        let [upper, lower] = tap.weights;
        for ((out, a), b) in out.iter_mut().zip(&kept[0].1).zip(&kept[1].1) {
            // Of 19 bits times 11, sums never overflow; checked arithmetic would keep loops from running in vectors.
            let part = |weight: i32, row: &i32| weight.wrapping_mul(row >> 4) >> 16;
            *out = (part(upper, a).wrapping_add(part(lower, b)).wrapping_add(2) >> 2) as u8;
        }
    }
}

/// Output columns of one row, 11 bits more.
fn widen(row: &[u8], columns: &[Tap], out: &mut [i32]) {
    for (tap, out) in columns.iter().zip(out.chunks_exact_mut(3)) {
        let pixel = |at: usize| row.get(3 * at..).and_then(|pixels| pixels.first_chunk::<3>());
        let (Some(a), Some(b)) = (pixel(tap.at), pixel(tap.next)) else { continue };
        let [left, right] = tap.weights;
        for (out, (a, b)) in out.iter_mut().zip(a.iter().zip(b)) {
            *out = i32::from(*a).wrapping_mul(left).wrapping_add(i32::from(*b).wrapping_mul(right));
        }
    }
}

/// Columns beyond the border count as those at it, with their full weight; rows keep the weights of two.
fn taps(from: usize, to: usize, is_column: bool) -> Vec<Tap> {
    let scale = 1.0 / (to as f64 / from as f64);
    let last = from as i64 - 1;
    let tap = |out: usize| {
        let place = ((out as f64 + 0.5) * scale - 0.5) as f32;
        let (mut at, mut part) = (place.floor() as i64, place - place.floor());
        if is_column && at < 0 {
            (at, part) = (0, 0.0);
        }
        if is_column && at >= last {
            (at, part) = (last, 0.0);
        }
        let weights = [(1.0 - part) * ONE, part * ONE].map(|weight| weight.round_ties_even() as i32);
        Tap { at: at.clamp(0, last) as usize, next: (at + 1).clamp(0, last) as usize, weights }
    };
    (0..to).map(tap).collect()
}

/// Means of 2 × 2 pixels.
fn halve(source: &[u8], from: ImageSize, out: &mut Vec<u8>) {
    let stride = 3 * from.width;
    for pair in source.chunks_exact(2 * stride) {
        let (upper, lower) = pair.split_at(stride);
        for (a, b) in upper.chunks_exact(6).zip(lower.chunks_exact(6)) {
            let mean =
                |c: usize| (u16::from(a[c]) + u16::from(a[c + 3]) + u16::from(b[c]) + u16::from(b[c + 3]) + 2) >> 2;
            out.extend([mean(0) as u8, mean(1) as u8, mean(2) as u8]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resized(source: &[u8], from: (usize, usize), to: (usize, usize)) -> Vec<u8> {
        let size = |(height, width)| ImageSize { height, width };
        let mut out = Vec::new();
        resize(source, size(from), size(to), &mut out);
        out
    }

    fn grey(values: &[u8]) -> Vec<u8> {
        values.iter().flat_map(|value| [*value; 3]).collect()
    }

    /// Sums of what OpenCV 5.0 (`cv2.resize`, `INTER_LINEAR`) makes of the same pixels.
    #[test]
    fn pixels_are_those_of_opencv() {
        for (from, to, expected) in [
            ((30, 40), (48, 64), 0x815c581f),
            ((48, 64), (30, 40), 0xc5af9864),
            ((60, 80), (30, 40), 0x767b50f7),
            ((61, 83), (40, 64), 0xf5f04c6e),
            ((17, 100), (11, 64), 0x2d1e54b4),
            ((100, 90), (64, 58), 0xb86183f7),
            ((33, 47), (64, 91), 0x8d6b16c5),
        ] {
            let count = 3 * from.0 as u64 * from.1 as u64;
            let source: Vec<u8> = (0..count).map(|i| ((i * i * 31 + i * 17) >> 3) as u8).collect();
            assert_eq!(libdeflater::crc32(&resized(&source, from, to)), expected, "{from:?} {to:?}");
        }
    }

    #[test]
    fn pixels_are_mixed_by_distance_from_their_centres() {
        // Centres of the output lie at -0.25, 0.25, 0.75, 1.25 of the input.
        assert_eq!(resized(&grey(&[0, 100]), (1, 2), (1, 4)), grey(&[0, 25, 75, 100]));
        assert_eq!(resized(&grey(&[0, 100]), (2, 1), (4, 1)), grey(&[0, 25, 75, 100]));
        // At 1/3 the middle of three.
        assert_eq!(resized(&grey(&[9, 50, 90]), (1, 3), (1, 1)), grey(&[50]));
        assert_eq!(resized(&grey(&[1, 2, 3, 5]), (2, 2), (1, 1)), grey(&[3]));
        assert_eq!(resized(&grey(&[7; 12]), (3, 4), (5, 9)), grey(&[7; 45]));
        assert_eq!(resized(&grey(&[1, 2]), (1, 2), (1, 2)), grey(&[1, 2]));
    }
}
