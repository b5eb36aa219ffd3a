//! PSNR and SSIM of frames.
//!
//! PSNR is `10·log10(1 / MSE)` of frames in 0..1. SSIM (Wang et al. 2004) is taken on 8-bit frames with an 11×11 Gaussian
//! window of sigma 1.5, its valid part alone, as the VRT paper's evaluation does. Luma is BT.601 in studio range.

use super::constants::constant;
use tch::{Device, Kind, Tensor};

const WINDOW: i64 = 11;
const SIGMA: f64 = 1.5;
/// `(0.01·255)²` and `(0.03·255)²`.
const C1: f64 = 6.5025;
const C2: f64 = 58.5225;
/// Frames that are equal would have infinitely many decibels; they count as 100.
const LEAST_MSE: f64 = 1e-10;

/// dB of each frame: `[N, C, h, w]` in 0..1, both clamped → `[N]`.
pub fn psnr(a: &Tensor, b: &Tensor) -> Tensor {
    let error = (a.clamp(0.0, 1.0) - b.clamp(0.0, 1.0)).square();
    let mse = error.mean_dim([1i64, 2, 3].as_slice(), false, Kind::Float);
    mse.clamp_min(LEAST_MSE).log10() * -10.0
}

/// Luma of frames `[N, 3, h, w]` in 0..1 → `[N, 1, h, w]`: `.257R + .504G + .098B + 16/255`.
pub fn luma(rgb: &Tensor) -> Tensor {
    let weights =
        constant("luma", [0; 4], rgb.device(), || Tensor::from_slice(&[0.257f32, 0.504, 0.098]).view([1, 3, 1, 1]));
    (rgb * weights).sum_dim_intlist([1i64].as_slice(), true, Kind::Float) + 16.0 / 255.0
}

/// Frames in 0..1 → whole numbers in 0..255, as f32.
pub fn eight_bit(frames: &Tensor) -> Tensor {
    (frames.clamp(0.0, 1.0) * 255.0).round()
}

/// SSIM of each 8-bit frame `[N, C, h, w]` → `[N]`, mean over channels; `None`: smaller than the window.
pub fn ssim(a: &Tensor, b: &Tensor) -> Option<Tensor> {
    let (n, channels, h, w) = a.size4().ok()?;
    if h < WINDOW || w < WINDOW {
        return None;
    }
    let flat = |x: &Tensor| x.to_kind(Kind::Float).reshape([n * channels, 1, h, w]);
    let (a, b) = (flat(a), flat(b));
    let maps = Tensor::cat(&[&a, &b, &a.square(), &b.square(), &(&a * &b)], 0);
    let blurred = blur(&maps).chunk(5, 0);
    let [mean_a, mean_b, aa, bb, ab] = &blurred[..] else { return None };
    let (square_a, square_b, cross) = (mean_a.square(), mean_b.square(), mean_a * mean_b);
    let structure = ((ab - &cross) * 2.0 + C2) / ((aa - &square_a) + (bb - &square_b) + C2);
    let light = (cross * 2.0 + C1) / (square_a + square_b + C1);
    Some((structure * light).mean_dim([1i64, 2, 3].as_slice(), false, Kind::Float).view([n, channels]).mean_dim(
        [1i64].as_slice(),
        false,
        Kind::Float,
    ))
}

/// The Gaussian as a row and a column, one after the other.
fn blur(maps: &Tensor) -> Tensor {
    let kernel = gaussian(maps.device());
    let no_bias: Option<&Tensor> = None;
    let down = maps.conv2d(&kernel.view([1, 1, WINDOW, 1]), no_bias, 1, 0, 1, 1);
    down.conv2d(&kernel.view([1, 1, 1, WINDOW]), no_bias, 1, 0, 1, 1)
}

fn gaussian(device: Device) -> Tensor {
    constant("gaussian", [0; 4], device, gaussian_row)
}

