//! Features of VGG16 (Simonyan and Zisserman 2015): up to relu3_3 for the perceptual term of the loss (Johnson et al. 2016),
//! all of them for [`super::lpips`].
//!
//! Its weights are not part of Headroom: `deblur.loss.perceptual_file` names a safetensors file with the tensors
//! `features.N.weight` and `features.N.bias` of torchvision's `vgg16`, N = 0, 2, 5, 7, 10, 12, 14. They stay as they are.

use crate::data::DataError;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// Number in torchvision's `features`, channels in and out, and whether a pooling comes before.
pub(super) const CONVOLUTIONS: [(usize, i64, i64, bool); 13] = [
    (0, 3, 64, false),
    (2, 64, 64, false),
    (5, 64, 128, true),
    (7, 128, 128, false),
    (10, 128, 256, true),
    (12, 256, 256, false),
    (14, 256, 256, false),
    (17, 256, 512, true),
    (19, 512, 512, false),
    (21, 512, 512, false),
    (24, 512, 512, true),
    (26, 512, 512, false),
    (28, 512, 512, false),
];
/// The convolution before relu3_3.
const RELU3_3: usize = 14;
/// ImageNet's mean and deviation of R, G and B.
const MEAN: [f32; 3] = [0.485, 0.456, 0.406];
const DEVIATION: [f32; 3] = [0.229, 0.224, 0.225];

/// A file of weights, taken out tensor by tensor.
pub(super) struct Weights {
    path: PathBuf,
    device: Device,
    tensors: HashMap<String, Tensor>,
}

impl Weights {
    /// `key`: the config's, which names the file; `what` it holds.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn read(path: &Path, device: Device, (key, what): (&str, &str)) -> Result<Self, DataError> {
        let fail = |problem: String| DataError::File { path: path.to_owned(), problem };
        if !path.is_file() {
            return Err(fail(format!("no such file: it is {key}, {what} as safetensors")));
        }
        let tensors = Tensor::read_safetensors(path).map_err(|e| fail(e.to_string()))?;
        Ok(Self { path: path.to_owned(), device, tensors: tensors.into_iter().collect() })
    }

    /// # Errors
    /// There is no such tensor, or it has another shape.
    pub fn take(&mut self, name: String, shape: &[i64]) -> Result<Tensor, DataError> {
        let fail = |problem| Err(DataError::File { path: self.path.clone(), problem });
        let Some(found) = self.tensors.remove(&name) else {
            return fail(format!("no tensor {name}, of shape {shape:?}"));
        };
        if found.size() != shape {
            return fail(format!("{name} is of shape {:?}: expected {shape:?}", found.size()));
        }
        Ok(found.to_device(self.device).to_kind(Kind::Float).set_requires_grad(false))
    }
}

/// VGG16's convolutions up to one of them, frozen.
pub(super) struct Convolutions(Vec<(usize, Tensor, Tensor, bool)>);

impl Convolutions {
    /// # Errors
    /// As [`Weights::take`].
    pub fn take(weights: &mut Weights, last: usize) -> Result<Self, DataError> {
        let wanted = CONVOLUTIONS.into_iter().filter(|(number, ..)| *number <= last);
        let layer = |(number, input, output, pool): (usize, i64, i64, bool)| {
            let weight = weights.take(format!("features.{number}.weight"), &[output, input, 3, 3])?;
            Ok((number, weight, weights.take(format!("features.{number}.bias"), &[output])?, pool))
        };
        Ok(Self(wanted.map(layer).collect::<Result<_, DataError>>()?))
    }

    pub fn move_to(&mut self, device: Device) {
        let tensors = self.0.iter_mut().flat_map(|(_, weight, bias, _)| [weight, bias]);
        tensors.for_each(|tensor| *tensor = tensor.to_device(device));
    }

    /// Normalised frames `[N, 3, h, w]` → the last ReLU's output; `see` is given each one's with its convolution's number.
    pub fn run(&self, frames: Tensor, mut see: impl FnMut(usize, &Tensor)) -> Tensor {
        let mut x = frames;
        for (number, weight, bias, pool) in &self.0 {
            if *pool {
                x = x.max_pool2d([2, 2], [2, 2], [0, 0], [1, 1], false);
            }
            x = x.conv2d(weight, Some(bias), 1, 1, 1, 1).relu();
            see(*number, &x);
        }
        x
    }
}

/// `[1, 3, 1, 1]`.
pub(super) fn channels(values: [f32; 3], device: Device) -> Tensor {
    Tensor::from_slice(&values).view([1, 3, 1, 1]).to_device(device)
}

