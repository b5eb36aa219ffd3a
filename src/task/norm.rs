//! Batch normalisation, over one rank's samples or over those of all ranks.
//!
//! Ioffe and Szegedy, 2015. Names, defaults and arithmetic are those of `torch.nn.BatchNorm*d`; with `train.sync_batchnorm`
//! statistics and gradients are those of the samples that all ranks pass at the same time, as with
//! `torch.nn.SyncBatchNorm`. The trainer decides: a model only builds [`BatchNorm`].

use crate::torch::with_backward;
use std::cell::RefCell;
use std::sync::Arc;
use tch::{Kind, Tensor, nn, no_grad};

/// The other ranks, for layers that take statistics over all of them.
pub trait Peers: Send + Sync {
    /// Adds `tensor` (f64, contiguous) over all ranks, in place. After a failure, which the trainer reports, it does nothing.
    fn sum(&self, tensor: &Tensor);
}

thread_local! {
    static PEERS: RefCell<Option<Arc<dyn Peers>>> = const { RefCell::new(None) };
}

/// Layers that run on this thread take their statistics over these ranks until it is dropped.
pub struct Together {
    before: Option<Arc<dyn Peers>>,
}

impl Together {
    /// `None`: over this rank's samples alone.
    pub fn with(peers: Option<Arc<dyn Peers>>) -> Self {
        Self { before: PEERS.with(|place| place.replace(peers)) }
    }
}

impl Drop for Together {
    fn drop(&mut self) {
        PEERS.with(|place| place.replace(self.before.take()));
    }
}

/// Numbers of a [`BatchNorm`]; the defaults are PyTorch's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BatchNormConfig {
    /// Term that keeps the division finite.
    pub eps: f64,
    /// Weight of a batch in the running statistics.
    pub momentum: f64,
    /// Learn a factor and a shift per channel.
    pub affine: bool,
}

impl Default for BatchNormConfig {
    fn default() -> Self {
        Self { eps: 1e-5, momentum: 0.1, affine: true }
    }
}

/// `torch.nn.BatchNorm1d`, `2d` and `3d` in one: input `[B, C]` or `[B, C, ...]`.
///
/// Buffers: `running_mean`, `running_var` (f32 `[C]`), `num_batches_tracked` (i64 scalar). Not for use inside
/// [`crate::torch::recompute`], which would count a batch twice.
pub struct BatchNorm {
    weight: Option<Tensor>,
    bias: Option<Tensor>,
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor,
    config: BatchNormConfig,
}

impl BatchNorm {
    pub fn new(vs: &nn::Path, channels: i64, config: BatchNormConfig) -> Self {
        let batches = Tensor::zeros([], (Kind::Int64, vs.device()));
        Self {
            weight: config.affine.then(|| vs.ones("weight", &[channels])),
            bias: config.affine.then(|| vs.zeros("bias", &[channels])),
            running_mean: vs.zeros_no_train("running_mean", &[channels]),
            running_var: vs.ones_no_train("running_var", &[channels]),
            batches: vs.add("num_batches_tracked", batches, false),
            config,
        }
    }

    /// Normalises `x`. `train`: by the statistics of the batch, which the running ones take in; else by the running ones.
    pub fn forward(&self, x: &Tensor, train: bool) -> Tensor {
        if !train {
            return self.normalised(x, &self.running_mean, &self.running_var);
        }
        let _ = self.batches.shallow_clone().g_add_scalar_(1);
        match PEERS.with(|place| place.borrow().clone()) {
            Some(peers) => self.over_all(x, peers),
            None => self.over_own(x),
        }
    }

    /// By given statistics.
    fn normalised(&self, x: &Tensor, mean: &Tensor, var: &Tensor) -> Tensor {
        let (weight, bias) = (self.weight.as_ref(), self.bias.as_ref());
        x.batch_norm(weight, bias, Some(mean), Some(var), false, 0.0, self.config.eps, true)
    }

    fn over_own(&self, x: &Tensor) -> Tensor {
        let BatchNormConfig { eps, momentum, .. } = self.config;
        let (weight, bias) = (self.weight.as_ref(), self.bias.as_ref());
        let single = x.numel() as i64 == self.running_mean.size()[0];
        // One value per channel has no variance: PyTorch's formula for the running one would divide by zero.
        let var = if single { self.running_var.copy() } else { self.running_var.shallow_clone() };
        x.batch_norm(weight, bias, Some(&self.running_mean), Some(&var), true, momentum, eps, true)
    }

