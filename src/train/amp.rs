//! Mixed precision: the element type in which a forward pass multiplies matrices.
//!
//! Parameters, gradients and optimizer state stay f32, and so does the loss. bf16 has the range of f32: it needs no loss
//! scale. fp16 does, and CPUs are slow at it, so that it is off there by rule.

use crate::task::{Batch, Model, Output};
use crate::torch::{Autocast, TorchError};
use launcher::config::Amp;
use tch::{Device, Kind};

/// Element type of autocast for `train.amp` on `device`, absent: none; and a line for people where the wish is not met.
pub fn narrow_kind(amp: Amp, device: Device) -> (Option<Kind>, Option<&'static str>) {
    match (amp, device) {
        (Amp::Off, _) => (None, None),
        (Amp::Bf16, _) => (Some(Kind::BFloat16), None),
        (Amp::Fp16, Device::Cpu) => (None, Some("amp: fp16 is off on a CPU by rule; train.amp: bf16 works on both")),
        (Amp::Fp16, _) => (None, Some("amp: fp16 is off: it needs a loss scale; choose train.amp: bf16")),
    }
}

/// Forward pass and loss, under autocast to `narrow` where there is one.
///
/// # Errors
/// The device knows no autocast.
pub fn forward(model: &dyn Model, batch: &Batch, train: bool, narrow: Option<Kind>) -> Result<Output, TorchError> {
    let device = batch.fields.first().map_or(Device::Cpu, tch::Tensor::device);
    let _narrow = narrow.map(|kind| Autocast::enter(device, true, kind)).transpose()?;
    Ok(model.forward(batch, train))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fp16_is_off_on_a_cpu_and_says_so() {
        assert_eq!(narrow_kind(Amp::Off, Device::Cpu), (None, None));
        assert_eq!(narrow_kind(Amp::Bf16, Device::Cpu), (Some(Kind::BFloat16), None));
        let (kind, note) = narrow_kind(Amp::Fp16, Device::Cpu);
        assert!(kind.is_none() && note.is_some_and(|note| note.contains("off on a CPU by rule")));
    }
}