/// The first three blocks, frozen.
pub struct Vgg {
    convolutions: Convolutions,
    mean: Tensor,
    deviation: Tensor,
}

impl Vgg {
    /// # Errors
    /// The file cannot be read, lacks a tensor, or holds one of another shape.
    pub fn load(path: &Path, device: Device) -> Result<Self, DataError> {
        let mut weights = Weights::read(path, device, ("deblur.loss.perceptual_file", "VGG16's weights"))?;
        let convolutions = Convolutions::take(&mut weights, RELU3_3)?;
        Ok(Self { convolutions, mean: channels(MEAN, device), deviation: channels(DEVIATION, device) })
    }

    /// Mean absolute difference of the features of frames `[N, 3, h, w]` in 0..1; no gradient to `sharp`.
    pub fn distance(&self, restored: &Tensor, sharp: &Tensor) -> Tensor {
        let target = tch::no_grad(|| self.features(sharp));
        (self.features(restored) - target).abs().mean(Kind::Float)
    }

    /// relu3_3 of frames `[N, 3, h, w]` → `[N, 256, h/4, w/4]`.
    pub fn features(&self, frames: &Tensor) -> Tensor {
        self.convolutions.run((frames - &self.mean) / &self.deviation, |_, _| ())
    }
}

/// Weights and frames that PyTorch made the golden values from, and those.
#[cfg(test)]
pub(super) mod golden {
    use super::*;

    /// (n · 2654435761 mod 2³²) / 2³² - shift, times scale, n from 0: as tests/benches/reference/make_vgg_golden.py.
    pub fn numbers(shape: &[i64], scale: f64, shift: f64) -> Tensor {
        let count: i64 = shape.iter().product();
        let value =
            |n: i64| ((((n as u64 * 2_654_435_761) & 0xFFFF_FFFF) as f64 / 4_294_967_296.0 - shift) * scale) as f32;
        Tensor::from_slice(&(0..count).map(value).collect::<Vec<_>>()).view(shape)
    }

    /// `features.N.weight` and `.bias` of all convolutions up to `last`.
    pub fn weights(last: usize) -> Vec<(String, Tensor)> {
        let wanted = CONVOLUTIONS.into_iter().filter(|(number, ..)| *number <= last);
        let layer = |(number, input, output, _): (usize, i64, i64, bool)| {
            let weight = numbers(&[output, input, 3, 3], (24.0 / (9 * input) as f64).sqrt(), 0.5);
            let bias = numbers(&[output], 0.1, 0.5);
            [(format!("features.{number}.weight"), weight), (format!("features.{number}.bias"), bias)]
        };
        wanted.flat_map(layer).collect()
    }

    /// Restored and sharp frames `[2, 3, 32, 48]`.
    pub fn frames() -> (Tensor, Tensor) {
        (numbers(&[2, 3, 32, 48], 1.0, 0.0), numbers(&[2, 3, 32, 48], 0.9, -0.05).flip([3]))
    }

    /// What PyTorch found.
    pub fn values(name: &str) -> Vec<f64> {
        let all: serde_json::Value =
            serde_json::from_str(include_str!("../../../tests/fixtures/vgg_golden.json")).unwrap();
        let values = all[name].as_array().cloned().unwrap_or_else(|| vec![all[name].clone()]);
        values.iter().map(|value| value.as_f64().unwrap()).collect()
    }

