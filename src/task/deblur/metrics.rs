//! Online metrics: sums over frames in f64, whatever the number of clips seen.
//!
//! | name | meaning |
//! |---|---|
//! | `loss` | mean over clips |
//! | `psnr_rgb`, `psnr_y` | dB of the output against the sharp frame, mean over frames; RGB and luma |
//! | `ssim_rgb`, `ssim_y` | Gaussian SSIM of 8-bit frames, mean over frames |
//! | `psnr_blur_rgb`, … | the same of the blurred input |
//! | `lpips` | where `deblur.loss.lpips_file` is given, in evaluation: mean over frames, 0 is the same |
//! | `psnr_gain_db` | `psnr_rgb - psnr_blur_rgb`: above 0 the output is nearer to the sharp frame than the input |

use super::data::voxel;
use super::lpips::{LEAST_SIDE, Lpips};
use super::quality::{eight_bit, luma, psnr, ssim};
use crate::data::DataError;
use crate::task::{Batch, Metrics, Output};
use std::path::Path;
use tch::{Device, Kind, Tensor, no_grad};

const CLIPS: usize = 0;
const LOSS: usize = 1;
const FRAMES: usize = 2;
/// Frames large enough for SSIM's window.
const WINDOWED: usize = 3;
/// Sums of the output's measures in the order of [`MEASURES`], then of the input's.
const OUTPUT: usize = 4;
const MEASURES: [&str; 4] = ["psnr_rgb", "psnr_y", "ssim_rgb", "ssim_y"];
const INPUT: usize = OUTPUT + MEASURES.len();
/// Frames that LPIPS looked at, and their sum.
const SEEN: usize = INPUT + MEASURES.len();
const LPIPS: usize = SEEN + 1;

/// Sums of one part of the data.
#[derive(Default)]
pub struct DeblurMetrics {
    sums: [f64; LPIPS + 1],
    /// Sums of batches on a device, f64 there, so that no step waits for them: the loss, then [`OUTPUT`] and what follows.
    pending: Option<Tensor>,
    lpips: Option<Lpips>,
}

/// Adds a device's or a batch's sums to their places.
fn add(sums: &mut [f64], found: &Tensor) {
    // It is a flat f64 tensor, so this cannot fail.
    let Ok(found) = Vec::<f64>::try_from(found) else { return };
    sums[LOSS] += found[0];
    for (sum, part) in sums[OUTPUT..SEEN].iter_mut().zip(&found[1..]) {
        *sum += part;
    }
}

impl DeblurMetrics {
    /// `lpips`: file of its weights, where it is measured.
    ///
    /// # Errors
    /// See [`Lpips::load`].
    pub fn new(lpips: Option<&Path>) -> Result<Self, DataError> {
        // The frames decide later which device it is needed on.
        let lpips = lpips.map(|path| Lpips::load(path, Device::Cpu)).transpose()?;
        Ok(Self { lpips, ..Self::default() })
    }

    /// Only where no gradient is kept: it takes about as long as a small model's step.
    fn add_lpips(&mut self, output: &Output, restored: &Tensor, sharp: &Tensor) {
        let size = restored.size();
        if output.loss.requires_grad() || size[2].min(size[3]) < LEAST_SIDE {
            return;
        }
        if let Some(lpips) = &mut self.lpips {
            lpips.move_to(restored.device());
            let sum = lpips.distance(&restored.clamp(0.0, 1.0), sharp).sum(Kind::Double);
            self.sums[SEEN] += size[0] as f64;
            self.sums[LPIPS] += sum.double_value(&[]);
        }
    }
}

