//! Small layers whose clones share their parameters, so that a recomputed part can hold its own.

use crate::torch;
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
        let init = nn::Init::Randn { mean: 0.0, stdev: 0.2 / (inputs as f64).sqrt() };
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

/// Convolution with stride 1 (or `stride`) that keeps the size: padding (k-1)/2 in every dimension.
#[derive(Clone, Debug)]
pub struct Conv {
    pub weight: Shared,
    pub bias: Shared,
    stride: Vec<i64>,
}

impl Conv {
    /// `kernel` has two or three numbers. Uniform in ±`gain`/√fan_in; with gain 1 what PyTorch does.
    pub fn new(p: &nn::Path, inputs: i64, outputs: i64, kernel: &[i64], gain: f64) -> Self {
        let bound = gain / ((inputs * kernel.iter().product::<i64>()) as f64).sqrt();
        let init = if gain > 0.0 { nn::Init::Uniform { lo: -bound, up: bound } } else { nn::Init::Const(0.0) };
        let shape = [&[outputs, inputs], kernel].concat();
        Self {
            weight: Shared(p.var("weight", &shape, init)),
            bias: Shared(p.var("bias", &[outputs], init)),
            stride: vec![1; kernel.len()],
        }
    }

    pub fn with_stride(mut self, stride: &[i64]) -> Self {
        self.stride = stride.to_vec();
        self
    }

    /// `[N, C, H, W]`, or `[N, C, T, H, W]` for three-dimensional kernels.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let size = self.weight.size();
        let padding: Vec<i64> = size[2..].iter().map(|k| k / 2).collect();
        let one = vec![1; padding.len()];
        if padding.len() == 3 {
            x.conv3d(&self.weight, Some(&*self.bias), &self.stride, &padding, &one, 1)
        } else {
            x.conv2d(&self.weight, Some(&*self.bias), &self.stride, &padding, &one, 1)
        }
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

/// Factors `[B, 1, 1, 1, 1]` that drop a residual branch of whole samples with probability `rate` and keep its mean;
/// absent: nothing is dropped. Drawn from torch's CPU generator, once per call and before the branch runs, so that a
/// branch that is recomputed meets the same factors.
pub fn drop_path(rate: f64, batch: i64, train: bool, device: Device) -> Option<Shared> {
    if !train || rate <= 0.0 {
        return None;
    }
    let keep = 1.0 - rate;
    let draws = Tensor::rand([batch, 1, 1, 1, 1], (Kind::Float, Device::Cpu));
    Some(Shared(((draws + keep).floor() / keep).to_device(device)))
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
