//! AdamW, Adam and SGD over the flat parameters, one fused kernel call per step.
//!
//! The arithmetic is PyTorch's (`torch.optim` with `fused=True`). A parameter without gradient in a step counts as one
//! with gradient zero: its moments decay, and weight decay acts on it.

use super::ddp::{Ddp, DdpError, Layout};
use crate::torch::{self, AdamState, AdamStep, SgdStep, device};
use tch::{Kind, Tensor};

/// Which rule, with the numbers that do not change from step to step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// Decoupled weight decay. Loshchilov and Hutter, 2019.
    AdamW { betas: [f64; 2], eps: f64, weight_decay: f64 },
    /// Weight decay is added to the gradient. Kingma and Ba, 2015.
    Adam { betas: [f64; 2], eps: f64, weight_decay: f64 },
    /// Without dampening.
    Sgd { momentum: f64, nesterov: bool, weight_decay: f64 },
}

impl Rule {
    /// Names of the tensors that are kept for each parameter, as in PyTorch's state.
    fn kept(&self) -> &'static [&'static str] {
        match self {
            Rule::AdamW { .. } | Rule::Adam { .. } => &["exp_avg", "exp_avg_sq"],
            Rule::Sgd { momentum: 0.0, .. } => &[],
            Rule::Sgd { .. } => &["momentum_buffer"],
        }
    }
}

/// Optimizer state in the places of the flat parameters.
pub struct Optimizer {
    rule: Rule,
    /// One flat tensor per name of [`Rule::kept`].
    kept: Vec<Tensor>,
    /// Steps taken, a f32 scalar.
    steps: Tensor,
    layout: Layout,
    version: u64,
}

impl Optimizer {
    /// State of zeros for all parameters of `ddp`.
    ///
    /// # Errors
    /// No memory.
    pub fn new(rule: Rule, ddp: &Ddp) -> Result<Optimizer, DdpError> {
        let kept = rule.kept().iter().map(|_| ddp.params().f_zeros_like()).collect::<Result<_, _>>()?;
        let steps = Tensor::f_zeros([], (Kind::Float, ddp.params().device()))?;
        Ok(Optimizer { rule, kept, steps, layout: ddp.layout().clone(), version: ddp.layout_version() })
    }

    /// Changes the parameters by the gradients that [`Ddp::finish`] left.
    ///
    /// # Errors
    /// libtorch refuses.
    pub fn step(&mut self, ddp: &Ddp, lr: f64) -> Result<(), DdpError> {
        self.follow(ddp)?;
        let _no_grad = tch::no_grad_guard();
        let first = self.steps_taken()? == 0;
        let (params, grads) = ([ddp.params().shallow_clone()], [ddp.grads()?]);
        let _ = self.steps.f_add_scalar_(1.0)?;
        match self.rule {
            Rule::AdamW { betas, eps, weight_decay } | Rule::Adam { betas, eps, weight_decay } => {
                let decoupled = matches!(self.rule, Rule::AdamW { .. });
                let steps = [self.steps.shallow_clone()];
                let (exp_avgs, exp_avg_sqs) = self.kept.split_at(1);
                let state = AdamState { params: &params, grads: &grads, exp_avgs, exp_avg_sqs, steps: &steps };
                let step = AdamStep { decoupled, lr, beta1: betas[0], beta2: betas[1], eps, weight_decay };
                torch::fused_adam(&state, &step)?;
            }
            Rule::Sgd { momentum, nesterov, weight_decay } => {
                let step = SgdStep { lr, momentum, weight_decay, nesterov, first };
                torch::fused_sgd(&params, &grads, &self.kept, &step)?;
            }
        }
        Ok(())
    }

    /// As [`Optimizer::step`] with the rate in `lr` (f32 scalar), for gradients of which the device knows whether they
    /// are any good: where `found` (f32 `[1]`) holds 1 nothing changes, the count of steps included. The host reads nothing.
    ///
    /// # Errors
    /// libtorch refuses.
    pub fn step_unless(&mut self, ddp: &Ddp, lr: &Tensor, found: &Tensor) -> Result<(), DdpError> {
        self.follow(ddp)?;
        let _no_grad = tch::no_grad_guard();
        let (params, grads) = ([ddp.params().shallow_clone()], [ddp.grads()?]);
        let _ = self.steps.f_add_scalar_(1.0)?;
        match self.rule {
            Rule::AdamW { betas, eps, weight_decay } | Rule::Adam { betas, eps, weight_decay } => {
                let decoupled = matches!(self.rule, Rule::AdamW { .. });
                let steps = [self.steps.shallow_clone()];
                let (exp_avgs, exp_avg_sqs) = self.kept.split_at(1);
                let state = AdamState { params: &params, grads: &grads, exp_avgs, exp_avg_sqs, steps: &steps };
                let step = AdamStep { decoupled, lr: 0.0, beta1: betas[0], beta2: betas[1], eps, weight_decay };
                device::fused_adam_unless(&state, &step, lr, found)?;
            }
            Rule::Sgd { momentum, nesterov, weight_decay } => {
                // Buffers of zeros make the first step by themselves: there is no dampening.
                let step = SgdStep { lr: 0.0, momentum, weight_decay, nesterov, first: false };
                device::fused_sgd_unless(&params, &grads, &self.kept, &step, lr, found)?;
            }
        }
        let _ = self.steps.f_sub_(&found.f_squeeze()?)?;
        Ok(())
    }

