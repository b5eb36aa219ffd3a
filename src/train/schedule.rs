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

/// What the schedule makes of a group of parameters.
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
        None => (config.warmup_epochs * steps_per_epoch.saturating_mul(accumulation) as f64).round() as u64,
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
mod tests {
    use super::*;

    fn config(scheduler: SchedulerKind) -> TrainConfig {
        TrainConfig { scheduler, learning_rate: 0.1, warmup_epochs: 0.0, num_epochs: 10, ..TrainConfig::default() }
    }

    fn made(config: &TrainConfig, steps_per_epoch: u64) -> Schedule {
        Schedule::new(config, Pace::even(steps_per_epoch, 1))
    }

    fn assert_close(found: impl IntoIterator<Item = f64>, expected: &[f64]) {
        let found: Vec<f64> = found.into_iter().collect();
        assert_eq!(found.len(), expected.len());
        let close = |(a, b): (&f64, &f64)| (a - b).abs() <= 1e-12 * b.abs().max(1e-3);
        assert!(found.iter().zip(expected).all(close), "{found:?}\n{expected:?}");
    }

    // Expected rates below were printed by PyTorch 2.11's schedulers with SGD at 0.1.

    #[test]
    fn step_matches_pytorch() {
        let config = TrainConfig { step_size: 3, gamma: 0.5, ..config(SchedulerKind::Step) };
        let expected = [0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.025, 0.025];
        assert_close((0..8).map(|epoch| made(&config, 1).rate(epoch)), &expected);
        // With many steps per epoch the rate holds within the epoch.
        assert_close((0..8).map(|epoch| made(&config, 50).rate(epoch * 50 + 49)), &expected);
    }

    #[test]
    fn cosine_matches_pytorch() {
        let config = TrainConfig { min_learning_rate: 0.01, ..config(SchedulerKind::Cosine) };
        let expected = [
            0.1,
            0.09779754323328192,
            0.09140576474687263,
            0.08145033635316129,
            0.06890576474687264,
            0.05500000000000001,
            0.04109423525312737,
            0.028549663646838717,
            0.01859423525312737,
            0.012202456766718092,
            0.01,
        ];
        assert_close((0..11).map(|step| made(&config, 1).rate(step)), &expected);
        assert_close((0..11).map(|epoch| made(&config, 7).rate(epoch * 7)), &expected);
        // Past the end the rate stays; PyTorch's would rise again.
        assert_close([made(&config, 1).rate(15)], &[0.01]);
        let shorter = TrainConfig { max_steps: Some(10), num_epochs: 999, ..config };
        assert_close((0..11).map(|step| made(&shorter, 7).rate(step)), &expected);
    }

    fn plateau_rates(config: &TrainConfig, metrics: &[f64]) -> Vec<f64> {
        let mut schedule = made(config, 5);
        let mut rates = Vec::new();
        for (epoch, &metric) in (0..).zip(metrics) {
            rates.push(schedule.rate(epoch * 5));
            // A checkpoint between epochs changes nothing.
            let json = serde_json::to_string(schedule.state()).unwrap();
            schedule = made(config, 5);
            schedule.restore(serde_json::from_str(&json).unwrap());
            schedule.end_epoch(epoch * 5 + 5, metric);
        }
        rates
    }

    #[test]
    fn plateau_matches_pytorch() {
        let down = TrainConfig {
            gamma: 0.5,
            plateau_patience: 2,
            min_learning_rate: 0.02,
            monitor_mode: MonitorMode::Min,
            ..config(SchedulerKind::Plateau)
        };
        let metrics = [1.0, 0.9, 0.9, 0.89995, 0.95, 0.8, 0.85, 0.85, 0.85, 0.85, 0.85, 0.85, 0.85, 0.85, 0.85];
        let expected = [0.1, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05, 0.025, 0.025, 0.025, 0.02, 0.02, 0.02];
        assert_close(plateau_rates(&down, &metrics), &expected);
        let up = TrainConfig {
            gamma: 0.1,
            plateau_patience: 1,
            min_learning_rate: 0.0,
            monitor_mode: MonitorMode::Max,
            ..down
        };
        let metrics = [0.5, 0.5, 0.6, 0.60001, 0.5, 0.7, 0.6];
        assert_close(plateau_rates(&up, &metrics), &[0.1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01]);
    }

