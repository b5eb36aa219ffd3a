//! Task `yolo`: objects in images.
//!
//! # Parts
//!
//! [`data`] finds images and labels, keeps their bytes in the page cache, and makes augmented samples.

pub mod data;

use super::outline::Outline;
use super::pass::{Opening, Pass};
use super::{ConvertRequest, Datasets, Metrics, Model, SampleRequest, Task, Team};
use crate::data::DataError;
use spec::config::Config;
use std::path::Path;
use tch::nn;

/// The task, as the registry knows it.
pub struct Yolo;

impl Task for Yolo {
    fn name(&self) -> &'static str {
        "yolo"
    }

    fn open(&self, config: &Config, team: &Team, index_dir: &Path) -> Result<Datasets, DataError> {
        data::open(config, team, index_dir)
    }

    fn outline(&self, config: &Config, index_dir: &Path) -> Result<Outline, DataError> {
        data::outline(config, index_dir)
    }

    fn predict_outline(&self, config: &Config, _index_dir: &Path) -> Result<Outline, DataError> {
        data::predict_outline(config)
    }

    fn evaluation(&self, opening: &Opening) -> Result<Datasets, DataError> {
        data::evaluation(opening)
    }

    fn predictor(&self, _opening: &Opening) -> Result<Pass, DataError> {
        Err(DataError::NoPass { task: "yolo", what: "has no predictor yet" })
    }

    fn model(&self, _config: &Config, _datasets: &Datasets, _vs: &nn::Path) -> Result<Box<dyn Model>, DataError> {
        Err(DataError::NoPass { task: "yolo", what: "has no model yet" })
    }

    fn metrics(&self, _config: &Config, _datasets: &Datasets) -> Result<Box<dyn Metrics>, DataError> {
        Err(DataError::NoPass { task: "yolo", what: "has no metrics yet" })
    }

    fn convert(&self, request: &ConvertRequest) -> Result<Vec<String>, DataError> {
        data::convert::convert(request)
    }

    fn sample_data(&self, request: &SampleRequest) -> Result<(), DataError> {
        data::sample::write(request)
    }
}