    /// With one sum over the ranks in forward and one in backward.
    fn over_all(&self, x: &Tensor, peers: Arc<dyn Peers>) -> Tensor {
        let ones = || Tensor::ones_like(&self.running_mean);
        let weight = self.weight.as_ref().map_or_else(ones, Tensor::shallow_clone);
        let bias = self.bias.as_ref().map_or_else(|| ones() * 0.0, Tensor::shallow_clone);
        let (statistics, result) = no_grad(|| {
            let statistics = Statistics::of(x, &*peers);
            self.take_in(&statistics);
            let (mean, var) = (Some(&statistics.mean), Some(&statistics.var));
            let result = x.batch_norm(Some(&weight), Some(&bias), mean, var, false, 0.0, self.config.eps, true);
            (statistics, result)
        });
        let saved = Saved { x: x.detach(), weight: weight.detach(), statistics, eps: self.config.eps, peers };
        match with_backward(&[x, &weight, &bias], &result, move |grad| saved.backward(grad)) {
            Ok(result) => result,
            // As every operator of tch does that libtorch refuses.
            Err(error) => panic!("{error}"),
        }
    }

    /// Brings the statistics of a batch into the running ones.
    fn take_in(&self, batch: &Statistics) {
        let BatchNormConfig { momentum, .. } = self.config;
        let _ = self.running_mean.shallow_clone().lerp_(&batch.mean, momentum);
        // The unbiased estimate. One value per channel has none: the running variance stays.
        let unbiased = &batch.var * (&batch.count / (&batch.count - 1.0)).to_kind(Kind::Float);
        let unbiased = unbiased.where_self(&batch.count.gt(1.0), &self.running_var);
        let _ = self.running_var.shallow_clone().lerp_(&unbiased, momentum);
    }
}

/// Statistics of the samples of all ranks.
struct Statistics {
    /// f32 `[C]`.
    mean: Tensor,
    /// f32 `[C]`, of the values themselves (divided by their number).
    var: Tensor,
    /// Values per channel, f64 `[1]`.
    count: Tensor,
}

impl Statistics {
    /// Every rank's sums about its own mean, put together in f64: no digits are lost where the mean is large.
    fn of(x: &Tensor, peers: &dyn Peers) -> Self {
        let channels = x.size()[1];
        let count = (x.numel() as i64 / channels.max(1)) as f64;
        let (var, mean) = x.to_kind(Kind::Float).var_mean_correction(over(x).as_slice(), 0, false);
        let (var, mean) = (var.to_kind(Kind::Double), mean.to_kind(Kind::Double));
        let number = Tensor::full([1], count, (Kind::Double, x.device()));
        let sums = Tensor::cat(&[&mean * count, (&var + mean.square()) * count, number], 0);
        peers.sum(&sums);
        let (first, second, count) =
            (sums.narrow(0, 0, channels), sums.narrow(0, channels, channels), sums.narrow(0, 2 * channels, 1));
        let mean = first / &count;
        let var = (second / &count - mean.square()).clamp_min(0.0);
        Self { mean: mean.to_kind(Kind::Float), var: var.to_kind(Kind::Float), count }
    }
}

/// What the backward pass needs.
struct Saved {
    x: Tensor,
    weight: Tensor,
    statistics: Statistics,
    eps: f64,
    peers: Arc<dyn Peers>,
}

impl Saved {
    /// Gradients of input, weight and bias. The statistics depend on all samples, so the gradient of the input has the
    /// ranks' sums of the other two in it; those two themselves are this rank's part, as all gradients are.
    fn backward(&self, grad: &Tensor) -> Vec<Option<Tensor>> {
        let Self { x, weight, statistics: Statistics { mean, var, count }, eps, peers } = self;
        let (channels, dims) = (mean.size()[0], over(x));
        let wide = |row: &Tensor| row.view(shape(x, channels).as_slice());
        let sum = |tensor: &Tensor| tensor.sum_dim_intlist(dims.as_slice(), false, Kind::Float);
        let inverse = (var + *eps).rsqrt();
        let grad = grad.to_kind(Kind::Float);
        let mut centred = x.to_kind(Kind::Float) - wide(mean);
        let (dw, db) = (sum(&(&grad * &centred)) * &inverse, sum(&grad));
        let sums = Tensor::cat(&[dw.to_kind(Kind::Double), db.to_kind(Kind::Double)], 0);
        peers.sum(&sums);
        let means = (sums / count).to_kind(Kind::Float);
        let (of_product, of_grad) = (means.narrow(0, 0, channels), means.narrow(0, channels, channels));
        // weight / sigma * (grad - mean(grad) - x^ * mean(grad * x^)), in place.
        let _ = centred.g_mul_(&wide(&(of_product * &inverse))).neg_().g_add_(&(grad - wide(&of_grad)));
        let _ = centred.g_mul_(&wide(&(weight * &inverse)));
        vec![Some(centred.to_kind(x.kind())), Some(dw), Some(db)]
    }
}

/// All dimensions but that of the channels.
fn over(x: &Tensor) -> Vec<i64> {
    (0..x.dim() as i64).filter(|dim| *dim != 1).collect()
}

/// `[1, C, 1, ...]`.
fn shape(x: &Tensor, channels: i64) -> Vec<i64> {
    (0..x.dim()).map(|dim| if dim == 1 { channels } else { 1 }).collect()
}

#[cfg(test)]
#[path = "norm_tests.rs"]
mod tests;