    #[test]
    fn linear_matches_pytorch() {
        let to_lrf = TrainConfig { lrf: 0.01, ..config(SchedulerKind::Linear) };
        let expected = [0.1, 0.0901, 0.0802, 0.0703, 0.0604, 0.0505, 0.0406, 0.0307, 0.0208, 0.0109, 0.001, 0.001];
        assert_close((0..12).map(|step| made(&to_lrf, 1).rate(step)), &expected);
        assert_close((0..12).map(|epoch| made(&to_lrf, 7).rate(epoch * 7)), &expected);
        let to_zero = TrainConfig { max_steps: Some(8), num_epochs: 999, ..config(SchedulerKind::Linear) };
        let expected = [0.1, 0.0875, 0.075, 0.0625, 0.05, 0.0375, 0.025, 0.0125, 0.0];
        assert_close((0..9).map(|step| made(&to_zero, 3).rate(step)), &expected);
        let floor = TrainConfig { min_learning_rate: 0.05, ..to_lrf };
        assert_close([made(&floor, 1).rate(5), made(&floor, 1).rate(10)], &[0.075, 0.05]);
        let cosine = TrainConfig { lrf: 0.1, ..config(SchedulerKind::Cosine) };
        assert_close([made(&cosine, 1).rate(0), made(&cosine, 1).rate(10)], &[0.1, 0.01]);
    }

    /// Reference: PyTorch 2.11's SGD with `LambdaLR` by epoch and the warm-up of Ultralytics' loop, which sets each group's
    /// rate and momentum with `numpy.interp` before every batch: 5 epochs of 6 batches, 12 of them warm-up.
    #[test]
    fn a_warm_up_within_the_schedule_matches_a_loop_over_batches() {
        let config = TrainConfig {
            learning_rate: 0.01,
            lrf: 0.01,
            num_epochs: 5,
            warmup_epochs: 2.0,
            warmup_mode: WarmupMode::Within,
            schedule_by: ScheduleBy::Epoch,
            ..config(SchedulerKind::Linear)
        };
        let momentum = Some((0.8, 0.937));
        let (bias, others) =
            (Course { factor: 1.0, start: 0.1, momentum }, Course { factor: 1.0, start: 0.0, momentum });
        let schedule = made(&config, 6);
        for (batch, of_bias, of_others, of_momentum) in [
            (0, 0.1, 0.0, 0.8),
            (1, 0.0925, 0.000_833_333_333_333_333_4, 0.811_416_666_666_666_7),
            (5, 0.0625, 0.004_166_666_666_666_667, 0.857_083_333_333_333_4),
            (6, 0.05401, 0.004_01, 0.8685),
            (11, 0.015_684_999_999_999_99, 0.007_351_666_666_666_667, 0.925_583_333_333_333_4),
            (12, 0.00604, 0.00604, 0.937),
            (17, 0.00604, 0.00604, 0.937),
            (18, 0.00406, 0.00406, 0.937),
            (29, 0.00208, 0.00208, 0.937),
        ] {
            let numbers = [&bias, &others].map(|course| schedule.numbers(batch, course));
            assert_close(numbers.map(|n| n.lr), &[of_bias, of_others]);
            assert_close(numbers.map(|n| n.momentum.unwrap()), &[of_momentum; 2]);
            assert_eq!(schedule.is_warming(batch), batch < 12);
        }
        assert_close([schedule.rate(1)], &[0.000_833_333_333_333_333_4]);
        // Two batches a step: a step has the numbers of its last batch.
        let pairs = TrainConfig { gradient_accumulation_steps: 2, ..config };
        let pairs = Schedule::new(&pairs, Pace::even(3, 2));
        assert_close(
            (0..15).map(|step| pairs.rate(step)),
            &(0..15).map(|s| schedule.rate(2 * s + 1)).collect::<Vec<_>>(),
        );
        // A group's factor is on the scheduler's rate, not on where the warm-up begins.
        let double = Course { factor: 2.0, start: 0.1, momentum: None };
        assert_close([0, 6, 29].map(|batch| schedule.numbers(batch, &double).lr), &[0.1, 0.05802, 0.00416]);
    }

