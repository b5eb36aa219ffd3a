//! LPIPS (Zhang et al. 2018, version 0.1, VGG16): distance of frames as people see it, from 0, the same, upwards.
//!
//! Weights are not part of Headroom: `deblur.loss.lpips_file` names a safetensors file with torchvision's `features.N.weight` and
//! `.bias` of all thirteen convolutions, and the five `linN.model.1.weight` of the `lpips` package.

use super::vgg::{Convolutions, Weights, channels};
use crate::data::DataError;
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// The convolutions whose ReLUs are compared (relu1_2, 2_2, 3_3, 4_3, 5_3), and their channels.
const TAPS: [(usize, i64); 5] = [(2, 64), (7, 128), (14, 256), (21, 512), (28, 512)];
/// Of R, G and B in -1..1.
const SHIFT: [f32; 3] = [-0.030, -0.088, -0.188];
const SCALE: [f32; 3] = [0.458, 0.448, 0.450];
/// Smaller frames vanish on the way to the last features.
pub(super) const LEAST_SIDE: i64 = 16;
/// Beside the norm of a pixel's features.
const EPSILON: f64 = 1e-10;

pub struct Lpips {
    convolutions: Convolutions,
    lins: Vec<Tensor>,
    shift: Tensor,
    scale: Tensor,
}

impl Lpips {
    /// # Errors
    /// The file cannot be read, lacks a tensor, or holds one of another shape.
    pub fn load(path: &Path, device: Device) -> Result<Self, DataError> {
        let mut weights = Weights::read(path, device, ("deblur.loss.lpips_file", "VGG16's and LPIPS's weights"))?;
        let convolutions = Convolutions::take(&mut weights, TAPS[TAPS.len() - 1].0)?;
        let lin = |(n, (_, width)): (usize, &(usize, i64))| {
            weights.take(format!("lin{n}.model.1.weight"), &[1, *width, 1, 1])
        };
        let lins = TAPS.iter().enumerate().map(lin).collect::<Result<_, _>>()?;
        Ok(Self { convolutions, lins, shift: channels(SHIFT, device), scale: channels(SCALE, device) })
    }

    pub fn move_to(&mut self, device: Device) {
        if self.shift.device() != device {
            self.convolutions.move_to(device);
            let tensors = self.lins.iter_mut().chain([&mut self.shift, &mut self.scale]);
            tensors.for_each(|tensor| *tensor = tensor.to_device(device));
        }
    }

    /// Distance of each frame: `[N, 3, h, w]` in 0..1, both → `[N]`. One frame at a time: features take 0.5 kB per pixel.
    pub fn distance(&self, restored: &Tensor, sharp: &Tensor) -> Tensor {
        let one = |n: i64| self.of_one(&restored.narrow(0, n, 1), &sharp.narrow(0, n, 1));
        Tensor::cat(&(0..restored.size()[0]).map(one).collect::<Vec<_>>(), 0)
    }

    fn of_one(&self, restored: &Tensor, sharp: &Tensor) -> Tensor {
        let (restored, sharp) = (self.features(restored), self.features(sharp));
        let mut sum = Tensor::zeros([1], (Kind::Float, self.shift.device()));
        for ((a, b), lin) in restored.iter().zip(&sharp).zip(&self.lins) {
            sum += ((a - b).square() * lin).sum_dim_intlist([1i64].as_slice(), false, Kind::Float).mean(Kind::Float);
        }
        sum
    }

    /// Outputs at [`TAPS`], each pixel's features of length 1.
    fn features(&self, frames: &Tensor) -> Vec<Tensor> {
        let mut found = Vec::with_capacity(TAPS.len());
        let _last = self.convolutions.run((frames * 2.0 - 1.0 - &self.shift) / &self.scale, |number, x| {
            if TAPS.iter().any(|(tap, _)| *tap == number) {
                let length = x.square().sum_dim_intlist([1i64].as_slice(), true, Kind::Float).sqrt();
                found.push(x / (length + EPSILON));
            }
        });
        found
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::vgg::golden;
    use super::*;

    pub fn write(path: &Path, change: impl Fn(&mut Vec<(String, Tensor)>)) {
        let mut tensors = golden::weights(28);
        for (n, (_, width)) in TAPS.iter().enumerate() {
            tensors.push((format!("lin{n}.model.1.weight"), golden::numbers(&[1, *width, 1, 1], 0.1, 0.0)));
        }
        change(&mut tensors);
        Tensor::write_safetensors(&tensors, path).unwrap();
    }

    #[test]
    fn distances_equal_pytorchs_and_bad_files_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lpips.safetensors");
        write(&path, |_| ());
        let lpips = Lpips::load(&path, Device::Cpu).unwrap();
        let (restored, sharp) = golden::frames();
        golden::assert_near(&lpips.distance(&restored, &sharp), "lpips", 2e-6);
        assert_eq!(lpips.distance(&restored, &restored).abs().max().double_value(&[]), 0.0);
        write(&path, |tensors| tensors.retain(|(name, _)| name != "lin3.model.1.weight"));
        let error = Lpips::load(&path, Device::Cpu).err().unwrap().to_string();
        assert!(error.contains("lpips.safetensors: no tensor lin3.model.1.weight, of shape [1, 512, 1, 1]"), "{error}");
        let error = Lpips::load(Path::new("no/such/file"), Device::Cpu).err().unwrap().to_string();
        assert!(error.contains("no/such/file: no such file: it is deblur.loss.lpips_file"), "{error}");
    }
}
