//! The user's model and metrics as the loop sees them.

use super::host::{Host, Passed};
use super::optimizer::PythonOptimizer;
use crate::task::{Batch, Metrics, Model, Output, OwnOptimizer};
use crate::torch::TorchError;
use spec::config::Config;
use spec::task::python::PythonConfig;
use std::sync::{Mutex, PoisonError};
use tch::{Device, Kind, Tensor};

/// Sums of the last forward pass that was measured, for [`Measures`], which is asked right after it.
static MEASURED: Mutex<Option<Vec<f64>>> = Mutex::new(None);

fn measured() -> std::sync::MutexGuard<'static, Option<Vec<f64>>> {
    MEASURED.lock().unwrap_or_else(PoisonError::into_inner)
}

pub struct PythonModel {
    host: &'static dyn Host,
    /// Training measures as well.
    online: bool,
    /// `train.learning_rate` and `train.weight_decay`, where the user has an optimizer of his own.
    optimizer: Option<[f64; 2]>,
    /// `python.compile`.
    compiles: bool,
}

impl PythonModel {
    pub fn new(host: &'static dyn Host, config: &Config) -> Self {
        let (python, train): (PythonConfig, _) = (config.section(), &config.train);
        let optimizer = python.optimizer.map(|_| [train.learning_rate, train.weight_decay]);
        Self { host, online: train.compute_metrics_online, optimizer, compiles: python.compile }
    }
}

impl Model for PythonModel {
    /// An error is a loss that is not finite: the trainer calls [`Model::try_forward`].
    fn forward(&self, batch: &Batch, train: bool) -> Output {
        self.try_forward(batch, train).unwrap_or_else(|error| {
            tracing::error!("{error}");
            let nothing = |value: f64| Tensor::full([], value, (Kind::Float, Device::Cpu));
            Output::new(nothing(f64::NAN), nothing(f64::NAN))
        })
    }

    fn try_forward(&self, batch: &Batch, train: bool) -> Result<Output, TorchError> {
        let Passed { loss, prediction, sums } = self.host.forward(&batch.fields, train, !train || self.online)?;
        *measured() = sums;
        Ok(Output::new(loss, prediction))
    }

    fn backward(&self, loss: &Tensor) -> Result<(), TorchError> {
        Ok(self.host.backward(loss)?)
    }

    fn try_predict(&self, batch: &Batch) -> Result<Tensor, TorchError> {
        Ok(self.host.predict(&batch.fields)?)
    }

    fn own_optimizer(&self) -> Result<Option<Box<dyn OwnOptimizer>>, TorchError> {
        let Some([rate, weight_decay]) = self.optimizer else { return Ok(None) };
        Ok(Some(Box::new(PythonOptimizer::new(self.host, rate, weight_decay)?)))
    }

    fn compiles(&self) -> bool {
        self.compiles
    }

    /// The host's part of a pass is the user's Python, which a recorded graph would leave out.
    fn reads_step(&self) -> bool {
        true
    }
}

/// The mean loss, and the user's metrics: each a sum and a count.
pub struct Measures {
    names: Vec<String>,
    /// Sum of losses, samples, then sum and count of each metric.
    sums: Vec<f64>,
}

impl Measures {
    pub fn new(names: Vec<String>) -> Self {
        let sums = vec![0.0; 2 + 2 * names.len()];
        Self { names, sums }
    }
}

impl Metrics for Measures {
    fn update(&mut self, batch: &Batch, output: &Output) {
        let samples = batch.len() as f64;
        self.sums[0] += output.loss.double_value(&[]) * samples;
        self.sums[1] += samples;
        for (sum, part) in self.sums[2..].iter_mut().zip(measured().take().unwrap_or_default()) {
            *sum += part;
        }
    }

    fn sums(&self) -> Vec<f64> {
        self.sums.clone()
    }

    fn values(&self, sums: &[f64]) -> Vec<(String, f64)> {
        let names = std::iter::once("loss").chain(self.names.iter().map(String::as_str));
        let pairs = sums.as_chunks::<2>().0.iter();
        names.zip(pairs).map(|(name, [sum, count])| (name.to_owned(), sum / count)).collect()
    }

    fn reset(&mut self) {
        self.sums.fill(0.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_sums_over_counts() {
        let mut measures = Measures::new(vec!["acc".into()]);
        for (loss, sums) in [(1.0, vec![2.0, 4.0]), (4.0, vec![1.0, 2.0])] {
            *measured() = Some(sums);
            let value = Tensor::from(loss);
            measures.update(&Batch::new(vec![], vec![0, 1]), &Output::new(value.shallow_clone(), value));
        }
        assert_eq!(measures.values(&measures.sums()), [("loss".to_owned(), 2.5), ("acc".to_owned(), 0.5)]);
        measures.reset();
        assert_eq!(measures.sums(), [0.0; 4]);
    }
}