    #[test]
    fn before_the_schedule_groups_warm_up_by_their_factor_and_momentum_with_them() {
        let config = TrainConfig { warmup_steps: Some(4), ..config(SchedulerKind::None) };
        let schedule = made(&config, 2);
        let course = Course { factor: 3.0, start: 0.7, momentum: Some((0.5, 0.9)) };
        let numbers: Vec<_> = (0..5).map(|step| schedule.numbers(step, &course)).collect();
        assert_close(numbers.iter().map(|n| n.lr), &[0.075, 0.15, 0.225, 0.3, 0.3]);
        assert_close(numbers.iter().map(|n| n.momentum.unwrap()), &[0.6, 0.7, 0.8, 0.9, 0.9]);
    }

    #[test]
    fn defect_e_warm_up_and_scheduler_never_act_at_the_same_time() {
        // LinearLR(start_factor=1/4, total_iters=3) of PyTorch, for every scheduler alike.
        for kind in [SchedulerKind::None, SchedulerKind::Step, SchedulerKind::Cosine, SchedulerKind::Plateau] {
            let config = TrainConfig { warmup_steps: Some(4), warmup_epochs: 9.0, step_size: 1, ..config(kind) };
            let schedule = made(&config, 2);
            assert_close((0..5).map(|step| schedule.rate(step)), &[0.025, 0.05, 0.075, 0.1, 0.1]);
            // After it, the scheduler runs as if training began there.
            let rest = TrainConfig { warmup_steps: Some(0), max_steps: Some(16), ..config };
            let rest = made(&rest, 2);
            assert!((0..16).all(|step| schedule.rate(4 + step) == rest.rate(step)), "{kind:?}");
        }
    }

    #[test]
    fn plateau_ignores_epochs_inside_warm_up() {
        let config =
            TrainConfig { warmup_epochs: 3.0, plateau_patience: 0, gamma: 0.5, ..config(SchedulerKind::Plateau) };
        let mut schedule = made(&config, 10);
        assert_eq!(schedule.warmup, Warmup::Before(30));
        for (steps, metric, rate) in [(10, 1.0, 0.1), (20, 2.0, 0.1), (30, 3.0, 0.1), (40, 4.0, 0.1), (50, 4.0, 0.05)] {
            schedule.end_epoch(steps, metric);
            assert_close([schedule.rate(60)], &[rate]);
        }
        schedule.end_epoch(60, f64::NAN);
        assert_eq!((schedule.state().best, schedule.rate(60)), (Some(4.0), 0.025));
    }

    #[test]
    fn early_stopping_counts_epochs_since_the_best() {
        let config = TrainConfig {
            early_stopping: true,
            patience: 2,
            min_delta: 0.1,
            monitor_mode: MonitorMode::Min,
            ..TrainConfig::default()
        };
        let run = |config: &TrainConfig, metrics: &[f64]| {
            let mut monitor = Monitor::new(config);
            let mut verdicts = Vec::new();
            for (epoch, &metric) in (0..).zip(metrics) {
                let json = serde_json::to_string(monitor.state()).unwrap();
                monitor = Monitor::new(config);
                monitor.restore(serde_json::from_str(&json).unwrap());
                let Verdict { improved, stop } = monitor.end_epoch(epoch, metric);
                verdicts.push((improved, stop));
            }
            (verdicts, monitor.state().clone())
        };
        let (verdicts, state) = run(&config, &[f64::NAN, 1.0, 0.95, 0.8, 0.75, 0.9]);
        let (bad, good, stop) = ((false, false), (true, false), (false, true));
        assert_eq!(verdicts, [bad, good, bad, good, bad, stop]);
        assert_eq!(state, MonitorState { best: Some(0.8), best_epoch: Some(3), bad_epochs: 2 });
        let up = TrainConfig { monitor_mode: MonitorMode::Max, early_stopping: false, ..config };
        assert_eq!(run(&up, &[0.1, 0.3, 0.2, 0.2, 0.2]).0, [good, good, bad, bad, bad]);
    }
}
