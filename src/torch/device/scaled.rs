//! The loss scale and optimizer steps that the device itself leaves out.

use crate::torch::{AdamState, AdamStep, Raw, SgdStep, TorchError, check, raw, raws};
use std::ffi::{c_char, c_double, c_int};
use tch::Tensor;

unsafe extern "C" {
    fn hr_update_scale(
        scale: Raw,
        tracker: Raw,
        found: Raw,
        growth: c_double,
        backoff: c_double,
        interval: i64,
    ) -> *mut c_char;
    fn hr_fused_adam_unless(
        adamw: c_int,
        params: *const Raw,
        grads: *const Raw,
        exp_avgs: *const Raw,
        exp_avg_sqs: *const Raw,
        steps: *const Raw,
        n: usize,
        lr: Raw,
        beta1: c_double,
        beta2: c_double,
        weight_decay: c_double,
        eps: c_double,
        found: Raw,
        divisor: Raw,
    ) -> *mut c_char;
    fn hr_fused_sgd_unless(
        params: *const Raw,
        grads: *const Raw,
        buffers: *const Raw,
        n: usize,
        lr: Raw,
        momentum: c_double,
        weight_decay: c_double,
        nesterov: c_int,
        first_step: c_int,
        found: Raw,
        divisor: Raw,
    ) -> *mut c_char;
}

/// How a loss scale moves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScaleRule {
    pub growth: f64,
    pub backoff: f64,
    /// Steps without overflow before it grows.
    pub interval: i64,
}

/// The rule of `torch.amp.GradScaler.update` on the device: `scale` f32 `[1]`, `tracker` i32 `[1]`, `found` f32 `[1]`.
///
/// # Errors
/// Tensors that the kernel refuses.
pub fn update_scale(scale: &Tensor, tracker: &Tensor, found: &Tensor, rule: ScaleRule) -> Result<(), TorchError> {
    let ScaleRule { growth, backoff, interval } = rule;
    // SAFETY: live tensors and plain numbers.
    let error = unsafe { hr_update_scale(raw(scale), raw(tracker), raw(found), growth, backoff, interval) };
    check("update scale", error)
}

/// [`crate::torch::fused_adam`] with the rate in a tensor (`step.lr` is not read). Nothing changes where `found` (f32 `[1]`)
/// holds 1; gradients are divided by `divisor` (f32 `[1]`), where there is one, and keep that value.
///
/// # Errors
/// As there.
pub fn fused_adam_unless(
    state: &AdamState,
    step: &AdamStep,
    lr: &Tensor,
    (found, divisor): (&Tensor, Option<&Tensor>),
) -> Result<(), TorchError> {
    let n = state.params.len();
    let lists = [state.params, state.grads, state.exp_avgs, state.exp_avg_sqs, state.steps];
    if lists.iter().any(|list| list.len() != n) {
        return Err(TorchError::Argument { call: "fused_adam", problem: format!("lists must all have {n} entries") });
    }
    let lists = lists.map(raws);
    let [p, g, m, v, s] = lists.each_ref().map(Vec::as_ptr);
    let AdamStep { decoupled, beta1, beta2, eps, weight_decay, .. } = *step;
    let (lr, found, divisor) = (raw(lr), raw(found), divisor.map_or(std::ptr::null_mut(), raw));
    let kind = decoupled.into();
    // SAFETY: five arrays of n live tensors, checked above, and three more, of which the last may be null; they outlive the
    // call.
    let error =
        unsafe { hr_fused_adam_unless(kind, p, g, m, v, s, n, lr, beta1, beta2, weight_decay, eps, found, divisor) };
    check("_fused_adam_", error)
}

/// [`crate::torch::fused_sgd`] with the rate in a tensor (`step.lr` is not read), `found` and `divisor` as in
/// [`fused_adam_unless`].
///
/// # Errors
/// As there.
pub fn fused_sgd_unless(
    (params, grads, buffers): (&[Tensor], &[Tensor], &[Tensor]),
    step: &SgdStep,
    lr: &Tensor,
    (found, divisor): (&Tensor, Option<&Tensor>),
) -> Result<(), TorchError> {
    let n = params.len();
    if grads.len() != n || (step.momentum != 0.0 && buffers.len() != n) {
        return Err(TorchError::Argument { call: "fused_sgd", problem: format!("lists must all have {n} entries") });
    }
    let (p, g, b) = (raws(params), raws(grads), raws(buffers));
    let (p, g, b) = (p.as_ptr(), g.as_ptr(), b.as_ptr());
    let SgdStep { momentum, weight_decay, nesterov, first, .. } = *step;
    let (lr, found, divisor) = (raw(lr), raw(found), divisor.map_or(std::ptr::null_mut(), raw));
    let (nesterov, first) = (nesterov.into(), first.into());
    // SAFETY: arrays of n live tensors, checked above, `b` read only with momentum, `divisor` may be null; all outlive the
    // call.
    let error = unsafe { hr_fused_sgd_unless(p, g, b, n, lr, momentum, weight_decay, nesterov, first, found, divisor) };
    check("_fused_sgd_", error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn the_loss_scale_moves_by_the_rule() {
        let one = |value: f32| Tensor::from_slice(&[value]);
        let (scale, tracker) = (one(8.0), Tensor::from_slice(&[0_i32]));
        let rule = ScaleRule { growth: 2.0, backoff: 0.5, interval: 2 };
        let mut seen = Vec::new();
        for overflow in [0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0] {
            update_scale(&scale, &tracker, &one(overflow), rule).unwrap();
            seen.push(scale.double_value(&[0]));
        }
        assert_eq!(seen, [8.0, 16.0, 8.0, 8.0, 4.0, 4.0, 8.0]);
    }

    #[test]
    fn adam_divides_the_gradient_and_changes_nothing_where_something_was_found() {
        for (bad, found) in [(f32::INFINITY, 1.0_f32), (f32::NAN, 1.0), (4.0, 0.0)] {
            let zeros = || [Tensor::zeros([2], (Kind::Float, Device::Cpu))];
            let (param, m, v) = ([Tensor::from_slice(&[1.0_f32, 1.0])], zeros(), zeros());
            let (grads, steps) = ([Tensor::from_slice(&[2.0_f32, bad])], [Tensor::from(1_f32)]);
            let state = AdamState { params: &param, grads: &grads, exp_avgs: &m, exp_avg_sqs: &v, steps: &steps };
            let step = AdamStep { decoupled: true, lr: 0.0, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.0 };
            let (found, divisor) = (Tensor::from_slice(&[found]), Tensor::from_slice(&[2_f32]));
            fused_adam_unless(&state, &step, &Tensor::from(0.1_f32), (&found, Some(&divisor))).unwrap();
            let kept = !bad.is_finite();
            assert_eq!(param[0].double_value(&[0]) == 1.0, kept);
            assert_eq!(m[0].double_value(&[0]), if kept { 0.0 } else { f64::from(0.1_f32) });
        }
    }
}
