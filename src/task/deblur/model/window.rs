//! Geometry of windowed attention: sizes that fit, cyclic shifts, masks, relative positions.

use super::layers::Shared;
use std::cell::RefCell;
use tch::{Device, Kind, Tensor};

/// Bias that keeps tokens of a shifted window apart that are no neighbours.
const APART: f32 = -100.0;

/// How `[B, D, H, W, C]` is cut into windows.
#[derive(Clone, Debug)]
pub struct Windows {
    /// Depth, height and width of the tensor.
    dims: [i64; 3],
    /// Windows as they fit: no larger than the tensor.
    pub size: [i64; 3],
    /// Cyclic shift before cutting; zero along an axis that has one window only.
    shift: [i64; 3],
    /// `dims` rounded up to whole windows.
    padded: [i64; 3],
    /// `[N · N]`: row of the bias table for each pair of tokens of a window.
    pub pairs: Shared,
    /// For shifted windows: the kind of each window `[windows]`, and what to add to the scores of a kind `[8, N, N]`.
    pub masks: Option<(Shared, Shared)>,
}

impl Windows {
    /// Windows of `window`, shifted by half of it or not, over a tensor of `dims`. As in Swin and VRT, an axis that is
    /// no longer than the window is one window and is not shifted.
    pub fn new(dims: [i64; 3], window: [i64; 3], shifted: bool, device: Device) -> Self {
        let size: [i64; 3] = std::array::from_fn(|i| window[i].min(dims[i]));
        let shift = std::array::from_fn(|i| if shifted && dims[i] > window[i] { window[i] / 2 } else { 0 });
        let padded = std::array::from_fn(|i| (dims[i] + size[i] - 1) / size[i] * size[i]);
        let pairs = Shared::new(Tensor::from_slice(&relative_rows(size, window)).to_device(device));
        let mut windows = Self { dims, size, shift, padded, pairs, masks: None };
        if shift.iter().any(|&s| s > 0) {
            let kinds = Tensor::from_slice(&windows.kinds()).to_device(device);
            let n = windows.tokens();
            let apart = Tensor::from_slice(&windows.apart()).reshape([8, n, n]).to_device(device);
            windows.masks = Some((Shared::new(kinds), Shared::new(apart)));
        }
        windows
    }

    /// Tokens of a window.
    pub fn tokens(&self) -> i64 {
        self.size.iter().product()
    }

    /// Windows of one sample.
    pub fn count(&self) -> i64 {
        self.grid().iter().product()
    }

    fn grid(&self) -> [i64; 3] {
        std::array::from_fn(|i| self.padded[i] / self.size[i])
    }

    /// Pads with zeros to whole windows and shifts: `[B, D, H, W, C]` to `[B, D', H', W', C]`.
    pub fn align(&self, x: &Tensor) -> Tensor {
        let pad: [i64; 3] = std::array::from_fn(|i| self.padded[i] - self.dims[i]);
        let x =
            if pad == [0; 3] { x.shallow_clone() } else { x.constant_pad_nd([0, 0, 0, pad[2], 0, pad[1], 0, pad[0]]) };
        if self.shift == [0; 3] { x } else { x.roll(self.shift.map(|s| -s), [1, 2, 3]) }
    }

    /// The reverse of [`Windows::align`].
    pub fn restore(&self, x: &Tensor) -> Tensor {
        let mut x = if self.shift == [0; 3] { x.shallow_clone() } else { x.roll(self.shift, [1, 2, 3]) };
        for axis in 0..3 {
            if self.padded[axis] != self.dims[axis] {
                x = x.narrow(axis as i64 + 1, 0, self.dims[axis]);
            }
        }
        x
    }

    /// `[B, D', H', W', parts · C]` to `parts` tensors `[B · windows, heads, N, C / heads]`.
    pub fn split(&self, x: &Tensor, parts: i64, heads: i64) -> Vec<Tensor> {
        let ([d, h, w], [nd, nh, nw]) = (self.size, self.grid());
        let size = x.size();
        let (batch, width) = (size[0], size[4] / parts / heads);
        x.reshape([batch, nd, d, nh, h, nw, w, parts, heads, width])
            .permute([7, 0, 1, 3, 5, 8, 2, 4, 6, 9])
            .reshape([parts, batch * self.count(), heads, self.tokens(), width])
            .unbind(0)
    }

