//! The loop: epochs of steps, evaluation, schedule, early stopping, checkpoints.

use super::amp;
use super::checkpoint::{self, CheckpointError, Checkpointer, Content, Facts};
use super::ddp::{Ddp, DdpError, DdpOptions};
use super::ema::Ema;
use super::evaluate::{EvalSpec, Watch, evaluate, reduce_sums};
use super::optimizer::{Optimizer, Rule};
use super::schedule::{Monitor, Schedule};
use super::state::{BestState, LoopState};
use super::step::{StepOutcome, StepRunner};
use super::{Observer, TrainError};
use crate::comm::Collective;
use crate::data::loader::{BatchPlanner, Loader, LoaderSpec, train_order};
use crate::task::{Datasets, Gallery, Metrics, Model};
use launcher::config::{Config, OptimizerKind, TrainConfig};
use launcher::contract::{MetricsRecord, Progress};
use launcher::plan::Plan;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Instant, SystemTime};
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
}

/// Where a resumed run goes on.
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
    /// Set by a signal: stop after a step that all ranks agree on.
    pub stop: Arc<AtomicBool>,
}

struct Loop<'a, 'o> {
    fit: Fit<'a>,
    observer: &'o mut dyn Observer,
    planner: BatchPlanner,
    /// Element type of autocast; absent: none.
    narrow: Option<Kind>,
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
        let planner = BatchPlanner {
            order: train_order(fit.datasets.train.as_ref(), &config.data, config.seed)?,
            global_batch: fit.plan.batch.global_batch as u64,
            micro_batch: fit.plan.batch.micro_batch as u64,
            rank: fit.collective.rank() as u64,
            world_size: fit.collective.world_size() as u64,
            drop_last: true,
        }
        .checked()?;
        let (narrow, note) = amp::narrow_kind(train.amp, fit.device);
        if let Some(note) = note.filter(|_| planner.rank == 0) {
            observer.line(note.to_owned());
        }
        let steps_per_epoch = planner.steps_per_epoch();
        let options = DdpOptions { bucket_mb: config.ddp.bucket_mb, ..DdpOptions::default() };
        let params = fit.params.iter().map(|(name, t)| (name.clone(), t.shallow_clone())).collect();
        let ddp = Ddp::new(params, Arc::clone(&fit.collective), options)?;
        let mut optimizer = Optimizer::new(rule(train), &ddp)?;
        let mut ema = train.ema_decay.map(|decay| Ema::new(decay, &fit.params));
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
            same_epochs(state.steps_per_epoch, steps_per_epoch)?;
            if let Some(saved) = state.schedule.take() {
                schedule.restore(saved);
            }
            if let Some(saved) = state.monitor.take() {
                monitor.restore(saved);
            }
        }
        let carried_sums = if planner.rank == 0 { std::mem::take(&mut state.train_sums) } else { Vec::new() };
        let saved_step = (state.step > 0).then_some(state.step);
        Ok(Self {
            fit,
            observer,
            planner,
            narrow,
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
        })
    }

    fn steps_total(&self) -> u64 {
        let by_epochs = (self.fit.config.train.num_epochs as u64).saturating_mul(self.state.steps_per_epoch);
        self.fit.config.train.max_steps.map_or(by_epochs, |max| max.min(by_epochs))
    }

    fn train(&mut self) -> Result<Status, TrainError> {
        let spec = LoaderSpec {
            threads: self.fit.plan.loader.threads,
            slots: self.fit.plan.loader.slots,
            micro_batch: self.fit.plan.batch.micro_batch,
            persistent: self.fit.config.train.persistent_workers,
            ..LoaderSpec::default()
        };
        let mut loader = Loader::new(Arc::clone(&self.fit.datasets.train), spec)?;
        let total = self.steps_total();
        if self.monitor.is_over() {
            // Killed between the checkpoint of its last epoch and its end.
            return Ok(Status::EarlyStopped);
        }
        while self.state.step < total {
            if let Some(status) = self.epoch(&mut loader, total)? {
                return Ok(status);
            }
        }
        self.seal(Status::Finished)
    }

    /// What is left of the current epoch. `Some`: training ends here.
    fn epoch(&mut self, loader: &mut Loader, total: u64) -> Result<Option<Status>, TrainError> {
        let epoch = self.state.epoch();
        let last = ((epoch + 1) * self.state.steps_per_epoch).min(total);
        self.observer.phase("train", self.state.step);
        let mut batches = loader.run(self.planner.requests(epoch, self.state.step_in_epoch()))?;
        loop {
            let outcome = self.step(&mut batches)?;
            let ends = self.state.step == last;
            let stop = outcome.stop;
            let mut record = self.record(&outcome, epoch, ends || stop)?;
            let status = if ends {
                drop(batches);
                let status = self.end_epoch(epoch, record.as_mut())?;
                self.write(record);
                self.save_if_due()?;
                return status.or(stop.then_some(Status::Stopped)).map(|status| self.seal(status)).transpose();
            } else if stop {
                Some(Status::Stopped)
            } else {
                None
            };
            self.write(record);
            if let Some(status) = status {
                return self.seal(status).map(Some);
            }
            self.save_if_due()?;
        }
    }

    /// `log.save_every_steps`.
    fn save_if_due(&mut self) -> Result<(), TrainError> {
        let every = self.fit.config.log.save_every_steps;
        if every > 0 && self.state.step.is_multiple_of(every) {
            self.save_once()?;
        }
        Ok(())
    }

    /// One optimizer step over all ranks.
    fn step(&mut self, batches: &mut crate::data::loader::BatchStream) -> Result<StepOutcome, TrainError> {
        let started = Instant::now();
        let step = self.state.step;
        let lr = self.schedule.rate(step);
        let runner = StepRunner {
            config: self.fit.config,
            planner: &self.planner,
            model: self.fit.model,
            device: self.fit.device,
            narrow: self.narrow,
            collective: self.fit.collective.as_ref(),
            step,
            step_in_epoch: self.state.step_in_epoch(),
            stop: self.fit.stop.load(Ordering::Relaxed),
        };
        let sums = self.local_sums();
        let result = runner.run(batches, &mut self.ddp, &mut self.optimizer, self.fit.metrics.as_mut(), lr);
        let mut outcome = match result {
            Err(error @ TrainError::NonFinite { .. }) => {
                // The failed step counts for nothing: its sums may be no numbers, which JSON cannot hold.
                self.fit.metrics.reset();
                self.carried_sums = sums;
                self.save_once()?;
                return Err(error);
            }
            other => other?,
        };
        if let Some(ema) = &mut self.ema {
            ema.update(&self.fit.params);
        }
        outcome.step_s = started.elapsed().as_secs_f64();
        self.state.step += 1;
        self.state.train_s += outcome.step_s;
        self.state.samples += self.planner.global_batch;
        self.steps_here += 1;
        self.samples_here += self.planner.global_batch;
        self.train_s_here += outcome.step_s;
        let progress = self.progress(&outcome);
        self.observer.step(&progress);
        Ok(outcome)
    }

    fn progress(&self, outcome: &StepOutcome) -> Progress {
        Progress {
            phase: "train".into(),
            epoch: (self.state.step - 1) / self.state.steps_per_epoch + 1,
            epochs: self.steps_total().div_ceil(self.state.steps_per_epoch),
            step: self.state.step,
            steps: self.steps_total(),
            loss: outcome.loss,
            samples_per_s: self.samples_here as f64 / self.train_s_here.max(1e-9),
            pss_bytes: 0,
            cache_hit_rate: None,
        }
    }

    /// The record of this step where one is due. Every rank calls it: values are reduced.
    fn record(&mut self, outcome: &StepOutcome, epoch: u64, due: bool) -> Result<Option<MetricsRecord>, TrainError> {
        let every = self.fit.config.log.log_every.max(1);
        if !due && !self.state.step.is_multiple_of(every) {
            return Ok(None);
        }
        let mut metrics = BTreeMap::new();
        if self.fit.config.train.compute_metrics_online {
            let values = self.fit.metrics.values(&self.train_sums()?);
            metrics.extend(values.into_iter().map(|(name, value)| (format!("train.{name}"), value)));
        }
        self.last_values.extend(metrics.clone());
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        metrics.retain(|_, value| value.is_finite());
        Ok(Some(MetricsRecord {
            t: now.as_secs_f64(),
            step: self.state.step,
            epoch: epoch + 1,
            loss: outcome.loss,
            lr: outcome.lr,
            samples_per_s: self.planner.global_batch as f64 / outcome.step_s.max(1e-9),
            data_wait_s: outcome.data_wait_s,
            step_s: outcome.step_s,
            grad_norm: outcome.grad_norm,
            scale: 1.0,
            cache_hit_rate: None,
            metrics,
        }))
    }

    /// Sums of the training metrics since the epoch began, over all ranks.
    fn train_sums(&self) -> Result<Vec<f64>, TrainError> {
        reduce_sums(&self.local_sums(), self.fit.collective.as_ref())
    }

    /// This rank's part of them.
    fn local_sums(&self) -> Vec<f64> {
        let mut sums = self.fit.metrics.sums();
        for (sum, carried) in sums.iter_mut().zip(&self.carried_sums) {
            *sum += carried;
        }
        sums
    }

    fn write(&mut self, record: Option<MetricsRecord>) {
        if let Some(record) = record
            && self.planner.rank == 0
        {
            self.observer.record(&record);
        }
    }

    /// Validation, schedule, early stopping, checkpoint. `Some`: training ends here.
    fn end_epoch(&mut self, epoch: u64, record: Option<&mut MetricsRecord>) -> Result<Option<Status>, TrainError> {
        let values = self.validate()?;
        self.carried_sums.clear();
        if let Some(record) = record {
            // JSON has no NaN: what is not finite is left out.
            record.metrics.extend(values.iter().filter(|(_, v)| v.is_finite()).map(|(k, v)| (k.clone(), *v)));
        }
        self.last_values.extend(values);
        let monitored = self.monitored()?;
        let verdict = self.monitor.end_epoch(epoch, monitored);
        self.schedule.end_epoch(self.state.step, monitored);
        let improved = verdict.improved;
        if improved {
            self.state.best = Some(BestState { value: monitored, step: self.state.step });
        }
        self.tell_epoch(epoch, improved);
        let log = &self.fit.config.log;
        let due = log.save_every > 0 && (epoch + 1).is_multiple_of(log.save_every) && !log.save_best_only;
        let keeps_best = improved && self.fit.config.train.restore_best_weights;
        if due || keeps_best || (improved && log.save_best_only) {
            self.save(improved)?;
        }
        Ok(verdict.stop.then_some(Status::EarlyStopped))
    }

    /// One line for people: `epoch 3/10, val: loss 0.1234, mae_deg 6.789 (best)`.
    fn tell_epoch(&mut self, epoch: u64, improved: bool) {
        let epochs = self.steps_total().div_ceil(self.state.steps_per_epoch);
        let best = if improved { " (best)" } else { "" };
        let values = told(&self.last_values, &self.headline("val."), "val.");
        self.observer.line(format!("epoch {}/{epochs}, val: {values}{best}", epoch + 1));
    }

    /// The monitored metric where it has this prefix (else the loss), then those that the task puts forward.
    fn headline(&self, prefix: &str) -> Vec<String> {
        let monitored = self.fit.config.train.monitor_metric.as_str();
        let first = if monitored.starts_with(prefix) { monitored.to_owned() } else { format!("{prefix}loss") };
        let mut names = vec![first];
        for name in self.fit.metrics.headline() {
            let name = format!("{prefix}{name}");
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names.retain(|name| self.last_values.contains_key(name));
        names
    }

    fn validate(&mut self) -> Result<BTreeMap<String, f64>, TrainError> {
        self.observer.phase("val", self.state.step);
        let dataset = Arc::clone(&self.fit.datasets.val);
        let values = self.evaluate(dataset, "val.")?;
        let picture = self.fit.gallery.as_mut().and_then(|gallery| gallery.picture());
        self.observer.validated(self.state.step, &values, picture);
        Ok(values)
    }

    /// With the averaged weights where there are any.
    fn evaluate(
        &mut self,
        dataset: Arc<dyn crate::data::Dataset>,
        prefix: &str,
    ) -> Result<BTreeMap<String, f64>, TrainError> {
        let spec = EvalSpec {
            batch: self.fit.plan.batch.val_batch,
            threads: self.fit.plan.loader.threads,
            device: self.fit.device,
            narrow: self.narrow,
        };
        if let Some(ema) = &mut self.ema {
            ema.swap(&self.fit.params);
        }
        let mut watch = Watch { metrics: self.fit.metrics.as_mut(), gallery: None };
        if prefix == "val." {
            watch.gallery = self.fit.gallery.as_deref_mut();
        }
        let values = evaluate(self.fit.model, &mut watch, &dataset, &spec, self.fit.collective.as_ref(), prefix);
        if let Some(ema) = &mut self.ema {
            ema.swap(&self.fit.params);
        }
        values
    }

    fn monitored(&self) -> Result<f64, TrainError> {
        let name = &self.fit.config.train.monitor_metric;
        self.last_values.get(name).copied().ok_or_else(|| {
            let known: Vec<&str> = self.last_values.keys().map(String::as_str).collect();
            TrainError::Config(format!(
                "train.monitor_metric {name} is not measured: choose one of {}",
                known.join(", ")
            ))
        })
    }

    /// The last checkpoint of a run that ends.
    fn seal(&mut self, status: Status) -> Result<Status, TrainError> {
        self.save_once()?;
        Ok(status)
    }

    /// A checkpoint of this step that is there already stays: it may be marked as the best.
    fn save_once(&mut self) -> Result<(), TrainError> {
        if self.saved_step == Some(self.state.step) { Ok(()) } else { self.save(false) }
    }

    /// Every rank calls it; rank 0 writes, in the background.
    fn save(&mut self, best: bool) -> Result<(), TrainError> {
        self.observer.phase("checkpoint", self.state.step);
        let mut state = self.state.clone();
        state.train_sums = if state.step_in_epoch() == 0 { Vec::new() } else { self.train_sums()? };
        state.schedule = Some(self.schedule.state().clone());
        state.monitor = Some(self.monitor.state().clone());
        self.saved_step = Some(state.step);
        if let Some(checkpoints) = &mut self.fit.checkpoints {
            let optimizer = self.optimizer.export(&self.ddp)?;
            let ema = self.ema.as_ref().map(Ema::tensors);
            checkpoints.save(Content {
                step: state.step,
                model: &self.fit.params,
                optimizer: &optimizer,
                ema: ema.as_deref(),
                facts: self.fit.facts.clone(),
                best,
                state: serde_json::to_value(&state).map_err(|e| TrainError::Config(format!("loop state: {e}")))?,
            })?;
        }
        Ok(())
    }

    /// The best weights back, the test split, the result.
    fn close(mut self, status: Status) -> Result<Finished, TrainError> {
        if status != Status::Stopped {
            // Ranks meet here: rank 0's checkpoints are on disk.
            self.fit.collective.barrier()?;
            self.restore_best()?;
            self.observer.phase("test", self.state.step);
            let values = self.evaluate(Arc::clone(&self.fit.datasets.test), "test.")?;
            self.last_values.extend(values);
        }
        let mut headline = self.headline("test.");
        if headline.is_empty() {
            headline = self.headline("val.");
        }
        self.last_values.retain(|_, value| value.is_finite());
        Ok(Finished {
            status,
            steps: self.state.step,
            epochs: self.state.epoch(),
            train_s: self.state.train_s,
            samples_per_s: self.samples_here as f64 / self.train_s_here.max(1e-9),
            metrics: self.last_values,
            headline,
            best: self.state.best,
        })
    }

    /// Rank 0 reads the best checkpoint, all ranks get its weights.
    fn restore_best(&mut self) -> Result<(), TrainError> {
        let Some(best) = self.state.best else { return Ok(()) };
        if !self.fit.config.train.restore_best_weights || best.step == self.state.step {
            return Ok(());
        }
        let averaged = self.ema.as_ref().map(Ema::tensors).unwrap_or_default();
        if self.planner.rank == 0 {
            let loaded = checkpoint::load(&self.fit.checkpoint_dir.join(format!("step-{}", best.step)))?;
            checkpoint::apply(&loaded.path, &loaded.model, &self.fit.params)?;
            if let Some(ema) = &loaded.ema {
                checkpoint::apply(&loaded.path, ema, &averaged)?;
            }
        }
        for (_, tensor) in self.fit.params.iter().chain(&averaged) {
            self.fit.collective.broadcast(&tensor.detach(), 0)?;
        }
        Ok(())
    }
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

/// `loss 0.01234, mae_deg 6.789`: four significant digits are what people compare.
fn told(values: &BTreeMap<String, f64>, names: &[String], prefix: &str) -> String {
    let short = |name: &String| name.strip_prefix(prefix).unwrap_or(name).to_owned();
    let one = |name: &String| values.get(name).map(|value| format!("{} {}", short(name), four_digits(*value)));
    names.iter().filter_map(one).collect::<Vec<_>>().join(", ")
}

fn four_digits(value: f64) -> String {
    let size = value.abs();
    if value == 0.0 || !value.is_finite() {
        return value.to_string();
    }
    match size.log10().floor() as i32 {
        exponent @ -4..=3 => format!("{value:.*}", (3 - exponent) as usize),
        _ => format!("{value:.3e}"),
    }
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