    pub fn assert_near(found: &Tensor, name: &str, within: f64) {
        let (found, expected) = (Vec::<f32>::try_from(found.flatten(0, -1)).unwrap(), values(name));
        assert_eq!(found.len(), expected.len(), "{name}");
        for (n, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert!((f64::from(*found) - expected).abs() <= within, "{name} {n}: {found}, {expected}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, change: impl Fn(&mut Vec<(String, Tensor)>)) {
        let mut tensors = golden::weights(RELU3_3);
        change(&mut tensors);
        Tensor::write_safetensors(&tensors, path).unwrap();
    }

    fn loaded(change: impl Fn(&mut Vec<(String, Tensor)>)) -> Result<Vgg, DataError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vgg.safetensors");
        write(&path, change);
        Vgg::load(&path, Device::Cpu)
    }

    #[test]
    fn features_and_distance_equal_pytorchs() {
        let vgg = loaded(|_| ()).unwrap();
        let (restored, sharp) = golden::frames();
        let small = restored.narrow(0, 0, 1).narrow(2, 0, 8).narrow(3, 0, 12);
        golden::assert_near(&vgg.features(&small), "relu3_3", 2e-6);
        golden::assert_near(&vgg.distance(&restored, &sharp), "distance", 1e-6);
    }

    /// relu3_3 from its definition: sums over the window, in f64.
    #[test]
    fn features_equal_sums_by_hand() {
        let frame = golden::numbers(&[3, 4, 8], 1.0, 0.0);
        let vgg = loaded(|_| ()).unwrap();
        let mut x = Vec::<f64>::try_from(frame.to_kind(Kind::Double).flatten(0, -1)).unwrap();
        let (mut h, mut w) = (4, 8);
        x.iter_mut().enumerate().for_each(|(n, value)| {
            let channel = n / (h * w);
            *value = (*value - f64::from(MEAN[channel])) / f64::from(DEVIATION[channel]);
        });
        let all: HashMap<String, Tensor> = golden::weights(RELU3_3).into_iter().collect();
        let list = |name: String| Vec::<f32>::try_from(all[&name].flatten(0, -1)).unwrap();
        for (number, input, output, pool) in CONVOLUTIONS.into_iter().filter(|(number, ..)| *number <= RELU3_3) {
            let (input, output) = (input as usize, output as usize);
            if pool {
                let at = |c: usize, y: usize, k: usize| x[(c * h + y) * w + k];
                let best = |c, y, k| at(c, y, k).max(at(c, y, k + 1)).max(at(c, y + 1, k)).max(at(c, y + 1, k + 1));
                let halved = (0..input * h / 2 * w / 2).map(|n| {
                    let (c, y, k) = (n / (h / 2 * w / 2), n / (w / 2) % (h / 2), n % (w / 2));
                    best(c, 2 * y, 2 * k)
                });
                x = halved.collect();
                (h, w) = (h / 2, w / 2);
            }
            let (weight, bias) = (list(format!("features.{number}.weight")), list(format!("features.{number}.bias")));
            let value = |n: usize| {
                let (o, y, k) = (n / (h * w), n / w % h, n % w);
                let mut sum = f64::from(bias[o]);
                for (c, dy, dx) in (0..input * 9).map(|n| (n / 9, n / 3 % 3, n % 3)) {
                    let (y, k) = ((y + dy).wrapping_sub(1), (k + dx).wrapping_sub(1));
                    if y < h && k < w {
                        sum += x[(c * h + y) * w + k] * f64::from(weight[((o * input + c) * 3 + dy) * 3 + dx]);
                    }
                }
                sum.max(0.0)
            };
            x = (0..output * h * w).map(value).collect();
        }
        let found = Vec::<f32>::try_from(vgg.features(&frame.unsqueeze(0)).flatten(0, -1)).unwrap();
        assert_eq!((found.len(), h, w), (256 * 2, 1, 2));
        let worst = found.iter().zip(&x).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
        assert!(worst < 1e-6 && x.iter().any(|value| *value > 0.01), "{worst}");
    }

    #[test]
    fn only_the_restored_frames_get_a_gradient() {
        let vgg = loaded(|_| ()).unwrap();
        let (frames, sharp) = golden::frames();
        let (frames, sharp) = (frames.set_requires_grad(true), sharp.set_requires_grad(true));
        assert_eq!(vgg.features(&frames).size(), [2, 256, 8, 12]);
        assert_eq!(vgg.distance(&frames, &frames).double_value(&[]), 0.0);
        vgg.distance(&frames, &sharp).backward();
        assert!(frames.grad().defined() && frames.grad().abs().sum(Kind::Float).double_value(&[]) > 0.0);
        assert!(!sharp.grad().defined());
    }

    #[test]
    fn a_file_that_is_not_vgg_names_tensor_and_shapes() {
        let error = |change: fn(&mut Vec<(String, Tensor)>)| loaded(change).err().unwrap().to_string();
        let found = error(|tensors| tensors[6].1 = Tensor::zeros([64, 128, 3, 3], (Kind::Float, Device::Cpu)));
        let wanted = "vgg.safetensors: features.7.weight is of shape [64, 128, 3, 3]: expected [128, 128, 3, 3]";
        assert!(found.contains(wanted), "{found}");
        let found = error(|tensors| drop(tensors.remove(13)));
        assert!(found.contains("vgg.safetensors: no tensor features.14.bias, of shape [256]"), "{found}");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vgg.safetensors");
        std::fs::write(&path, b"not a safetensors file").unwrap();
        assert!(Vgg::load(&path, Device::Cpu).err().unwrap().to_string().contains("vgg.safetensors"));
    }
}
