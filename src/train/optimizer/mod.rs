//! AdamW, Adam, SGD and MuSGD over the flat parameters, one fused kernel call per step and group.
//!
//! The arithmetic is PyTorch's (`torch.optim` with `fused=True`). A parameter without gradient in a step counts as one
//! with gradient zero: its moments decay, and weight decay acts on it.
//!
//! Where ranks divide the state among themselves ([`Ddp::own_range`]), each keeps and updates its slice, and the updated
//! parameters are shared afterwards. The arithmetic of an element does not depend on who does it.

mod orthogonal;

use super::ddp::{Ddp, DdpError, Layout, Slot};
use crate::torch::{self, AdamState, AdamStep, SgdStep, device};
use orthogonal::{Along, Matrix, Rate};
use tch::{Device, Kind, Tensor};

/// Which rule, with the numbers that do not change from step to step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// Decoupled weight decay. Loshchilov and Hutter, 2019.
    AdamW { betas: [f64; 2], eps: f64, weight_decay: f64 },
    /// Weight decay is added to the gradient. Kingma and Ba, 2015.
    Adam { betas: [f64; 2], eps: f64, weight_decay: f64 },
    /// Without dampening.
    Sgd { momentum: f64, nesterov: bool, weight_decay: f64 },
    /// SGD, before which matrices and filters take a step along their orthogonalised average gradient.
    MuSgd { momentum: f64, nesterov: bool, weight_decay: f64 },
}

impl Rule {
    /// Names of the tensors that are kept for each parameter, as in PyTorch's state.
    fn kept(&self) -> &'static [&'static str] {
        match self {
            Rule::AdamW { .. } | Rule::Adam { .. } => &["exp_avg", "exp_avg_sq"],
            Rule::Sgd { momentum: 0.0, .. } => &[],
            Rule::Sgd { .. } => &["momentum_buffer"],
            Rule::MuSgd { .. } => &["momentum_buffer", "average_gradient"],
        }
    }

    /// `first`: nothing has been kept yet.
    fn numbers(&self, Numbers { lr, momentum: now }: &Numbers, first: bool) -> Step {
        let lr = *lr;
        match *self {
            Rule::AdamW { betas: [beta1, beta2], eps, weight_decay }
            | Rule::Adam { betas: [beta1, beta2], eps, weight_decay } => {
                let decoupled = matches!(self, Rule::AdamW { .. });
                Step::Adam(AdamStep { decoupled, lr, beta1, beta2, eps, weight_decay })
            }
            Rule::Sgd { momentum, nesterov, weight_decay } | Rule::MuSgd { momentum, nesterov, weight_decay } => {
                let momentum = if momentum == 0.0 { 0.0 } else { now.unwrap_or(momentum) };
                let nesterov = nesterov && momentum > 0.0;
                Step::Sgd(SgdStep { lr, momentum, weight_decay, nesterov, first })
            }
        }
    }
}

/// Numbers of one call.
enum Step {
    Adam(AdamStep),
    Sgd(SgdStep),
}

/// Numbers of one group that may change from step to step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Numbers {
    pub lr: f64,
    /// Takes the place of the rule's, which must not be 0.
    pub momentum: Option<f64>,
}

impl From<f64> for Numbers {
    fn from(lr: f64) -> Self {
        Self { lr, momentum: None }
    }
}

/// Optimizer state in the places of the flat parameters.
pub struct Optimizer {
    /// Settings of each group.
    rules: Vec<Rule>,
    /// One flat tensor per name of [`Rule::kept`].
    kept: Vec<Tensor>,
    /// Steps taken, a f32 scalar.
    steps: Tensor,
    layout: Layout,
    version: u64,
    /// Ranges of each group's parameters.
    parts: Vec<Part>,
}

/// Views of the parameters of a group: one per range of neighbours, all in one kernel call.
struct Part {
    params: Vec<Tensor>,
    grads: Vec<Tensor>,
    /// One list per name of [`Rule::kept`].
    kept: Vec<Vec<Tensor>>,
    /// Parameters that take an orthogonal step.
    matrices: Vec<Matrix>,
    /// The count of steps, once per range.
    steps: Vec<Tensor>,
}

