//! Learning rate by optimizer step, early stopping, and the best epoch. Pure: numbers in, numbers out.
//!
//! With `train.warmup_mode: before` one function gives the rate: `warm-up factor × base` before the end of warm-up, the
//! scheduler's rate after it. The scheduler's clock starts at 0 there, so the two never act at the same time. With `within`
//! the scheduler's clock starts at the first step, and the warm-up leads from its starting rate to the scheduler's rate.

use super::optimizer::Numbers;
use super::pace::Pace;
use serde::{Deserialize, Serialize};
use spec::config::{MonitorMode, ScheduleBy, SchedulerKind, TrainConfig, WarmupMode};

/// Relative improvement that counts for `plateau`: `threshold` of PyTorch's `ReduceLROnPlateau`, in its mode `rel`.
const PLATEAU_THRESHOLD: f64 = 1e-4;
/// Reductions smaller than this are left out: `eps` of `ReduceLROnPlateau`.
const PLATEAU_EPS: f64 = 1e-8;

/// The learning rate of every optimizer step.
///
/// With `t` steps since the scheduler's clock began, `e = t / steps_per_epoch` whole epochs and `T` steps from there to the
/// end of training, and with `last` = the larger of `min_learning_rate` and `lrf · base`:
/// - `none`: `base`
/// - `step`: `base · gamma^⌊e / step_size⌋` (PyTorch `StepLR`)
/// - `cosine`: `last + (base - last) · (1 + cos(π t / T)) / 2` (`CosineAnnealingLR`, per step), `last` past the end
/// - `linear`: `last + (base - last) · (1 - t / T)` (`LinearLR`, per step), `last` past the end
/// - `plateau`: `base`, times `gamma` after more than `plateau_patience` epochs without improvement
///   (`ReduceLROnPlateau`), not below `min_learning_rate`
///
/// With `schedule_by: epoch`, `cosine` and `linear` take `t` from the beginning of the epoch.
#[derive(Clone, Debug)]
pub struct Schedule {
    kind: SchedulerKind,
    by: ScheduleBy,
    base: f64,
    min: f64,
    /// Last rate of `cosine` and `linear`.
    last: f64,
    gamma: f64,
    step_epochs: u64,
    patience: usize,
    mode: MonitorMode,
    pace: Pace,
    warmup: Warmup,
    total_steps: u64,
    /// `within`: rate at the beginning.
    start: f64,
    state: ScheduleState,
}

/// How training begins.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Warmup {
    /// So many optimizer steps.
    Before(u64),
    /// So many batches.
    Within(u64),
}

/// Values of the schedule for a group of parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Course {
    /// Factor on the scheduler's rate.
    pub factor: f64,
    /// `within`: rate at the beginning of the warm-up.
    pub start: f64,
    /// Momentum at the beginning and at the end of the warm-up, where it changes.
    pub momentum: Option<(f64, f64)>,
}

/// Optimizer steps of the warm-up. Float to integer casts saturate: a negative warm-up becomes zero.
fn warmup_steps(config: &TrainConfig, steps_per_epoch: u64) -> u64 {
    config.warmup_steps.unwrap_or((config.warmup_epochs * steps_per_epoch.max(1) as f64).round() as u64)
}

/// Batches of the warm-up: a step has `gradient_accumulation_steps` of them.
pub fn warmup_batches(config: &TrainConfig, steps_per_epoch: u64) -> u64 {
    let accumulation = config.gradient_accumulation_steps.max(1) as u64;
    match config.warmup_steps {
        Some(steps) => steps.saturating_mul(accumulation),
        None => {
            // It ends before the last epoch begins.
            let epochs = config.warmup_epochs.min(config.num_epochs.saturating_sub(1) as f64);
            (epochs * steps_per_epoch.saturating_mul(accumulation) as f64).round_ties_even() as u64
        }
    }
}

/// State of a [`Schedule`] in a checkpoint; the rest follows from config and step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScheduleState {
    /// `plateau`: the rate now.
    pub plateau_rate: f64,
    pub best: Option<f64>,
    pub bad_epochs: usize,
}

