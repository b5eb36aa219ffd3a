//! Spikes → voxels, on the rank's device, after the crop.

use super::super::constants::constant;
use tch::{Kind, Tensor};

/// How spike planes become a model's input.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct VoxelSpec {
    /// Time bins, `K`.
    pub bins: i64,
    /// Counts become `ln(1 + count)`.
    pub log1p: bool,
    /// Then `(x - mean) / deviation`.
    pub norm: Option<(f64, f64)>,
}

/// Sums spikes into bins of time and brings them to the frames' size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Voxeliser {
    spec: VoxelSpec,
    /// Columns of the spike camera and of frames: how many of a crop's packed bits count.
    columns: (i64, i64),
}

impl Voxeliser {
    /// `spike_width`, `image_width`: columns of whole spike planes and of whole frames.
    pub fn new(spec: VoxelSpec, spike_width: usize, image_width: usize) -> Self {
        Self { spec, columns: (spike_width as i64, image_width as i64) }
    }

    /// Packed planes u8 `[B, T, S, h', ceil(w'/8)]` → voxels f32 `[B, T, K, h, w]` of a crop of `h × w` pixels, on the
    /// planes' device. Plane `t` counts for bin `floor(t·K/S)`; where S < K some bins stay empty. One bin's planes are
    /// widened at a time.
    pub fn voxels(&self, spikes: &Tensor, h: i64, w: i64) -> Tensor {
        let (b, t, planes, rows, bytes) = spikes.size5().unwrap_or_default();
        let width = (w * self.columns.0 / self.columns.1.max(1)).min(8 * bytes);
        let lanes = constant("lanes", [0; 4], spikes.device(), lanes);
        let count = |bin: i64| {
            // Planes t with bin·S <= t·K < (bin + 1)·S.
            let first = |bin: i64| (bin * planes + self.spec.bins - 1) / self.spec.bins.max(1);
            let (from, to) = (first(bin), first(bin + 1));
            let mut counts = Tensor::zeros([b, t, rows, 8 * bytes], (Kind::Float, spikes.device()));
            // A lane counts to 255.
            for from in (from..to).step_by(255) {
                let some = spikes.narrow(2, from, (to - from).min(255));
                let words = lanes.index_select(0, &some.to_kind(Kind::Int).reshape([-1])).view(some.size().as_slice());
                let sums = words.sum_dim_intlist([2i64].as_slice(), false, Kind::Int64);
                counts += sums.view_dtype(Kind::Uint8).view([b, t, rows, 8 * bytes]);
            }
            counts.narrow(3, 0, width)
        };
        let counts: Vec<Tensor> = (0..self.spec.bins).map(count).collect();
        self.finish(&Tensor::stack(&counts, 2), h, w)
    }

    /// Precomputed counts f32 `[B, T, K, h', w']` → as [`Voxeliser::voxels`].
    pub fn finish(&self, counts: &Tensor, h: i64, w: i64) -> Tensor {
        let (b, t, bins, rows, width) = counts.size5().unwrap_or_default();
        let mut voxels = if self.spec.log1p { counts.log1p() } else { counts.shallow_clone() };
        if let Some((mean, deviation)) = self.spec.norm {
            voxels = (voxels - mean) / deviation;
        }
        if (rows, width) == (h, w) {
            return voxels;
        }
        let flat = voxels.reshape([b * t, bins, rows, width]);
        flat.upsample_bilinear2d([h, w], false, None, None).view([b, t, bins, h, w])
    }
}

/// i64 `[256]`: the bits of each byte as eight bytes of a word, in memory order, so that adding words counts eight
/// spikes at a time.
fn lanes() -> Tensor {
    let word = |byte: u8| i64::from_ne_bytes(std::array::from_fn(|bit| byte >> bit & 1));
    Tensor::from_slice(&(0..=u8::MAX).map(word).collect::<Vec<_>>())
}