impl Optimizer {
    /// State of zeros for all parameters of `ddp`, in one group.
    ///
    /// # Errors
    /// No memory.
    pub fn new(rule: Rule, ddp: &Ddp) -> Result<Optimizer, DdpError> {
        Self::with_groups(vec![rule], ddp)
    }

    /// State of zeros for all parameters of `ddp`; a rule for each of its groups, all of one kind.
    ///
    /// # Errors
    /// No memory, or rules of different kinds.
    pub fn with_groups(rules: Vec<Rule>, ddp: &Ddp) -> Result<Optimizer, DdpError> {
        let most = rules.iter().max_by_key(|rule| rule.kept().len());
        let names = most.map(Rule::kept).unwrap_or_default();
        if rules.iter().any(|rule| !names.starts_with(rule.kept())) {
            return Err(DdpError::Usage("groups of one optimizer have rules of different kinds".to_owned()));
        }
        let own = [ddp.own_range().1 as i64];
        let kept = names.iter().map(|_| Tensor::f_zeros(own, (Kind::Float, ddp.params().device())));
        let kept = kept.collect::<Result<_, _>>()?;
        let steps = Tensor::f_zeros([], (Kind::Float, ddp.params().device()))?;
        let (layout, version) = (ddp.layout().clone(), ddp.layout_version());
        let mut new = Optimizer { rules, kept, steps, layout, version, parts: Vec::new() };
        new.divide(ddp)?;
        Ok(new)
    }