/// Sums over frames of `[N, 3, h, w]` in 0..1 against `sharp`: [`MEASURES`] as one tensor; frames without SSIM add 0.
fn measure(frames: &Tensor, sharp: &Tensor) -> Tensor {
    let sum = |per_frame: Tensor| per_frame.to_kind(Kind::Double).sum(Kind::Double);
    let none = || Tensor::zeros([], (Kind::Double, frames.device()));
    let clamped = frames.clamp(0.0, 1.0);
    let (bytes, sharp_bytes) = (eight_bit(&clamped), eight_bit(sharp));
    // Luma of 8-bit colours is rounded to 8 bits again.
    let grey = |bytes: &Tensor| (luma(&(bytes / 255.0)) * 255.0).round();
    let rgb = ssim(&bytes, &sharp_bytes).map_or_else(none, sum);
    let y = ssim(&grey(&bytes), &grey(&sharp_bytes)).map_or_else(none, sum);
    Tensor::stack(&[sum(psnr(&clamped, sharp)), sum(psnr(&luma(&clamped), &luma(sharp))), rgb, y], 0)
}

impl Metrics for DeblurMetrics {
    fn update(&mut self, batch: &Batch, output: &Output) {
        let (blur, sharp) = (voxel::frames(&batch.fields[0]), voxel::frames(&batch.fields[1]));
        let Ok((b, t, _, h, w)) = sharp.size5() else { return };
        let flat = |clips: &Tensor| clips.detach().to_kind(Kind::Float).reshape([b * t, 3, h, w]);
        let (clips, frames) = (b as f64, (b * t) as f64);
        let found = no_grad(|| {
            let (restored, sharp) = (flat(&output.prediction), flat(&sharp));
            self.add_lpips(output, &restored, &sharp);
            let loss = output.loss.detach().to_kind(Kind::Double).view([1]) * clips;
            Tensor::cat(&[loss, measure(&restored, &sharp), measure(&flat(&blur), &sharp)], 0)
        });
        self.sums[CLIPS] += clips;
        self.sums[FRAMES] += frames;
        self.sums[WINDOWED] += if h >= 11 && w >= 11 { frames } else { 0.0 };
        if found.device() == Device::Cpu {
            add(&mut self.sums, &found);
        } else {
            self.pending = Some(match self.pending.take() {
                Some(sums) => sums + found,
                None => found,
            });
        }
    }

    fn sums(&self) -> Vec<f64> {
        let mut sums = self.sums.to_vec();
        if let Some(found) = &self.pending {
            add(&mut sums, found);
        }
        sums
    }

    fn values(&self, sums: &[f64]) -> Vec<(String, f64)> {
        let frames = sums[FRAMES];
        if frames == 0.0 {
            return Vec::new();
        }
        let mut values = vec![("loss".to_owned(), sums[LOSS] / sums[CLIPS])];
        for (first, of) in [(OUTPUT, ""), (INPUT, "blur_")] {
            for (n, name) in MEASURES.iter().enumerate() {
                let count = if name.starts_with("ssim") { sums[WINDOWED] } else { frames };
                if count > 0.0 {
                    let (kind, channels) = name.split_once('_').unwrap_or((name, ""));
                    values.push((format!("{kind}_{of}{channels}"), sums[first + n] / count));
                }
            }
        }
        if sums[SEEN] > 0.0 {
            values.push(("lpips".to_owned(), sums[LPIPS] / sums[SEEN]));
        }
        values.push(("psnr_gain_db".to_owned(), (sums[OUTPUT] - sums[INPUT]) / frames));
        values
    }

    fn headline(&self) -> &[&str] {
        &["psnr_rgb", "psnr_gain_db", "ssim_rgb"]
    }