impl Schedule {
    pub fn new(config: &TrainConfig, pace: Pace) -> Self {
        let (by_epochs, all_epochs) =
            (warmup_steps(config, pace.steps_per_epoch), pace.steps(config.num_epochs as u64));
        let warmup = match config.warmup_mode {
            WarmupMode::Before => Warmup::Before(by_epochs),
            WarmupMode::Within => Warmup::Within(warmup_batches(config, pace.steps_per_epoch)),
        };
        Self {
            kind: config.scheduler,
            by: config.schedule_by,
            base: config.learning_rate,
            min: config.min_learning_rate,
            last: config.min_learning_rate.max(config.lrf * config.learning_rate),
            gamma: config.gamma,
            step_epochs: (config.step_size as u64).max(1),
            patience: config.plateau_patience,
            mode: config.monitor_mode,
            pace,
            warmup,
            total_steps: config.max_steps.unwrap_or(all_epochs),
            start: config.warmup_rate,
            state: ScheduleState { plateau_rate: config.learning_rate, best: None, bad_epochs: 0 },
        }
    }

    /// The rate of optimizer step `step`, counted from 0 at the start of training, of parameters in no particular group.
    /// Before the scheduler, warm-up runs from `base / W` in step 0 to `base` in step `W - 1` (`LinearLR` with
    /// `start_factor` 1/W).
    pub fn rate(&self, step: u64) -> f64 {
        self.numbers(step, &Course { factor: 1.0, start: self.start, momentum: None }).lr
    }

    /// Numbers of a group in a step.
    pub fn numbers(&self, step: u64, course: &Course) -> Numbers {
        let share = self.warmed(step);
        let momentum = course.momentum.map(|(from, to)| if share < 1.0 { from + (to - from) * share } else { to });
        let lr = match self.warmup {
            Warmup::Before(steps) if step < steps => self.base * share * course.factor,
            Warmup::Before(steps) => self.scheduled(step - steps, steps) * course.factor,
            Warmup::Within(_) => {
                let target = self.scheduled(step, 0) * course.factor;
                if share < 1.0 { course.start + (target - course.start) * share } else { target }
            }
        };
        Numbers { lr, momentum }
    }

    /// Share of the warm-up that is behind in a step: 1 after it.
    fn warmed(&self, step: u64) -> f64 {
        let (done, all) = match self.warmup {
            Warmup::Before(steps) => (step + 1, steps),
            Warmup::Within(batches) => (self.pace.last_batch(step), batches),
        };
        if done < all { done as f64 / all as f64 } else { 1.0 }
    }

    /// True while a step's momentum may differ from the next one's.
    pub fn is_warming(&self, step: u64) -> bool {
        self.warmed(step) < 1.0
    }

    /// The scheduler's rate `since` steps after its clock began, which was at step `begin`.
    fn scheduled(&self, since: u64, begin: u64) -> f64 {
        match self.kind {
            SchedulerKind::None => self.base,
            SchedulerKind::Step => {
                let epochs = if begin == 0 { self.pace.epoch(since) } else { since / self.pace.steps_per_epoch };
                self.base * self.gamma.powf((epochs / self.step_epochs) as f64)
            }
            SchedulerKind::Cosine => {
                let done = self.done(since, begin);
                self.last + (self.base - self.last) * (1.0 + (std::f64::consts::PI * done).cos()) / 2.0
            }
            SchedulerKind::Linear => self.last + (self.base - self.last) * (1.0 - self.done(since, begin)),
            SchedulerKind::Plateau => self.state.plateau_rate,
        }
    }

    /// Share of the scheduler's time that is over.
    fn done(&self, since: u64, begin: u64) -> f64 {
        let span = self.total_steps.saturating_sub(begin).max(1);
        let since = match self.by {
            ScheduleBy::Step => since,
            // Epochs count alike, whatever number of steps the first ones have.
            ScheduleBy::Epoch if begin == 0 => {
                let epochs = self.total_epochs();
                return self.pace.epoch(since).min(epochs) as f64 / epochs as f64;
            }
            ScheduleBy::Epoch => since / self.pace.steps_per_epoch * self.pace.steps_per_epoch,
        };
        since.min(span) as f64 / span as f64
    }