fn gaussian_row() -> Tensor {
    let weight = |n: i64| (-((n - WINDOW / 2) as f64).powi(2) / (2.0 * SIGMA * SIGMA)).exp();
    let weights: Vec<f64> = (0..WINDOW).map(weight).collect();
    let sum: f64 = weights.iter().sum();
    let normal: Vec<f32> = weights.iter().map(|weight| (weight / sum) as f32).collect();
    Tensor::from_slice(&normal)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ramp(shape: [i64; 4], step: f64) -> Tensor {
        let count: i64 = shape.iter().product();
        ((Tensor::arange(count, (Kind::Float, Device::Cpu)) * step).sin() * 0.4 + 0.5).view(shape)
    }

    #[test]
    fn psnr_is_that_of_the_mean_squared_error_and_equal_frames_count_as_100_db() {
        let a = ramp([2, 3, 4, 5], 0.37);
        let b = &a + 0.1;
        let found = Vec::<f32>::try_from(psnr(&a, &b.clamp(0.0, 1.0))).unwrap();
        // Nothing is clamped: 0.5 ± 0.4 + 0.1 stays within 1.
        assert!(found.iter().all(|db| (db - 20.0).abs() < 1e-4), "{found:?}");
        assert_eq!(Vec::<f32>::try_from(psnr(&a, &a)).unwrap(), [100.0, 100.0]);
        assert!(psnr(&(&a * 0.0 - 3.0), &(&a * 0.0)).double_value(&[0]) == 100.0, "values below 0 are clamped");
    }

    #[test]
    fn luma_of_white_and_black_is_the_studio_range() {
        let white = luma(&Tensor::ones([1, 3, 1, 1], (Kind::Float, Device::Cpu))).double_value(&[0, 0, 0, 0]);
        let black = luma(&Tensor::zeros([1, 3, 1, 1], (Kind::Float, Device::Cpu))).double_value(&[0, 0, 0, 0]);
        assert!((white - (0.859 + 16.0 / 255.0)).abs() < 1e-6 && (black - 16.0 / 255.0).abs() < 1e-6);
    }

    /// One window, summed by hand in f64.
    #[test]
    fn ssim_of_one_window_by_hand() {
        let (a, b) = (eight_bit(&ramp([1, 1, 11, 11], 0.31)), eight_bit(&ramp([1, 1, 11, 11], 0.33)));
        let values = |x: &Tensor| Vec::<f32>::try_from(x.flatten(0, -1)).unwrap();
        let weights: Vec<f64> =
            (0..121).map(|n| (-(f64::from(n / 11 - 5).powi(2) + f64::from(n % 11 - 5).powi(2)) / 4.5).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mean = |f: &dyn Fn(f64, f64) -> f64| {
            let pairs = values(&a).into_iter().zip(values(&b));
            pairs.zip(&weights).map(|((a, b), w)| f(a.into(), b.into()) * w / total).sum::<f64>()
        };
        let (x, y) = (mean(&|a, _| a), mean(&|_, b| b));
        let (xx, yy, xy) = (mean(&|a, _| a * a) - x * x, mean(&|_, b| b * b) - y * y, mean(&|a, b| a * b) - x * y);
        let expected = (2.0 * x * y + C1) * (2.0 * xy + C2) / ((x * x + y * y + C1) * (xx + yy + C2));
        let found = ssim(&a, &b).unwrap().double_value(&[0]);
        assert!((found - expected).abs() < 1e-4, "{found} {expected}");
    }

    #[test]
    fn ssim_is_1_for_equal_frames_less_for_others_and_absent_for_tiny_ones() {
        let a = eight_bit(&ramp([2, 3, 16, 20], 0.2));
        let same = Vec::<f32>::try_from(ssim(&a, &a).unwrap()).unwrap();
        assert!(same.iter().all(|value| (value - 1.0).abs() < 1e-5), "{same:?}");
        let other = ssim(&a, &eight_bit(&ramp([2, 3, 16, 20], 0.21))).unwrap().double_value(&[1]);
        assert!(other < 0.9, "{other}");
        assert!(ssim(&a.narrow(2, 0, 10), &a.narrow(2, 0, 10)).is_none());
    }
}
