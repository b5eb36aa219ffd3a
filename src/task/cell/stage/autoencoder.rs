//! Stage `autoencoder`: trains encoder and decoder by the squared error of expression.
//!
//! | metric | meaning |
//! |---|---|
//! | `loss` | mean squared error over all entries |
//! | `mse_expressed`, `mse_silent` | the same over entries that are above 0, and over the others |
//! | `vs_zero` | `loss` over that of predicting 0 everywhere |

use super::super::densify::{Scale, dense};
use super::super::model::Autoencoder;
use super::sums::{Sums, ratio};
use crate::task::{Batch, Metrics, Model, Output};
use tch::{Kind, Tensor, no_grad};

/// Sums of a cell in a prediction: squared error, that of expressed entries, their number, squares, entries.
const COLUMNS: i64 = 5;

/// The autoencoder with its loss.
pub struct AutoencoderNet {
    pub net: Autoencoder,
    pub genes: i64,
    pub scale: Scale,
}

impl Model for AutoencoderNet {
    fn forward(&self, batch: &Batch, train: bool) -> Output {
        let x = dense(batch, self.genes, &self.scale);
        let draws = train.then(|| batch.draws());
        let reconstruction = self.net.forward(&x, draws.as_ref());
        let loss = Autoencoder::loss(&reconstruction, &x);
        let prediction = no_grad(|| errors(&reconstruction.detach(), &x));
        Output::new(loss, prediction)
    }

    // Dropout draws by sample.
    fn reads_step(&self) -> bool {
        true
    }
}

/// `[B, COLUMNS]`.
fn errors(reconstruction: &Tensor, x: &Tensor) -> Tensor {
    let squares = (reconstruction.to_kind(Kind::Float) - x).square();
    let expressed = x.gt(0.0).to_kind(Kind::Float);
    let sum = |values: &Tensor| values.sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
    let entries = Tensor::full([x.size()[0]], x.size()[1], (Kind::Float, x.device()));
    let parts = [sum(&squares), sum(&(&squares * &expressed)), sum(&expressed), sum(&x.square()), entries];
    Tensor::stack(&parts, 1)
}

/// Sums of [`errors`], and of the loss by cells.
pub struct AutoencoderMetrics(Sums);

impl Default for AutoencoderMetrics {
    fn default() -> Self {
        Self::new()
    }
}

impl AutoencoderMetrics {
    pub fn new() -> Self {
        Self(Sums::new(COLUMNS as usize))
    }
}

impl Metrics for AutoencoderMetrics {
    fn update(&mut self, _: &Batch, output: &Output) {
        self.0.add(&output.prediction.sum_dim_intlist([0i64].as_slice(), false, Kind::Double));
    }

    fn sums(&self) -> Vec<f64> {
        self.0.sums()
    }

    fn values(&self, sums: &[f64]) -> Vec<(String, f64)> {
        let [squares, of_expressed, expressed, zero, entries] = sums else { return Vec::new() };
        let values = [
            ("loss", ratio(*squares, *entries)),
            ("mse_expressed", ratio(*of_expressed, *expressed)),
            ("mse_silent", ratio(squares - of_expressed, entries - expressed)),
            ("vs_zero", ratio(*squares, *zero)),
        ];
        values.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
    }

    fn headline(&self) -> &[&str] {
        &["vs_zero", "mse_expressed"]
    }

    fn reset(&mut self) {
        self.0.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_expressed_and_silent_entries_are_told_apart() {
        let x = Tensor::from_slice(&[0f32, 2.0, 0.0, 4.0]).view([2, 2]);
        let y = Tensor::from_slice(&[1f32, 2.0, 3.0, 1.0]).view([2, 2]);
        let mut metrics = AutoencoderMetrics::new();
        metrics.update(&Batch::new(vec![], vec![0, 1]), &Output::new(Tensor::from(0.0), errors(&y, &x)));
        let values: std::collections::BTreeMap<String, f64> = metrics.values(&metrics.sums()).into_iter().collect();
        assert_eq!(values["loss"], 19.0 / 4.0);
        assert_eq!(values["mse_expressed"], 4.5);
        assert_eq!(values["mse_silent"], 5.0);
        assert_eq!(values["vs_zero"], 19.0 / 20.0);
        metrics.reset();
        assert!(metrics.values(&metrics.sums()).is_empty());
    }
}
