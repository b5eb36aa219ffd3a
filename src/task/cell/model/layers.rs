//! Layers with PyTorch's names, defaults and initial values.

use tch::{Kind, Tensor, nn};

/// `eps` of `nn.LayerNorm`.
const EPS: f64 = 1e-5;

/// `nn.Linear`: uniform in `±1/√inputs`, weight and bias.
pub struct Linear {
    weight: Tensor,
    bias: Tensor,
    /// A batch norm follows, which takes the bias away again.
    cancelled: bool,
}

impl Linear {
    pub fn new(vs: &nn::Path, inputs: i64, outputs: i64) -> Self {
        let [weight, bias] = uniform(inputs, outputs).map(|(name, shape, init)| vs.var(name, &shape, init));
        Self { weight, bias, cancelled: false }
    }

    /// A layer whose output goes to a batch norm. Its bias has no gradient: what arithmetic finds are rounding errors, which
    /// AdamW makes whole steps of. The bias then wanders, the running mean lags behind, and evaluation differs with the number
    /// of ranks. Here the gradient is exactly 0.
    pub fn before_norm(vs: &nn::Path, inputs: i64, outputs: i64) -> Self {
        Self { cancelled: true, ..Self::new(vs, inputs, outputs) }
    }

    pub fn forward(&self, x: &Tensor) -> Tensor {
        if self.cancelled {
            let bias = &self.bias * 0.0 + self.bias.detach();
            return x.linear(&self.weight, Some(&bias));
        }
        x.linear(&self.weight, Some(&self.bias))
    }
}

/// Keeps the weights of an `nn.Linear` that takes no part in the model: named in published files, never trained.
pub fn unused_linear(vs: &nn::Path, inputs: i64, outputs: i64) {
    for (name, shape, init) in uniform(inputs, outputs) {
        let _ = vs.add(name, nn::init(init, &shape, vs.device()), false);
    }
}

fn uniform(inputs: i64, outputs: i64) -> [(&'static str, Vec<i64>, nn::Init); 2] {
    let bound = 1.0 / (inputs.max(1) as f64).sqrt();
    let init = nn::Init::Uniform { lo: -bound, up: bound };
    [("weight", vec![outputs, inputs], init), ("bias", vec![outputs], init)]
}

/// `nn.LayerNorm` over the last dimension.
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
}

impl LayerNorm {
    pub fn new(vs: &nn::Path, features: i64) -> Self {
        Self { weight: vs.ones("weight", &[features]), bias: vs.zeros("bias", &[features]) }
    }

    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.layer_norm(self.weight.size(), Some(&self.weight), Some(&self.bias), EPS, true)
    }
}

/// `nn.PReLU` with one weight.
pub struct PRelu(Tensor);

impl PRelu {
    pub fn new(vs: &nn::Path) -> Self {
        Self(vs.var("weight", &[1], nn::Init::Const(0.25)))
    }

    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.prelu(&self.0)
    }
}

/// Features of noise steps `t` (`[B]`, any kind) as `[B, width]`: cosines, then sines, periods from 2π to 20,000π.
///
/// All of it in f32 as in the public package: in f64 the angles at t = 999 differ by 5e-5. Odd widths end with a zero.
pub fn time_features(t: &Tensor, width: i64) -> Tensor {
    const LONGEST: f64 = 10_000.0;
    let half = width / 2;
    let place = Tensor::arange(half, (Kind::Float, t.device()));
    let frequency = (place * -LONGEST.ln() / half.max(1) as f64).exp();
    let angle = t.to_kind(Kind::Float).unsqueeze(1) * frequency.unsqueeze(0);
    let features = Tensor::cat(&[angle.cos(), angle.sin()], 1);
    if width % 2 == 0 { features } else { features.constant_pad_nd([0, 1]) }
}

/// The time embedding: features, Linear, SiLU, Linear, under the names `0` and `2`.
pub struct TimeEmbedding {
    width: i64,
    first: Linear,
    second: Linear,
}

impl TimeEmbedding {
    pub fn new(vs: &nn::Path, width: i64) -> Self {
        Self { width, first: Linear::new(&(vs / 0), width, width), second: Linear::new(&(vs / 2), width, width) }
    }

    /// `[B]` to `[B, width]`.
    pub fn forward(&self, t: &Tensor) -> Tensor {
        self.second.forward(&self.first.forward(&time_features(t, self.width)).silu())
    }
}

/// Zeros where `keep` (uniform in 0..1, of `x`'s shape) is below `p`, and scales the rest by 1 / (1 − p).
pub fn dropout(x: &Tensor, p: f64, keep: Option<&Tensor>) -> Tensor {
    match keep {
        Some(keep) if p > 0.0 => x * (keep.ge(p).to_kind(x.kind()) / (1.0 - p)),
        _ => x.shallow_clone(),
    }
}
