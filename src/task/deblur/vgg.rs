//! Features of VGG16 (Simonyan and Zisserman 2015) up to relu3_3, for the perceptual term of the loss (Johnson et al. 2016).
//!
//! Its weights are not part of Headroom: `train.perceptual_file` names a safetensors file with the tensors
//! `features.N.weight` and `features.N.bias` of torchvision's `vgg16`, N = 0, 2, 5, 7, 10, 12, 14. They stay as they are.

use crate::data::DataError;
use std::collections::HashMap;
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// Number in torchvision's `features`, channels in and out, and whether a pooling comes before.
const CONVOLUTIONS: [(usize, i64, i64, bool); 7] = [
    (0, 3, 64, false),
    (2, 64, 64, false),
    (5, 64, 128, true),
    (7, 128, 128, false),
    (10, 128, 256, true),
    (12, 256, 256, false),
    (14, 256, 256, false),
];
/// ImageNet's mean and deviation of R, G and B.
const MEAN: [f32; 3] = [0.485, 0.456, 0.406];
const DEVIATION: [f32; 3] = [0.229, 0.224, 0.225];

/// The first three blocks, frozen.
pub struct Vgg {
    layers: Vec<(Tensor, Tensor, bool)>,
    mean: Tensor,
    deviation: Tensor,
}

impl Vgg {
    /// # Errors
    /// The file cannot be read, lacks a tensor, or holds one of another shape.
    pub fn load(path: &Path, device: Device) -> Result<Self, DataError> {
        let fail = |problem: String| DataError::File { path: path.to_owned(), problem };
        if !path.is_file() {
            return Err(fail("no such file: it is train.perceptual_file, VGG16's weights as safetensors".into()));
        }
        let tensors = Tensor::read_safetensors(path).map_err(|e| fail(e.to_string()))?;
        let mut tensors: HashMap<String, Tensor> = tensors.into_iter().collect();
        let mut take = |name: String, shape: &[i64]| {
            let found = tensors.remove(&name).ok_or_else(|| fail(format!("no tensor {name}, of shape {shape:?}")))?;
            if found.size() != shape {
                return Err(fail(format!("{name} is of shape {:?}; VGG16 has {shape:?}", found.size())));
            }
            Ok(found.to_device(device).to_kind(Kind::Float).set_requires_grad(false))
        };
        let mut layers = Vec::with_capacity(CONVOLUTIONS.len());
        for (number, input, output, pool) in CONVOLUTIONS {
            let weight = take(format!("features.{number}.weight"), &[output, input, 3, 3])?;
            layers.push((weight, take(format!("features.{number}.bias"), &[output])?, pool));
        }
        let channels = |values: [f32; 3]| Tensor::from_slice(&values).view([1, 3, 1, 1]).to_device(device);
        Ok(Self { layers, mean: channels(MEAN), deviation: channels(DEVIATION) })
    }

    /// Mean absolute difference of the features of frames `[N, 3, h, w]` in 0..1; no gradient to `sharp`.
    pub fn distance(&self, restored: &Tensor, sharp: &Tensor) -> Tensor {
        let target = tch::no_grad(|| self.features(sharp));
        (self.features(restored) - target).abs().mean(Kind::Float)
    }

    /// relu3_3 of frames `[N, 3, h, w]` → `[N, 256, h/4, w/4]`.
    pub fn features(&self, frames: &Tensor) -> Tensor {
        let mut x = (frames - &self.mean) / &self.deviation;
        for (weight, bias, pool) in &self.layers {
            if *pool {
                x = x.max_pool2d([2, 2], [2, 2], [0, 0], [1, 1], false);
            }
            x = x.conv2d(weight, Some(bias), 1, 1, 1, 1).relu();
        }
        x
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, break_one: bool) {
        let wave = |shape: &[i64], scale: f64| {
            let count: i64 = shape.iter().product();
            ((Tensor::arange(count, (Kind::Float, Device::Cpu)) * 0.7).sin() * scale).view(shape)
        };
        let mut tensors = Vec::new();
        for (number, input, output, _) in CONVOLUTIONS {
            let output = if break_one && number == 7 { 64 } else { output };
            tensors.push((format!("features.{number}.weight"), wave(&[output, input, 3, 3], 0.05)));
            tensors.push((format!("features.{number}.bias"), wave(&[output], 0.1)));
        }
        Tensor::write_safetensors(&tensors, path).unwrap();
    }

    #[test]
    fn features_have_a_quarter_of_the_size_and_only_the_restored_frames_get_a_gradient() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vgg.safetensors");
        write(&path, false);
        let vgg = Vgg::load(&path, Device::Cpu).unwrap();
        let frames = Tensor::rand([2, 3, 16, 24], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        assert_eq!(vgg.features(&frames).size(), [2, 256, 4, 6]);
        let sharp = Tensor::rand([2, 3, 16, 24], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        assert_eq!(vgg.distance(&frames, &frames).double_value(&[]), 0.0);
        let distance = vgg.distance(&frames, &sharp);
        assert!(distance.double_value(&[]) > 0.0);
        distance.backward();
        assert!(frames.grad().defined() && frames.grad().abs().sum(Kind::Float).double_value(&[]) > 0.0);
        assert!(!sharp.grad().defined());
    }

    #[test]
    fn a_file_that_is_not_vgg_names_tensor_and_shape() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vgg.safetensors");
        write(&path, true);
        let error = Vgg::load(&path, Device::Cpu).err().unwrap().to_string();
        assert!(error.contains("vgg.safetensors: features.7.weight is of shape [64, 128, 3, 3]"), "{error}");
        std::fs::write(&path, b"not a safetensors file").unwrap();
        assert!(Vgg::load(&path, Device::Cpu).is_err());
    }
}