    /// `[B · windows, heads, N, C / heads]` to `[B, D', H', W', C]`.
    pub fn join(&self, x: &Tensor) -> Tensor {
        let ([d, h, w], [nd, nh, nw], [pd, ph, pw]) = (self.size, self.grid(), self.padded);
        let size = x.size();
        let (batch, heads, width) = (size[0] / self.count(), size[1], size[3]);
        x.reshape([batch, nd, nh, nw, heads, d, h, w, width]).permute([0, 1, 5, 2, 6, 3, 7, 4, 8]).reshape([
            batch,
            pd,
            ph,
            pw,
            heads * width,
        ])
    }

    /// Kind of each window: bit i says that it is the last along axis i, which a shift made of two ends.
    fn kinds(&self) -> Vec<i64> {
        let [nd, nh, nw] = self.grid();
        let bit = |at: i64, n: i64, axis: usize| i64::from(at + 1 == n && self.shift[axis] > 0) << axis;
        let mut kinds = Vec::new();
        for d in 0..nd {
            for h in 0..nh {
                kinds.extend((0..nw).map(|w| bit(d, nd, 0) | bit(h, nh, 1) | bit(w, nw, 2)));
            }
        }
        kinds
    }

    /// `[8, N, N]`: [`APART`] between tokens from different ends, by kind of window.
    fn apart(&self) -> Vec<f32> {
        let mut all = Vec::new();
        for kind in 0..8 {
            let end = |at: i64, axis: usize| kind >> axis & 1 == 1 && at >= self.size[axis] - self.shift[axis];
            let ends: Vec<_> = positions(self.size).map(|p| std::array::from_fn::<_, 3, _>(|i| end(p[i], i))).collect();
            all.extend(ends.iter().flat_map(|a| ends.iter().map(move |b| if a == b { 0.0 } else { APART })));
        }
        all
    }
}

/// Positions of a window's tokens, in order.
fn positions(size: [i64; 3]) -> impl Iterator<Item = [i64; 3]> {
    let [d, h, w] = size;
    (0..d * h * w).map(move |i| [i / (h * w), i / w % h, i % w])
}

/// Rows of the bias table of `window` (`(2d-1)(2h-1)(2w-1)` offsets) for the pairs of tokens of `size`.
fn relative_rows(size: [i64; 3], window: [i64; 3]) -> Vec<i64> {
    let row =
        |a: [i64; 3], b: [i64; 3]| (0..3).fold(0, |row, i| row * (2 * window[i] - 1) + a[i] - b[i] + window[i] - 1);
    positions(size).flat_map(|a| positions(size).map(move |b| row(a, b))).collect()
}

/// Key of a geometry: dims, window, shifted.
type Key = ([i64; 3], [i64; 3], bool);

/// Geometries of a model's last inputs: they depend on sizes only.
#[derive(Default)]
pub struct Geometries(RefCell<Vec<(Key, Windows)>>);

impl Geometries {
    /// Most geometries kept: a model has about a dozen per size of input.
    const MOST: usize = 64;

    /// The geometry for these sizes, made on first use.
    pub fn get(&self, dims: [i64; 3], window: [i64; 3], shifted: bool, device: Device) -> Windows {
        let key = (dims, window, shifted);
        let mut known = self.0.borrow_mut();
        if let Some((_, windows)) = known.iter().find(|(k, _)| *k == key) {
            return windows.clone();
        }
        if known.len() >= Self::MOST {
            known.clear();
        }
        let windows = Windows::new(dims, window, shifted, device);
        known.push((key, windows.clone()));
        windows
    }
}

