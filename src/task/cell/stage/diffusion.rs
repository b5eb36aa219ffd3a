//! Stage `diffusion`: trains Cell_Unet on latents.
//!
//! | metric | meaning |
//! |---|---|
//! | `loss` | mean of the loss over samples, weighted by `cell.diffusion.schedule_sampler` |
//! | `mse`, `vb` | its parts, where it has them: squared error of the prediction, variational bound in bits |
//! | `loss_q0` … `loss_q3`, `mse_q*`, `vb_q*` | the same by quartile of the noise step, q0 the least noise |

use super::super::diffusion::{Diffusion, Losses, StepChoice};
use super::super::latents::widened;
use super::super::model::CellUnet;
use super::super::stream;
use super::sums::{Sums, ratio};
use crate::task::{Batch, Metrics, Model, Output};
use tch::{Kind, Tensor, no_grad};

const QUARTILES: i64 = 4;
/// Parts of the loss in a prediction: loss, mse, vb.
const PARTS: [&str; 3] = ["loss", "mse", "vb"];

/// The network with the process that it is trained on.
pub struct DiffusionNet {
    pub net: CellUnet,
    pub process: Diffusion,
    pub steps: StepChoice,
    pub latent: i64,
}

impl Model for DiffusionNet {
    fn forward(&self, batch: &Batch, train: bool) -> Output {
        let x0 = widened(&batch.fields[0]);
        let draws = batch.draws();
        let (t, weights) = self.steps.draw(&draws, train);
        let noise = draws.normals(stream::NOISE, self.latent);
        let dropout = train.then_some(&draws);
        let network = |x: &Tensor, time: &Tensor| self.net.forward(x, time, dropout);
        let losses = self.process.losses(&network, &x0, &t, &noise);
        let loss = (&losses.loss * &weights).mean(Kind::Float);
        no_grad(|| {
            let share = Tensor::stack(&[t.to_kind(Kind::Float), losses.loss.detach()], 1);
            let quartile = (&t * QUARTILES).divide_scalar_mode(self.process.steps() as i64, "floor");
            let output = Output::new(loss, parts(&losses, &weights, &quartile));
            if train && self.steps.listens() { output.sharing(share) } else { output }
        })
    }

    fn share_width(&self) -> usize {
        if self.steps.listens() { 2 } else { 0 }
    }

    fn shared(&self, values: &Tensor) {
        self.steps.hear(values);
    }

    fn state(&self) -> Vec<(String, Tensor)> {
        self.steps.state()
    }

    // Steps and noise are drawn by sample.
    fn reads_step(&self) -> bool {
        true
    }
}

/// `[B, 1 + 3]`: quartile, and the weighted parts of the loss; 0 where it lacks one.
fn parts(losses: &Losses, weights: &Tensor, quartile: &Tensor) -> Tensor {
    let weighted = |part: Option<&Tensor>| part.map_or_else(|| weights.zeros_like(), |part| part.detach() * weights);
    let parts = [Some(&losses.loss), losses.mse.as_ref(), losses.vb.as_ref()].map(weighted);
    let columns: Vec<Tensor> = std::iter::once(quartile.to_kind(Kind::Float)).chain(parts).collect();
    Tensor::stack(&columns, 1)
}

/// Sums per quartile: samples, then each part of the loss.
pub struct DiffusionMetrics {
    sums: Sums,
    /// Whether the loss has a squared error and a bound.
    has: [bool; 3],
}

impl DiffusionMetrics {
    /// For losses with a squared error, and with a bound.
    pub fn new(mse: bool, vb: bool) -> Self {
        Self { sums: Sums::new(QUARTILES as usize * (1 + PARTS.len())), has: [true, mse, vb] }
    }
}

impl Metrics for DiffusionMetrics {
    fn update(&mut self, _: &Batch, output: &Output) {
        let prediction = output.prediction.to_kind(Kind::Double);
        let quartile = prediction.select(1, 0).to_kind(Kind::Int64).clamp(0, QUARTILES - 1);
        let of = quartile.one_hot(QUARTILES).to_kind(Kind::Double);
        let ones = prediction.select(1, 0).ones_like().unsqueeze(1);
        let columns = Tensor::cat(&[ones, prediction.narrow(1, 1, PARTS.len() as i64)], 1);
        self.sums.add(&of.transpose(0, 1).matmul(&columns));
    }

    fn sums(&self) -> Vec<f64> {
        self.sums.sums()
    }

    fn values(&self, sums: &[f64]) -> Vec<(String, f64)> {
        let rows: Vec<&[f64]> = sums.chunks_exact(1 + PARTS.len()).collect();
        let mut values = Vec::new();
        for (part, name) in PARTS.iter().enumerate().filter(|(part, _)| self.has[*part]) {
            let total = |column: usize| rows.iter().map(|row| row[column]).sum::<f64>();
            values.extend(ratio(total(1 + part), total(0)).map(|mean| ((*name).to_owned(), mean)));
            let of = rows.iter().enumerate().filter_map(|(q, row)| Some((q, ratio(row[1 + part], row[0])?)));
            values.extend(of.map(|(q, mean)| (format!("{name}_q{q}"), mean)));
        }
        values
    }

    fn headline(&self) -> &[&str] {
        &["loss_q0", "loss_q3"]
    }

    fn reset(&mut self) {
        self.sums.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_are_told_apart_by_quartile_of_the_step() {
        let loss = Tensor::from_slice(&[4f32, 2.0, 1.0, 1.0]);
        let losses = Losses { loss: loss.shallow_clone(), mse: Some(loss), vb: None };
        let weights = Tensor::from_slice(&[1f32, 0.5, 2.0, 1.0]);
        let quartile = Tensor::from_slice(&[0i64, 0, 2, 3]);
        let mut metrics = DiffusionMetrics::new(true, false);
        let output = Output::new(Tensor::from(0.0), parts(&losses, &weights, &quartile));
        metrics.update(&Batch::new(vec![], vec![0, 1, 2, 3]), &output);
        let values: std::collections::BTreeMap<String, f64> = metrics.values(&metrics.sums()).into_iter().collect();
        assert_eq!(values["loss"], 2.0);
        assert_eq!([values["loss_q0"], values["loss_q2"], values["mse_q3"]], [2.5, 2.0, 1.0]);
        assert!(!values.contains_key("loss_q1") && !values.contains_key("vb"), "{values:?}");
    }
}
