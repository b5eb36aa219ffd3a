//! Inputs that a launcher hands to its ranks: the job to train, and the model to measure.

use crate::config::Config;
use crate::contract::files::SplitChoice;
use crate::contract::{Gpu, Measured};
use crate::plan::Plan;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

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
    /// An earlier answer for the same model: its passes serve again where samples have the same shape.
    pub known: Option<Measured>,
}
