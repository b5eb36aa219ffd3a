#![doc = include_str!("README.md")]
//!
//! # Parts
//!
//! [`data`] reads cells and filters genes; [`densify`] makes expression of a batch on its device. [`model`] has the three
//! networks, [`mod@diffusion`] the process, [`stage`] what each stage trains or writes, [`latents`] what lies between them.
//! [`quality`] and [`report`] compare generated cells with real ones.

pub mod data;
pub mod densify;
pub mod diffusion;
pub mod latents;
pub mod model;
mod open;
mod picture;
mod predict;
pub mod quality;
mod read;
pub mod report;
pub mod stage;
#[cfg(test)]
mod tests;

use super::outline::Outline;
use super::pass::{Opening, Pass};
use super::{Datasets, Metrics, Model, SampleRequest, Task, Team};
use crate::data::DataError;
use spec::config::Config;
use spec::task::cell::{CLASSIFIER, CellConfig, DIFFUSION};
use stage::autoencoder::AutoencoderMetrics;
use stage::classifier::ClassifierMetrics;
use stage::diffusion::DiffusionMetrics;
use std::path::Path;
use tch::nn;

/// The task, as the registry knows it.
pub struct Cell;

impl Task for Cell {
    fn name(&self) -> &'static str {
        "cell"
    }

    fn open(&self, config: &Config, team: &Team, index_dir: &Path) -> Result<Datasets, DataError> {
        open::open(config, team, index_dir)
    }

    fn outline(&self, config: &Config, index_dir: &Path) -> Result<Outline, DataError> {
        open::outline(config, index_dir)
    }

    fn pass(&self, opening: &Opening) -> Result<Pass, DataError> {
        open::pass(opening)
    }

    fn predictor(&self, opening: &Opening) -> Result<Pass, DataError> {
        predict::predictor(opening)
    }

    fn model(&self, config: &Config, datasets: &Datasets, vs: &nn::Path) -> Result<Box<dyn Model>, DataError> {
        open::model(config, datasets, vs)
    }

    fn metrics(&self, config: &Config, _: &Datasets) -> Result<Box<dyn Metrics>, DataError> {
        let diffusion = config.section::<CellConfig>().diffusion;
        Ok(match open::stage(config) {
            DIFFUSION => Box::new(DiffusionMetrics::new(!diffusion.use_kl, diffusion.use_kl || diffusion.learn_sigma)),
            CLASSIFIER => Box::new(ClassifierMetrics::new()),
            _ => Box::new(AutoencoderMetrics::new()),
        })
    }

    /// Sizes of the stage's networks alone: the process and dropout change no parameter.
    fn architecture(&self, config: &Config) -> String {
        let CellConfig { autoencoder, unet, classifier, diffusion, .. } = config.section();
        let latent = autoencoder.latent;
        match open::stage(config) {
            DIFFUSION => {
                format!("unet {:?} time {:?} latent {latent} sigma {}", unet.hidden, unet.time, diffusion.learn_sigma)
            }
            CLASSIFIER => format!("classifier {:?} time {:?} latent {latent}", classifier.hidden, classifier.time),
            _ => format!("autoencoder {:?} latent {latent}", autoencoder.hidden),
        }
    }

    fn sample_data(&self, request: &SampleRequest) -> Result<(), DataError> {
        data::sample::write(request)
    }
}

/// Streams of random numbers: see [`super::draw`].
mod stream {
    /// The noise step of a training sample.
    pub const STEP: u64 = 1;
    /// The noise of a training sample.
    pub const NOISE: u64 = 2;
    /// Noise that a generated cell begins as, and fresh noise of each step.
    pub const START: u64 = 3;
    pub const FRESH: u64 = 4;
    /// Dropout of the first layer; those of the others follow.
    pub const DROPOUT: u64 = 16;
}
