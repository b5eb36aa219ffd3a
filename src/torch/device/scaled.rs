//! The loss scale and optimizer steps that the device itself leaves out.

use crate::torch::{AdamState, AdamStep, Raw, SgdStep, TorchError, check, raw, raws};
use std::ffi::{c_char, c_double, c_int};
use tch::Tensor;

unsafe extern "C" {
    fn hr_unscale(grads: *const Raw, n: usize, found: Raw, inv_scale: Raw) -> *mut c_char;
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
    ) -> *mut c_char;
}

/// Multiplies gradients by `inv_scale` (f32 `[1]`), and sets `found` (f32 `[1]`) to 1 where a result is infinite or no
/// number, on their device.
///
/// # Errors
/// Tensors that the kernel refuses.
pub fn unscale(grads: &[Tensor], found: &Tensor, inv_scale: &Tensor) -> Result<(), TorchError> {
    let list = raws(grads);
    // SAFETY: an array of live tensors and two more; all outlive the call.
    check("unscale", unsafe { hr_unscale(list.as_ptr(), list.len(), raw(found), raw(inv_scale)) })
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

/// [`crate::torch::fused_adam`] with the rate in a tensor (`step.lr` is not read), undone on the device where `found` holds 1.
///
/// # Errors
/// As there.
pub fn fused_adam_unless(state: &AdamState, step: &AdamStep, lr: &Tensor, found: &Tensor) -> Result<(), TorchError> {
    let n = state.params.len();
    let lists = [state.params, state.grads, state.exp_avgs, state.exp_avg_sqs, state.steps];
    if lists.iter().any(|list| list.len() != n) {
        return Err(TorchError::Argument { call: "fused_adam", problem: format!("lists must all have {n} entries") });
    }
    let lists = lists.map(raws);
    let [p, g, m, v, s] = lists.each_ref().map(Vec::as_ptr);
    let AdamStep { decoupled, beta1, beta2, eps, weight_decay, .. } = *step;
    let (lr, found) = (raw(lr), raw(found));
    // SAFETY: five arrays of n live tensors, checked above, and two more; they outlive the call.
    let error =
        unsafe { hr_fused_adam_unless(decoupled.into(), p, g, m, v, s, n, lr, beta1, beta2, weight_decay, eps, found) };
    check("_fused_adam_", error)
}

/// [`crate::torch::fused_sgd`] with the rate in a tensor (`step.lr` is not read), undone on the device where `found` holds 1.
///
/// # Errors
/// As there.
pub fn fused_sgd_unless(
    params: &[Tensor],
    grads: &[Tensor],
    buffers: &[Tensor],
    step: &SgdStep,
    lr: &Tensor,
    found: &Tensor,
) -> Result<(), TorchError> {
    let n = params.len();
    if grads.len() != n || (step.momentum != 0.0 && buffers.len() != n) {
        return Err(TorchError::Argument { call: "fused_sgd", problem: format!("lists must all have {n} entries") });
    }
    let (p, g, b) = (raws(params), raws(grads), raws(buffers));
    let (p, g, b) = (p.as_ptr(), g.as_ptr(), b.as_ptr());
    let SgdStep { momentum, weight_decay, nesterov, first, .. } = *step;
    let (lr, found) = (raw(lr), raw(found));
    // SAFETY: arrays of n live tensors, checked above, `b` read only with momentum; all outlive the call.
    let error =
        unsafe { hr_fused_sgd_unless(p, g, b, n, lr, momentum, weight_decay, nesterov.into(), first.into(), found) };
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
    fn unscale_finds_what_is_not_finite_and_adam_then_changes_nothing() {
        for (bad, kept) in [(f32::INFINITY, true), (f32::NAN, true), (4.0, false)] {
            let (grads, found) = (Tensor::from_slice(&[2.0_f32, bad]), Tensor::from_slice(&[0_f32]));
            unscale(&[grads.shallow_clone()], &found, &Tensor::from_slice(&[0.5_f32])).unwrap();
            assert_eq!((grads.double_value(&[0]), found.double_value(&[0])), (1.0, f64::from(u8::from(kept))));
            let zeros = || [Tensor::zeros([2], (Kind::Float, Device::Cpu))];
            let (param, m, v) = ([Tensor::from_slice(&[1.0_f32, 1.0])], zeros(), zeros());
            let steps = [Tensor::from(1_f32)];
            let grads = [grads];
            let state = AdamState { params: &param, grads: &grads, exp_avgs: &m, exp_avg_sqs: &v, steps: &steps };
            let step = AdamStep { decoupled: true, lr: 0.0, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.0 };
            fused_adam_unless(&state, &step, &Tensor::from(0.1_f32), &found).unwrap();
            assert_eq!(param[0].double_value(&[0]) == 1.0, kept);
            assert_eq!(m[0].double_value(&[0]) == 0.0, kept);
        }
    }
}