    /// Names of the kept tensors.
    fn names(&self) -> &'static [&'static str] {
        self.rules.iter().map(Rule::kept).max_by_key(|names| names.len()).unwrap_or_default()
    }

    /// Finds the ranges of each group.
    fn divide(&mut self, ddp: &Ddp) -> Result<(), DdpError> {
        let grads = ddp.grads()?;
        let (first, own) = ddp.own_range();
        let (first, end) = (first as i64, (first + own) as i64);
        let part = |group: usize| {
            let mut ranges = ranges(&self.layout, ddp.groups(), group);
            ranges.iter_mut().for_each(|(start, len)| {
                let last = (*start + *len).min(end);
                *start = (*start).max(first);
                *len = last - *start;
            });
            ranges.retain(|(_, len)| *len > 0);
            let views = |flat: &Tensor, from: i64| {
                ranges.iter().map(|(start, len)| flat.f_narrow(0, start - from, *len)).collect::<Result<Vec<_>, _>>()
            };
            Ok::<_, DdpError>(Part {
                params: views(ddp.params(), 0)?,
                grads: views(&grads, 0)?,
                kept: self.kept.iter().map(|kept| views(kept, first)).collect::<Result<_, _>>()?,
                matrices: self.matrices(ddp, group, &grads)?,
                steps: ranges.iter().map(|_| self.steps.shallow_clone()).collect(),
            })
        };
        self.parts = (0..self.rules.len()).map(part).collect::<Result<_, _>>()?;
        Ok(())
    }

    /// Parameters of a group that take an orthogonal step.
    fn matrices(&self, ddp: &Ddp, group: usize, grads: &Tensor) -> Result<Vec<Matrix>, DdpError> {
        let (Rule::MuSgd { .. }, Some(average)) = (self.rules[group], self.kept.get(1)) else { return Ok(Vec::new()) };
        if ddp.is_sharded() {
            let problem = "train.optimizer musgd needs whole gradients on every rank: set ddp.shard_optimizer: false";
            return Err(DdpError::Usage(problem.to_owned()));
        }
        let member = |index: &usize| ddp.groups().get(*index).copied().unwrap_or(0) == group;
        let slots = self.layout.slots().iter().enumerate();
        let fitting = slots.filter(|(_, slot)| Matrix::fits(&slot.shape)).map(|(index, _)| index).filter(member);
        let views = |index: usize| {
            let view = |flat: &Tensor| self.layout.view(flat, index);
            Ok(Matrix { param: view(ddp.params())?, grad: view(grads)?, average: view(average)? })
        };
        fitting.map(views).collect()
    }

    /// Changes the parameters by the gradients that [`Ddp::finish`] left; with `numbers` of each group.
    ///
    /// # Errors
    /// libtorch refuses.
    pub fn step(&mut self, ddp: &Ddp, numbers: &[Numbers]) -> Result<(), DdpError> {
        self.follow(ddp)?;
        let _no_grad = tch::no_grad_guard();
        let first = self.steps_taken()? == 0;
        let _ = self.steps.f_add_scalar_(1.0)?;
        for (_, rule, part, numbers) in self.groups(numbers) {
            match rule.numbers(numbers, first) {
                Step::Adam(step) => torch::fused_adam(&part.adam(), &step)?,
                Step::Sgd(step) => {
                    part.orthogonal(&step, Rate::Host(step.lr))?;
                    torch::fused_sgd(&part.params, &part.grads, part.buffers(), &step)?;
                }
            }
        }
        ddp.share_params()
    }

    /// As [`Optimizer::step`] with the rates in `lrs` (f32, one per group), for gradients of which the device knows whether
    /// they are any good: where `found` (f32 `[1]`) holds 1 nothing changes, the count of steps included. Gradients are
    /// divided by `divisor` (f32 `[1]`) on the way, and keep that value. The host reads nothing.
    ///
    /// # Errors
    /// libtorch refuses.
    pub fn step_unless(
        &mut self,
        ddp: &Ddp,
        lrs: &Tensor,
        numbers: &[Numbers],
        (found, divisor): (&Tensor, Option<&Tensor>),
    ) -> Result<(), DdpError> {
        self.follow(ddp)?;
        let _no_grad = tch::no_grad_guard();
        let _ = self.steps.f_add_scalar_(1.0)?;
        for (group, rule, part, numbers) in self.groups(numbers) {
            let lr = lrs.f_select(0, group as i64)?;
            // Buffers of zeros make the first step by themselves: there is no dampening.
            match rule.numbers(numbers, false) {
                Step::Adam(step) => device::fused_adam_unless(&part.adam(), &step, &lr, (found, divisor))?,
                Step::Sgd(step) => {
                    part.orthogonal(&step, Rate::Device { lr: &lr, found, divisor })?;
                    let (params, grads) = (&part.params, &part.grads);
                    device::fused_sgd_unless((params, grads, part.buffers()), &step, &lr, (found, divisor))?;
                }
            }
        }
        let _ = self.steps.f_sub_(&found.f_squeeze()?)?;
        ddp.share_params()
    }

    /// Groups that have parameters here, by their numbers: a rank's slice may hold none of a group's.
    fn groups<'a>(&'a self, numbers: &'a [Numbers]) -> impl Iterator<Item = (usize, &'a Rule, &'a Part, &'a Numbers)> {
        let all = self.rules.iter().zip(&self.parts).zip(numbers).enumerate();
        all.map(|(group, ((rule, part), numbers))| (group, rule, part, numbers))
            .filter(|(_, _, part, _)| !part.params.is_empty())
    }

    /// Bytes of the state that this rank keeps. Gaps between parameters, below 64 bytes each, are not counted, as those of
    /// weights and gradients are not.
    pub fn kept_bytes(&self, ddp: &Ddp) -> u64 {
        let (start, len) = ddp.own_range();
        let inside = |slot: &Slot| (slot.offset + slot.len()).min(start + len).saturating_sub(slot.offset.max(start));
        let elements: usize = self.layout.slots().iter().map(inside).sum();
        (self.kept.len() * elements * size_of::<f32>()) as u64
    }

    /// Steps taken so far.
    ///
    /// # Errors
    /// libtorch refuses.
    pub fn steps_taken(&self) -> Result<u64, DdpError> {
        Ok(self.steps.f_double_value(&[])? as u64)
    }

    /// State as tensors of one parameter each, such as `exp_avg.encoder.weight`, and `step`: independent of buckets and
    /// world size. They are views, to be copied before the next step. Where ranks divide the state, all call it together, and
    /// rank 0 alone gets it, in host memory: no device has room for all of it.
    ///
    /// # Errors
    /// A peer failed, or libtorch refuses.
    pub fn export(&mut self, ddp: &Ddp) -> Result<Vec<(String, Tensor)>, DdpError> {
        self.follow(ddp)?;
        let mut all = vec![("step".to_owned(), self.steps.shallow_clone())];
        for (kind, kept) in self.names().iter().zip(&self.kept) {
            let mut flat = ddp.gathered(kept)?;
            if ddp.is_sharded() {
                if ddp.rank() != 0 {
                    continue;
                }
                flat = flat.f_to_device(Device::Cpu)?;
            }
            for (index, name) in ddp.names().iter().enumerate() {
                all.push((format!("{kind}.{name}"), self.layout.view(&flat, index)?));
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
        let (slots, kinds) = (self.layout.slots(), self.names());
        let of_kind = |kind: &&str| {
            let sources = ddp.names().iter().zip(slots);
            sources.map(|(name, slot)| find(&format!("{kind}.{name}"), &slot.shape)).collect::<Result<Vec<_>, _>>()
        };
        let (step, sources) = (find("step", &[])?, kinds.iter().map(of_kind).collect::<Result<Vec<_>, _>>()?);
        self.steps.f_copy_(step)?;
        for (kept, sources) in self.kept.iter().zip(sources) {
            // Where this rank keeps a slice, the whole is put together first.
            let flat = if ddp.is_sharded() { ddp.params().f_zeros_like()? } else { kept.shallow_clone() };
            for (index, source) in sources.into_iter().enumerate() {
                self.layout.view(&flat, index)?.f_copy_(source)?;
            }
            take_slice(ddp, kept, &flat)?;
        }
        Ok(())
    }

    /// Moves the state when buckets were rebuilt; parts of it to other ranks where these divide it.
    fn follow(&mut self, ddp: &Ddp) -> Result<(), DdpError> {
        if self.version == ddp.layout_version() {
            return Ok(());
        }
        // One after the other: a device that keeps slices has no room for all of them whole.
        for kept in &self.kept {
            let mut flat = ddp.gathered(kept)?;
            ddp.layout().refill(&mut flat, &self.layout)?;
            take_slice(ddp, kept, &flat)?;
        }
        (self.layout, self.version) = (ddp.layout().clone(), ddp.layout_version());
        self.divide(ddp)
    }
}

/// Takes this rank's slice of a whole tensor over, where ranks keep slices.
fn take_slice(ddp: &Ddp, kept: &Tensor, whole: &Tensor) -> Result<(), DdpError> {
    if ddp.is_sharded() {
        let _no_grad = tch::no_grad_guard();
        let (start, len) = ddp.own_range();
        kept.shallow_clone().f_copy_(&whole.f_narrow(0, start as i64, len as i64)?)?;
    }
    Ok(())
}

impl Part {
    fn adam(&self) -> AdamState<'_> {
        let kept = |index: usize| self.kept.get(index).map(Vec::as_slice).unwrap_or_default();
        let (params, grads, steps) = (&self.params, &self.grads, &self.steps);
        AdamState { params, grads, exp_avgs: kept(0), exp_avg_sqs: kept(1), steps }
    }

    /// The step of MuSGD before that of SGD; none under other rules.
    fn orthogonal(&self, step: &SgdStep, lr: Rate) -> Result<(), DdpError> {
        let along = Along { lr, momentum: step.momentum, nesterov: step.nesterov };
        self.matrices.iter().try_for_each(|matrix| matrix.step(&along))
    }

    fn buffers(&self) -> &[Tensor] {
        self.kept.first().map(Vec::as_slice).unwrap_or_default()
    }
}

/// Ranges `(first element, elements)` of a group's parameters, neighbours as one; the whole where there is one group.
fn ranges(layout: &Layout, groups: &[usize], group: usize) -> Vec<(i64, i64)> {
    if groups.is_empty() {
        return if group == 0 { vec![(0, layout.len() as i64)] } else { Vec::new() };
    }
    let members = layout.slots().iter().zip(groups).filter(|(_, of)| **of == group);
    let mut slots: Vec<_> = members.map(|(slot, _)| (slot.offset as i64, slot.padded_len() as i64)).collect();
    slots.sort_unstable();
    let mut ranges: Vec<(i64, i64)> = Vec::new();
    for (start, len) in slots {
        match ranges.last_mut() {
            Some(last) if last.0 + last.1 == start => last.1 += len,
            _ => ranges.push((start, len)),
        }
    }
    ranges
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
