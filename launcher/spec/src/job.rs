//! The job that a launcher hands to its ranks.

use crate::config::Config;
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
    /// Checkpoint folder to resume from, absolute; absent: start afresh.
    pub resume: Option<PathBuf>,
    /// Names this start of the run: its summary carries the same name. Empty in jobs of earlier versions.
    #[serde(default)]
    pub start: String,
}
