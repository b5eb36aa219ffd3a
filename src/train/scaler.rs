//! The loss scale of fp16: gradients too small for its range are lifted before backward, and the optimizer sets them down.
//!
//! The rule is `torch.amp.GradScaler`'s: start at 65,536; twice as much after 2,000 steps without overflow; half as much
//! after a step with one, which is skipped. All of it happens on the device. The decision is taken from the gradients that
//! all ranks share, so that all ranks decide alike.

use super::TrainError;
use crate::torch::device::{ScaleRule, update_scale};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

/// Source: the defaults of `torch.amp.GradScaler`.
pub const START: f64 = 65536.0;
const RULE: ScaleRule = ScaleRule { growth: 2.0, backoff: 0.5, interval: 2000 };

/// Part of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScalerState {
    pub scale: f64,
    /// Steps since the last overflow or growth.
    pub good_steps: i64,
}

impl Default for ScalerState {
    fn default() -> Self {
        Self { scale: START, good_steps: 0 }
    }
}

/// A loss scale on the device.
pub struct Scaler {
    /// f32 `[1]`.
    scale: Tensor,
    /// i32 `[1]`.
    good_steps: Tensor,
}

impl Scaler {
    /// # Errors
    /// No memory.
    pub fn new(device: Device, state: ScalerState) -> Result<Scaler, TrainError> {
        let scale = Tensor::f_full([1], state.scale, (Kind::Float, device)).map_err(tch_error)?;
        let good_steps = Tensor::f_full([1], state.good_steps, (Kind::Int, device)).map_err(tch_error)?;
        Ok(Scaler { scale, good_steps })
    }

    /// f32 `[1]`, on the device.
    pub fn scale(&self) -> &Tensor {
        &self.scale
    }

    /// `loss` times the scale.
    pub fn lift(&self, loss: &Tensor) -> Tensor {
        loss * self.scale.squeeze()
    }

    /// Moves the scale after a step.
    ///
    /// # Errors
    /// libtorch refuses.
    pub fn update(&self, found: &Tensor) -> Result<(), TrainError> {
        Ok(update_scale(&self.scale, &self.good_steps, found, RULE)?)
    }

    /// For a checkpoint; waits for the device.
    ///
    /// # Errors
    /// Work on the device failed.
    pub fn state(&self) -> Result<ScalerState, TrainError> {
        let scale = self.scale.f_double_value(&[0]).map_err(tch_error)?;
        Ok(ScalerState { scale, good_steps: self.good_steps.f_int64_value(&[0]).map_err(tch_error)? })
    }
}

pub(super) fn tch_error(error: tch::TchError) -> TrainError {
    crate::torch::error_of("a step on the device", &error).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::cell::diffusion::Diffusion;
    use crate::task::cell::model::CellUnet;
    use crate::torch::Autocast;
    use spec::task::cell::{CellDiffusion, CellUnet as UnetKeys};
    use tch::nn;

    /// The cell network by fp16 beside f32 weights. That a found overflow skips the step is [`super::super::device`]'s.
    #[test]
    fn checklist_24_an_overflow_of_the_cell_network_is_found_and_lowers_the_scale() {
        let vs = nn::VarStore::new(Device::Cpu);
        let net = CellUnet::new(&UnetKeys { hidden: vec![12, 8, 6], ..UnetKeys::default() }, 6, 6, &vs.root());
        let process = Diffusion::new(&CellDiffusion::default(), Device::Cpu).unwrap();
        let (x0, noise) =
            (Tensor::randn([8, 6], (Kind::Float, Device::Cpu)), Tensor::randn([8, 6], (Kind::Float, Device::Cpu)));
        let t = Tensor::arange(8, (Kind::Int64, Device::Cpu)) * 120;
        for (scale, overflows) in [(1024.0, false), (1e30, true)] {
            let scaler = Scaler::new(Device::Cpu, ScalerState { scale, good_steps: 0 }).unwrap();
            let loss = {
                let _on = Autocast::enter(Device::Cpu, true, Kind::Half).unwrap();
                process.losses(&|x, time| net.forward(x, time, None), &x0, &t, &noise).loss.mean(Kind::Float)
            };
            scaler.lift(&loss).backward();
            let grads: Vec<Tensor> =
                vs.trainable_variables().iter().map(|variable| variable.grad().flatten(0, -1)).collect();
            assert!(grads.iter().all(|grad| grad.kind() == Kind::Float));
            let grads = Tensor::cat(&grads, 0);
            // The step's flag, as `super::super::device` raises it: the norm is no number.
            let found = grads.norm().isfinite().logical_not().to_kind(Kind::Float).view([1]);
            assert_eq!(found.double_value(&[0]) > 0.0, overflows, "scale {scale}");
            scaler.update(&found).unwrap();
            let expected = if overflows {
                ScalerState { scale: f64::from(scale as f32) / 2.0, good_steps: 0 }
            } else {
                ScalerState { scale, good_steps: 1 }
            };
            assert_eq!(scaler.state().unwrap(), expected);
            vs.trainable_variables().iter_mut().for_each(|variable| variable.zero_grad());
        }
    }

    #[test]
    fn an_overflow_halves_the_scale_and_two_thousand_good_steps_double_it() {
        let scaler = Scaler::new(Device::Cpu, ScalerState { scale: 1024.0, good_steps: 1997 }).unwrap();
        let flag = |value: f32| Tensor::from_slice(&[value]);
        let mut seen = Vec::new();
        for overflow in [0.0, 0.0, 0.0, 1.0, 0.0] {
            scaler.update(&flag(overflow)).unwrap();
            let ScalerState { scale, good_steps } = scaler.state().unwrap();
            seen.push((scale, good_steps));
        }
        assert_eq!(seen, [(1024.0, 1998), (1024.0, 1999), (2048.0, 0), (1024.0, 0), (1024.0, 1)]);
    }
}
