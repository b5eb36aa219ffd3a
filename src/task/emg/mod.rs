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
pub mod resample;
pub mod sample;
pub mod tds;
#[cfg(test)]
mod tests;

pub use metrics::EmgMetrics;
pub use model::EmgNet;

use super::outline::Outline;
use super::{Datasets, Metrics, Model, SampleRequest, Task, Team};
use crate::data::DataError;
use crate::data::source::hdf5::write::Storage;
use spec::config::Config;
use spec::task::emg::{EmgConfig, EmgModel};
use std::path::Path;
use tch::nn;

/// The task, as the registry knows it.
pub struct Emg;

impl Task for Emg {
    fn name(&self) -> &'static str {
        "emg"
    }

    fn open(&self, config: &Config, team: &Team, index_dir: &Path) -> Result<Datasets, DataError> {
        let opened = data::open_datasets(&data::WindowKeys::of(config), config.seed, team, index_dir)?;
        Ok(Datasets { baseline: Some(opened.mean_pose), ..opened.datasets })
    }

    fn outline(&self, config: &Config, _index_dir: &Path) -> Result<Outline, DataError> {
        outline::outline(config)
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
