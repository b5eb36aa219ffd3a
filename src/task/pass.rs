//! Passes over data without training: predictions, and stages of a task that compute rather than train.
//!
//! ```text
//! Task::predictor / Task::pass ─► Pass: samples in the order of the inputs, outputs, their weights
//!      ranges of samples, divided among ranks ─► begin, take (batch by batch), end ─► a part, renamed when it is whole
//!      parts of an output ─► join ─► the output, renamed when it is whole ─► finish, on rank 0
//! ```
//!
//! Ranges depend on the data alone, never on the number of ranks. So a pass that was stopped continues on any number of them,
//! and outputs are equal.

use super::{Batch, Datasets, Team};
use crate::data::DataError;
use serde_json::Value;
use spec::config::Config;
use spec::contract::Weights;
use std::ops::Range;
use std::path::{Path, PathBuf};
use tch::Tensor;

/// Folders of the stages before the one that runs, in the order in which they ran.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StageInputs(Vec<(String, PathBuf)>);

impl StageInputs {
    /// Names and folders of stages that are finished.
    pub fn new(folders: Vec<(String, PathBuf)>) -> Self {
        Self(folders)
    }

    /// The folder of stage `name`.
    ///
    /// # Errors
    /// That stage has not run.
    pub fn folder(&self, name: &str) -> Result<&Path, DataError> {
        let found = self.0.iter().find(|(stage, _)| stage == name).map(|(_, folder)| folder.as_path());
        found.ok_or_else(|| {
            DataError::setting("stage", format!("stage {name} has not run yet: run it first, with --stage {name}"))
        })
    }
}

/// Data to evaluate or to predict for, or a stage's pass.
pub struct Opening<'a> {
    /// `data.dataset_path` is the data's.
    pub config: &'a Config,
    pub team: &'a Team<'a>,
    /// Where facts about unchanged files may be kept.
    pub index_dir: &'a Path,
    /// [`Datasets::carried`] of the training. `None`: the run is from before there were any.
    pub carried: Option<&'a Value>,
}

/// Weights for a part of the model: names below `prefix` in the model, without it in the checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct PartWeights {
    /// With the dot: `autoencoder.`; empty for the whole model.
    pub prefix: String,
    /// Folder of a run or stage, which has `checkpoints/`.
    pub folder: PathBuf,
    pub weights: Weights,
}

/// A pass, ready to run.
pub struct Pass {
    /// `val` holds the samples, in the order of the inputs. The model is built for these data sets.
    pub datasets: Datasets,
    /// Weights of the model. Empty: for a prediction those that the command line chose, for a stage none.
    pub weights: Vec<PartWeights>,
    pub predictor: Box<dyn Predictor>,
}

/// A file or a folder that a pass makes from a run of samples.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassOutput {
    /// Relative to the folder of outputs.
    pub name: PathBuf,
    /// Its samples. Those of all outputs follow each other without a gap.
    pub samples: Range<u64>,
}

/// Consecutive samples whose results are written together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassRange {
    /// Index into [`Predictor::outputs`].
    pub output: usize,
    pub samples: Range<u64>,
}

/// Makes outputs of what a model says of samples. Every rank has one; each gets whole ranges.
pub trait Predictor {
    /// All outputs, in the order of their samples.
    fn outputs(&self) -> &[PassOutput];
    /// Most samples of a range. They are lost when a pass is stopped within it, so a range should take seconds.
    fn range_samples(&self) -> u64;
    /// True if the part of an output's only range is the output itself, so that there is nothing to join.
    fn parts_are_outputs(&self) -> bool {
        false
    }
    /// Text that differs where parts of an earlier, stopped pass must not be used: what decides samples and outputs
    /// besides weights and config, such as names and sizes of input files.
    fn identity(&self) -> String;
    /// Begins a range, whose results go to `part`: a file or folder, which does not exist.
    ///
    /// # Errors
    /// It cannot be made, as in the methods below.
    fn begin(&mut self, range: &PassRange, part: &Path) -> Result<(), DataError>;
    /// Takes the prediction for the next samples of the range, in their order. Samples that the data set leaves out
    /// ([`crate::data::Dataset::is_left_out`]) are not among them.
    ///
    /// # Errors
    /// As [`Predictor::begin`].
    fn take(&mut self, batch: &Batch, prediction: &Tensor) -> Result<(), DataError>;
    /// Writes what is left of the range: the part is whole, and the caller renames it.
    ///
    /// # Errors
    /// As [`Predictor::begin`].
    fn end(&mut self) -> Result<(), DataError>;
    /// Makes an output at `into`, which does not exist and which the caller renames, from all its parts in their order. Parts
    /// may be moved, but a join that is repeated after a stop must find them: link or copy. By default they are copied
    /// one behind the other.
    ///
    /// # Errors
    /// As [`Predictor::begin`].
    fn join(&mut self, _output: &PassOutput, parts: &[PathBuf], into: &Path) -> Result<(), DataError> {
        concatenate(parts, into)
    }
    /// Last work on rank 0, when all outputs are in `folder`; returns lines for the user.
    ///
    /// # Errors
    /// As [`Predictor::begin`].
    fn finish(&mut self, _folder: &Path) -> Result<Vec<String>, DataError> {
        Ok(Vec::new())
    }
}

/// Files one behind the other.
fn concatenate(parts: &[PathBuf], into: &Path) -> Result<(), DataError> {
    let failed = |path: &Path, e: std::io::Error| DataError::output(path, e);
    let mut file = std::fs::File::create_new(into).map_err(|e| failed(into, e))?;
    for part in parts {
        let mut from = std::fs::File::open(part).map_err(|e| failed(part, e))?;
        std::io::copy(&mut from, &mut file).map_err(|e| failed(into, e))?;
    }
    file.sync_all().map_err(|e| failed(into, e))
}