    /// Epochs to the end of training, a begun one counted as whole.
    fn total_epochs(&self) -> u64 {
        self.pace.epoch(self.total_steps.saturating_sub(1)) + 1
    }

    /// Passes the watched metric of an epoch that ended after `steps_done` optimizer steps to the schedule. Only
    /// `plateau` uses it, and ignores epochs that end inside warm-up.
    pub fn end_epoch(&mut self, steps_done: u64, metric: f64) {
        let warms = match self.warmup {
            Warmup::Before(steps) => steps > 0 && steps_done <= steps,
            Warmup::Within(_) => steps_done > 0 && self.is_warming(steps_done - 1),
        };
        if self.kind != SchedulerKind::Plateau || warms {
            return;
        }
        let improved = self.state.best.is_none_or(|best| match self.mode {
            MonitorMode::Min => metric < best * (1.0 - PLATEAU_THRESHOLD),
            MonitorMode::Max => metric > best * (1.0 + PLATEAU_THRESHOLD),
        });
        // A metric that is not finite is an epoch without improvement, and never the best.
        if improved && metric.is_finite() {
            self.state.best = Some(metric);
            self.state.bad_epochs = 0;
            return;
        }
        self.state.bad_epochs += 1;
        if self.state.bad_epochs > self.patience {
            let reduced = (self.state.plateau_rate * self.gamma).max(self.min);
            if self.state.plateau_rate - reduced > PLATEAU_EPS {
                self.state.plateau_rate = reduced;
            }
            self.state.bad_epochs = 0;
        }
    }

    /// State for a checkpoint.
    pub fn state(&self) -> &ScheduleState {
        &self.state
    }

    /// Restores the state from a checkpoint.
    pub fn restore(&mut self, state: ScheduleState) {
        self.state = state;
    }
}

/// Watches the monitored metric: the best epoch, and when to stop.
#[derive(Clone, Debug)]
pub struct Monitor {
    mode: MonitorMode,
    min_delta: f64,
    /// `None`: never stop early.
    patience: Option<usize>,
    state: MonitorState,
}

/// State of a [`Monitor`] in a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MonitorState {
    pub best: Option<f64>,
    pub best_epoch: Option<u64>,
    /// Epochs since the best.
    pub bad_epochs: usize,
}

/// Verdict on an epoch's metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Better than the best so far by more than `min_delta`: these weights are to be kept.
    pub improved: bool,
    /// `patience` epochs have passed without improvement.
    pub stop: bool,
}

impl Monitor {
    pub fn new(config: &TrainConfig) -> Self {
        Self {
            mode: config.monitor_mode,
            min_delta: config.min_delta,
            patience: config.early_stopping.then_some(config.patience),
            state: MonitorState::default(),
        }
    }

    /// Takes the metric of `epoch`. What is not finite is never better.
    pub fn end_epoch(&mut self, epoch: u64, metric: f64) -> Verdict {
        let better = self.state.best.is_none_or(|best| match self.mode {
            MonitorMode::Min => metric < best - self.min_delta,
            MonitorMode::Max => metric > best + self.min_delta,
        });
        let improved = better && metric.is_finite();
        if improved {
            self.state = MonitorState { best: Some(metric), best_epoch: Some(epoch), bad_epochs: 0 };
        } else {
            self.state.bad_epochs += 1;
        }
        Verdict { improved, stop: self.patience.is_some_and(|patience| !improved && self.state.bad_epochs >= patience) }
    }

    /// `patience` epochs had passed when this state was saved.
    pub fn is_over(&self) -> bool {
        self.patience.is_some_and(|patience| self.state.bad_epochs > 0 && self.state.bad_epochs >= patience)
    }

    /// State for a checkpoint.
    pub fn state(&self) -> &MonitorState {
        &self.state
    }

    /// Restores the state from a checkpoint.
    pub fn restore(&mut self, state: MonitorState) {
        self.state = state;
    }
}

#[cfg(test)]
mod tests;
