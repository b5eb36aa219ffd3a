//! The spike branch: an encoder over space and time, attention over a pixel's times, fusion into the image branch.

use super::attention::attend;
use super::layers::{Conv, Linear, Mlp, Norm, child, maybe_recompute};
use super::spynet::SCALES;
use tch::{Tensor, nn};

/// Blocks per scale.
const BLOCKS: usize = 2;
const KERNEL: [i64; 3] = [3, 3, 3];

/// Numbers of the spike branch.
#[derive(Clone, Debug, PartialEq)]
pub struct SpikeShape {
    /// Voxel bins per frame, K.
    pub bins: i64,
    /// Heads of temporal self attention.
    pub tsa_heads: i64,
    /// Heads of the fusion.
    pub fuse_heads: i64,
    /// Hidden features of the feed-forward parts, as a multiple.
    pub mlp_ratio: i64,
}

impl Default for SpikeShape {
    fn default() -> Self {
        Self { bins: 32, tsa_heads: 4, fuse_heads: 4, mlp_ratio: 2 }
    }
}

/// `x + conv(ReLU(conv(x)))`.
struct Residual(Conv, Conv);

impl Residual {
    fn forward(&self, x: &Tensor) -> Tensor {
        x + self.1.over_time(&self.0.over_time(x).relu())
    }
}

/// SpikeEncoder3D: a convolution, then residual blocks at four scales with halving convolutions between; all 3×3×3.
pub struct SpikeEncoder {
    first: Conv,
    blocks: Vec<Vec<Residual>>,
    downs: Vec<Conv>,
}

impl SpikeEncoder {
    pub fn new(p: &nn::Path, bins: i64, features: i64) -> Self {
        let conv = |p: nn::Path, inputs: i64| Conv::new(&p, inputs, features, &KERNEL, 1.0);
        let block = |scale: usize, i: usize| {
            let p = child(&child(&(p / "blocks"), scale), i);
            Residual(conv(&p / "conv1", features), conv(&p / "conv2", features))
        };
        Self {
            first: conv(p / "conv_in", bins),
            blocks: (0..SCALES).map(|scale| (0..BLOCKS).map(|i| block(scale, i)).collect()).collect(),
            downs: (1..SCALES).map(|i| conv(child(&(p / "downs"), i - 1), features).halving()).collect(),
        }
    }

    /// Voxels `[B, T, K, H, W]` to features `[B, T, H/s, W/s, C]` for s = 1, 2, 4, 8.
    pub fn forward(&self, voxels: &Tensor) -> Vec<Tensor> {
        let mut x = self.first.over_time(voxels).relu();
        let mut scales = Vec::with_capacity(SCALES);
        for (scale, blocks) in self.blocks.iter().enumerate() {
            if scale > 0 {
                x = self.downs[scale - 1].over_time(&x).relu();
            }
            x = blocks.iter().fold(x, |x, block| block.forward(&x));
            scales.push(x.permute([0, 1, 3, 4, 2]).contiguous());
        }
        scales
    }
}

/// How many pixels attention over time takes at once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tiles {
    /// Most pixels of a tile, counted over the batch (`MAX_BATCH_TOKENS`).
    pub max_tokens: i64,
    /// Longest side (`CHUNK_SIZE`).
    pub side: i64,
}

impl Tiles {
    /// Height and width of a tile. Pixels are independent, so that no result depends on it.
    fn size(&self, batch: i64, h: i64, w: i64) -> (i64, i64) {
        let (tall, wide) = (h.min(self.side.max(1)), w.min(self.side.max(1)));
        let rows = (self.max_tokens / (batch * wide).max(1)).max(1);
        let wide = if batch * wide > self.max_tokens { (self.max_tokens / batch.max(1)).max(1) } else { wide };
        (tall.min(rows), wide)
    }
}

/// Pre-LN attention over the times of each pixel and a feed-forward part, both with residuals. With a second input its
/// features are keys and values, else the queries' own.
#[derive(Clone, Debug)]
pub struct TemporalAttention {
    heads: i64,
    norm_q: Norm,
    norm_kv: Option<Norm>,
    q: Linear,
    kv: Linear,
    proj: Linear,
    norm2: Norm,
    mlp: Mlp,
}

impl TemporalAttention {
    pub fn new(p: &nn::Path, features: i64, heads: i64, mlp_ratio: i64, cross: bool) -> Self {
        // At VRT's small deviations a run of a few hundred steps never hears of the spikes.
        let linear = |name: &str, outputs: i64| Linear::with_gain(&(p / name), features, outputs, 1.0);
        Self {
            heads,
            norm_q: Norm::new(&(p / "norm_q"), features),
            norm_kv: cross.then(|| Norm::new(&(p / "norm_kv"), features)),
            q: linear("q", features),
            kv: linear("kv", 2 * features),
            proj: linear("proj", features),
            norm2: Norm::new(&(p / "norm2"), features),
            mlp: Mlp::new(&(p / "mlp"), features, mlp_ratio * features),
        }
    }

