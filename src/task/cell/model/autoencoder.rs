//! The autoencoder: expression `[B, G]` (normalised, log1p) to a latent vector of length 1, and back.
//!
//! ```text
//! encoder   G ─► hidden … ─► latent, divided by its length      each hidden layer: dropout, Linear, BatchNorm, PReLU
//! decoder   latent ─► hidden reversed … ─► G                    the loss reads it as it is; generated cells after ReLU
//! ```
//! Parameters are named as in published checkpoints: `encoder.network.0.1.weight`, `decoder.network.0.0.weight`, ...
//!
//! The published program never leaves training mode: its latents hold the statistics of the whole matrix as one batch, its
//! cells those of the generated batch, so that decoding one type alone goes wrong. Here `train` decides, and everything but
//! training uses the running statistics.

use super::layers::{Linear, PRelu, dropout};
use crate::task::cell::stream;
use crate::task::draw::Draws;
use crate::task::norm::{BatchNorm, BatchNormConfig};
use spec::task::cell::CellAutoencoder;
use tch::{Kind, Tensor, nn};

/// Least length that a latent is divided by: `eps` of `F.normalize`.
const SHORTEST: f64 = 1e-12;

/// Encoder and decoder.
pub struct Autoencoder {
    encoder: Half,
    decoder: Half,
}

/// Hidden layers, then a linear one.
struct Half {
    hidden: Vec<Hidden>,
    out: Linear,
}

/// One hidden layer.
struct Hidden {
    linear: Linear,
    norm: BatchNorm,
    activation: PRelu,
    dropout: f64,
    /// Number of its stream of draws.
    stream: u64,
}

impl Autoencoder {
    /// Builds encoder and decoder under `vs` for `genes` genes.
    pub fn new(keys: &CellAutoencoder, genes: i64, vs: &nn::Path) -> Self {
        let latent = keys.latent as i64;
        let mut sizes: Vec<i64> = keys.hidden.iter().map(|&size| size as i64).collect();
        let dropouts = [keys.dropout; 2];
        let encoder = Half::new(&(vs / "encoder" / "network"), genes, &sizes, latent, dropouts, true);
        sizes.reverse();
        // The decoder's first layer has no dropout, and no place for it in the names.
        let decoder = Half::new(&(vs / "decoder" / "network"), latent, &sizes, genes, [0.0, keys.dropout], false);
        Self { encoder, decoder }
    }

    /// Expression `[B, G]` to latents `[B, L]` of length 1. `draws`: those of dropout; `None` means evaluation.
    pub fn encode(&self, x: &Tensor, draws: Option<&Draws>) -> Tensor {
        let latent = self.encoder.forward(x, draws);
        let length = latent.norm_scalaropt_dim(2.0, [1i64].as_slice(), true).clamp_min(SHORTEST);
        latent / length
    }

    /// Latents `[B, L]` to expression `[B, G]`, which may be negative: what the loss compares.
    pub fn decode(&self, latent: &Tensor, draws: Option<&Draws>) -> Tensor {
        self.decoder.forward(latent, draws)
    }

    /// Expression `[B, G]` of generated latents `[B, L]`, 0 or more.
    pub fn generate(&self, latent: &Tensor) -> Tensor {
        self.decode(latent, None).relu()
    }

    /// Reconstruction `[B, G]` of `x`.
    pub fn forward(&self, x: &Tensor, draws: Option<&Draws>) -> Tensor {
        self.decode(&self.encode(x, draws), draws)
    }

    /// Mean squared error of a reconstruction, f32.
    pub fn loss(reconstruction: &Tensor, x: &Tensor) -> Tensor {
        (reconstruction.to_kind(Kind::Float) - x).square().mean(Kind::Float)
    }
}

impl Half {
    fn new(vs: &nn::Path, inputs: i64, sizes: &[i64], outputs: i64, dropouts: [f64; 2], encoder: bool) -> Self {
        let mut before = inputs;
        let hidden = sizes.iter().enumerate().map(|(index, &size)| {
            // Published files number dropout too, where the layer has one.
            let first = i64::from(encoder || index > 0);
            let layer = vs / index;
            let built = Hidden {
                linear: Linear::before_norm(&(&layer / first), before, size),
                norm: BatchNorm::new(&(&layer / (first + 1)), size, BatchNormConfig::default()),
                activation: PRelu::new(&(&layer / (first + 2))),
                dropout: dropouts[usize::from(index > 0)],
                stream: 2 * index as u64 + u64::from(encoder),
            };
            before = size;
            built
        });
        let hidden: Vec<Hidden> = hidden.collect();
        Self { out: Linear::new(&(vs / hidden.len()), before, outputs), hidden }
    }

    fn forward(&self, x: &Tensor, draws: Option<&Draws>) -> Tensor {
        let last = self.hidden.iter().fold(x.shallow_clone(), |x, layer| layer.forward(&x, draws));
        self.out.forward(&last)
    }
}

impl Hidden {
    fn forward(&self, x: &Tensor, draws: Option<&Draws>) -> Tensor {
        let keep = draws.filter(|_| self.dropout > 0.0);
        let keep = keep.map(|draws| draws.uniforms(stream::DROPOUT + self.stream, x.size()[1]));
        let x = self.linear.forward(&dropout(x, self.dropout, keep.as_ref()));
        self.activation.forward(&self.norm.forward(&x, draws.is_some()))
    }
}
