#![doc = include_str!("README.md")]
//!
//! # Parts
//!
//! [`data`] finds images and labels, keeps their bytes in the page cache, and makes augmented samples. [`model`] is the
//! detector, [`loss`] its loss with the assignment of anchors to objects, [`detect`] finds objects in its output,
//! [`measure`] judges them. [`net`] and [`metrics`] are what the trainer runs; [`report`] draws and writes.

pub mod data;
pub mod detect;
pub mod groups;
pub mod loss;
pub mod measure;
pub mod metrics;
pub mod model;
pub mod net;
mod predict;
pub mod report;

use super::outline::Outline;
use super::pass::{Opening, Pass};
use super::{
    ConvertRequest, Datasets, Drawing, Gallery, GroupSpec, Journal, Metrics, Model, ParamInfo, SampleRequest, Task,
    Team,
};
use crate::data::DataError;
use crate::data::loader::train_order;
use data::YoloFacts;
use metrics::YoloMetrics;
use net::YoloNet;
use report::{BoxGallery, YoloJournal};
use spec::config::Config;
use spec::task::yolo::YoloConfig;
use std::path::Path;
use std::sync::Arc;
use tch::nn;

/// Samples of `images/train.png`.
const SAMPLES_DRAWN: u64 = 9;

/// The task, as the registry knows it.
pub struct Yolo;

impl Task for Yolo {
    fn name(&self) -> &'static str {
        "yolo"
    }

    /// Without images for a test, the best weights are measured on those of validation once more, as the package does.
    fn open(&self, config: &Config, team: &Team, index_dir: &Path) -> Result<Datasets, DataError> {
        let mut datasets = data::open(config, team, index_dir)?;
        if datasets.test.is_empty() {
            datasets.test = Arc::clone(&datasets.val);
            datasets
                .notes
                .push("no images for a test: the best weights are measured on the validation images again".into());
        }
        Ok(datasets)
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

    fn predictor(&self, opening: &Opening) -> Result<Pass, DataError> {
        predict::predictor(opening)
    }

    fn model(&self, config: &Config, datasets: &Datasets, vs: &nn::Path) -> Result<Box<dyn Model>, DataError> {
        let facts = facts(datasets)?;
        Ok(Box::new(YoloNet::new(&config.section::<YoloConfig>(), facts.nc(), facts.most, vs)))
    }

    fn metrics(&self, _config: &Config, datasets: &Datasets) -> Result<Box<dyn Metrics>, DataError> {
        Ok(Box::new(YoloMetrics::new(&facts(datasets)?.names)))
    }

    /// Sizes that shape the parameters, besides the data set's classes, which are compared tensor by tensor.
    fn architecture(&self, config: &Config) -> String {
        let size = config.section::<YoloConfig>().size();
        serde_json::json!({ "depth": size.depth, "width": size.width, "max_channels": size.max_channels }).to_string()
    }

    fn groups(&self, config: &Config, parameters: &[ParamInfo], global_batch: u64) -> Vec<GroupSpec> {
        groups::groups(config, parameters, global_batch)
    }

    fn settle(&self, config: &mut Config, datasets: &Datasets, global_batch: u64) -> Vec<String> {
        let classes = facts(datasets).map_or(0, YoloFacts::nc);
        groups::settle(config, datasets.train.len(), classes, global_batch)
    }

    /// The class branches, whose shapes are those of the classes.
    fn begins_anew(&self, name: &str) -> bool {
        name.starts_with(groups::CLASS_BRANCHES)
    }

    fn gallery(&self, config: &Config, datasets: &Datasets) -> Option<Box<dyn Gallery>> {
        let names = facts(datasets).ok()?.names.clone();
        (config.log.images > 0).then(|| -> Box<dyn Gallery> { Box::new(BoxGallery::new(config.log.images, names)) })
    }

    /// `labels.png` with the other plots, and the first samples of training with the pictures.
    fn drawing(&self, config: &Config, datasets: &Datasets) -> Option<Drawing> {
        let facts = facts(datasets).ok()?.clone();
        let order = train_order(datasets.train.as_ref(), &config.data, config.seed).ok()?.epoch(0);
        let first: Vec<u64> = (0..SAMPLES_DRAWN).map_while(|at| order.at(at)).collect();
        let (train, plots) = (Arc::clone(&datasets.train), config.log.plots);
        let draws = config.log.images > 0 && !first.is_empty();
        Some(Box::new(move || {
            let mut drawn = Vec::new();
            if plots {
                drawn.push(("labels.png".to_owned(), report::labels(&facts.labels, &facts.names)));
            }
            if draws {
                drawn.push(("images/train.png".to_owned(), report::samples(train.as_ref(), &first, &facts.names)));
            }
            drawn
        }))
    }

    fn journal(&self, config: &Config, run_dir: &Path) -> Option<Box<dyn Journal>> {
        Some(Box::new(YoloJournal::new(run_dir, config.log.plots)))
    }

    fn convert(&self, request: &ConvertRequest) -> Result<Vec<String>, DataError> {
        data::convert::convert(request)
    }

    fn sample_data(&self, request: &SampleRequest) -> Result<(), DataError> {
        data::sample::write(request)
    }
}

/// Facts that [`data`] found.
///
/// # Errors
/// The data sets are another task's.
fn facts(datasets: &Datasets) -> Result<&YoloFacts, DataError> {
    let facts = datasets.facts.as_ref().and_then(|facts| facts.downcast_ref::<YoloFacts>());
    facts.ok_or_else(|| DataError::NothingUsable("facts on the images are missing: open them as task yolo".into()))
}

#[cfg(test)]
mod tests;
