//! Mixed precision: the element type in which a forward pass multiplies matrices.
//!
//! Parameters, gradients and optimizer state stay f32, and so does the loss. bf16 has the range of f32: it needs no loss
//! scale. fp16 does (see `scaler`), and CPUs are slow at it, so that it is off there by rule.

use crate::task::norm::{Peers, Together};
use crate::task::{Batch, Model, Output};
use crate::torch::{Autocast, TorchError};
use spec::config::Amp;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// Element type of autocast for `train.amp`, or `None` without autocast; and a line where the wish is not met.
/// `on_device`: steps keep their numbers on the device, which a loss scale needs. `auto` starts without.
pub fn narrow_kind(amp: Amp, on_device: bool) -> (Option<Kind>, Option<&'static str>) {
    match amp {
        Amp::Off | Amp::Auto => (None, None),
        Amp::Bf16 => (Some(Kind::BFloat16), None),
        Amp::Fp16 if on_device => (Some(Kind::Half), None),
        Amp::Fp16 => (None, Some("amp: fp16 is off on a CPU by rule; train.amp: bf16 works on both")),
    }
}

/// Forward pass and loss, under autocast to `narrow` where there is one; in training, layers take statistics over `peers`
/// where there are any.
///
/// # Errors
/// The device knows no autocast.
pub fn forward(
    model: &dyn Model,
    batch: &Batch,
    train: bool,
    (narrow, peers): (Option<Kind>, Option<Arc<dyn Peers>>),
) -> Result<Output, TorchError> {
    let device = batch.fields.first().map_or(Device::Cpu, tch::Tensor::device);
    let _narrow = narrow.map(|kind| Autocast::enter(device, true, kind)).transpose()?;
    let _together = Together::with(peers);
    model.try_forward(batch, train)
}

/// Prediction for a batch of a pass, under autocast to `narrow` where there is one.
///
/// # Errors
/// The device knows no autocast.
pub fn predict(model: &dyn Model, batch: &Batch, narrow: Option<Kind>) -> Result<Tensor, TorchError> {
    let device = batch.fields.first().map_or(Device::Cpu, Tensor::device);
    let _narrow = narrow.map(|kind| Autocast::enter(device, true, kind)).transpose()?;
    model.try_predict(batch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fp16_is_off_on_a_cpu_and_says_so() {
        assert_eq!([narrow_kind(Amp::Off, false), narrow_kind(Amp::Auto, true)], [(None, None); 2]);
        assert_eq!(narrow_kind(Amp::Bf16, false), (Some(Kind::BFloat16), None));
        assert_eq!(narrow_kind(Amp::Fp16, true), (Some(Kind::Half), None));
        let (kind, note) = narrow_kind(Amp::Fp16, false);
        assert!(kind.is_none() && note.is_some_and(|note| note.contains("off on a CPU by rule")));
    }
}
