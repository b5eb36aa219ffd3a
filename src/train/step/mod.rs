//! One optimizer step: micro-batches forward and backward, the reduction, clipping, the update.
//!
//! Votes travel with the gradients, so that ranks agree without another collective. A rank whose memory ran out, even in
//! the middle of backward, leaves its other micro-batches out and takes part in every reduction all the same: nobody waits
//! for it, and its vote makes all ranks forget the step.

use super::amp;
use super::buffers::Buffers;
use super::ddp::{DISCARD, Ddp};
use super::optimizer::{Numbers, clip_grad_norm};
use super::peers::AllRanks;
use super::update::Update;
use super::{TrainError, to_tensors};
use crate::comm::Collective;
use crate::data::loader::{BatchPlanner, BatchStream, HostBatch};
use crate::task::norm::Peers;
use crate::task::{Batch, Metrics, Model, Output};
use crate::torch::{self, TorchError};
use spec::config::Config;
use std::sync::Arc;
use tch::{Device, Kind};

/// Places of this room's sums among the votes of [`Ddp::votes_mut`].
pub(super) const STOP: usize = 0;
const NON_FINITE: usize = 1;
pub(super) const LOSS: usize = 2;
pub(super) const HALVE: usize = 3;
pub(super) const OVERDUE: usize = 4;
/// Divisor of a loss that is a quotient of sums: [`Model::divides`].
pub(super) const DIVISOR: usize = 5;

/// Inputs of a step.
pub struct StepRunner<'a> {
    pub config: &'a Config,
    pub planner: &'a BatchPlanner,
    pub model: &'a dyn Model,
    pub device: Device,
    /// Element type of autocast. `None` means no autocast.
    pub narrow: Option<Kind>,
    pub collective: &'a dyn Collective,
    /// Optimizer steps done before this one.
    pub step: u64,
    pub step_in_epoch: u64,
    pub epoch: u64,
    pub wishes: Wishes,
    /// `train.amp: auto` is still trying.
    pub trial: bool,
    /// The next step may have another momentum.
    pub warming: bool,
    /// Learning rate of parameters in no particular group.
    pub lr: f64,
    /// Values of each group of parameters.
    pub numbers: &'a [Numbers],
    /// The ranks over which layers take statistics, where they do.
    pub peers: Option<&'a Arc<AllRanks>>,
}

/// State that a step changes.
pub struct Parts<'a> {
    pub ddp: &'a mut Ddp,
    pub optimizer: &'a mut Update,
    pub metrics: &'a mut dyn Metrics,
    pub buffers: &'a mut Buffers,
}

/// Requests to this rank, to be agreed on with the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    /// Stop after this step: one rank is enough.
    pub stop: bool,
    /// Halve the micro-batch after this step, once every rank was asked to.
    pub halve: bool,
    /// The same, and some rank seems not to be asked at all: do not wait for it.
    pub overdue: bool,
}

/// Result of a step; identical on every rank.
pub enum Attempt {
    Done(StepOutcome),
    /// Memory ran out on some rank: nothing has changed, repeat the step with smaller micro-batches. `message`: what
    /// this rank's allocator said, where it was this one.
    OutOfMemory {
        message: Option<String>,
    },
}

/// Measurements of a step; identical on every rank except `data_wait_s` and `step_s`.
#[derive(Clone, Debug, Default)]
pub struct StepOutcome {
    /// Mean over the samples of the global batch.
    pub loss: f64,
    pub lr: f64,
    /// Learning rate of each group of parameters.
    pub lrs: Vec<f64>,
    /// Global norm of the averaged gradient before clipping.
    pub grad_norm: f64,
    pub data_wait_s: f64,
    pub step_s: f64,
    /// Loss scale of fp16; 1 without.
    pub scale: f64,
    /// Some rank was asked to stop: all stop after this step.
    pub stop: bool,
    /// All halve the micro-batch before the next one.
    pub halve: bool,
}

/// Sums over the micro-batches of a step on this rank.
#[derive(Default)]
struct Passes {
    /// Losses, weighted by their share of the global batch; those that are parts of a sum as they are.
    loss: f64,
    /// Their divisor's parts.
    divisor: f64,
    /// The first loss that is not finite, and its samples.
    bad: Option<(f64, Vec<u64>)>,
    data_wait_s: f64,
    /// Allocator's message when memory ran out.
    short: Option<String>,
    /// Samples of this rank that are done.
    samples: usize,
}

