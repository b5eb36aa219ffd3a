//! Stage `classifier`: trains the classifier on noised latents of labelled cells.
//!
//! | metric | meaning |
//! |---|---|
//! | `loss` | mean cross-entropy |
//! | `accuracy` | share of cells whose class has the largest logit |
//! | `accuracy_q0` … `accuracy_q3`, `loss_q*` | by quartile of the noise step below `start_guide_time`, q0 the least noise |

use super::super::diffusion::Diffusion;
use super::super::latents::widened;
use super::super::model::Classifier;
use super::super::stream;
use super::sums::{Sums, ratio};
use crate::task::{Batch, Metrics, Model, Output};
use tch::{Kind, Reduction, Tensor, no_grad};

const QUARTILES: i64 = 4;
/// Sums per quartile: samples, losses, right answers.
const COLUMNS: usize = 3;

/// The classifier with the noise that it is trained on.
pub struct ClassifierNet {
    pub net: Classifier,
    pub process: Diffusion,
    /// Kept steps that noise is drawn from; 0: clean latents.
    pub below: i64,
    pub latent: i64,
}

impl ClassifierNet {
    /// Kept steps whose number among all is below `start`.
    pub fn steps_below(process: &Diffusion, start: usize) -> i64 {
        process.places().iter().filter(|place| **place < start).count() as i64
    }
}

impl Model for ClassifierNet {
    fn forward(&self, batch: &Batch, train: bool) -> Output {
        let (x0, y) = (widened(&batch.fields[0]), &batch.fields[1]);
        let draws = batch.draws();
        let (x, t) = if self.below > 0 {
            let t = (draws.uniform(stream::STEP) * self.below as f64).floor().to_kind(Kind::Int64);
            (self.process.noised(&x0, &t, &draws.normals(stream::NOISE, self.latent)), t)
        } else {
            (x0, y.zeros_like())
        };
        let logits = self.net.forward(&x, &self.process.network_time(&t), train.then_some(&draws));
        let logits = logits.to_kind(Kind::Float);
        let losses = logits.cross_entropy_loss::<Tensor>(y, None, Reduction::None, -100, 0.0);
        let loss = losses.mean(Kind::Float);
        no_grad(|| {
            let right = logits.argmax(-1, false).eq_tensor(y).to_kind(Kind::Float);
            let quartile = (&t * QUARTILES).divide_scalar_mode(self.below.max(1), "floor").to_kind(Kind::Float);
            let prediction = Tensor::stack(&[quartile, losses.detach(), right], 1);
            Output::new(loss, prediction)
        })
    }

    fn reads_step(&self) -> bool {
        true
    }
}

/// Sums per quartile.
pub struct ClassifierMetrics(Sums);

impl Default for ClassifierMetrics {
    fn default() -> Self {
        Self::new()
    }
}

impl ClassifierMetrics {
    pub fn new() -> Self {
        Self(Sums::new(QUARTILES as usize * COLUMNS))
    }
}

impl Metrics for ClassifierMetrics {
    fn update(&mut self, _: &Batch, output: &Output) {
        let prediction = output.prediction.to_kind(Kind::Double);
        let quartile = prediction.select(1, 0);
        let of = quartile.to_kind(Kind::Int64).clamp(0, QUARTILES - 1).one_hot(QUARTILES).to_kind(Kind::Double);
        let columns = Tensor::cat(&[quartile.ones_like().unsqueeze(1), prediction.narrow(1, 1, 2)], 1);
        self.0.add(&of.transpose(0, 1).matmul(&columns));
    }

    fn sums(&self) -> Vec<f64> {
        self.0.sums()
    }

    fn values(&self, sums: &[f64]) -> Vec<(String, f64)> {
        let rows: Vec<&[f64]> = sums.chunks_exact(COLUMNS).collect();
        let mut values = Vec::new();
        for (column, name) in [(1, "loss"), (2, "accuracy")] {
            let total = |column: usize| rows.iter().map(|row| row[column]).sum::<f64>();
            values.extend(ratio(total(column), total(0)).map(|mean| (name.to_owned(), mean)));
            let of = rows.iter().enumerate().filter_map(|(q, row)| Some((q, ratio(row[column], row[0])?)));
            values.extend(of.map(|(q, mean)| (format!("{name}_q{q}"), mean)));
        }
        values
    }

    fn headline(&self) -> &[&str] {
        &["accuracy", "accuracy_q0", "accuracy_q3"]
    }

    fn reset(&mut self) {
        self.0.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accuracy_is_told_apart_by_quartile_of_the_step() {
        let prediction = Tensor::from_slice(&[0f32, 1.0, 1.0, 0.0, 3.0, 0.0, 3.0, 2.0, 1.0]).view([3, 3]);
        let mut metrics = ClassifierMetrics::new();
        metrics.update(&Batch::new(vec![], vec![0, 1, 2]), &Output::new(Tensor::from(0.0), prediction));
        let values: std::collections::BTreeMap<String, f64> = metrics.values(&metrics.sums()).into_iter().collect();
        assert_eq!([values["accuracy"], values["accuracy_q0"], values["accuracy_q3"]], [2.0 / 3.0, 0.5, 1.0]);
        assert_eq!([values["loss"], values["loss_q0"]], [2.0, 2.0]);
    }
}
