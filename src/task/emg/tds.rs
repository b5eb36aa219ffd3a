//! The encoder: strided convolutions and time-depth separable (TDS) blocks over `[B, T, features]`.
//!
//! Features are `channels × width`, channel-major, as PyTorch's `view [B, channels, width, T]` has them. Tensors stay
//! channels-last, so that LayerNorm and the linear layers copy nothing. Convolutions keep their length (zeros on both
//! sides, `(k-1)/2` on the left), so any window passes through any kernel and frame `i` stays over sample `i × stride`.

use super::init;
use spec::task::emg::TdsStage;
use tch::{Device, IndexOp, Kind, Tensor, nn};

const LAYER_NORM_EPS: f64 = 1e-5;

/// All stages, one after the other.
pub struct Encoder {
    stages: Vec<Stage>,
    features: i64,
}

impl Encoder {
    pub fn new(vs: &nn::Path, inputs: usize, stages: &[TdsStage], dropout: f64) -> Self {
        let root = vs / "stages";
        let mut features = inputs as i64;
        let build = |(index, config): (usize, &TdsStage)| {
            let stage = Stage::new(&(&root / index), features, config, dropout);
            features = (config.channels * config.feature_width) as i64;
            stage
        };
        let stages = stages.iter().enumerate().map(build).collect();
        Self { stages, features }
    }

    /// Features of one frame.
    pub fn features(&self) -> i64 {
        self.features
    }

    /// Frames that a window of `window` samples yields.
    pub fn frames(&self, window: i64) -> i64 {
        self.stages.iter().fold(window, |t, stage| stage.frames(t))
    }

    /// `[B, T, inputs]` to `[B, N, features]`: the encoder's frames named by `wanted` (`[N]`, i64; `None` means all).
    /// Layers that act on single frames are computed for those frames alone.
    pub fn forward(&self, x: &Tensor, wanted: Option<&Tensor>, train: bool) -> Tensor {
        let last = self.stages.len().saturating_sub(1);
        let mut x = x.shallow_clone();
        for (index, stage) in self.stages.iter().enumerate() {
            x = stage.forward(&x, wanted.filter(|_| index == last), train);
        }
        x
    }
}

/// Conv1d without bias, LayerNorm, ReLU, dropout, then pairs of TDS and FC blocks.
struct Stage {
    /// `[features, inputs, k]`.
    conv: Tensor,
    norm: Norm,
    stride: i64,
    dropout: f64,
    blocks: Vec<(TdsConv, FcBlock)>,
}

impl Stage {
    fn new(vs: &nn::Path, inputs: i64, config: &TdsStage, dropout: f64) -> Self {
        let features = (config.channels * config.feature_width) as i64;
        let kernel = config.in_conv_kernel as i64;
        let block = |index| {
            let vs = vs / "blocks" / index;
            (TdsConv::new(&(&vs / "tds"), config), FcBlock::new(&(&vs / "fc"), features))
        };
        Self {
            conv: init::uniform(&(vs / "conv"), "weight", &[features, inputs, kernel], inputs * kernel),
            norm: Norm::new(&(vs / "norm"), features),
            stride: config.in_conv_stride.max(1) as i64,
            dropout,
            blocks: (0..config.num_blocks).map(block).collect(),
        }
    }

    fn kernel(&self) -> i64 {
        self.conv.size()[2]
    }

    fn frames(&self, t: i64) -> i64 {
        (t + 2 * (self.kernel() / 2) - self.kernel()) / self.stride + 1
    }

    /// The strided convolution as one matrix product: tiles of `stride` frames, each with those that follow until the
    /// kernel is covered. Backward through it is about twice as fast as through a direct convolution.
    fn convolve(&self, x: &Tensor) -> Tensor {
        if x.device().is_cuda() {
            return self.convolve_directly(x);
        }
        let [b, t, inputs] = [x.size()[0], x.size()[1], x.size()[2]];
        let (kernel, tile, frames) = (self.kernel(), self.stride, self.frames(t));
        let shifts = (kernel + tile - 1) / tile;
        let left = kernel / 2;
        let padded = x.constant_pad_nd([0, 0, left, (frames + shifts - 1) * tile - t - left]);
        let rows = shifted(&padded.view([b, frames + shifts - 1, tile * inputs]), frames, shifts);
        let weight = self.conv.permute([2, 1, 0]).constant_pad_nd([0, 0, 0, 0, 0, shifts * tile - kernel]);
        let outputs = self.conv.size()[0];
        rows.matmul(&weight.reshape([shifts * tile * inputs, outputs]))
    }

