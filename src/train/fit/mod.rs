//! The loop: epochs of steps, evaluation, schedule, early stopping, checkpoints.
//!
//! `epochs` runs the steps, `close` ends epochs and runs, `relief` gives memory back, `tell` reports.

mod close;
mod epochs;
mod relief;
mod tell;

use super::amp;
use super::buffers::Buffers;
use super::checkpoint::{self, CheckpointError, Checkpointer, Facts, staging_bytes};
use super::controls::Controls;
use super::ddp::{Ddp, DdpError, DdpOptions};
use super::device::{DeviceOptions, DeviceStep};
use super::ema::{Averages, Named};
use super::groups::Groups;
use super::pace::Pace;
use super::peers::AllRanks;
use super::schedule::{Monitor, Schedule, warmup_batches};
use super::state::{BestState, LoopState};
use super::trial::AmpTrial;
use super::update::Update;
use super::{Observer, TrainError};
use crate::comm::Collective;
use crate::data::Dataset;
use crate::data::loader::{BatchPlanner, Cut, Ramp, train_order};
use crate::ledger::{self, Holding, Part};
use crate::task::{Datasets, Gallery, GroupSpec, Metrics, Model};
use crate::torch;
pub(super) use relief::Orders;
use spec::config::{Amp, Config};
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
    pub optimizer: Named,
    pub ema: Vec<(Option<f64>, Named)>,
    /// A model's state, and buffers that ranks do not share.
    pub rest: Named,
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
    pub params: Named,
    /// Tensors of the model that no gradient changes, by name; the same order on every rank.
    pub buffers: Named,
    /// The task's groups of parameters; none: all in one.
    pub groups: Vec<GroupSpec>,
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
    optimizer: Update,
    groups: Groups,
    buffers: Buffers,
    /// The ranks over which layers take statistics, where they do.
    peers: Option<Arc<AllRanks>>,
    schedule: Schedule,
    monitor: Monitor,
    averages: Averages,
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
        let (rank, world) = (fit.collective.rank() as u64, fit.collective.world_size() as u64);
        let mut planner = planner(config, fit.plan, fit.datasets.train.as_ref(), (rank, world))?;
        if let Some(note) = left_out(&planner, train.drop_last).filter(|_| planner.rank == 0) {
            observer.line(note);
        }
        let on_device = fit.device.is_cuda() || fit.device_options.always;
        let (narrow, note) = amp::narrow_kind(train.amp, on_device);
        if let Some(note) = note.filter(|_| planner.rank == 0) {
            observer.line(note.to_owned());
        }
        let pace = Pace::of(&planner, train.gradient_accumulation_steps as u64);
        let (ddp, groups) = parallel(&fit)?;
        let mut optimizer = Update::new(fit.model, &groups.rules, &ddp)?;
        let clone = |(name, tensor): &(String, Tensor)| (name.clone(), tensor.shallow_clone());
        let named = fit.buffers.iter().map(clone).collect();
        let mut buffers = Buffers::new("buffers", named, config.ddp.buffers, Arc::clone(&fit.collective))?;
        let together = (config.ddp.buffers, &fit.collective);
        let mut averages = Averages::new(train, &fit.params, buffers.named(), together)?;
        let held = hold_model(&fit, optimizer.kept_bytes(&ddp), &averages);
        // Scanning files and drawing weights left free pieces behind: memory of a step does not lie where they do.
        torch::release_caches();
        let mut state = LoopState {
            steps_per_epoch: planner.steps_per_epoch(),
            early: pace.early().to_vec(),
            ..LoopState::default()
        };
        let mut schedule = Schedule::new(train, pace);
        let mut monitor = Monitor::new(train);
        if let Some(resume) = resume {
            let imported = optimizer.import(&ddp, &resume.optimizer);
            imported.map_err(|error| of_another_optimizer(error, fit.checkpoint_dir, resume.state.step))?;
            for rate in averages.load(&resume.ema) {
                observer.line(format!("the checkpoint has no average with decay {rate}: it begins at the weights"));
            }
            let all = std::iter::once(&mut buffers).chain(averages.buffers());
            all.into_iter().try_for_each(|buffers| buffers.restore(&resume.rest))?;
            let path = fit.checkpoint_dir.join(format!("step-{}", resume.state.step));
            take_state(&path, &resume.rest, fit.model)?;
            same_epochs(&resume.state, &state)?;
            state = resume.state;
            planner.micro_batch = state.micro_batch(planner.micro_batch);
            if let Some(saved) = state.schedule.take() {
                schedule.restore(saved);
            }
            if let Some(saved) = state.monitor.take() {
                monitor.restore(saved);
            }
        }
        let scaler = (narrow == Some(Kind::Half)).then(|| state.scaler.take().unwrap_or_default());
        let graph = (train.cuda_graph, groups.rules.len());
        let new = || DeviceStep::new(fit.device, scaler, graph, fit.device_options);
        let on_device = on_device.then(new).transpose()?;
        let carried_sums = if planner.rank == 0 { std::mem::take(&mut state.train_sums) } else { Vec::new() };
        let saved_step = (state.step > 0).then_some(state.step);
        let together = train.sync_batchnorm && world > 1;
        Ok(Self {
            orders: Orders::new(Arc::clone(&fit.controls)),
            val_batch: fit.plan.batch.val_batch,
            peers: together.then(|| Arc::new(AllRanks::new(Arc::clone(&fit.collective)))),
            fit,
            observer,
            planner,
            narrow,
            trial: (train.amp == Amp::Auto).then(AmpTrial::default),
            on_device,
            ddp,
            optimizer,
            groups,
            buffers,
            schedule,
            monitor,
            averages,
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

/// How training cuts the data set's epochs into batches, for one rank of `world`.
///
/// # Errors
/// Sizes that do not go together.
pub fn planner(
    config: &Config,
    plan: &Plan,
    dataset: &dyn Dataset,
    (rank, world): (u64, u64),
) -> Result<BatchPlanner, TrainError> {
    let train = &config.train;
    let mut planner = BatchPlanner {
        order: train_order(dataset, &config.data, config.seed)?,
        global_batch: plan.batch.global_batch as u64,
        micro_batch: plan.batch.micro_batch as u64,
        rank,
        world_size: world,
        drop_last: train.drop_last,
        cut: Cut { even: train.sync_batchnorm && world > 1, ..Cut::default() },
    }
    .checked()?;
    planner.drop_last |= !has_room_for_rest(&planner);
    // Where the rest is all that there is, nothing is left to train on.
    let mut planner = planner.checked()?;
    let accumulation = train.gradient_accumulation_steps as u64;
    if train.warmup_accumulation {
        let batches = warmup_batches(train, planner.steps_per_epoch());
        planner.cut.ramp = Ramp::new(planner.order.len, planner.global_batch, accumulation, batches);
    }
    let least = planner.global_batch / accumulation.max(1);
    let (fewest, most) = (least / world, least.div_ceil(world).div_ceil(planner.micro_batch));
    if planner.cut.even && fewest < most {
        return Err(TrainError::Config(format!(
            "train.sync_batchnorm: batches of {least} samples in micro-batches of {} leave some of {world} ranks without a \
             sample in some of them: raise train.microbatch or train.batch_size, or use fewer ranks",
            planner.micro_batch
        )));
    }
    Ok(planner)
}

/// True if a last, smaller step gives every rank as many passes as the others, where passes of all ranks belong together.
fn has_room_for_rest(planner: &BatchPlanner) -> bool {
    let rest = planner.order.len % planner.global_batch.max(1);
    let (fewest, most) = (rest / planner.world_size, rest.div_ceil(planner.world_size).div_ceil(planner.micro_batch));
    !planner.cut.even || fewest >= most
}

/// A line about samples at the end of an epoch that [`planner`] leaves out although the config does not.
fn left_out(planner: &BatchPlanner, wanted: bool) -> Option<String> {
    let BatchPlanner { global_batch, world_size, order, .. } = planner;
    let rest = order.len % global_batch;
    (planner.drop_last && !wanted && rest > 0).then(|| {
        format!(
            "train.sync_batchnorm: a last step of {rest} samples gives some of {world_size} ranks fewer passes than others, so \
             each epoch leaves {rest} of {} samples out",
            order.len
        )
    })
}

/// Parameters and gradients in flat tensors, sorted by the task's groups.
fn parallel(fit: &Fit) -> Result<(Ddp, Groups), TrainError> {
    let names: Vec<String> = fit.params.iter().map(|(name, _)| name.clone()).collect();
    let groups = Groups::new(&fit.config.train, fit.groups.clone(), &names)?;
    let options = DdpOptions {
        bucket_mb: fit.config.ddp.bucket_mb,
        groups: groups.of.clone(),
        shared: fit.plan.batch.global_batch * fit.model.share_width(),
        sharded: fit.config.ddp.shard_optimizer && fit.collective.world_size() > 1,
        ..DdpOptions::default()
    };
    let params = fit.params.iter().map(|(name, t)| (name.clone(), t.shallow_clone())).collect();
    Ok((Ddp::new(params, Arc::clone(&fit.collective), options)?, groups))
}

/// Prefix of a model's state among the tensors of a checkpoint that are neither parameters nor buffers.
const STATE: &str = "model.";

/// The model's state as a checkpoint keeps it.
fn named_state(model: &dyn Model) -> Named {
    model.state().into_iter().map(|(name, tensor)| (format!("{STATE}{name}"), tensor)).collect()
}

/// Copies the saved state into the model's.
fn take_state(path: &Path, saved: &[(String, Tensor)], model: &dyn Model) -> Result<(), TrainError> {
    let own = saved.iter().filter(|(name, _)| name.starts_with(STATE));
    let own: Named = own.map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
    Ok(checkpoint::apply(&path.join("loop.safetensors"), &own, &named_state(model))?)
}

/// Weights, gradients, moments, averages and buffers, where they lie in host memory. Gradients lie where ranks meet.
fn hold_model(fit: &Fit, moment_bytes: u64, averages: &Averages) -> [Holding; 2] {
    if fit.device.is_cuda() {
        return [ledger::hold(Part::Model, 0), ledger::hold(Part::ModelShared, 0)];
    }
    let bytes = |named: &Named| staging_bytes(named.iter().map(|(_, tensor)| tensor));
    let one = bytes(&fit.params);
    let averaged: u64 = averages.tensors().iter().map(bytes).sum();
    // Buffers as they are, and as they were before the step.
    let all = one * 2 + moment_bytes + averaged + 2 * bytes(&fit.buffers) + bytes(&fit.model.state());
    let shared = if fit.collective.world_size() > 1 { one } else { 0 };
    [ledger::hold(Part::Model, all), ledger::hold(Part::ModelShared, shared)]
}

fn of_another_optimizer(error: DdpError, checkpoint_dir: &Path, step: u64) -> TrainError {
    match error {
        DdpError::Parameter { name, problem } => TrainError::Checkpoint(CheckpointError::Mismatch {
            path: checkpoint_dir.join(format!("step-{step}")),
            problem: format!(
                "its optimizer's {name} {problem}: keep train.optimizer, train.momentum and the task's own optimizer"
            ),
        }),
        other => other.into(),
    }
}

fn same_epochs(saved: &LoopState, here: &LoopState) -> Result<(), TrainError> {
    let (was, is) = (saved.steps_per_epoch, here.steps_per_epoch);
    if was != is {
        return Err(TrainError::Config(format!(
            "the checkpoint counts {was} steps per epoch, this run {is}: the training data or the global batch changed; \
             start afresh, or give the old data back"
        )));
    }
    if saved.early != here.early {
        return Err(TrainError::Config(format!(
            "the checkpoint's first epochs have {:?} steps, this run's {:?}: keep train.warmup_accumulation, the warm-up and \
             train.gradient_accumulation_steps as they were",
            saved.early, here.early
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