impl StepRunner<'_> {
    /// Runs the step. Each micro-batch's mean loss is weighted by its share of the global batch, so that the summed
    /// gradient is the mean over the global batch however it was split.
    ///
    /// # Errors
    /// A batch cannot be read, a peer failed, or the loss is not finite: then no parameter has changed.
    pub fn run(&self, batches: &mut BatchStream, parts: &mut Parts) -> Result<Attempt, TrainError> {
        parts.ddp.zero_grad()?;
        let passes = self.passes(batches, parts)?;
        self.vote(parts.ddp, &passes);
        parts.ddp.finish()?;
        let votes = *parts.ddp.votes();
        if votes[DISCARD] > 0.0 {
            parts.buffers.forget()?;
            return Ok(Attempt::OutOfMemory { message: passes.short });
        }
        if votes[NON_FINITE] > 0.0 {
            parts.buffers.forget()?;
            return Err(non_finite(self.collective, self.step, passes.bad)?);
        }
        let loss = self.divide(parts.ddp, &votes)?;
        let grad_norm = clip_grad_norm(parts.ddp, self.config.train.gradient_clip_norm)?;
        if !grad_norm.is_finite() {
            parts.buffers.forget()?;
            let first = (self.collective.rank() == 0).then(|| (grad_norm, Vec::new()));
            return Err(non_finite(self.collective, self.step, first)?);
        }
        parts.optimizer.step(parts.ddp, self.lr, self.numbers)?;
        parts.buffers.keep()?;
        self.hand_out(parts.ddp)?;
        Ok(Attempt::Done(StepOutcome {
            loss,
            lr: self.lr,
            lrs: self.lrs(),
            grad_norm,
            data_wait_s: passes.data_wait_s,
            step_s: 0.0,
            scale: 1.0,
            stop: votes[STOP] > 0.0,
            halve: votes[HALVE] >= self.collective.world_size() as f32 || votes[OVERDUE] > 0.0,
        }))
    }

    pub(super) fn lrs(&self) -> Vec<f64> {
        self.numbers.iter().map(|numbers| numbers.lr).collect()
    }

    /// Samples of the step over all ranks.
    pub(super) fn samples(&self) -> u64 {
        self.planner.step_samples(self.epoch, self.step_in_epoch)
    }

    /// Forward and backward of all micro-batches, or until memory runs out.
    fn passes(&self, batches: &mut BatchStream, parts: &mut Parts) -> Result<Passes, TrainError> {
        let mut passes = Passes::default();
        let micros = self.planner.micro_batches(self.epoch, self.step_in_epoch);
        for micro in 0..micros {
            let host = batches.next().ok_or_else(|| self.ran_dry())??;
            passes.data_wait_s += batches.last_wait_s();
            parts.ddp.set_sync(micro + 1 == micros);
            let passed = torch::catch_out_of_memory(|| self.pass(micro, host, parts, &mut passes));
            match passed.unwrap_or_else(|short| Err(short.into())) {
                Err(TrainError::Torch(TorchError::OutOfMemory { message })) => {
                    passes.short = Some(self.may_repeat(message)?);
                    break;
                }
                other => self.check_peers().and(other)?,
            }
        }
        Ok(passes)
    }

    /// Forward and backward of one micro-batch.
    fn pass(&self, micro: u64, host: HostBatch, parts: &mut Parts, passes: &mut Passes) -> Result<(), TrainError> {
        let batch = self.placed(to_tensors(&host, self.device));
        drop(host);
        tch::manual_seed(self.seed(micro));
        let output = self.forward(&batch)?;
        let share = self.weight(&batch, &output)?;
        let value = output.loss.double_value(&[]);
        passes.divisor += output.divisor.as_ref().map_or(0.0, |divisor| divisor.double_value(&[]));
        passes.loss += value * share;
        if !value.is_finite() && passes.bad.is_none() {
            passes.bad = Some((value, batch.sample_ids.clone()));
        }
        if self.config.train.compute_metrics_online {
            parts.metrics.update(&batch, &output);
        }
        self.share(parts.ddp, &output, &batch, passes.samples)?;
        passes.samples += batch.len();
        let scaled = output.loss * share;
        Ok(self.model.backward(&scaled)?)
    }

    /// Factor on the loss of a micro-batch: its share of the step's samples, or 1 where it is part of a sum.
    ///
    /// # Errors
    /// The pass gave no divisor though its model divides, or the other way round.
    pub(super) fn weight(&self, batch: &Batch, output: &Output) -> Result<f64, TrainError> {
        match (self.model.divides(), output.divisor.is_some()) {
            (false, false) => Ok(batch.len() as f64 / self.samples() as f64),
            (true, true) => Ok(1.0),
            (announced, found) => Err(TrainError::Divisor { announced, found }),
        }
    }

    /// Makes the gradient that of the step's loss, and gives that loss.
    fn divide(&self, ddp: &Ddp, votes: &[f32]) -> Result<f64, TrainError> {
        let loss = f64::from(votes[LOSS]);
        if !self.model.divides() {
            return Ok(loss);
        }
        let divisor = f64::from(votes[DIVISOR]).max(1.0);
        let factor = self.samples() as f64 / divisor;
        let _no_grad = tch::no_grad_guard();
        let _ = ddp.grads()?.f_mul_scalar_(factor).map_err(|error| torch::error_of("division", &error))?;
        Ok(loss / divisor)
    }

    /// A batch that knows its step.
    pub(super) fn placed(&self, batch: Batch) -> Batch {
        batch.at(self.step, self.config.seed).of_step(self.samples())
    }

    pub(super) fn forward(&self, batch: &Batch) -> Result<Output, TrainError> {
        let peers = self.peers.map(|peers| Arc::clone(peers) as Arc<dyn Peers>);
        let output = amp::forward(self.model, batch, true, (self.narrow, peers))?;
        self.check_peers()?;
        Ok(output)
    }

    /// # Errors
    /// A sum over the ranks failed inside of a pass.
    pub(super) fn check_peers(&self) -> Result<(), TrainError> {
        self.peers.map_or(Ok(()), |peers| peers.check())
    }

    /// Puts a pass's numbers for all ranks to their place. `done`: samples of this rank in the passes before.
    pub(super) fn share(&self, ddp: &Ddp, output: &Output, batch: &Batch, done: usize) -> Result<(), TrainError> {
        let width = self.model.share_width();
        if width == 0 {
            return Ok(());
        }
        let wrong = |found: String| TrainError::Share { expected: [batch.len(), width], found };
        let share = output.share.as_ref().ok_or_else(|| wrong("nothing".into()))?;
        if share.size() != [batch.len() as i64, width as i64] || share.kind() != Kind::Float {
            return Err(wrong(format!("{:?} {:?}", share.kind(), share.size())));
        }
        let (rank, world) = (self.collective.rank(), self.collective.world_size());
        Ok(ddp.share((rank + done * world, world), share)?)
    }

    /// Gives the model what all ranks shared in the step.
    pub(super) fn hand_out(&self, ddp: &Ddp) -> Result<(), TrainError> {
        let width = self.model.share_width();
        if width > 0 {
            let _no_grad = tch::no_grad_guard();
            self.model.shared(&ddp.shared(self.samples() as usize, width)?);
        }
        Ok(())
    }

    /// The allocator's message where a step can be repeated. While ranks take statistics together it cannot: the others
    /// wait for this one in the middle of their passes.
    pub(super) fn may_repeat(&self, message: String) -> Result<String, TrainError> {
        if self.peers.is_none() {
            return Ok(message);
        }
        let (step, rank) = (self.step + 1, self.collective.rank());
        Err(TrainError::OutOfMemoryTogether { step, rank, message })
    }

    fn vote(&self, ddp: &mut Ddp, passes: &Passes) {
        let yes = |wish: bool| f32::from(u8::from(wish));
        let votes = ddp.votes_mut();
        votes[STOP] = yes(self.wishes.stop);
        votes[NON_FINITE] = yes(passes.bad.is_some());
        votes[LOSS] = passes.loss as f32;
        votes[DIVISOR] = passes.divisor as f32;
        votes[HALVE] = yes(self.wishes.halve);
        votes[OVERDUE] = yes(self.wishes.overdue);
        votes[DISCARD] = yes(passes.short.is_some());
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

    pub(super) fn ran_dry(&self) -> TrainError {
        TrainError::Config(format!("step {}: the loader ended before its epoch did; please report this", self.step))
    }
}

/// Finds out which rank met the value of step `step` (from 0) first, and where. All ranks call it together.
pub(super) fn non_finite(
    collective: &dyn Collective,
    step: u64,
    bad: Option<(f64, Vec<u64>)>,
) -> Result<TrainError, TrainError> {
    let mine = bad.map(|(value, ids)| format!("{value}|{ids:?}")).unwrap_or_default();
    let all = collective.all_gather(mine.as_bytes())?;
    let first = all.iter().enumerate().find(|(_, text)| !text.is_empty());
    let (rank, text) = first.map(|(rank, text)| (rank, String::from_utf8_lossy(text).into_owned())).unwrap_or_default();
    let (value, samples) = text.split_once('|').unwrap_or(("not finite", "[]"));
    Ok(TrainError::NonFinite {
        step: step + 1,
        rank,
        value: value.to_string(),
        samples: if samples == "[]" { "of any rank: the gradient's norm".into() } else { samples.to_string() },
        good: step,
    })
}

#[cfg(test)]
mod tests;
