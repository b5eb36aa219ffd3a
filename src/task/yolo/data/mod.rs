//! Images and their labels as a data set.

pub mod batch;
mod facts;
pub mod sample;

pub use facts::YoloFacts;

use crate::data::DataError;
use crate::task::outline::Outline;
use crate::task::pass::Opening;
use crate::task::{Datasets, Team};
use spec::config::Config;
use std::path::Path;

/// The data sets of a run, with [`YoloFacts`].
///
/// # Errors
/// No images, or labels that cannot be used.
pub fn open(_config: &Config, _team: &Team, _index_dir: &Path) -> Result<Datasets, DataError> {
    Err(DataError::NoPass { task: "yolo", what: "has no data yet" })
}

/// Shapes and sizes of the data set.
///
/// # Errors
/// As [`open`].
pub fn outline(_config: &Config, _index_dir: &Path) -> Result<Outline, DataError> {
    Err(DataError::NoPass { task: "yolo", what: "has no data yet" })
}

/// The same of images to predict for.
///
/// # Errors
/// As [`open`].
pub fn predict_outline(_config: &Config) -> Result<Outline, DataError> {
    Err(DataError::NoPass { task: "yolo", what: "has no data yet" })
}

/// Images with labels that are not those of training, all in `val`.
///
/// # Errors
/// As [`open`].
pub fn evaluation(_opening: &Opening) -> Result<Datasets, DataError> {
    Err(DataError::NoPass { task: "yolo", what: "has no data yet" })
}

/// Images without labels, in `val`, for predictions; in the order of their paths.
///
/// # Errors
/// As [`open`].
pub fn unlabelled(_opening: &Opening) -> Result<Datasets, DataError> {
    Err(DataError::NoPass { task: "yolo", what: "has no data yet" })
}
