//! State of the loop besides tensors: the part of a checkpoint that holds its position.

use super::scaler::ScalerState;
use super::schedule::{MonitorState, ScheduleState};
use crate::data::loader::{locate, steps_of};
use serde::{Deserialize, Serialize};
use spec::contract::MetricsRecord;
use std::collections::BTreeSet;

/// Position and memory of the loop after `step` optimizer steps.
///
/// A step at the beginning of an epoch means that the end of the one before (validation, schedule, early stopping) is behind, unless
/// `unvalidated` says otherwise.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct LoopState {
    /// Optimizer steps done since the first start.
    pub step: u64,
    pub steps_per_epoch: u64,
    /// Steps of the first epochs, where they differ (`train.warmup_accumulation`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub early: Vec<u64>,
    /// Sums of the training metrics since the epoch began, over all ranks.
    pub train_sums: Vec<f64>,
    pub schedule: Option<ScheduleState>,
    pub monitor: Option<MonitorState>,
    pub best: Option<BestState>,
    /// Seconds spent in training steps before this process.
    pub train_s: f64,
    pub samples: u64,
    /// Loss scale of fp16, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scaler: Option<ScalerState>,
    /// The record of an epoch's last step whose validation was broken off by a request to stop: it is still to be done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unvalidated: Option<MetricsRecord>,
    /// A line for each file that reading found to be unusable, over all ranks.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub left_out: BTreeSet<String>,
    /// Smaller micro-batches than planned, since memory was short.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reduced: Option<Reduced>,
}

/// Micro-batch that memory left of the planned one. A resumed run continues with `now` where it plans the same again;
/// another plan (`train.microbatch`, `train.batch_size`, other devices) wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reduced {
    pub planned: u64,
    pub now: u64,
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
        locate(self.step, self.steps_per_epoch, &self.early).0
    }

    /// Steps of the first `epochs` epochs.
    pub fn steps_of(&self, epochs: u64) -> u64 {
        steps_of(epochs, self.steps_per_epoch, &self.early)
    }

    /// Epochs that so many steps need, a begun one counted as whole.
    pub fn epochs_of(&self, steps: u64) -> u64 {
        match steps.checked_sub(1) {
            Some(last) => locate(last, self.steps_per_epoch, &self.early).0 + 1,
            None => 0,
        }
    }

    /// Steps whose records are whole: the last one's is written again where its validation is still to be done.
    pub fn recorded_step(&self) -> u64 {
        self.step - u64::from(self.unvalidated.is_some() && self.step > 0)
    }

    /// Micro-batch of a run that plans `planned`.
    pub fn micro_batch(&self, planned: u64) -> u64 {
        self.reduced.filter(|reduced| reduced.planned == planned).map_or(planned, |reduced| reduced.now.max(1))
    }

    /// Optimizer steps done in the running epoch.
    pub fn step_in_epoch(&self) -> u64 {
        locate(self.step, self.steps_per_epoch, &self.early).1
    }
}
