//! A micro-batch, the numbers that a model draws for its samples, and the result of a forward pass.

use super::draw::Draws;
use tch::{Device, Tensor};

/// A micro-batch on the rank's device: one tensor `[B, ...]` per field of the data set.
pub struct Batch {
    pub fields: Vec<Tensor>,
    pub sample_ids: Vec<u64>,
    /// Optimizer steps done before the one that this batch is part of. 0 in evaluation, which therefore draws the same
    /// numbers each time.
    pub step: u64,
    /// The config's seed.
    pub seed: u64,
    /// Samples of the whole step over all ranks and micro-batches. The trainer takes the mean of the loss over them: a
    /// model whose gradients are to be sums multiplies its loss by this number.
    pub step_samples: u64,
}

impl Batch {
    /// A batch of step 0 with seed 0.
    pub fn new(fields: Vec<Tensor>, sample_ids: Vec<u64>) -> Self {
        let step_samples = sample_ids.len() as u64;
        Self { fields, sample_ids, step: 0, seed: 0, step_samples }
    }

    /// The same batch as part of step `step` of a run with this seed.
    pub fn at(self, step: u64, seed: u64) -> Self {
        Self { step, seed, ..self }
    }

    /// The same batch as part of a step of so many samples.
    pub fn of_step(self, step_samples: u64) -> Self {
        Self { step_samples, ..self }
    }

    pub fn len(&self) -> usize {
        self.sample_ids.len()
    }

    pub fn is_empty(&self) -> bool {
        self.sample_ids.is_empty()
    }

    /// Random numbers of this batch's samples, on the device of the fields.
    pub fn draws(&self) -> Draws {
        let device = self.fields.first().map_or(Device::Cpu, Tensor::device);
        let ids: Vec<i64> = self.sample_ids.iter().map(|&id| id as i64).collect();
        Draws::new(self.seed, self.step, Tensor::from_slice(&ids).to_device(device))
    }

    /// Uniform numbers in [0, 1), f32 `[B, count]`, on the device of the fields: for each sample a pure function of (seed,
    /// step, sample id, `stream`), so that every number of ranks and every micro-batch draws the same. Numbers for
    /// different purposes need different streams.
    pub fn uniform(&self, stream: u64, count: usize) -> Tensor {
        self.draws().uniforms(stream, count as i64)
    }

    /// Standard normal numbers, f32 `[B, count]`; otherwise as [`Batch::uniform`].
    pub fn normal(&self, stream: u64, count: usize) -> Tensor {
        self.draws().normals(stream, count as i64)
    }
}

/// Result of a forward pass.
pub struct Output {
    /// Scalar: mean of the loss over the micro-batch's samples.
    pub loss: Tensor,
    /// Prediction that the metrics read; no gradient is taken through it.
    pub prediction: Tensor,
    /// Numbers of each sample that all ranks get to see, f32 `[B, Model::share_width()]`; read in training alone.
    pub share: Option<Tensor>,
    /// See [`Output::divided_by`]; read in training alone.
    pub divisor: Option<Tensor>,
    /// Numbers of the pass that the metrics read besides, such as the terms of the loss, without gradient.
    pub terms: Option<Tensor>,
}

impl Output {
    /// A result that shares nothing.
    pub fn new(loss: Tensor, prediction: Tensor) -> Self {
        Self { loss, prediction, share: None, divisor: None, terms: None }
    }

    /// The same result with numbers of each sample for all ranks: see [`super::Model::shared`].
    pub fn sharing(self, share: Tensor) -> Self {
        Self { share: Some(share), ..self }
    }

    /// The same result of a model that [`super::Model::divides`]: its loss is this pass's part of a sum, and `divisor` (a
    /// scalar without gradient) its part of what that sum is divided by.
    pub fn divided_by(self, divisor: Tensor) -> Self {
        Self { divisor: Some(divisor), ..self }
    }

    /// The same result with numbers for the metrics.
    pub fn with_terms(self, terms: Tensor) -> Self {
        Self { terms: Some(terms), ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Kind;

    fn batch(ids: &[u64], step: u64) -> Batch {
        Batch::new(vec![], ids.to_vec()).at(step, 42)
    }

    fn rows(tensor: &Tensor) -> Vec<Vec<f32>> {
        Vec::<Vec<f32>>::try_from(tensor).unwrap()
    }

    #[test]
    fn a_sample_draws_the_same_in_every_batch_and_others_in_every_step_and_stream() {
        for draw in [Batch::uniform, Batch::normal] {
            let all = rows(&draw(&batch(&[3, 4, 5, 9], 7), 1, 3));
            assert_eq!(rows(&draw(&batch(&[9, 4], 7), 1, 3)), [all[3].clone(), all[1].clone()]);
            for other in [draw(&batch(&[3], 8), 1, 3), draw(&batch(&[3], 7), 2, 3)] {
                assert!(rows(&other)[0].iter().zip(&all[0]).all(|(a, b)| a != b));
            }
            // A longer row begins as a shorter one.
            assert_eq!(rows(&draw(&batch(&[3], 7), 1, 5))[0][..3], all[0][..]);
        }
        assert_eq!(batch(&[1, 2], 0).normal(0, 0).size(), [2, 0]);
    }

    #[test]
    fn numbers_are_distributed_as_they_should_be() {
        let ids: Vec<u64> = (0..500).collect();
        let normal = batch(&ids, 1).normal(0, 101).flatten(0, -1).to_kind(Kind::Double);
        let n = normal.numel() as f64;
        let moment = |power: i64| normal.pow_tensor_scalar(power).mean(Kind::Double).double_value(&[]);
        // Six standard deviations of each moment's estimate.
        for (power, expected, variance) in [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)] {
            let far = (moment(power) - expected).abs();
            assert!(far < 6.0 * f64::sqrt(variance / n), "moment {power} is off by {far}");
        }
        let uniform = batch(&ids, 1).uniform(0, 101);
        let (low, high) = (uniform.min().double_value(&[]), uniform.max().double_value(&[]));
        assert!(low >= 0.0 && high < 1.0 && low < 1e-3 && high > 0.999, "{low} to {high}");
        let mean = uniform.mean(Kind::Double).double_value(&[]);
        assert!((mean - 0.5).abs() < 6.0 * f64::sqrt(1.0 / 12.0 / n), "{mean}");
    }
}
