//! Messages of the loop: progress, records, lines.

use super::Loop;
use crate::task::Datasets;
use crate::train::TrainError;
use crate::train::evaluate::reduce_sums;
use crate::train::input::Copied;
use crate::train::step::StepOutcome;
use spec::contract::{InputRecord, MetricsRecord, Phase, Progress};
use std::collections::BTreeMap;
use std::time::SystemTime;

impl Loop<'_, '_> {
    pub(super) fn progress(&self, outcome: &StepOutcome) -> Progress {
        Progress {
            phase: Phase::Train,
            epoch: self.state.epochs_of(self.state.step),
            epochs: self.state.epochs_of(self.steps_total()),
            step: self.state.step,
            steps: self.steps_total(),
            loss: outcome.loss,
            samples_per_s: self.samples_here as f64 / self.train_s_here.max(1e-9),
            pss_bytes: 0,
            cache_hit_rate: None,
        }
    }

    /// The record of this step where one is due.
    pub(super) fn record_if_due(
        &mut self,
        outcome: &StepOutcome,
        epoch: u64,
        due: bool,
    ) -> Result<Option<MetricsRecord>, TrainError> {
        let every = self.fit.config.log.log_every.max(1);
        (due || self.state.step.is_multiple_of(every)).then(|| self.record(outcome, epoch)).transpose()
    }

    /// The record of this step. Every rank calls it: values are reduced.
    pub(super) fn record(&mut self, outcome: &StepOutcome, epoch: u64) -> Result<MetricsRecord, TrainError> {
        self.tell_left_out()?;
        let mut metrics = BTreeMap::new();
        if self.fit.config.train.compute_metrics_online {
            let values = self.fit.metrics.values(&self.train_sums()?);
            metrics.extend(values.into_iter().map(|(name, value)| (format!("train.{name}"), value)));
        }
        self.last_values.extend(metrics.clone());
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        metrics.retain(|_, value| value.is_finite());
        metrics.extend(self.groups.names.iter().zip(&outcome.lrs).map(|(name, lr)| (format!("lr.{name}"), *lr)));
        let samples = self.planner.step_samples(epoch, self.step_before(epoch));
        Ok(MetricsRecord {
            t: now.as_secs_f64(),
            step: self.state.step,
            epoch: epoch + 1,
            loss: outcome.loss,
            lr: outcome.lr,
            samples_per_s: samples as f64 / outcome.step_s.max(1e-9),
            data_wait_s: outcome.data_wait_s,
            step_s: outcome.step_s,
            grad_norm: outcome.grad_norm,
            scale: outcome.scale,
            cache_hit_rate: None,
            input: self.on_device.as_mut().map(|device| input_record(device.input.take_copied())),
            files_skipped: self.files_skipped(),
            metrics,
        })
    }

    /// Place in `epoch` of the step that was counted last.
    fn step_before(&self, epoch: u64) -> u64 {
        self.state.step.saturating_sub(1).saturating_sub(self.state.steps_of(epoch))
    }

    /// A warning for each file that reading found to be unusable since the last call, on any rank. All ranks call it.
    pub(super) fn tell_left_out(&mut self) -> Result<(), TrainError> {
        let Datasets { train, val, test, .. } = self.fit.datasets;
        let news: Option<Vec<Vec<String>>> =
            [train, val, test].into_iter().map(|split| split.take_left_out()).collect();
        let Some(news) = news else { return Ok(()) };
        let own = serde_json::to_vec(&news.concat()).unwrap_or_default();
        for theirs in self.fit.collective.all_gather(&own)? {
            for line in serde_json::from_slice::<Vec<String>>(&theirs).unwrap_or_default() {
                if self.state.left_out.insert(line.clone()) {
                    self.observer.line(format!("warning: left out: {line}"));
                }
            }
        }
        Ok(())
    }

    /// Files left out so far, at opening and since.
    pub(super) fn files_skipped(&self) -> u64 {
        (self.fit.datasets.skipped.len() + self.state.left_out.len()) as u64
    }

    /// Sums of the training metrics since the epoch began, over all ranks.
    pub(super) fn train_sums(&self) -> Result<Vec<f64>, TrainError> {
        reduce_sums(&self.local_sums(), self.fit.collective.as_ref())
    }

    /// This rank's part of them.
    pub(super) fn local_sums(&self) -> Vec<f64> {
        let mut sums = self.fit.metrics.sums();
        for (sum, carried) in sums.iter_mut().zip(&self.carried_sums) {
            *sum += carried;
        }
        sums
    }

    pub(super) fn write(&mut self, record: Option<MetricsRecord>) {
        if let Some(record) = record
            && self.planner.rank == 0
        {
            self.observer.record(&record);
        }
    }

    /// Prints one line: `epoch 3/10, val: loss 0.1234, mae_deg 6.789 (best)`.
    pub(super) fn tell_epoch(&mut self, epoch: u64, improved: bool) {
        let epochs = self.state.epochs_of(self.steps_total());
        let best = if improved { " (best)" } else { "" };
        let values = told(&self.last_values, &self.headline("val."), "val.");
        self.observer.line(format!("epoch {}/{epochs}, val: {values}{best}", epoch + 1));
    }

    /// The monitored metric where it has this prefix (else the loss), then those that the task puts forward.
    pub(super) fn headline(&self, prefix: &str) -> Vec<String> {
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
}

fn input_record(copied: Copied) -> InputRecord {
    let Copied { bytes, direct_bytes, timed_bytes, device_s } = copied;
    InputRecord { bytes, direct_bytes, timed_bytes, device_s }
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