/// Frames u8 `[B, T, h, w, 3]` → f32 `[B, T, 3, h, w]` in 0..1.
pub fn frames(pixels: &Tensor) -> Tensor {
    pixels.permute([0, 1, 4, 2, 3]).contiguous().to_kind(Kind::Float) / 255.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::source::video::bits;

    /// The same in f64 from a raw stream of bytes `[S, h', w']`.
    fn by_hand(stream: &[u8], [s, rows, width]: [usize; 3], spec: VoxelSpec, h: usize, w: usize) -> Vec<f64> {
        let bins = spec.bins as usize;
        let mut counts = vec![0.0; bins * rows * width];
        for (n, spike) in stream.iter().enumerate() {
            let (t, place) = (n / (rows * width), n % (rows * width));
            counts[t * bins / s * rows * width + place] += f64::from(*spike);
        }
        let value = |count: f64| {
            let value = if spec.log1p { count.ln_1p() } else { count };
            spec.norm.map_or(value, |(mean, deviation)| (value - mean) / deviation)
        };
        let counts: Vec<f64> = counts.into_iter().map(value).collect();
        let sides = |at: usize, to: usize, from: usize| {
            let centre = ((at as f64 + 0.5) * from as f64 / to as f64 - 0.5).max(0.0);
            let low = centre.floor() as usize;
            (low, (low + 1).min(from - 1), centre - low as f64)
        };
        let mut out = Vec::new();
        for plane in counts.chunks(rows * width) {
            for y in 0..h {
                let (y0, y1, fy) = sides(y, h, rows);
                for x in 0..w {
                    let (x0, x1, fx) = sides(x, w, width);
                    let row = |y: usize| plane[y * width + x0] * (1.0 - fx) + plane[y * width + x1] * fx;
                    out.push(row(y0) * (1.0 - fy) + row(y1) * fy);
                }
            }
        }
        out
    }

    #[test]
    fn voxels_equal_those_of_the_raw_stream_in_f64() {
        for (s, bins, rows, width, h, w) in [
            (66, 32, 6, 8, 12, 16),
            (66, 32, 5, 13, 10, 26),
            (10, 32, 4, 9, 4, 9),
            (7, 3, 4, 6, 10, 9),
            (900, 2, 2, 9, 2, 9),
        ] {
            for (log1p, norm) in [(false, None), (true, None), (true, Some((0.31, 0.27)))] {
                let spec = VoxelSpec { bins, log1p, norm };
                let stream = |clip: usize| -> Vec<u8> {
                    (0..s * rows * width).map(|n| u8::from((n * 2654435761 + clip * 97) % 11 < 4)).collect()
                };
                let mut packed = Vec::new();
                for clip in 0..6 {
                    for row in stream(clip).chunks(width) {
                        let mut out = vec![0; bits::row_bytes(width)];
                        assert_eq!(bits::pack(row, 1, &mut out), None);
                        packed.extend(out);
                    }
                }
                let shape = [2, 3, s, rows, bits::row_bytes(width)].map(|n| n as i64);
                let spikes = Tensor::from_slice(&packed).view(shape);
                let voxeliser = Voxeliser::new(spec, width, w);
                let voxels = voxeliser.voxels(&spikes, h as i64, w as i64);
                assert_eq!(voxels.size(), [2, 3, bins, h as i64, w as i64]);
                let found = Vec::<f32>::try_from(voxels.flatten(0, -1)).unwrap();
                let wanted: Vec<f64> =
                    (0..6).flat_map(|clip| by_hand(&stream(clip), [s, rows, width], spec, h, w)).collect();
                let worst = found.iter().zip(&wanted).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
                assert!(worst < 1e-6, "{s} {bins} {rows} {width}: {worst}");
            }
        }
    }

    #[test]
    fn frames_become_channels_in_unit_range() {
        let pixels = Tensor::from_slice(&[0u8, 51, 255, 102, 153, 204]).view([1, 1, 1, 2, 3]);
        let found = Vec::<f32>::try_from(frames(&pixels).flatten(0, -1)).unwrap();
        assert_eq!(found, [0.0, 102.0 / 255.0, 51.0 / 255.0, 153.0 / 255.0, 1.0, 204.0 / 255.0]);
    }
}