    /// [`Stage::convolve`] by cuDNN: channels stay last, so that nothing is copied.
    fn convolve_directly(&self, x: &Tensor) -> Tensor {
        let x = x.transpose(1, 2).unsqueeze(2);
        let bias = None::<&Tensor>;
        let y = x.conv2d(&self.conv.unsqueeze(2), bias, [1, self.stride], [0, self.kernel() / 2], [1, 1], 1);
        y.squeeze_dim(2).transpose(1, 2)
    }

    fn forward(&self, x: &Tensor, wanted: Option<&Tensor>, train: bool) -> Tensor {
        let y = self.norm.forward(&self.convolve(x));
        let mut x = dropout(&y.relu(), self.dropout, train);
        let last = self.blocks.len().saturating_sub(1);
        for (index, (tds, fc)) in self.blocks.iter().enumerate() {
            x = fc.forward(&tds.forward(&x, wanted.filter(|_| index == last)));
        }
        match wanted {
            Some(frames) if self.blocks.is_empty() => x.index_select(1, frames),
            _ => x,
        }
    }
}

/// Convolution over time within each group of `width` features, ReLU, residual, LayerNorm.
struct TdsConv {
    /// `[channels, channels, 1, k]`; k is the config's `kernel_width`, whatever the width of a group.
    weight: Tensor,
    bias: Tensor,
    norm: Norm,
    channels: i64,
    width: i64,
    toeplitz: Toeplitz,
}

impl TdsConv {
    fn new(vs: &nn::Path, config: &TdsStage) -> Self {
        let (channels, width, kernel) =
            (config.channels as i64, config.feature_width as i64, config.kernel_width as i64);
        let conv = vs / "conv";
        Self {
            weight: init::uniform(&conv, "weight", &[channels, channels, 1, kernel], channels * kernel),
            bias: init::uniform(&conv, "bias", &[channels], channels * kernel),
            norm: Norm::new(&(vs / "norm"), channels * width),
            channels,
            width,
            toeplitz: Toeplitz::new(kernel, vs.device()),
        }
    }

    fn forward(&self, x: &Tensor, wanted: Option<&Tensor>) -> Tensor {
        let y = self.convolve(x).relu();
        let sum = match wanted {
            Some(frames) => y.index_select(1, frames) + x.index_select(1, frames),
            None => y + x,
        };
        self.norm.forward(&sum)
    }

    /// The convolution as one well-shaped matrix product: tiles of `p` frames, each with the two tiles that follow,
    /// times the banded matrix of the kernel. A direct convolution from 8 to 8 channels leaves most of a vector
    /// register idle.
    fn convolve(&self, x: &Tensor) -> Tensor {
        if x.device().is_cuda() {
            return self.convolve_directly(x);
        }
        let [b, t] = [x.size()[0], x.size()[1]];
        let (c, w, p) = (self.channels, self.width, self.toeplitz.tile);
        let tiles = (t + p - 1) / p;
        let left = self.toeplitz.left;
        let padded = x.constant_pad_nd([0, 0, left, (tiles + 2) * p - t - left]);
        let padded = padded.view([b, tiles + 2, p, c, w]).permute([0, 1, 4, 2, 3]).reshape([b, tiles + 2, w, p * c]);
        let rows = shifted(&padded, tiles, 3).view([b * tiles * w, 3 * p * c]);
        let y = self.bias.repeat([p]).addmm(&rows, &self.toeplitz.matrix(&self.weight));
        let y = y.view([b, tiles, w, p, c]).permute([0, 1, 3, 4, 2]).reshape([b, tiles * p, c * w]);
        if tiles * p == t { y } else { y.narrow(1, 0, t) }
    }
}

impl TdsConv {
    /// [`TdsConv::convolve`] by cuDNN.
    fn convolve_directly(&self, x: &Tensor) -> Tensor {
        let [b, t] = [x.size()[0], x.size()[1]];
        let (c, w, kernel) = (self.channels, self.width, self.toeplitz.kernel);
        let groups = x.view([b, t, c, w]).permute([0, 2, 3, 1]);
        // An even kernel has one frame more on its right.
        let groups = if kernel % 2 == 0 { groups.constant_pad_nd([0, 1]) } else { groups };
        let y = groups.conv2d(&self.weight, Some(&self.bias), [1, 1], [0, self.toeplitz.left], [1, 1], 1);
        y.permute([0, 3, 1, 2]).reshape([b, t, c * w])
    }
}

