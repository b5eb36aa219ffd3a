//! Losses of restored frames, and the perceptual term.

use super::vgg::Vgg;
use crate::data::DataError;
use crate::torch::Autocast;
use spec::task::deblur::{DeblurLoss, LossConfig};
use tch::{Device, Kind, Tensor};

/// `pixel loss + weight × L1 of VGG features`.
pub struct Loss {
    kind: DeblurLoss,
    delta: f64,
    perceptual: Option<(f64, Vgg)>,
}

impl Loss {
    /// # Errors
    /// `deblur.loss.perceptual_file` cannot be read, or does not hold VGG16's convolutions.
    pub fn new(kind: DeblurLoss, config: &LossConfig, device: Device) -> Result<Self, DataError> {
        let file = config.perceptual_file.as_ref().filter(|_| config.perceptual_weight > 0.0);
        let vgg = file.map(|path| Vgg::load(path, device)).transpose()?;
        let perceptual = vgg.map(|vgg| (config.perceptual_weight, vgg));
        Ok(Self { kind, delta: config.charbonnier_delta, perceptual })
    }

    /// Scalar, mean over all elements: `[B, T, 3, h, w]` restored and sharp, in 0..1. Under autocast too it is f32.
    pub fn of(&self, restored: &Tensor, sharp: &Tensor) -> Tensor {
        // A device without autocast has none to turn off.
        let _full = Autocast::enter(restored.device(), false, Kind::BFloat16).ok();
        let restored = restored.to_kind(Kind::Float);
        let error = &restored - sharp;
        let pixels = match self.kind {
            DeblurLoss::Mse => error.square().mean(Kind::Float),
            // Charbonnier et al. 1994, in the form of Lai et al. 2017.
            DeblurLoss::Charbonnier => (error.square() + self.delta * self.delta).sqrt().mean(Kind::Float),
            DeblurLoss::Mae => error.abs().mean(Kind::Float),
        };
        match &self.perceptual {
            None => pixels,
            Some((weight, vgg)) => pixels + vgg.distance(&restored.flatten(0, 1), &sharp.flatten(0, 1)) * *weight,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loss(kind: DeblurLoss) -> Loss {
        let config = LossConfig { charbonnier_delta: 0.3, ..LossConfig::default() };
        Loss::new(kind, &config, Device::Cpu).unwrap()
    }

    #[test]
    fn losses_by_hand() {
        let restored = Tensor::from_slice(&[0.4f32, 1.0, 0.5]).view([1, 1, 3, 1, 1]);
        let sharp = Tensor::from_slice(&[0.0f32, 1.0, 0.5]).view([1, 1, 3, 1, 1]);
        let of = |kind| loss(kind).of(&restored, &sharp).double_value(&[]);
        assert!((of(DeblurLoss::Charbonnier) - (0.5 + 0.3 + 0.3) / 3.0).abs() < 1e-6);
        assert!((of(DeblurLoss::Mse) - 0.16 / 3.0).abs() < 1e-6 && (of(DeblurLoss::Mae) - 0.4 / 3.0).abs() < 1e-6);
    }

    #[test]
    fn a_perceptual_weight_without_a_file_adds_nothing() {
        let mut config = LossConfig { perceptual_weight: 0.1, ..LossConfig::default() };
        assert!(Loss::new(DeblurLoss::Mae, &config, Device::Cpu).unwrap().perceptual.is_none());
        config.perceptual_file = Some("no/such/vgg.safetensors".into());
        let error = Loss::new(DeblurLoss::Mae, &config, Device::Cpu).err().unwrap().to_string();
        assert!(error.contains("no/such/vgg.safetensors"), "{error}");
    }
}
