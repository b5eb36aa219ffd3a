//! Learning rate by optimizer step, early stopping, and the best epoch. Pure: numbers in, numbers out.
//!
//! One function gives the rate: `warm-up factor × base` before the end of warm-up, the scheduler's rate after it. The
//! scheduler's own clock starts at 0 there, so the two never act at the same time.

use serde::{Deserialize, Serialize};
use spec::config::{MonitorMode, SchedulerKind, TrainConfig};

/// Relative improvement that counts for `plateau`: `threshold` of PyTorch's `ReduceLROnPlateau`, in its mode `rel`.
const PLATEAU_THRESHOLD: f64 = 1e-4;
/// Reductions smaller than this are left out: `eps` of `ReduceLROnPlateau`.
const PLATEAU_EPS: f64 = 1e-8;

/// The learning rate of every optimizer step.
///
/// After warm-up, with `t` steps since its end, `e = t / steps_per_epoch` whole epochs and `T` steps left to the end of
/// training at that point:
/// - `none`: `base`
/// - `step`: `base · gamma^⌊e / step_size⌋` (PyTorch `StepLR`)
/// - `cosine`: `min + (base - min) · (1 + cos(π t / T)) / 2` (`CosineAnnealingLR`, per step), `min` past the end
/// - `plateau`: `base`, times `gamma` after more than `plateau_patience` epochs without improvement
///   (`ReduceLROnPlateau`), not below `min_learning_rate`
#[derive(Clone, Debug)]
pub struct Schedule {
    kind: SchedulerKind,
    base: f64,
    min: f64,
    gamma: f64,
    step_epochs: u64,
    patience: usize,
    mode: MonitorMode,
    steps_per_epoch: u64,
    warmup_steps: u64,
    total_steps: u64,
    state: ScheduleState,
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
    /// `steps_per_epoch`: optimizer steps; 0 counts as 1.
    pub fn new(config: &TrainConfig, steps_per_epoch: u64) -> Self {
        let steps_per_epoch = steps_per_epoch.max(1);
        // Float to integer casts saturate: a negative warm-up becomes zero.
        let by_epochs = (config.warmup_epochs * steps_per_epoch as f64).round() as u64;
        let all_epochs = (config.num_epochs as u64).saturating_mul(steps_per_epoch);
        Self {
            kind: config.scheduler,
            base: config.learning_rate,
            min: config.min_learning_rate,
            gamma: config.gamma,
            step_epochs: (config.step_size as u64).max(1),
            patience: config.plateau_patience,
            mode: config.monitor_mode,
            steps_per_epoch,
            warmup_steps: config.warmup_steps.unwrap_or(by_epochs),
            total_steps: config.max_steps.unwrap_or(all_epochs),
            state: ScheduleState { plateau_rate: config.learning_rate, best: None, bad_epochs: 0 },
        }
    }

    /// The rate of optimizer step `step`, counted from 0 at the start of training. Warm-up runs from `base / W` in step 0
    /// to `base` in step `W - 1` (`LinearLR` with `start_factor` 1/W).
    pub fn rate(&self, step: u64) -> f64 {
        match step.checked_sub(self.warmup_steps) {
            None => self.base * ((step + 1) as f64 / self.warmup_steps as f64),
            Some(since) => self.scheduled(since),
        }
    }

    /// Optimizer steps of the warm-up.
    pub fn warmup_steps(&self) -> u64 {
        self.warmup_steps
    }

    /// The scheduler's rate `since` steps after warm-up.
    fn scheduled(&self, since: u64) -> f64 {
        match self.kind {
            SchedulerKind::None => self.base,
            SchedulerKind::Step => {
                let reductions = since / self.steps_per_epoch / self.step_epochs;
                self.base * self.gamma.powf(reductions as f64)
            }
            SchedulerKind::Cosine => {
                let span = self.total_steps.saturating_sub(self.warmup_steps).max(1);
                let done = since.min(span) as f64 / span as f64;
                self.min + (self.base - self.min) * (1.0 + (std::f64::consts::PI * done).cos()) / 2.0
            }
            SchedulerKind::Plateau => self.state.plateau_rate,
        }
    }

    /// Passes the watched metric of an epoch that ended after `steps_done` optimizer steps to the schedule. Only
    /// `plateau` uses it, and ignores epochs that end inside warm-up.
    pub fn end_epoch(&mut self, steps_done: u64, metric: f64) {
        if self.kind != SchedulerKind::Plateau || steps_done <= self.warmup_steps && self.warmup_steps > 0 {
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
        assert_close((0..8).map(|epoch| Schedule::new(&config, 1).rate(epoch)), &expected);
        // With many steps per epoch the rate holds within the epoch.
        assert_close((0..8).map(|epoch| Schedule::new(&config, 50).rate(epoch * 50 + 49)), &expected);
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
        assert_close((0..11).map(|step| Schedule::new(&config, 1).rate(step)), &expected);
        assert_close((0..11).map(|epoch| Schedule::new(&config, 7).rate(epoch * 7)), &expected);
        // Past the end the rate stays; PyTorch's would rise again.
        assert_close([Schedule::new(&config, 1).rate(15)], &[0.01]);
        let shorter = TrainConfig { max_steps: Some(10), num_epochs: 999, ..config };
        assert_close((0..11).map(|step| Schedule::new(&shorter, 7).rate(step)), &expected);
    }

    fn plateau_rates(config: &TrainConfig, metrics: &[f64]) -> Vec<f64> {
        let mut schedule = Schedule::new(config, 5);
        let mut rates = Vec::new();
        for (epoch, &metric) in (0..).zip(metrics) {
            rates.push(schedule.rate(epoch * 5));
            // A checkpoint between epochs changes nothing.
            let json = serde_json::to_string(schedule.state()).unwrap();
            schedule = Schedule::new(config, 5);
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
    fn defect_e_warm_up_and_scheduler_never_act_at_the_same_time() {
        // LinearLR(start_factor=1/4, total_iters=3) of PyTorch, for every scheduler alike.
        for kind in [SchedulerKind::None, SchedulerKind::Step, SchedulerKind::Cosine, SchedulerKind::Plateau] {
            let config = TrainConfig { warmup_steps: Some(4), warmup_epochs: 9.0, step_size: 1, ..config(kind) };
            let schedule = Schedule::new(&config, 2);
            assert_close((0..5).map(|step| schedule.rate(step)), &[0.025, 0.05, 0.075, 0.1, 0.1]);
            // After it, the scheduler runs as if training began there.
            let rest = TrainConfig { warmup_steps: Some(0), max_steps: Some(16), ..config };
            let rest = Schedule::new(&rest, 2);
            assert!((0..16).all(|step| schedule.rate(4 + step) == rest.rate(step)), "{kind:?}");
        }
    }

    #[test]
    fn plateau_ignores_epochs_inside_warm_up() {
        let config =
            TrainConfig { warmup_epochs: 3.0, plateau_patience: 0, gamma: 0.5, ..config(SchedulerKind::Plateau) };
        let mut schedule = Schedule::new(&config, 10);
        assert_eq!(schedule.warmup_steps(), 30);
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