    fn reset(&mut self) {
        self.sums.fill(0.0);
        self.pending = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use tch::Device;

    fn pixels(step: f64) -> Tensor {
        let values = (Tensor::arange(2 * 3 * 16 * 12 * 3, (Kind::Float, Device::Cpu)) * step).sin() * 100.0 + 120.0;
        values.view([2, 3, 16, 12, 3]).to_kind(Kind::Uint8)
    }

    fn metrics(lpips: Option<&Path>) -> DeblurMetrics {
        DeblurMetrics::new(lpips).unwrap()
    }

    fn named(metrics: &DeblurMetrics, sums: &[f64]) -> BTreeMap<String, f64> {
        metrics.values(sums).into_iter().collect()
    }

    /// Two clips at once and one after the other give the same, and ranks add up.
    #[test]
    fn values_are_means_over_frames_however_they_come() {
        let (blur, sharp) = (pixels(0.011), pixels(0.0113));
        let prediction = voxel::frames(&sharp) * 0.9 + 0.02;
        let part = |from: i64, count: i64| {
            let fields = vec![blur.narrow(0, from, count), sharp.narrow(0, from, count)];
            let batch = Batch::new(fields, vec![0; count as usize]);
            let loss = Tensor::from(0.25 * (from + 1) as f64);
            (batch, Output::new(loss, prediction.narrow(0, from, count)))
        };
        let (mut whole, mut parts, mut other) = (metrics(None), metrics(None), metrics(None));
        let (batch, output) = part(0, 2);
        whole.update(&batch, &output);
        let (batch, output) = part(0, 1);
        parts.update(&batch, &output);
        let (batch, output) = part(1, 1);
        other.update(&batch, &output);
        let sums: Vec<f64> = parts.sums().iter().zip(other.sums()).map(|(a, b)| a + b).collect();
        let (once, twice) = (named(&whole, &whole.sums()), named(&whole, &sums));
        assert_eq!(once.len(), 10, "{once:?}");
        for (name, value) in &once {
            let expected = if name == "loss" { 0.375 } else { *value };
            assert!((twice[name] - expected).abs() < 1e-6, "{name}: {value} {}", twice[name]);
        }
        assert!((once["psnr_gain_db"] - (once["psnr_rgb"] - once["psnr_blur_rgb"])).abs() < 1e-9);
        assert!(once["psnr_gain_db"] > 0.0 && once["ssim_rgb"] > once["ssim_blur_rgb"], "{once:?}");
        whole.reset();
        assert!(whole.values(&whole.sums()).is_empty());
    }

    #[test]
    fn a_perfect_output_gains_all_there_is() {
        let (blur, sharp) = (pixels(0.011), pixels(0.0113));
        let prediction = voxel::frames(&sharp);
        let batch = Batch::new(vec![blur, sharp], vec![0, 1]);
        let mut metrics = metrics(None);
        metrics.update(&batch, &Output::new(Tensor::from(0.0), prediction));
        let values = named(&metrics, &metrics.sums());
        assert!((values["psnr_rgb"] - 100.0).abs() < 1e-4 && (values["ssim_y"] - 1.0).abs() < 1e-5, "{values:?}");
    }

    #[test]
    fn lpips_is_measured_in_evaluation_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lpips.safetensors");
        super::super::lpips::tests::write(&path, |_| ());
        let wide = |step| pixels(step).repeat([1, 1, 1, 2, 1]);
        let (blur, sharp) = (wide(0.011), wide(0.0113));
        // `loss` with a gradient is that of a training step.
        let update = |metrics: &mut DeblurMetrics, gradient: bool, columns: i64| {
            let fields = Vec::from([&blur, &sharp].map(|frames| frames.narrow(3, 0, columns)));
            let prediction = voxel::frames(&fields[0]) * 1.2;
            let loss = Tensor::from(0.5f32).set_requires_grad(gradient);
            metrics.update(&Batch::new(fields, vec![0, 1]), &Output::new(loss, prediction));
        };
        let mut metrics = metrics(Some(&path));
        update(&mut metrics, true, 24);
        // Too small for the last features.
        update(&mut metrics, false, 12);
        assert!(!named(&metrics, &metrics.sums()).contains_key("lpips"));
        metrics.reset();
        update(&mut metrics, false, 24);
        update(&mut metrics, false, 24);
        let flat = |frames: Tensor| frames.clamp(0.0, 1.0).flatten(0, 1);
        let alone = Lpips::load(&path, Device::Cpu).unwrap();
        let each = alone.distance(&flat(voxel::frames(&blur) * 1.2), &flat(voxel::frames(&sharp)));
        let found = named(&metrics, &metrics.sums())["lpips"];
        assert!(found > 0.0 && (found - each.mean(Kind::Double).double_value(&[])).abs() < 1e-9, "{found}");
        assert!(DeblurMetrics::new(Some(Path::new("no/such/file"))).is_err());
    }
}
