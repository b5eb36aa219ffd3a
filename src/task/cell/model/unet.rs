//! Cell_Unet: the network that predicts the noise of a latent `[B, L]` at noise step `t`.
//!
//! ```text
//! L ─► h0 ─► h1 ─► h2 ─► h3 ─► h2 ─► h1 ─► h0 ─► 2·h1 ─► L (or 2 L)     a block: Linear, + Linear(SiLU(time)), LayerNorm, SiLU
//!       └─────┼─────┼───────────+     +     +                            a skip connection is added after its block
//! ```
//! Parameters are named as in published checkpoints: `time_embedding.time_embed.0.weight`, `layers.0.emb_layer.1.weight`,
//! `reverse_layers.0.fc.weight`, `out1`, `norm_out`, `out2`.

use super::layers::{LayerNorm, Linear, TimeEmbedding, dropout};
use crate::task::cell::stream;
use crate::task::draw::Draws;
use spec::task::cell::CellUnet as UnetKeys;
use tch::{Kind, Tensor, nn};

/// The network.
pub struct CellUnet {
    time: TimeEmbedding,
    down: Vec<Block>,
    up: Vec<Block>,
    out1: Linear,
    norm_out: LayerNorm,
    out2: Linear,
    dropout: f64,
}

impl CellUnet {
    /// For latents of `latent` numbers. `outputs`: numbers per latent that come out, `latent`, or twice that where the
    /// variance is learned.
    pub fn new(keys: &UnetKeys, latent: i64, outputs: i64, vs: &nn::Path) -> Self {
        let sizes: Vec<i64> = keys.hidden.iter().map(|&size| size as i64).collect();
        let first = sizes.first().copied().unwrap_or(1);
        let width = keys.time.map_or(first, |time| time as i64);
        let stack = |name: &str, pairs: Vec<(i64, i64)>| {
            let vs = vs / name;
            pairs.iter().enumerate().map(|(n, &(i, o))| Block::new(&(&vs / n), i, o, width)).collect()
        };
        let steps: Vec<(i64, i64)> = sizes.windows(2).map(|pair| (pair[0], pair[1])).collect();
        let down = std::iter::once((latent, first)).chain(steps.iter().copied()).collect();
        let up = steps.iter().rev().map(|&(outer, inner)| (inner, outer)).collect();
        // The published width of the head.
        let head = 2 * sizes.get(1).copied().unwrap_or(first);
        Self {
            time: TimeEmbedding::new(&(vs / "time_embedding" / "time_embed"), width),
            down: stack("layers", down),
            up: stack("reverse_layers", up),
            out1: Linear::new(&(vs / "out1"), first, head),
            norm_out: LayerNorm::new(&(vs / "norm_out"), head),
            out2: Linear::new(&(vs / "out2"), head, outputs),
            dropout: keys.dropout,
        }
    }

    /// Latents `[B, L]` at noise steps `t` (`[B]`) to `[B, outputs]`. `draws`: those of dropout; `None` means evaluation.
    pub fn forward(&self, x: &Tensor, t: &Tensor, draws: Option<&Draws>) -> Tensor {
        let time = self.time.forward(t).silu();
        let mut x = x.to_kind(Kind::Float);
        // Only what a skip connection will read is kept, until it is read.
        let mut skips = Vec::with_capacity(self.up.len());
        for (index, block) in self.down.iter().enumerate() {
            x = block.forward(&x, &time);
            if index < self.up.len() {
                skips.push(x.shallow_clone());
            }
        }
        for block in &self.up {
            x = block.forward(&x, &time);
            if let Some(skip) = skips.pop() {
                x += skip;
            }
        }
        let head = self.norm_out.forward(&self.out1.forward(&x)).silu();
        let keep = draws.filter(|_| self.dropout > 0.0);
        let keep = keep.map(|draws| draws.uniforms(stream::DROPOUT, head.size()[1]));
        self.out2.forward(&dropout(&head, self.dropout, keep.as_ref()))
    }
}

/// Linear, plus the time, LayerNorm, SiLU.
struct Block {
    fc: Linear,
    time: Linear,
    norm: LayerNorm,
}

impl Block {
    fn new(vs: &nn::Path, inputs: i64, outputs: i64, width: i64) -> Self {
        Self {
            fc: Linear::new(&(vs / "fc"), inputs, outputs),
            time: Linear::new(&(vs / "emb_layer" / 1), width, outputs),
            norm: LayerNorm::new(&(vs / "norm"), outputs),
        }
    }

    /// `time`: the embedding after SiLU, the same for all blocks.
    fn forward(&self, x: &Tensor, time: &Tensor) -> Tensor {
        self.norm.forward(&(self.fc.forward(x) + self.time.forward(time))).silu()
    }
}
