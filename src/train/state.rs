//! What the loop keeps besides tensors: the part of a checkpoint that says where it stands.

use super::scaler::ScalerState;
use super::schedule::{MonitorState, ScheduleState};
use serde::{Deserialize, Serialize};

/// Position and memory of the loop after `step` optimizer steps.
///
/// A multiple of `steps_per_epoch` means that the epoch's end (validation, schedule, early stopping) is behind.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct LoopState {
    /// Optimizer steps done since the first start.
    pub step: u64,
    pub steps_per_epoch: u64,
    /// Sums of the training metrics since the epoch began, over all ranks.
    pub train_sums: Vec<f64>,
    pub schedule: Option<ScheduleState>,
    pub monitor: Option<MonitorState>,
    pub best: Option<BestState>,
    /// Seconds spent in training steps before this process.
    pub train_s: f64,
    pub samples: u64,
    /// Loss scale of fp16, where there is one.
    #[serde(default)]
    pub scaler: Option<ScalerState>,
}

/// Best value of the monitored metric so far.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct BestState {
    pub value: f64,
    pub step: u64,
}

impl LoopState {
    /// Epochs done, which is the number of the running one, counted from 0.
    pub fn epoch(&self) -> u64 {
        self.step.checked_div(self.steps_per_epoch).unwrap_or(0)
    }

    /// Optimizer steps done in the running epoch.
    pub fn step_in_epoch(&self) -> u64 {
        self.step.checked_rem(self.steps_per_epoch).unwrap_or(0)
    }
}
