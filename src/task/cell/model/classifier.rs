//! The classifier of noised latents: `[B, L]` at noise step `t` to logits `[B, classes]`.
//!
//! Three layers of Linear, BatchNorm, SiLU, dropout; the first two add the time before the norm. Parameters are named as in
//! published checkpoints, `emb_layers3` among them, which no published forward pass reads: it is kept for the files and is not
//! trained.

use super::layers::{Linear, TimeEmbedding, dropout, unused_linear};
use crate::task::cell::stream;
use crate::task::draw::Draws;
use crate::task::norm::{BatchNorm, BatchNormConfig};
use spec::task::cell::CellClassifier;
use tch::{Kind, Tensor, nn};

/// The network.
pub struct Classifier {
    time: TimeEmbedding,
    layers: [Layer; 3],
    out: Linear,
    dropout: f64,
}

struct Layer {
    fc: Linear,
    time: Option<Linear>,
    norm: BatchNorm,
}

impl Classifier {
    /// For latents of `latent` numbers and so many classes.
    pub fn new(keys: &CellClassifier, latent: i64, classes: i64, vs: &nn::Path) -> Self {
        let size = |n: usize| keys.hidden.get(n).copied().unwrap_or(1) as i64;
        let width = keys.time.map_or(size(0), |time| time as i64);
        let layer = |n: usize, inputs: i64| {
            let time = vs / format!("emb_layers{}", n + 1) / 1;
            if n == 2 {
                unused_linear(&time, width, size(n));
            }
            Layer {
                fc: Linear::before_norm(&(vs / format!("fc{}", n + 1)), inputs, size(n)),
                time: (n < 2).then(|| Linear::before_norm(&time, width, size(n))),
                norm: BatchNorm::new(&(vs / format!("norm{}", n + 1)), size(n), BatchNormConfig::default()),
            }
        };
        Self {
            time: TimeEmbedding::new(&(vs / "time_embed"), width),
            layers: [layer(0, latent), layer(1, size(0)), layer(2, size(1))],
            out: Linear::new(&(vs / "out"), size(2), classes),
            dropout: keys.dropout,
        }
    }

    /// Latents `[B, L]` at noise steps `t` (`[B]`) to logits `[B, classes]`. `draws`: those of dropout; `None` means
    /// evaluation, with running statistics.
    pub fn forward(&self, x: &Tensor, t: &Tensor, draws: Option<&Draws>) -> Tensor {
        let time = self.time.forward(t).silu();
        let mut x = x.to_kind(Kind::Float);
        for (n, layer) in self.layers.iter().enumerate() {
            x = layer.fc.forward(&x);
            if let Some(embed) = &layer.time {
                x += embed.forward(&time);
            }
            x = layer.norm.forward(&x, draws.is_some()).silu();
            let keep = draws.filter(|_| self.dropout > 0.0);
            let keep = keep.map(|draws| draws.uniforms(stream::DROPOUT + n as u64, x.size()[1]));
            x = dropout(&x, self.dropout, keep.as_ref());
        }
        self.out.forward(&x)
    }

    /// Gradient by `x` of the log probability that each latent is of its class, times a scale: `[B, L]`. `targets`: classes
    /// (`[B]`, i64) with the scale of each; gradients of several add up.
    pub fn gradient(&self, x: &Tensor, t: &Tensor, targets: &[(&Tensor, f64)]) -> Tensor {
        tch::with_grad(|| {
            let x = x.detach().set_requires_grad(true);
            let log = self.forward(&x, t, None).log_softmax(-1, Kind::Float);
            let chosen = |(y, scale): &(&Tensor, f64)| log.gather(1, &y.unsqueeze(1), false).sum(Kind::Float) * *scale;
            let sum: Vec<Tensor> = targets.iter().map(chosen).collect();
            Tensor::run_backward(&[Tensor::stack(&sum, 0).sum(Kind::Float)], &[&x], false, false).remove(0)
        })
    }
}
