//! The loop: epochs of steps, evaluation, schedule, early stopping, checkpoints.
//!
//! `epochs` runs the steps, `close` ends epochs and runs, `relief` gives memory back, `tell` reports.

mod close;
mod epochs;
mod relief;
mod tell;

use super::amp;
use super::checkpoint::{CheckpointError, Checkpointer, Facts, staging_bytes};
use super::controls::Controls;
use super::ddp::{Ddp, DdpError, DdpOptions};
use super::device::{DeviceOptions, DeviceStep};
use super::ema::Ema;
use super::optimizer::{Optimizer, Rule};
use super::schedule::{Monitor, Schedule};
use super::state::{BestState, LoopState};
use super::trial::AmpTrial;
use super::{Observer, TrainError};
use crate::comm::Collective;
use crate::data::loader::{BatchPlanner, train_order};
use crate::ledger::{self, Holding, Part};
use crate::task::{Datasets, Gallery, Metrics, Model};
use crate::torch;
pub(super) use relief::Orders;
use spec::config::{Amp, Config, OptimizerKind, TrainConfig};
use spec::plan::Plan;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// How training ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Finished,
    EarlyStopped,
    /// A signal asked for it; a checkpoint holds everything.
    Stopped,
}

/// Result of a run, the same on every rank.
#[derive(Clone, Debug)]
pub struct Finished {
    pub status: Status,
    pub steps: u64,
    pub epochs: u64,
    pub train_s: f64,
    pub samples_per_s: f64,
    pub metrics: BTreeMap<String, f64>,
    /// Names in `metrics` that a person wants to see first.
    pub headline: Vec<String>,
    pub best: Option<BestState>,
    /// Why it was asked to stop, where someone said so.
    pub reason: Option<String>,
    /// How often `memory.cleanup_every` released the caches, in this process.
    pub cleanups: u64,
    /// Files left out, at opening and since.
    pub files_skipped: u64,
}

/// Position at which a resumed run continues.
pub struct Resume {
    pub state: LoopState,
    pub optimizer: Vec<(String, Tensor)>,
    pub ema: Vec<(String, Tensor)>,
}

/// A run, made ready by `rank`.
pub struct Fit<'a> {
    pub config: &'a Config,
    pub plan: &'a Plan,
    pub device: Device,
    pub collective: Arc<dyn Collective>,
    pub datasets: &'a Datasets,
    pub model: &'a dyn Model,
    /// Trainable parameters by name, in registration order.
    pub params: Vec<(String, Tensor)>,
    pub metrics: Box<dyn Metrics>,
    /// Rank 0's, where the task has pictures to show.
    pub gallery: Option<Box<dyn Gallery>>,
    pub facts: Facts,
    /// Rank 0's writer of checkpoints.
    pub checkpoints: Option<Checkpointer>,
    /// Where that writer writes.
    pub checkpoint_dir: &'a Path,
    /// Requests to stop, and to give memory back.
    pub controls: Arc<Controls>,
    pub device_options: DeviceOptions,
}

struct Loop<'a, 'o> {
    fit: Fit<'a>,
    observer: &'o mut dyn Observer,
    orders: Orders,
    planner: BatchPlanner,
    /// Samples of an evaluation's forward pass.
    val_batch: usize,
    /// Element type of autocast. `None` means no autocast.
    narrow: Option<Kind>,
    /// `train.amp: auto`, while it tries and after.
    trial: Option<AmpTrial>,
    /// Steps whose numbers stay on the device; absent on a CPU.
    on_device: Option<DeviceStep>,
    ddp: Ddp,
    optimizer: Optimizer,
    schedule: Schedule,
    monitor: Monitor,
    ema: Option<Ema>,
    state: LoopState,
    /// Sums of the running epoch before a resume; they count on rank 0.
    carried_sums: Vec<f64>,
    last_values: BTreeMap<String, f64>,
    saved_step: Option<u64>,
    steps_here: u64,
    samples_here: u64,
    train_s_here: f64,
    cleanups: u64,
    _held: [Holding; 2],
}

impl<'a> Fit<'a> {
    /// Trains to the end, or until a signal or early stopping ends it.
    ///
    /// # Errors
    /// See [`TrainError`]; whatever was saved before stays whole.
    pub fn run(self, resume: Option<Resume>, observer: &mut dyn Observer) -> Result<Finished, TrainError> {
        let mut this = Loop::new(self, resume, observer)?;
        let result = this.train();
        let written = this.fit.checkpoints.as_mut().map_or(Ok(()), Checkpointer::wait);
        let status = result?;
        written?;
        this.close(status)
    }
}

