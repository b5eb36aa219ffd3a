//! Complete overlap of boxes. Zheng and others, 2020 (CIoU).

use std::f64::consts::PI;
use tch::{Tensor, no_grad};

const EPS: f64 = 1e-7;

/// CIoU of each row of `first` with that of `second`: boxes f32 `[N, 4]` (left, top, right, bottom); `[N]`.
///
/// `IoU - ρ²/c² - α v`, with `v = 4/π² (atan(w₂/h₂) - atan(w₁/h₁))²` and `α = v / (v - IoU + 1 + ε)` without gradient. ε is
/// added to heights, union and c², as the package does.
pub fn ciou(first: &Tensor, second: &Tensor) -> Tensor {
    let (a, b) = (sides(first), sides(second));
    let (w1, h1) = (&a[2] - &a[0], &a[3] - &a[1] + EPS);
    let (w2, h2) = (&b[2] - &b[0], &b[3] - &b[1] + EPS);
    let across = |low: usize, high: usize| (a[high].minimum(&b[high]) - a[low].maximum(&b[low])).clamp_min(0.0);
    let inter = across(0, 2) * across(1, 3);
    let union = &w1 * &h1 + &w2 * &h2 - &inter + EPS;
    let iou = inter / union;
    let around = |low: usize, high: usize| a[high].maximum(&b[high]) - a[low].minimum(&b[low]);
    let diagonal = around(0, 2).square() + around(1, 3).square() + EPS;
    let apart = |low: usize, high: usize| (&b[low] + &b[high] - &a[low] - &a[high]).square();
    let distance = (apart(0, 2) + apart(1, 3)) / 4.0;
    let v = ((&w2 / &h2).atan() - (&w1 / &h1).atan()).square() * (4.0 / (PI * PI));
    let alpha = no_grad(|| &v / (&v - &iou + (1.0 + EPS)));
    iou - (distance / diagonal + v * alpha)
}

/// The four columns.
fn sides(boxes: &Tensor) -> [Tensor; 4] {
    [0, 1, 2, 3].map(|side| boxes.select(-1, side))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(first: [f32; 4], second: [f32; 4]) -> f64 {
        let row = |values: [f32; 4]| Tensor::from_slice(&values).view([1, 4]);
        ciou(&row(first), &row(second)).double_value(&[0])
    }

    #[test]
    fn overlaps_of_boxes_by_hand() {
        assert!((of([0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 4.0]) - 1.0).abs() < 1e-6);
        // Same shape, shifted by half: IoU 1/3, centres 2 apart, diagonal of 6 × 4.
        let expected = 1.0 / 3.0 - 4.0 / 52.0;
        assert!((of([0.0, 0.0, 4.0, 4.0], [2.0, 0.0, 6.0, 4.0]) - expected).abs() < 1e-6);
        // Apart: no overlap, centres 10 apart in both directions.
        assert!((of([0.0, 0.0, 2.0, 2.0], [10.0, 10.0, 12.0, 12.0]) + 200.0 / 288.0).abs() < 1e-6);
        // Same centre, other shape.
        let v = 4.0 / (PI * PI) * (2f64.atan() - 0.5f64.atan()).powi(2);
        let iou = 4.0 / 12.0;
        let expected = iou - v * v / (v - iou + 1.0);
        assert!((of([0.0, 1.0, 4.0, 3.0], [1.0, 0.0, 3.0, 4.0]) - expected).abs() < 1e-6);
    }

    #[test]
    fn a_box_without_area_has_a_finite_overlap_and_gradient() {
        let flat = Tensor::from_slice(&[1f32, 1.0, 1.0, 1.0]).view([1, 4]).set_requires_grad(true);
        let overlap = ciou(&flat, &Tensor::from_slice(&[0f32, 0.0, 2.0, 2.0]).view([1, 4]));
        let gradient = Tensor::run_backward(&[overlap.sum(tch::Kind::Float)], &[&flat], false, false);
        assert!(overlap.double_value(&[0]).is_finite() && bool::try_from(gradient[0].isfinite().all()).unwrap());
    }
}
