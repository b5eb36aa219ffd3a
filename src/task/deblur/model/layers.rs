//! Small layers whose clones share their parameters, so that a recomputed part can hold its own.

use crate::torch;
use std::cell::Cell;
use std::ops::Deref;
use tch::{Device, Kind, Tensor, nn};

const LAYER_NORM_EPS: f64 = 1e-5;

/// A tensor whose clones are the same tensor.
#[derive(Debug)]
pub struct Shared(Tensor);

impl Shared {
    pub fn new(tensor: Tensor) -> Self {
        Self(tensor)
    }
}

impl Clone for Shared {
    fn clone(&self) -> Self {
        Self(self.0.shallow_clone())
    }
}

impl Deref for Shared {
    type Target = Tensor;

    fn deref(&self) -> &Tensor {
        &self.0
    }
}

/// Child of `p` by number.
pub fn child<'a>(p: &nn::Path<'a>, index: usize) -> nn::Path<'a> {
    p / index
}

/// Weight `[outputs, inputs]` and bias. Weights are normal with deviation 0.2/√inputs, which for the published 96
/// channels is VRT's 0.02; biases zero.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Shared,
    bias: Shared,
}

impl Linear {
    pub fn new(p: &nn::Path, inputs: i64, outputs: i64) -> Self {
        Self::with_gain(p, inputs, outputs, 0.2)
    }

    /// Deviation `gain`/√inputs; 1 keeps the size of what passes, as PyTorch's attention begins.
    pub fn with_gain(p: &nn::Path, inputs: i64, outputs: i64, gain: f64) -> Self {
        let init = nn::Init::Randn { mean: 0.0, stdev: gain / (inputs as f64).sqrt() };
        Self {
            weight: Shared(p.var("weight", &[outputs, inputs], init)),
            bias: Shared(p.var("bias", &[outputs], nn::Init::Const(0.0))),
        }
    }

    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight, Some(&*self.bias))
    }
}

/// LayerNorm over the last dimension.
#[derive(Clone, Debug)]
pub struct Norm {
    weight: Shared,
    bias: Shared,
}

impl Norm {
    pub fn new(p: &nn::Path, features: i64) -> Self {
        Self {
            weight: Shared(p.var("weight", &[features], nn::Init::Const(1.0))),
            bias: Shared(p.var("bias", &[features], nn::Init::Const(0.0))),
        }
    }

    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.layer_norm(self.weight.size(), Some(&*self.weight), Some(&*self.bias), LAYER_NORM_EPS, true)
    }
}

/// Convolution that keeps the size: stride 1, padding (k-1)/2 in every dimension.
#[derive(Clone, Debug)]
pub struct Conv {
    pub weight: Shared,
    pub bias: Shared,
    stride: i64,
}

impl Conv {
    /// `kernel` has two or three numbers. Uniform in ±`gain`/√fan_in; with gain 1 what PyTorch does.
    pub fn new(p: &nn::Path, inputs: i64, outputs: i64, kernel: &[i64], gain: f64) -> Self {
        let bound = gain / ((inputs * kernel.iter().product::<i64>()) as f64).sqrt();
        let init = if gain > 0.0 { nn::Init::Uniform { lo: -bound, up: bound } } else { nn::Init::Const(0.0) };
        let shape = [&[outputs, inputs], kernel].concat();
        Self { weight: Shared(p.var("weight", &shape, init)), bias: Shared(p.var("bias", &[outputs], init)), stride: 1 }
    }

    /// Rows and columns are halved.
    pub fn halving(mut self) -> Self {
        self.stride = 2;
        self
    }

    /// `[N, C, H, W]` with a kernel of two numbers.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        self.convolve(x, &self.weight)
    }

    /// `[B, T, C, H, W]` with a kernel of three numbers, the first of them 1 or 3, frames kept. Each frame and its
    /// neighbours are channels of a two-dimensional convolution: libtorch has no fast one of three dimensions for a
    /// batch of one on a CPU.
    pub fn over_time(&self, x: &Tensor) -> Tensor {
        let (shape, size) = (x.size(), self.weight.size());
        let (frames, c) = (shape[1], shape[2]);
        let x = if size[2] == 1 {
            x.shallow_clone()
        } else {
            let padded = x.constant_pad_nd([0, 0, 0, 0, 0, 0, 1, 1]);
            Tensor::cat(&[0, 1, 2].map(|at| padded.narrow(1, at, frames)), 2)
        };
        let weight = self.weight.transpose(1, 2).reshape([size[0], size[2] * c, size[3], size[4]]);
        let y = self.convolve(&x.reshape([-1, size[2] * c, shape[3], shape[4]]), &weight);
        let side = y.size();
        y.reshape([shape[0], frames, size[0], side[2], side[3]])
    }

    fn convolve(&self, x: &Tensor, weight: &Tensor) -> Tensor {
        let size = weight.size();
        let padding = [size[2] / 2, size[3] / 2];
        x.conv2d(weight, Some(&*self.bias), [self.stride; 2], padding, [1, 1], 1)
    }
}

