//! Task `emg`: surface EMG of the forearm to the joint angles of the hand.
//!
//! A sample is a window of `emg` `[T, 16]` (volts, or normalised) and `joint_angles` `[T, 20]` (radians) at 2 kHz.
//! The model is a TDS encoder with a decoder that feeds its pose back: see [`model`], [`tds`], [`decoder`].
//!
//! Parameters have the names and shapes of a PyTorch `state_dict`: `nn.LSTM` (`decoder.lstm.weight_ih_l0`, gates in the
//! order i, f, g, o), `nn.Linear`, `nn.LayerNorm`, `nn.Conv1d`, and `nn.Conv2d` with kernel `(1, k)` in the TDS blocks. A
//! file written by `safetensors.torch.save_file(model.state_dict(), path)` is read by `train.init_from`, and the
//! `model.safetensors` of a checkpoint by `load_state_dict`; `tests/benches/reference/emg_torch.py` is the model for it.

pub mod data;
pub mod decoder;
mod init;
pub mod joints;
pub mod loss;
pub mod metrics;
pub mod model;
mod outline;
mod predict;
pub mod resample;
mod rollout;
pub mod sample;
pub mod tds;
#[cfg(test)]
mod tests;

pub use metrics::EmgMetrics;
pub use model::EmgNet;

use super::outline::Outline;
use super::pass::{Opening, Pass};
use super::{Datasets, Metrics, Model, SampleRequest, Task, Team};
use crate::data::DataError;
use crate::data::source::hdf5::gather::Affine;
use crate::data::source::hdf5::write::Storage;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use spec::config::Config;
use spec::task::emg::{EmgConfig, EmgModel};
use std::path::Path;
use tch::nn;

/// The task, as the registry knows it.
pub struct Emg;

/// Facts on the training files that other data are evaluated with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Carried {
    /// Statistics of EMG, per channel, after rectification where that is on.
    mean: Vec<f32>,
    inverse_std: Vec<f32>,
    /// Radians.
    mean_pose: Vec<f64>,
}

impl Carried {
    fn of(data: &data::EmgData) -> Self {
        let Affine { mean, inverse_std } = data::affine(&data.statistics);
        Self { mean, inverse_std, mean_pose: data.mean_pose.clone() }
    }

    fn value(&self) -> Option<Value> {
        serde_json::to_value(self).ok()
    }

    /// # Errors
    /// The run kept none, or others.
    fn read(carried: Option<&Value>) -> Result<Self, DataError> {
        let way_out = "resume the run once (launch --resume RUN), which writes it";
        let value = carried.ok_or_else(|| {
            let text =
                format!("the run has no carried.json, which keeps the statistics of its training files: {way_out}");
            DataError::setting("emg.normalize", text)
        })?;
        serde_json::from_value(value.clone())
            .map_err(|e| DataError::setting("emg.normalize", format!("the run's carried.json: {e}: {way_out}")))
    }

    /// # Errors
    /// As [`Carried::read`].
    fn affine(carried: Option<&Value>) -> Result<Affine, DataError> {
        Self::read(carried).map(|Self { mean, inverse_std, .. }| Affine { mean, inverse_std })
    }
}

impl Task for Emg {
    fn name(&self) -> &'static str {
        "emg"
    }

    fn open(&self, config: &Config, team: &Team, index_dir: &Path) -> Result<Datasets, DataError> {
        let opened = data::open_datasets(&data::WindowKeys::of(config), config.seed, team, index_dir)?;
        let carried = Carried::of(&opened).value();
        Ok(Datasets { baseline: Some(opened.mean_pose), carried, ..opened.datasets })
    }

    fn evaluation(&self, opening: &Opening) -> Result<Datasets, DataError> {
        data::open_for_evaluation(&data::WindowKeys::of(opening.config), opening)
    }

    fn predictor(&self, opening: &Opening) -> Result<Pass, DataError> {
        predict::predictor(opening)
    }

    fn outline(&self, config: &Config, _index_dir: &Path) -> Result<Outline, DataError> {
        outline::outline(config)
    }

    fn predict_outline(&self, config: &Config, _index_dir: &Path) -> Result<Outline, DataError> {
        outline::predict_outline(config)
    }

    fn model(&self, config: &Config, _: &Datasets, vs: &nn::Path) -> Result<Box<dyn Model>, DataError> {
        let emg: EmgConfig = config.section();
        let loss = loss::Loss::of(&config.train.loss_type, emg.mae_weight).map_err(DataError::Other)?;
        Ok(model::build(&emg.model, loss, emg.window_size, vs))
    }

    fn architecture(&self, config: &Config) -> String {
        let model: EmgModel = config.section::<EmgConfig>().model;
        serde_json::to_value(model).unwrap_or_default().to_string()
    }

    fn metrics(&self, config: &Config, datasets: &Datasets) -> Result<Box<dyn Metrics>, DataError> {
        let EmgModel { output_size, original_sampling_rate: rate, .. } = config.section::<EmgConfig>().model;
        Ok(Box::new(EmgMetrics::new(output_size, rate, datasets.baseline.as_deref())))
    }

    fn sample_data(&self, request: &SampleRequest) -> Result<(), DataError> {
        let mut spec = sample::SampleSpec { seed: request.seed, ..sample::SampleSpec::default() };
        match request.layout.as_deref().unwrap_or("gzip") {
            "gzip" => {}
            "contiguous" => {
                spec.storage = Storage { chunk_rows: None, gzip: None, shuffle: false, ..spec.storage };
            }
            other => {
                let problem = format!("--layout {other} is unknown: choose gzip or contiguous");
                return Err(DataError::setting("--layout", problem));
            }
        }
        spec.sessions = request.sessions.unwrap_or(spec.sessions);
        spec.seconds = request.seconds.unwrap_or(spec.seconds);
        sample::write_sample_data(&request.out, &spec)
    }
}
