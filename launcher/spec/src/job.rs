//! Inputs that a launcher hands to its ranks: the job to train, and the model to measure.

use crate::config::Config;
use crate::contract::files::SplitChoice;
use crate::contract::{Gpu, Measured, Weights};
use crate::plan::Plan;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Everything a rank needs to know besides its environment; written to the run folder before ranks start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Job {
    pub version: u32,
    pub config: Config,
    pub plan: Plan,
    /// `runs/<name>`, absolute.
    pub run_dir: PathBuf,
    /// Checkpoint folder to resume from, absolute. `None` starts a new training.
    pub resume: Option<PathBuf>,
    /// Names this start of the run: its summary carries the same name. Empty in jobs of earlier versions.
    #[serde(default)]
    pub start: String,
    /// `--resume-split`; `None`: the checkpoint's split, unless a changed file makes it doubtful.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume_split: Option<SplitChoice>,
    /// Work of the ranks.
    #[serde(default)]
    pub work: Work,
    /// Stages before this one, whose folders it may read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub earlier: Vec<EarlierStage>,
    /// Where it was started, and how. `None`: a job of an earlier version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
}

/// Place and command of a start, for people who look at it later. Programs do not depend on it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Origin {
    /// Time of this start and of the run's first, seconds since the Unix epoch.
    pub t: f64,
    pub first_t: f64,
    pub host: String,
    pub pid: u32,
    /// Words of the command line.
    pub command: Vec<String>,
    pub cwd: PathBuf,
    /// Commit of the repository around `cwd`.
    pub commit: Option<String>,
    /// Version of Headroom.
    pub program: String,
    /// Names of the variables that were set.
    pub environment: Vec<String>,
}

/// A stage of a run that has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EarlierStage {
    pub name: String,
    /// Absolute.
    pub folder: PathBuf,
    /// Its last start: [`Job::start`]. What another start made is no basis for what was made from this one.
    pub start: String,
}

/// Work of a job's ranks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    #[default]
    Train,
    /// The pass of the stage `config.stage`.
    Pass,
    /// Predictions for `data`, written to `out`.
    Predict { of: Trained, data: PathBuf, out: PathBuf },
    /// Metrics of a split of the run's data, or of other data.
    Evaluate { of: Trained, on: Subject },
}

/// A trained model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Trained {
    /// Folder of the run or stage, absolute.
    pub folder: PathBuf,
    pub weights: Weights,
}

/// Data of an evaluation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Subject {
    Train,
    Val,
    Test,
    /// All samples of other data.
    Data(PathBuf),
}

impl Job {
    /// The folder of the launcher's runs, where facts about unchanged files are kept.
    pub fn runs_dir(&self) -> &Path {
        let levels = if self.config.stage.is_some() { 2 } else { 1 };
        let folder = match &self.work {
            Work::Train | Work::Pass => &self.run_dir,
            Work::Predict { of, .. } | Work::Evaluate { of, .. } => &of.folder,
        };
        folder.ancestors().nth(levels).unwrap_or(folder)
    }
}

/// Passes of a model that a job makes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PassKind {
    /// Training steps and evaluations.
    #[default]
    Train,
    /// Evaluations: forward passes with loss and metrics.
    Evaluate,
    /// Predictions: forward passes alone.
    Predict,
    /// The pass of a stage: the same for the stage's samples.
    Stage,
}

/// Request of a launcher to `rank describe`, as JSON on its standard input.
///
/// The answer is one line of JSON, a [`Measured`], for each stage of the measurement: the last whole line holds all that
/// was measured until the process ended, or was ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DescribeJob {
    pub version: u32,
    pub config: Config,
    /// Index of the CUDA device to measure on, with its name and free bytes; `None`: on the CPU.
    pub device: Option<Gpu>,
    /// Compute threads.
    pub threads: usize,
    /// Bytes that passes may take beyond the process before them.
    pub limit_bytes: u64,
    /// Seconds in which the answer must be complete.
    pub limit_s: f64,
    /// The passes that are planned for.
    #[serde(default)]
    pub passes: PassKind,
    /// An earlier answer for the same model: its passes serve again where samples have the same shape.
    pub known: Option<Measured>,
}
