//! Initial weights, distributed as PyTorch's defaults.

use tch::{Tensor, nn};

/// Uniform in `±1/√fan_in`: what kaiming-uniform with a = √5 comes to for weights of `nn.Linear` and `nn.Conv*d`, and
/// what PyTorch uses for their biases. With the hidden size as `fan_in`: the weights of `nn.LSTM`.
pub fn uniform(vs: &nn::Path, name: &str, shape: &[i64], fan_in: i64) -> Tensor {
    let bound = 1.0 / (fan_in.max(1) as f64).sqrt();
    vs.var(name, shape, nn::Init::Uniform { lo: -bound, up: bound })
}