impl<'a, 'o> Loop<'a, 'o> {
    fn new(fit: Fit<'a>, resume: Option<Resume>, observer: &'o mut dyn Observer) -> Result<Self, TrainError> {
        let (config, train) = (fit.config, &fit.config.train);
        let mut planner = BatchPlanner {
            order: train_order(fit.datasets.train.as_ref(), &config.data, config.seed)?,
            global_batch: fit.plan.batch.global_batch as u64,
            micro_batch: fit.plan.batch.micro_batch as u64,
            rank: fit.collective.rank() as u64,
            world_size: fit.collective.world_size() as u64,
            drop_last: true,
        }
        .checked()?;
        let on_device = fit.device.is_cuda() || fit.device_options.always;
        let (narrow, note) = amp::narrow_kind(train.amp, on_device);
        if let Some(note) = note.filter(|_| planner.rank == 0) {
            observer.line(note.to_owned());
        }
        let steps_per_epoch = planner.steps_per_epoch();
        let options = DdpOptions { bucket_mb: config.ddp.bucket_mb, ..DdpOptions::default() };
        let params = fit.params.iter().map(|(name, t)| (name.clone(), t.shallow_clone())).collect();
        let ddp = Ddp::new(params, Arc::clone(&fit.collective), options)?;
        let mut optimizer = Optimizer::new(rule(train), &ddp)?;
        let mut ema = train.ema_decay.map(|decay| Ema::new(decay, &fit.params));
        let held = hold_model(&fit, optimizer.moments() + usize::from(ema.is_some()));
        // Scanning files and drawing weights left free pieces behind: memory of a step does not lie where they do.
        torch::release_caches();
        let mut schedule = Schedule::new(train, steps_per_epoch);
        let mut monitor = Monitor::new(train);
        let mut state = LoopState { steps_per_epoch, ..LoopState::default() };
        if let Some(resume) = resume {
            let imported = optimizer.import(&ddp, &resume.optimizer);
            imported.map_err(|error| of_another_optimizer(error, fit.checkpoint_dir, resume.state.step))?;
            if let Some(ema) = &mut ema {
                ema.load(&resume.ema);
            }
            state = resume.state;
            planner.micro_batch = state.micro_batch(planner.micro_batch);
            same_epochs(state.steps_per_epoch, steps_per_epoch)?;
            if let Some(saved) = state.schedule.take() {
                schedule.restore(saved);
            }
            if let Some(saved) = state.monitor.take() {
                monitor.restore(saved);
            }
        }
        let scaler = (narrow == Some(Kind::Half)).then(|| state.scaler.take().unwrap_or_default());
        let new = || DeviceStep::new(fit.device, scaler, train.cuda_graph, fit.device_options);
        let on_device = on_device.then(new).transpose()?;
        let carried_sums = if planner.rank == 0 { std::mem::take(&mut state.train_sums) } else { Vec::new() };
        let saved_step = (state.step > 0).then_some(state.step);
        Ok(Self {
            orders: Orders::new(Arc::clone(&fit.controls)),
            val_batch: fit.plan.batch.val_batch,
            fit,
            observer,
            planner,
            narrow,
            trial: (train.amp == Amp::Auto).then(AmpTrial::default),
            on_device,
            ddp,
            optimizer,
            schedule,
            monitor,
            ema,
            state,
            carried_sums,
            last_values: BTreeMap::new(),
            saved_step,
            steps_here: 0,
            samples_here: 0,
            train_s_here: 0.0,
            cleanups: 0,
            _held: held,
        })
    }
}

/// Weights, gradients and `more` tensors of their size, where they lie in host memory. Gradients lie where ranks meet.
fn hold_model(fit: &Fit, more: usize) -> [Holding; 2] {
    let one = if fit.device.is_cuda() { 0 } else { staging_bytes(fit.params.iter().map(|(_, tensor)| tensor)) };
    let shared = if fit.collective.world_size() > 1 { one } else { 0 };
    [ledger::hold(Part::Model, one * (2 + more as u64)), ledger::hold(Part::ModelShared, shared)]
}

fn of_another_optimizer(error: DdpError, checkpoint_dir: &Path, step: u64) -> TrainError {
    match error {
        DdpError::Parameter { name, problem } => TrainError::Checkpoint(CheckpointError::Mismatch {
            path: checkpoint_dir.join(format!("step-{step}")),
            problem: format!("its optimizer's {name} {problem}: keep train.optimizer and train.momentum"),
        }),
        other => other.into(),
    }
}

fn same_epochs(saved: u64, here: u64) -> Result<(), TrainError> {
    if saved == here {
        return Ok(());
    }
    Err(TrainError::Config(format!(
        "the checkpoint counts {saved} steps per epoch, this run {here}: the training data or the global batch changed; \
         start afresh, or give the old data back"
    )))
}

/// The optimizer's rule as the config has it.
fn rule(train: &TrainConfig) -> Rule {
    let TrainConfig { betas, eps, weight_decay, momentum, .. } = *train;
    match train.optimizer {
        OptimizerKind::Adamw => Rule::AdamW { betas, eps, weight_decay },
        OptimizerKind::Adam => Rule::Adam { betas, eps, weight_decay },
        OptimizerKind::Sgd => Rule::Sgd { momentum, nesterov: false, weight_decay },
    }
}

#[cfg(test)]
mod tests;