/// Gated feed-forward: `fc2(GELU(fc11(x)) · fc12(x))`.
#[derive(Clone, Debug)]
pub struct Geglu {
    fc11: Linear,
    fc12: Linear,
    fc2: Linear,
}

impl Geglu {
    pub fn new(p: &nn::Path, inputs: i64, hidden: i64, outputs: i64) -> Self {
        Self {
            fc11: Linear::new(&(p / "fc11"), inputs, hidden),
            fc12: Linear::new(&(p / "fc12"), inputs, hidden),
            fc2: Linear::new(&(p / "fc2"), hidden, outputs),
        }
    }

    pub fn forward(&self, x: &Tensor) -> Tensor {
        self.fc2.forward(&(self.fc11.forward(x).gelu("none") * self.fc12.forward(x)))
    }
}

/// Two linear layers with GELU between.
#[derive(Clone, Debug)]
pub struct Mlp {
    fc1: Linear,
    fc2: Linear,
}

impl Mlp {
    pub fn new(p: &nn::Path, features: i64, hidden: i64) -> Self {
        Self { fc1: Linear::new(&(p / "fc1"), features, hidden), fc2: Linear::new(&(p / "fc2"), hidden, features) }
    }

    pub fn forward(&self, x: &Tensor) -> Tensor {
        self.fc2.forward(&self.fc1.forward(x).gelu("none"))
    }
}

/// Random numbers of one forward pass on a CPU: the n-th draw is a function of (seed, n), whatever else runs. Other devices
/// draw from their own generator.
pub struct Draws {
    seed: Option<u64>,
    count: Cell<u64>,
}

impl Draws {
    /// Without a seed nothing is dropped.
    pub fn new(seed: Option<u64>) -> Self {
        Self { seed, count: Cell::new(0) }
    }

    /// Uniform in [0, 1): SplitMix64 of seed and number.
    fn next(&self, seed: u64) -> f64 {
        self.count.set(self.count.get() + 1);
        let mut z = seed.wrapping_add(self.count.get().wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Factors `[B, 1, 1, 1, 1]` that drop a residual branch of whole samples with probability `rate` and keep its
    /// mean; `None` drops nothing. Taken before the branch runs, so that one that is recomputed meets the same factors.
    pub fn drop_path(&self, rate: f64, batch: i64, device: Device) -> Option<Shared> {
        let seed = self.seed.filter(|_| rate > 0.0)?;
        let kept = (1.0 / (1.0 - rate)) as f32;
        if device != Device::Cpu {
            // The device's own generator: a recorded step draws anew each time it runs, and nothing is copied.
            let uniform = Tensor::rand([batch, 1, 1, 1, 1], (Kind::Float, device));
            return Some(Shared(uniform.ge(rate).to_kind(Kind::Float) * f64::from(kept)));
        }
        let factors: Vec<f32> = (0..batch).map(|_| if self.next(seed) < rate { 0.0 } else { kept }).collect();
        Some(Shared(Tensor::from_slice(&factors).reshape([batch, 1, 1, 1, 1]).to_device(device)))
    }
}

/// `part(inputs)`, recomputed during backward where `checkpoint` says so.
pub fn maybe_recompute<F>(checkpoint: bool, inputs: &[&Tensor], part: F) -> Tensor
where
    F: Fn(&[Tensor]) -> Tensor + Send + 'static,
{
    if !checkpoint {
        let inputs: Vec<Tensor> = inputs.iter().map(|x| x.shallow_clone()).collect();
        return part(&inputs);
    }
    match torch::recompute(inputs, part) {
        Ok(y) => y,
        // As tch's own operations do; the step turns it into its error.
        Err(error) => panic!("{error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn over_time_is_a_convolution_of_three_dimensions() {
        let vs = nn::VarStore::new(Device::Cpu);
        let x = Tensor::randn([2, 4, 5, 6, 8], (Kind::Float, Device::Cpu));
        for (name, frames, stride) in [("a", 3, 1), ("b", 3, 2), ("c", 1, 1)] {
            let conv = Conv::new(&(vs.root() / name), 5, 7, &[frames, 3, 3], 1.0);
            let conv = if stride == 2 { conv.halving() } else { conv };
            let weights = (&*conv.weight, Some(&*conv.bias));
            let padding = [frames / 2, 1, 1];
            let right = x.transpose(1, 2).conv3d(weights.0, weights.1, [1, stride, stride], padding, [1, 1, 1], 1);
            let y = conv.over_time(&x).transpose(1, 2);
            assert_eq!(y.size(), right.size());
            assert!((y - right).abs().max().double_value(&[]) < 1e-5, "{name}");
        }
    }

    #[test]
    fn drop_path_keeps_the_mean_and_repeats_with_its_seed() {
        let draw = |seed: u64| Draws::new(Some(seed)).drop_path(0.25, 4000, Device::Cpu).unwrap();
        let mean = draw(1).mean(Kind::Float).double_value(&[]);
        assert!((mean - 1.0).abs() < 0.05, "{mean}");
        assert!(*draw(1) == *draw(1) && *draw(1) != *draw(2));
        assert!(Draws::new(None).drop_path(0.25, 4, Device::Cpu).is_none());
    }
}