    /// `x` `[B, T, H, W, C]` to the same shape, tile by tile; `other`, of the same shape, for cross attention.
    pub fn forward(&self, x: &Tensor, other: Option<&Tensor>, tiles: Tiles, checkpoint: [bool; 2]) -> Tensor {
        let part = self.clone();
        let inputs: Vec<&Tensor> = std::iter::once(x).chain(other).collect();
        let y = maybe_recompute(checkpoint[0], &inputs, move |x| {
            by_tile(x, tiles, |tile| part.attention(&tile[0], tile.get(1)))
        });
        let part = self.clone();
        maybe_recompute(checkpoint[1], &[&y], move |y| &y[0] + part.mlp.forward(&part.norm2.forward(&y[0])))
    }

    fn attention(&self, x: &Tensor, other: Option<&Tensor>) -> Tensor {
        let size = x.size();
        let own = self.norm_q.forward(x);
        let read = match (&self.norm_kv, other) {
            (Some(norm), Some(other)) => norm.forward(other),
            _ => own.shallow_clone(),
        };
        let (b, t, h, w, c) = (size[0], size[1], size[2], size[3], size[4]);
        let per_pixel = |x: &Tensor, parts: i64| {
            x.reshape([b, t, h * w, parts, self.heads, c / self.heads])
                .permute([3, 0, 2, 4, 1, 5])
                .reshape([parts, b * h * w, self.heads, t, c / self.heads])
                .unbind(0)
        };
        let (q, kv) = (per_pixel(&self.q.forward(&own), 1), per_pixel(&self.kv.forward(&read), 2));
        let out = attend(&q[0], &kv[0], &kv[1], None);
        let out = out.reshape([b, h * w, self.heads, t, c / self.heads]).permute([0, 3, 1, 2, 4]);
        x + self.proj.forward(&out.reshape(&*size))
    }
}

/// `act` on tiles of the height and width of `[B, T, H, W, C]` tensors, put together again.
fn by_tile(x: &[Tensor], tiles: Tiles, act: impl Fn(&[Tensor]) -> Tensor) -> Tensor {
    let size = x[0].size();
    let (h, w) = (size[2], size[3]);
    let (tall, wide) = tiles.size(size[0], h, w);
    if (tall, wide) == (h, w) {
        return act(x);
    }
    let tile = |top: i64, left: i64| {
        let cut = |t: &Tensor| t.narrow(2, top, tall.min(h - top)).narrow(3, left, wide.min(w - left));
        act(&x.iter().map(cut).collect::<Vec<_>>())
    };
    let starts = |n: i64, step: i64| (0..n).step_by(step as usize);
    let row = |top: i64| Tensor::cat(&starts(w, wide).map(|left| tile(top, left)).collect::<Vec<_>>(), 3);
    Tensor::cat(&starts(h, tall).map(row).collect::<Vec<_>>(), 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn tiles_stay_within_both_limits() {
        for (limits, batch, h, w) in [((49_152, 64), 1, 256, 256), ((100, 64), 3, 40, 50), ((5, 64), 8, 9, 9)] {
            let tiles = Tiles { max_tokens: limits.0, side: limits.1 };
            let (tall, wide) = tiles.size(batch, h, w);
            assert!(tall >= 1 && wide >= 1 && tall <= 64 && wide <= 64);
            assert!(batch * tall * wide <= limits.0.max(batch), "{tall} {wide}");
        }
    }

    #[test]
    fn results_do_not_depend_on_the_tile() {
        let vs = nn::VarStore::new(Device::Cpu);
        let cross = TemporalAttention::new(&vs.root(), 16, 4, 2, true);
        let random = || Tensor::randn([2, 5, 12, 18, 16], (Kind::Float, Device::Cpu));
        let (x, other) = (random().set_requires_grad(true), random());
        let run = |max_tokens: i64, side: i64| {
            let y = cross.forward(&x, Some(&other), Tiles { max_tokens, side }, [false, false]);
            let grad = Tensor::run_backward(&[y.square().sum(Kind::Float)], &[&x], false, false).remove(0);
            (y, grad)
        };
        let (whole, grad) = run(1 << 20, 64);
        for (max_tokens, side) in [(1 << 20, 5), (64, 64), (7, 64), (2, 1)] {
            let (y, slope) = run(max_tokens, side);
            assert!((&y - &whole).abs().max().double_value(&[]) < 1e-6, "{max_tokens} {side}");
            assert!((slope - &grad).abs().max().double_value(&[]) < 1e-5, "{max_tokens} {side}");
        }
    }
}
