//! Training in legs: what the recorded metrics say after each. Pure; the legs are run elsewhere.
//!
//! Architecture invariant: reads a config and records, starts nothing.

use crate::config::{Config, MonitorMode, SmartConfig};
use crate::contract::MetricsRecord;
use serde::Serialize;
use std::fmt::{self, Display};

/// A target that cannot be read.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("smart.targets: {0:?} is no comparison; expected a metric, <= or >=, and a number, such as val.loss<=0.02")]
pub struct BadTarget(String);

/// A metric and where it should get to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Target {
    pub metric: String,
    /// Higher is better.
    pub rises: bool,
    /// Absent: only its progress counts.
    pub value: Option<f64>,
}

/// What is to be done after a leg.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "decision", rename_all = "snake_case")]
pub enum Decision {
    /// Train up to so many epochs in all.
    GoOn {
        up_to: usize,
    },
    TargetsMet,
    NoProgress,
    EpochsDone,
}

/// A leg that was trained.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Leg {
    /// Epochs in all, at its end.
    pub epochs: usize,
    /// Last value of each target's metric.
    pub values: Vec<(String, Option<f64>)>,
    /// Mean of the window's older half less that of the newer one, in the direction of getting better.
    pub gains: Vec<(String, Option<f64>)>,
    #[serde(flatten)]
    pub decision: Decision,
}

/// The targets that `config` names; the monitored metric alone where it names none.
///
/// # Errors
/// Text that is no comparison.
pub fn targets(config: &Config) -> Result<Vec<Target>, BadTarget> {
    let text = config.smart.targets.as_deref().unwrap_or_default();
    let named: Vec<Target> =
        text.split(',').map(str::trim).filter(|part| !part.is_empty()).map(target).collect::<Result<_, _>>()?;
    if !named.is_empty() {
        return Ok(named);
    }
    let rises = config.train.monitor_mode == MonitorMode::Max;
    Ok(vec![Target { metric: config.train.monitor_metric.clone(), rises, value: None }])
}

fn target(text: &str) -> Result<Target, BadTarget> {
    let bad = || BadTarget(text.to_owned());
    let (rises, (metric, value)) = match (text.split_once("<="), text.split_once(">=")) {
        (Some(parts), None) => (false, parts),
        (None, Some(parts)) => (true, parts),
        _ => return Err(bad()),
    };
    let value: f64 = value.trim().parse().map_err(|_| bad())?;
    let metric = metric.trim().to_owned();
    if metric.is_empty() || !value.is_finite() { Err(bad()) } else { Ok(Target { metric, rises, value: Some(value) }) }
}

impl Target {
    /// Its values over time, one per epoch.
    fn values(&self, records: &[MetricsRecord]) -> Vec<f64> {
        let mut by_epoch: Vec<(u64, f64)> = Vec::new();
        for record in records {
            let value =
                if self.metric == "loss" { Some(record.loss) } else { record.metrics.get(&self.metric).copied() };
            match (value, by_epoch.last_mut()) {
                (Some(value), Some(last)) if last.0 == record.epoch => last.1 = value,
                (Some(value), _) => by_epoch.push((record.epoch, value)),
                (None, _) => {}
            }
        }
        by_epoch.into_iter().map(|(_, value)| value).collect()
    }

    fn is_met(&self, values: &[f64]) -> bool {
        match (self.value, values.last()) {
            (Some(wanted), Some(last)) => {
                if self.rises {
                    *last >= wanted
                } else {
                    *last <= wanted
                }
            }
            _ => false,
        }
    }

    /// Absent: fewer than two values.
    fn gain(&self, values: &[f64], window: usize) -> Option<f64> {
        let recent = &values[values.len().saturating_sub(window)..];
        (recent.len() >= 2).then_some(())?;
        let (older, newer) = recent.split_at(recent.len() / 2);
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        let fell = mean(older) - mean(newer);
        Some(if self.rises { -fell } else { fell })
    }
}