/// `[B, tiles, ..., N]`: each of the first `tiles` tiles of `x` `[B, tiles + count - 1, ..., N / count]` with the
/// `count - 1` that follow it, side by side.
fn shifted(x: &Tensor, tiles: i64, count: i64) -> Tensor {
    let parts: Vec<Tensor> = (0..count).map(|shift| x.narrow(1, shift, tiles)).collect();
    Tensor::cat(&parts, -1)
}

/// How a kernel of `k` taps becomes a banded matrix over tiles of `p = ceil((k-1)/2)` frames.
struct Toeplitz {
    kernel: i64,
    tile: i64,
    left: i64,
    /// `[3p × p]`: tap that joins an input frame to an output frame; `k` means no tap.
    taps: Tensor,
}

impl Toeplitz {
    fn new(kernel: i64, device: Device) -> Self {
        let tile = (kernel / 2).max(4);
        let tap = |input: i64, output: i64| match input - output {
            tap if (0..kernel).contains(&tap) => tap,
            _ => kernel,
        };
        let taps: Vec<i64> = (0..3 * tile).flat_map(|input| (0..tile).map(move |output| tap(input, output))).collect();
        Self { kernel, tile, left: (kernel - 1) / 2, taps: Tensor::from_slice(&taps).to_device(device) }
    }

    /// `[3p × c_in, p × c_out]` from the weight `[c_out, c_in, 1, k]`.
    fn matrix(&self, weight: &Tensor) -> Tensor {
        let [outputs, inputs] = [weight.size()[0], weight.size()[1]];
        let taps = weight.squeeze_dim(2).permute([2, 1, 0]).reshape([self.kernel, inputs * outputs]);
        taps.constant_pad_nd([0, 0, 0, 1])
            .index_select(0, &self.taps)
            .view([3 * self.tile, self.tile, inputs, outputs])
            .permute([0, 2, 1, 3])
            .reshape([3 * self.tile * inputs, self.tile * outputs])
    }
}

/// Linear, ReLU, Linear; residual; LayerNorm.
struct FcBlock {
    linear1: Linear,
    linear2: Linear,
    norm: Norm,
}

impl FcBlock {
    fn new(vs: &nn::Path, features: i64) -> Self {
        Self {
            linear1: Linear::new(&(vs / "linear1"), features, features),
            linear2: Linear::new(&(vs / "linear2"), features, features),
            norm: Norm::new(&(vs / "norm"), features),
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let hidden = self.linear1.forward(x).relu();
        self.norm.forward(&(self.linear2.forward(&hidden) + x))
    }
}

/// Weight `[outputs, inputs]` and bias, as `nn.Linear`.
pub(super) struct Linear {
    pub weight: Tensor,
    pub bias: Tensor,
}

impl Linear {
    pub fn new(vs: &nn::Path, inputs: i64, outputs: i64) -> Self {
        Self {
            weight: init::uniform(vs, "weight", &[outputs, inputs], inputs),
            bias: init::uniform(vs, "bias", &[outputs], inputs),
        }
    }

    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight, Some(&self.bias))
    }
}

/// LayerNorm over the last dimension.
struct Norm {
    weight: Tensor,
    bias: Tensor,
}

impl Norm {
    fn new(vs: &nn::Path, features: i64) -> Self {
        Self {
            weight: vs.var("weight", &[features], nn::Init::Const(1.0)),
            bias: vs.var("bias", &[features], nn::Init::Const(0.0)),
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        x.layer_norm(self.weight.size(), Some(&self.weight), Some(&self.bias), LAYER_NORM_EPS, false)
    }
}

/// Dropout. On a CPU, four 16-bit draws come out of one 64-bit random number: a quarter of the generator's work. The
/// probability is then the nearest multiple of 1/65536, and the scale its exact inverse.
pub(super) fn dropout(x: &Tensor, p: f64, train: bool) -> Tensor {
    let dropped = (p * 65536.0).round();
    if !train || dropped <= 0.0 {
        return x.shallow_clone();
    }
    if x.device() != Device::Cpu || dropped >= 65536.0 {
        return x.dropout(p, true);
    }
    let count = x.numel() as i64;
    let mut words = Tensor::empty([(count + 3) / 4], (Kind::Int64, Device::Cpu));
    let _ = words.random_from_(i64::MIN, None::<i64>);
    let draws = words.view_dtype(Kind::Int16).i(..count).view(x.size().as_slice());
    let mask = draws.ge((dropped - 32768.0) as i64).to_kind(Kind::Float) * (65536.0 / (65536.0 - dropped));
    (x * mask).to_kind(x.kind())
}