/// Two-dimensional sine encoding `[h, w, features]` of positions in a window: the first half of the features for the
/// row, the second for the column; normalised to 2π, temperature 10,000 (DETR).
pub fn sine_encoding(h: i64, w: i64, features: i64) -> Tensor {
    let half = features / 2;
    let axis = |n: i64| {
        let at =
            Tensor::arange_start(1, n + 1, (Kind::Float, Device::Cpu)) * (std::f64::consts::TAU / (n as f64 + 1e-6));
        let pair = Tensor::arange(half, (Kind::Float, Device::Cpu)).divide_scalar_mode(2.0, "floor") * 2.0;
        let angle = at.unsqueeze(1) / (pair * (10_000_f64.ln() / half as f64)).exp();
        let even = Tensor::arange(half, (Kind::Int64, Device::Cpu)).remainder(2).eq(0);
        angle.sin().where_self(&even, &angle.cos())
    };
    let rows = axis(h).unsqueeze(1).expand([h, w, half], false);
    let columns = axis(w).unsqueeze(0).expand([h, w, half], false);
    let both = Tensor::cat(&[rows, columns], 2);
    // An odd number of features leaves the last one without a position.
    if features % 2 == 0 { both } else { both.constant_pad_nd([0, 1]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbered(batch: i64, dims: [i64; 3], features: i64) -> Tensor {
        let n = batch * dims.iter().product::<i64>() * features;
        Tensor::arange(n, (Kind::Float, Device::Cpu)).reshape([batch, dims[0], dims[1], dims[2], features])
    }

    #[test]
    fn windows_come_back_as_they_were() {
        for (dims, shifted) in [([5, 12, 20], true), ([4, 8, 8], true), ([1, 3, 17], true), ([6, 9, 10], false)] {
            let windows = Windows::new(dims, [2, 4, 8], shifted, Device::Cpu);
            let x = numbered(2, dims, 6);
            let parts = windows.split(&windows.align(&x), 1, 3);
            assert_eq!(parts[0].size(), [2 * windows.count(), 3, windows.tokens(), 2]);
            assert_eq!(windows.restore(&windows.join(&parts[0])), x, "{dims:?}");
        }
    }

    #[test]
    fn tokens_of_different_ends_are_kept_apart() {
        let windows = Windows::new([4, 8, 8], [2, 4, 4], true, Device::Cpu);
        // Where each token comes from, before the shift.
        let at = windows.split(&windows.align(&numbered(1, [4, 8, 8], 1)), 1, 1).remove(0).reshape([-1, 32]);
        let (kinds, apart) = windows.masks.as_ref().unwrap();
        let masks = apart.index_select(0, kinds);
        let place = |token: f64| [token as i64 / 64, token as i64 / 8 % 8, token as i64 % 8];
        for window in 0..windows.count() {
            for (a, b) in [(0, 31), (3, 12), (5, 26), (16, 0)] {
                let (p, q) = (place(at.double_value(&[window, a])), place(at.double_value(&[window, b])));
                let near = (0..3).all(|i| (p[i] - q[i]).abs() < [2, 4, 4][i]);
                assert_eq!(masks.double_value(&[window, a, b]) == 0.0, near, "window {window}, {p:?} {q:?}");
            }
        }
    }

    #[test]
    fn relative_rows_are_those_of_the_full_window_also_when_it_is_cut() {
        let full = relative_rows([2, 4, 4], [2, 4, 4]);
        assert_eq!((full[0], full.iter().max()), (73, Some(&146)), "the middle of 3 · 7 · 7 offsets, and the last one");
        let cut = relative_rows([1, 4, 2], [2, 4, 4]);
        // Token (0, 1, 0) against (0, 0, 1) in both.
        assert_eq!(cut[2 * 8 + 1], full[4 * 32 + 1]);
    }

    #[test]
    fn sine_encoding_tells_positions_apart() {
        let encoding = sine_encoding(4, 4, 16).reshape([16, 16]);
        for a in 0..16 {
            for b in 0..a {
                assert!((encoding.get(a) - encoding.get(b)).abs().max().double_value(&[]) > 1e-2, "{a} {b}");
            }
        }
    }
}