    /// Tensors of the parameters' size that are kept.
    pub fn moments(&self) -> usize {
        self.kept.len()
    }

    /// Steps taken so far.
    ///
    /// # Errors
    /// libtorch refuses.
    pub fn steps_taken(&self) -> Result<u64, DdpError> {
        Ok(self.steps.f_double_value(&[])? as u64)
    }

    /// State as tensors of one parameter each, such as `exp_avg.encoder.weight`, and `step`: independent of buckets and
    /// world size. They are views, to be copied before the next step.
    ///
    /// # Errors
    /// libtorch refuses.
    pub fn export(&mut self, ddp: &Ddp) -> Result<Vec<(String, Tensor)>, DdpError> {
        self.follow(ddp)?;
        let mut all = vec![("step".to_owned(), self.steps.shallow_clone())];
        for (kind, flat) in self.rule.kept().iter().zip(&self.kept) {
            for (index, name) in ddp.names().iter().enumerate() {
                all.push((format!("{kind}.{name}"), self.layout.view(flat, index)?));
            }
        }
        Ok(all)
    }

    /// Takes over what [`Optimizer::export`] gave; the order does not matter.
    ///
    /// # Errors
    /// A tensor is missing or has another shape: the state is of another model or optimizer. Nothing is changed then.
    pub fn import(&mut self, ddp: &Ddp, tensors: &[(String, Tensor)]) -> Result<(), DdpError> {
        self.follow(ddp)?;
        let find = |name: &str, shape: &[i64]| {
            let (_, tensor) = tensors.iter().find(|(key, _)| key == name).ok_or_else(|| {
                let problem = "is missing: the state is of another model or optimizer".to_owned();
                DdpError::Parameter { name: name.to_owned(), problem }
            })?;
            if tensor.size() != shape {
                let problem = format!("has shape {:?}, expected {shape:?}", tensor.size());
                return Err(DdpError::Parameter { name: name.to_owned(), problem });
            }
            Ok(tensor)
        };
        let _no_grad = tch::no_grad_guard();
        let mut copies = vec![(self.steps.shallow_clone(), find("step", &[])?)];
        for (kind, flat) in self.rule.kept().iter().zip(&self.kept) {
            for (index, name) in ddp.names().iter().enumerate() {
                let place = self.layout.view(flat, index)?;
                let source = find(&format!("{kind}.{name}"), &place.size())?;
                copies.push((place, source));
            }
        }
        copies.into_iter().try_for_each(|(mut place, source)| place.f_copy_(source).map(|_| ()))?;
        Ok(())
    }

    /// Moves the state when buckets were rebuilt.
    fn follow(&mut self, ddp: &Ddp) -> Result<(), DdpError> {
        if self.version == ddp.layout_version() {
            return Ok(());
        }
        for flat in &self.kept {
            ddp.layout().refill(&mut flat.shallow_clone(), &self.layout)?;
        }
        (self.layout, self.version) = (ddp.layout().clone(), ddp.layout_version());
        Ok(())
    }
}

/// Scales all gradients so that their global two-norm is at most `max_norm`, as `torch.nn.utils.clip_grad_norm_`:
/// by `min(1, max_norm / (norm + 1e-6))`. Returns the norm before; 0 or less for `max_norm` only measures.
///
/// # Errors
/// libtorch refuses.
pub fn clip_grad_norm(ddp: &Ddp, max_norm: f64) -> Result<f64, DdpError> {
    let _no_grad = tch::no_grad_guard();
    let mut flat = ddp.grads()?;
    // One tensor per parameter in registered order: the same norm whatever the buckets.
    let parts = (0..ddp.names().len()).map(|index| ddp.layout().view(&flat, index)).collect::<Result<Vec<_>, _>>()?;
    let norm = torch::total_norm(&parts)?;
    let value = norm.f_double_value(&[])?;
    if max_norm > 0.0 {
        let scale = norm.f_add_scalar(1e-6)?.f_reciprocal()?.f_mul_scalar(max_norm)?.f_clamp_max(1.0)?;
        let _ = flat.f_mul_(&scale)?;
    }
    Ok(value)
}

#[cfg(test)]
mod tests;