/// Judges the leg that ended after `epochs` epochs, from all records of the run.
pub fn judge(config: &SmartConfig, targets: &[Target], records: &[MetricsRecord], epochs: usize) -> Leg {
    let all: Vec<Vec<f64>> = targets.iter().map(|target| target.values(records)).collect();
    let gains: Vec<Option<f64>> =
        targets.iter().zip(&all).map(|(target, values)| target.gain(values, config.window)).collect();
    let met = targets.iter().zip(&all).all(|(target, values)| target.is_met(values));
    // What was not measured yet cannot be called stuck.
    let progress = gains.iter().any(|gain| gain.is_none_or(|gain| gain > config.threshold));
    let decision = if met {
        Decision::TargetsMet
    } else if epochs >= config.max_total_epochs {
        Decision::EpochsDone
    } else if progress {
        Decision::GoOn { up_to: (epochs + config.increment).min(config.max_total_epochs) }
    } else {
        Decision::NoProgress
    };
    let named = |values: Vec<Option<f64>>| targets.iter().map(|t| t.metric.clone()).zip(values).collect();
    let last = all.iter().map(|values| values.last().copied()).collect();
    Leg { epochs, values: named(last), gains: named(gains), decision }
}

impl Display for Leg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} epochs", self.epochs)?;
        for ((metric, value), (_, gain)) in self.values.iter().zip(&self.gains) {
            match value {
                Some(value) => write!(f, ", {metric} {value:.5}")?,
                None => write!(f, ", no {metric} recorded")?,
            }
            if let Some(gain) = gain {
                write!(f, " (better by {gain:.5})")?;
            }
        }
        match &self.decision {
            Decision::GoOn { up_to } => write!(f, ": going on to {up_to}"),
            Decision::TargetsMet => write!(f, ": all targets met"),
            Decision::NoProgress => write!(f, ": no progress any more"),
            Decision::EpochsDone => write!(f, ": smart.max_total_epochs reached"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(targets: Option<&str>) -> Config {
        let smart = SmartConfig { targets: targets.map(str::to_owned), ..SmartConfig::default() };
        Config { smart, ..Config::default() }
    }

    fn records(metric: &str, values: impl IntoIterator<Item = f64>) -> Vec<MetricsRecord> {
        let one = |(epoch, value): (usize, f64)| MetricsRecord {
            epoch: epoch as u64,
            metrics: [(metric.to_owned(), value)].into(),
            ..Default::default()
        };
        values.into_iter().enumerate().map(one).collect()
    }

    fn after(text: Option<&str>, records: &[MetricsRecord], epochs: usize) -> Decision {
        let config = config(text);
        judge(&config.smart, &targets(&config).unwrap(), records, epochs).decision
    }

    #[test]
    fn item_61_the_smart_loop_goes_on_while_a_target_gets_better() {
        let falling = || (0..100).map(|epoch| 1.0 - 0.005 * f64::from(epoch));
        let text = Some("val.mae_deg<=0.2");
        assert_eq!(after(text, &records("val.mae_deg", falling()), 100), Decision::GoOn { up_to: 150 });
        assert_eq!(after(text, &records("val.mae_deg", falling()), 480), Decision::GoOn { up_to: 500 });
        assert_eq!(after(text, &records("val.mae_deg", falling()), 500), Decision::EpochsDone);
        assert_eq!(after(text, &records("val.mae_deg", vec![0.7; 100]), 100), Decision::NoProgress);
        assert_eq!(after(text, &records("val.mae_deg", vec![0.2; 100]), 100), Decision::TargetsMet);
    }

    #[test]
    fn a_rising_metric_is_better_when_it_rises_and_all_targets_count() {
        let rising = records("val.map50", (0..40).map(|epoch| 0.01 * f64::from(epoch)));
        assert_eq!(after(Some("val.map50>=0.7"), &rising, 100), Decision::GoOn { up_to: 150 });
        assert_eq!(after(Some("val.map50>=0.3"), &rising, 100), Decision::TargetsMet);
        assert_eq!(after(Some("val.map50>=0.3, val.other<=1"), &rising, 100), Decision::GoOn { up_to: 150 });
        assert_eq!(after(Some("val.map50<=0.1"), &rising, 100), Decision::NoProgress);
    }

    #[test]
    fn without_targets_the_monitored_metric_decides() {
        assert_eq!(after(None, &records("val.loss", vec![0.5; 30]), 100), Decision::NoProgress);
        assert_eq!(after(None, &records("val.loss", [0.5]), 100), Decision::GoOn { up_to: 150 });
        assert!(targets(&config(Some("val.loss=3"))).unwrap_err().to_string().contains("\"val.loss=3\""));
        assert!(targets(&config(Some("val.loss<=x"))).is_err());
    }
}
