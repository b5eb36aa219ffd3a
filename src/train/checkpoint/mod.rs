//! Checkpoints: `step-<N>/{model,optimizer,ema,loop}.safetensors` and `state.json`, whole or not there at all.
//!
//! `model.safetensors` uses PyTorch's `state_dict` names, so `safetensors.torch.load_file` reads it; buffers are among
//! them. With several rates of averages there is an `ema-<rate>.safetensors` for each, and `loop.safetensors` holds what else
//! a step depends on, where there is any. `state.json` is the
//! manifest: sizes and CRC-32 of the other files, the facts a run must share to resume, and the caller's state.
//! `split.json` lists the files of each split with their fingerprints ([`crate::data::split`]); older checkpoints have
//! none. JSON has no NaN: keep values that may not be finite as `Option`, or as bits.

mod choose;
mod files;
mod load;
mod save;

pub use choose::{Chosen, choose, split_of_run};
pub use files::staging_bytes;
pub use load::{Loaded, apply, check_coverage, list, load, load_weights};
pub use save::{Checkpointer, Content};

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

/// Version of the manifest and of what the files hold.
pub const VERSION: u32 = 1;
const MANIFEST: &str = "state.json";
const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const EMA: &str = "ema.safetensors";
const LOOP: &str = "loop.safetensors";
const SPLIT: &str = "split.json";

/// Errors of checkpoints.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("{path}: {action}: {source}", path = path.display())]
    Io { path: PathBuf, action: &'static str, source: io::Error },
    #[error(
        "{path}: no room for the checkpoint: {needed_bytes} bytes needed, {available_bytes} available; free some space, \
         or lower log.keep_last; earlier checkpoints are whole", path = path.display()
    )]
    NoSpace { path: PathBuf, needed_bytes: u64, available_bytes: u64 },
    #[error("{path}: {problem}; resume from an earlier checkpoint", path = path.display())]
    Corrupt { path: PathBuf, problem: String },
    #[error("{path}: is of another run: {problem}", path = path.display())]
    Mismatch { path: PathBuf, problem: String },
    #[error("train.init_from {path}: {problem}: name a safetensors file of this model, or leave the key out", path = path.display())]
    Weights { path: PathBuf, problem: String },
    #[error("{path}: {problem}: train first, or name a file with --weights FILE", path = path.display())]
    NothingSaved { path: PathBuf, problem: String },
    #[error("--weights, {path}: {problem}", path = path.display())]
    NoSuchWeights { path: PathBuf, problem: String },
    #[error("checkpoint of step {step}: tensor {name}: {problem}")]
    Tensor { step: u64, name: String, problem: String },
}

/// Facts that a resumed run must share with the run that saved. The world size may differ.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// Names the model and its sizes.
    pub model: String,
    /// Samples of one optimizer step over the whole job.
    pub global_batch: u64,
    pub seed: u64,
    /// For information; not compared.
    pub world_size: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Manifest {
    version: u32,
    step: u64,
    /// The best so far when it was saved.
    best: bool,
    /// It is never removed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    keep: bool,
    facts: Facts,
    files: BTreeMap<String, FileFacts>,
    /// Rates of the averages, as `train.ema_decay` lists them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    ema: Vec<f64>,
    /// Epoch, position, schedule, history: whatever the loop keeps.
    state: serde_json::Value,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct FileFacts {
    bytes: u64,
    crc32: u32,
}

impl CheckpointError {
    /// True if a later save may succeed: no room, a failing server.
    pub fn is_passing(&self) -> bool {
        match self {
            CheckpointError::NoSpace { .. } => true,
            CheckpointError::Io { source, .. } => host::journal::is_passing(source),
            _ => false,
        }
    }

    /// The same about a file of initial weights, which has no earlier checkpoint to go back to.
    pub fn of_weights(self) -> Self {
        match self {
            CheckpointError::Corrupt { path, problem } | CheckpointError::Mismatch { path, problem } => {
                CheckpointError::Weights { path, problem }
            }
            CheckpointError::Io { path, action, source } => {
                CheckpointError::Weights { path, problem: format!("{action}: {source}") }
            }
            other => other,
        }
    }
}

impl Manifest {
    /// Files of averaged weights with their rates, first that of the first rate. Older checkpoints do not name the rate.
    fn averages(&self) -> Vec<(String, Option<f64>)> {
        match self.ema[..] {
            [] if self.files.contains_key(EMA) => vec![(EMA.to_owned(), None)],
            ref rates => rates.iter().map(|rate| (ema_file(*rate, rates.len()), Some(*rate))).collect(),
        }
    }
}

/// Name of the file with the average of this rate, where a run has so many.
fn ema_file(rate: f64, count: usize) -> String {
    if count == 1 { EMA.to_owned() } else { format!("ema-{rate}.safetensors") }
}

fn io_error(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> CheckpointError {
    let path = path.to_owned();
    move |source| CheckpointError::Io { path, action, source }
}

#[cfg(test)]
mod tests;
