//! One optimizer step: micro-batches forward and backward, the reduction, clipping, the update.

use super::amp;
use super::ddp::Ddp;
use super::optimizer::{Optimizer, clip_grad_norm};
use super::{TrainError, to_tensors};
use crate::comm::Collective;
use crate::data::loader::{BatchPlanner, BatchStream};
use crate::task::{Metrics, Model};
use launcher::config::Config;
use tch::{Device, Kind};

/// Places of this room's sums among the votes of [`Ddp::votes_mut`].
const STOP: usize = 0;
const NON_FINITE: usize = 1;
const LOSS: usize = 2;

/// What a step needs to read.
pub struct StepRunner<'a> {
    pub config: &'a Config,
    pub planner: &'a BatchPlanner,
    pub model: &'a dyn Model,
    pub device: Device,
    /// Element type of autocast; absent: none.
    pub narrow: Option<Kind>,
    pub collective: &'a dyn Collective,
    /// Optimizer steps done before this one.
    pub step: u64,
    pub step_in_epoch: u64,
    /// This rank was asked to stop.
    pub stop: bool,
    /// `train.amp: auto` is still trying.
    pub trial: bool,
}

/// What a step yields; the same on every rank but for `data_wait_s` and `step_s`.
#[derive(Clone, Debug, Default)]
pub struct StepOutcome {
    /// Mean over the samples of the global batch.
    pub loss: f64,
    pub lr: f64,
    /// Global norm of the averaged gradient before clipping.
    pub grad_norm: f64,
    pub data_wait_s: f64,
    pub step_s: f64,
    /// Loss scale of fp16; 1 without.
    pub scale: f64,
    /// Some rank was asked to stop: all stop after this step.
    pub stop: bool,
}

impl StepRunner<'_> {
    /// Runs the step. Each micro-batch's mean loss is weighted by its share of the global batch, so that the summed
    /// gradient is the mean over the global batch however it was split.
    ///
    /// # Errors
    /// A batch cannot be read, a peer failed, or the loss is not finite: then no parameter has changed.
    pub fn run(
        &self,
        batches: &mut BatchStream,
        ddp: &mut Ddp,
        optimizer: &mut Optimizer,
        metrics: &mut dyn Metrics,
        lr: f64,
    ) -> Result<StepOutcome, TrainError> {
        let mut outcome = StepOutcome { lr, scale: 1.0, ..StepOutcome::default() };
        ddp.zero_grad()?;
        let micros = self.planner.micro_batches(self.step_in_epoch);
        let (mut loss_sum, mut bad) = (0.0, None);
        for micro in 0..micros {
            let host = batches.next().ok_or_else(|| self.ran_dry())??;
            outcome.data_wait_s += batches.last_wait_s();
            let batch = to_tensors(&host, self.device);
            drop(host);
            tch::manual_seed(self.seed(micro));
            let output = amp::forward(self.model, &batch, true, self.narrow)?;
            let share = batch.len() as f64 / self.planner.global_batch as f64;
            let value = output.loss.double_value(&[]);
            loss_sum += value * share;
            if !value.is_finite() && bad.is_none() {
                bad = Some((value, batch.sample_ids.clone()));
            }
            if self.config.train.compute_metrics_online {
                metrics.update(&batch, &output);
            }
            let last = micro + 1 == micros;
            ddp.set_sync(last);
            (output.loss * share).backward();
        }
        let votes = ddp.votes_mut();
        votes[STOP] = f32::from(u8::from(self.stop));
        votes[NON_FINITE] = f32::from(u8::from(bad.is_some()));
        votes[LOSS] = loss_sum as f32;
        ddp.finish()?;
        if ddp.votes()[NON_FINITE] > 0.0 {
            return Err(self.non_finite(bad)?);
        }
        outcome.loss = f64::from(ddp.votes()[LOSS]);
        outcome.stop = ddp.votes()[STOP] > 0.0;
        outcome.grad_norm = clip_grad_norm(ddp, self.config.train.gradient_clip_norm)?;
        if !outcome.grad_norm.is_finite() {
            let value = outcome.grad_norm;
            return Err(self.non_finite((self.collective.rank() == 0).then(|| (value, Vec::new())))?);
        }
        optimizer.step(ddp, lr)?;
        Ok(outcome)
    }

    /// Seed of dropout: a pure function of position and rank, so that a resumed run draws the same numbers.
    pub(super) fn seed(&self, micro: u64) -> i64 {
        let mut x = self.config.seed ^ 0x9e37_79b9_7f4a_7c15;
        for part in [self.step, self.collective.rank() as u64, micro] {
            x = (x ^ part).wrapping_mul(0xff51_afd7_ed55_8ccd);
            x ^= x >> 32;
        }
        (x >> 1) as i64
    }

    fn ran_dry(&self) -> TrainError {
        TrainError::Config(format!("step {}: the loader ended before its epoch did; please report this", self.step))
    }

    /// Finds out which rank met the value first, and where. All ranks call it together.
    fn non_finite(&self, bad: Option<(f64, Vec<u64>)>) -> Result<TrainError, TrainError> {
        let mine = bad.map(|(value, ids)| format!("{value}|{ids:?}")).unwrap_or_default();
        let all = self.collective.all_gather(mine.as_bytes())?;
        let first = all.iter().enumerate().find(|(_, text)| !text.is_empty());
        let (rank, text) =
            first.map(|(rank, text)| (rank, String::from_utf8_lossy(text).into_owned())).unwrap_or_default();
        let (value, samples) = text.split_once('|').unwrap_or(("not finite", ""));
        Ok(TrainError::NonFinite {
            step: self.step + 1,
            rank,
            value: value.to_string(),
            samples: if samples == "[]" { "of any rank: the gradient's norm".into() } else { samples.to_string() },
            good: self.step,
        })
    }
}

#[cfg(test)]
mod tests;
