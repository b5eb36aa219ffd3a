//! Online metrics: sums and counts in f64, whatever the number of windows seen.
//!
//! | name | meaning | unit |
//! |---|---|---|
//! | `loss` | mean over samples | |
//! | `mae_rad`, `mae_deg` | mean of \|e\|, e = prediction − target, over samples, time *and* joints | rad, ° |
//! | `mae_deg_<finger>`, `mae_deg_<region>` | the same over a group of joints | ° |
//! | `velocity_mae`, `acceleration_mae`, `jerk_mae` | mean of \|Δⁿe\| × rateⁿ, n = 1, 2, 3: error of the n-th derivative in time, differences within a window | rad/sⁿ |
//! | `mean_pose_mae_deg` | what always predicting the given mean pose would reach | ° |
//! | `vs_mean_pose` | `mae_deg / mean_pose_mae_deg`; below 1 is better than the mean pose | |

use super::joints;
use crate::task::{Batch, Metrics, Output};
use tch::{Kind, Tensor, no_grad};

const SAMPLES: usize = 0;
const LOSS: usize = 1;
const FRAMES: usize = 2;
/// Sum, then count, for each order of difference.
const DERIVATIVES: usize = 3;
const BASELINE: usize = 9;
/// First of the sums of |e| per joint.
const JOINT: usize = 10;
const NAMES: [&str; 3] = ["velocity_mae", "acceleration_mae", "jerk_mae"];

/// Sums of one part of the data.
pub struct EmgMetrics {
    rate: f64,
    joints: usize,
    mean_pose: Option<Tensor>,
    sums: Vec<f64>,
    /// Sums of batches on a device, f64 there, so that no step waits for them; laid out as by `reduce`.
    pending: Option<Tensor>,
}

impl EmgMetrics {
    /// `rate`: samples per second of the recording. `mean_pose`: the training data's mean angles `[P]` in radians, to
    /// compare with.
    pub fn new(joints: usize, rate: f64, mean_pose: Option<&[f64]>) -> Self {
        let mean_pose = mean_pose.map(|pose| Tensor::from_slice(pose).to_kind(Kind::Float));
        Self { rate, joints, mean_pose, sums: vec![0.0; JOINT + joints], pending: None }
    }

    /// Contribution of one batch as one tensor: the loss, |Δ¹e|, |Δ²e|, |Δ³e|, |target − mean pose|, then |e| per
    /// joint.
    fn reduce(&self, target: &Tensor, output: &Output) -> Tensor {
        let error = output.prediction.to_kind(Kind::Float) - target;
        let time = error.size()[1];
        let per_joint = error.abs().sum_dim_intlist([0, 1].as_slice(), false, Kind::Float);
        let mut parts = vec![output.loss.to_kind(Kind::Float)];
        let mut difference = error;
        for order in 1..=3 {
            if time <= order {
                parts.push(Tensor::zeros([], (Kind::Float, difference.device())));
                continue;
            }
            difference = difference.narrow(1, 1, time - order) - difference.narrow(1, 0, time - order);
            parts.push(absolute_sum(&difference));
        }
        parts.push(match &self.mean_pose {
            Some(pose) => absolute_sum(&(target - pose)),
            None => Tensor::zeros([], (Kind::Float, target.device())),
        });
        Tensor::cat(&[Tensor::stack(&parts, 0), per_joint], 0)
    }
}

/// Adds what `reduce` gave, its loss times the number of samples, to its places among the sums.
fn add_reduced(sums: &mut [f64], reduced: &Tensor) {
    // It is a flat f64 tensor, so this cannot fail.
    let Ok(reduced) = Vec::<f64>::try_from(reduced) else {
        return;
    };
    sums[LOSS] += reduced[0];
    for (order, sum) in reduced[1..=NAMES.len()].iter().enumerate() {
        sums[DERIVATIVES + 2 * order] += sum;
    }
    sums[BASELINE] += reduced[4];
    for (sum, part) in sums[JOINT..].iter_mut().zip(&reduced[5..]) {
        *sum += part;
    }
}

fn absolute_sum(x: &Tensor) -> Tensor {
    x.abs().sum(Kind::Float)
}

impl Metrics for EmgMetrics {
    fn update(&mut self, batch: &Batch, output: &Output) {
        let target = &batch.fields[1];
        let shape = target.size();
        let [samples, time] = [shape[0] as f64, shape[1] as f64];
        self.mean_pose = self.mean_pose.take().map(|pose| pose.to_device(target.device()));
        let mut reduced = no_grad(|| self.reduce(target, output)).to_kind(Kind::Double);
        self.sums[SAMPLES] += samples;
        self.sums[FRAMES] += samples * time;
        for order in 0..NAMES.len() {
            let count = samples * (time - 1.0 - order as f64).max(0.0) * self.joints as f64;
            self.sums[DERIVATIVES + 2 * order + 1] += count;
        }
        let _ = reduced.narrow(0, 0, 1).multiply_scalar_(samples);
        if reduced.device().is_cuda() {
            if let Some(before) = self.pending.take() {
                reduced += before;
            }
            self.pending = Some(reduced);
        } else {
            add_reduced(&mut self.sums, &reduced);
        }
    }

    fn sums(&self) -> Vec<f64> {
        let mut sums = self.sums.clone();
        if let Some(pending) = &self.pending {
            add_reduced(&mut sums, pending);
        }
        sums
    }

    fn values(&self, sums: &[f64]) -> Vec<(String, f64)> {
        let (samples, frames) = (sums[SAMPLES], sums[FRAMES]);
        if samples == 0.0 || frames == 0.0 {
            return Vec::new();
        }
        let joint = &sums[JOINT..];
        let over = |joints: &[usize]| joints.iter().map(|&j| joint[j]).sum::<f64>() / (frames * joints.len() as f64);
        let all: Vec<usize> = (0..joint.len()).collect();
        let mae = over(&all);
        let mut values = vec![
            ("loss".to_owned(), sums[LOSS] / samples),
            ("mae_rad".to_owned(), mae),
            ("mae_deg".to_owned(), mae.to_degrees()),
        ];
        if joint.len() == joints::JOINTS {
            let groups = joints::groups().into_iter();
            values.extend(groups.map(|(name, joints)| (format!("mae_deg_{name}"), over(&joints).to_degrees())));
        }
        for (order, name) in NAMES.iter().enumerate() {
            let [sum, count] = [sums[DERIVATIVES + 2 * order], sums[DERIVATIVES + 2 * order + 1]];
            if count > 0.0 {
                values.push(((*name).to_owned(), sum / count * self.rate.powi(order as i32 + 1)));
            }
        }
        if self.mean_pose.is_some() {
            let baseline = sums[BASELINE] / (frames * joint.len() as f64);
            values.push(("mean_pose_mae_deg".to_owned(), baseline.to_degrees()));
            values.push(("vs_mean_pose".to_owned(), mae / baseline));
        }
        values
    }

    fn headline(&self) -> &[&str] {
        match self.mean_pose {
            Some(_) => &["mae_deg", "vs_mean_pose"],
            None => &["mae_deg"],
        }
    }

    fn reset(&mut self) {
        self.pending = None;
        self.sums.fill(0.0);
    }
}
