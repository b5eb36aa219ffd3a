//! Building blocks. Names are those of the YOLO package's `state_dict`.

use crate::task::norm::{BatchNorm, BatchNormConfig};
use tch::{Tensor, nn};

/// Batch normalisation of every convolution. Source: TASKS 2.2, as the published models have it.
const NORM: BatchNormConfig = BatchNormConfig { eps: 1e-3, momentum: 0.03, affine: true };
/// Window of the pooling in [`Sppf`].
const POOL: i64 = 5;

/// Uniform in `±1/√fan_in`, as PyTorch begins a convolution `[outputs, inputs, k, k]`.
fn weight(vs: &nn::Path, inputs: i64, outputs: i64, kernel: i64) -> Tensor {
    let bound = 1.0 / ((inputs * kernel * kernel).max(1) as f64).sqrt();
    vs.var("weight", &[outputs, inputs, kernel, kernel], nn::Init::Uniform { lo: -bound, up: bound })
}

/// Convolution without bias, batch normalisation, SiLU: `conv.weight`, `bn.*`.
pub struct Conv {
    weight: Tensor,
    norm: BatchNorm,
    stride: i64,
    padding: i64,
}

impl Conv {
    pub fn new(vs: &nn::Path, inputs: i64, outputs: i64, kernel: i64, stride: i64) -> Self {
        let weight = weight(&(vs / "conv"), inputs, outputs, kernel);
        Self { weight, norm: BatchNorm::new(&(vs / "bn"), outputs, NORM), stride, padding: kernel / 2 }
    }

    pub fn forward(&self, x: &Tensor, train: bool) -> Tensor {
        let (stride, padding) = ([self.stride; 2], [self.padding; 2]);
        let y = x.conv2d(&self.weight, None::<&Tensor>, stride, padding, [1, 1], 1);
        // In place where no backward pass needs the input: batch normalisation keeps its own.
        if train { self.norm.forward(&y, true).silu() } else { self.norm.forward(&y, false).silu_() }
    }
}

/// A 1×1 convolution with bias and nothing behind it: `weight`, `bias`.
pub struct Last {
    weight: Tensor,
    bias: Tensor,
}

impl Last {
    /// Every bias begins at `bias`.
    pub fn new(vs: &nn::Path, inputs: i64, outputs: i64, bias: f64) -> Self {
        let weight = weight(vs, inputs, outputs, 1);
        Self { weight, bias: vs.var("bias", &[outputs], nn::Init::Const(bias)) }
    }

    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.conv2d(&self.weight, Some(&self.bias), [1, 1], [0, 0], [1, 1], 1)
    }
}

/// Two 3×3 convolutions, added to the input where `shortcut` says so.
struct Bottleneck {
    first: Conv,
    second: Conv,
    shortcut: bool,
}

impl Bottleneck {
    fn new(vs: &nn::Path, channels: i64, shortcut: bool) -> Self {
        let conv = |name: &str| Conv::new(&(vs / name), channels, channels, 3, 1);
        Self { first: conv("cv1"), second: conv("cv2"), shortcut }
    }

    fn forward(&self, x: &Tensor, train: bool) -> Tensor {
        let y = self.second.forward(&self.first.forward(x, train), train);
        if self.shortcut { x + y } else { y }
    }
}

/// A 1×1 convolution whose halves are joined with the output of a chain of bottlenecks: `cv1`, `cv2`, `m.I`.
pub struct C2f {
    enter: Conv,
    leave: Conv,
    chain: Vec<Bottleneck>,
}

impl C2f {
    pub fn new(vs: &nn::Path, inputs: i64, outputs: i64, blocks: usize, shortcut: bool) -> Self {
        let half = outputs / 2;
        let inner = vs / "m";
        Self {
            enter: Conv::new(&(vs / "cv1"), inputs, 2 * half, 1, 1),
            leave: Conv::new(&(vs / "cv2"), (2 + blocks as i64) * half, outputs, 1, 1),
            chain: (0..blocks).map(|block| Bottleneck::new(&(&inner / block), half, shortcut)).collect(),
        }
    }

    pub fn forward(&self, x: &Tensor, train: bool) -> Tensor {
        let mut parts = self.enter.forward(x, train).chunk(2, 1);
        for block in &self.chain {
            if let Some(last) = parts.last() {
                parts.push(block.forward(last, train));
            }
        }
        self.leave.forward(&Tensor::cat(&parts, 1), train)
    }
}

/// Pooling over growing windows: a 1×1 convolution, three poolings one behind the other, a 1×1 convolution over all four.
pub struct Sppf {
    enter: Conv,
    leave: Conv,
}

impl Sppf {
    pub fn new(vs: &nn::Path, channels: i64) -> Self {
        let half = channels / 2;
        Self {
            enter: Conv::new(&(vs / "cv1"), channels, half, 1, 1),
            leave: Conv::new(&(vs / "cv2"), 4 * half, channels, 1, 1),
        }
    }

    pub fn forward(&self, x: &Tensor, train: bool) -> Tensor {
        let pooled = |x: &Tensor| x.max_pool2d([POOL; 2], [1, 1], [POOL / 2; 2], [1, 1], false);
        let first = self.enter.forward(x, train);
        let second = pooled(&first);
        let third = pooled(&second);
        let fourth = pooled(&third);
        self.leave.forward(&Tensor::cat(&[first, second, third, fourth], 1), train)
    }
}
