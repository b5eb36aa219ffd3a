//! Training in legs: what the recorded metrics say after each. Pure; the legs are run elsewhere.
//!
//! Architecture invariant: reads a config and records, starts nothing.

use serde::{Deserialize, Serialize};
use spec::config::{Config, Language, MonitorMode, SmartConfig};
use spec::contract::MetricsRecord;
use std::collections::BTreeSet;

/// A target that cannot be read.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("smart.targets: {0:?} is no comparison; expected a metric, <= or >=, and a number, such as val.loss<=0.02")]
pub struct BadTarget(String);

/// A target whose metric no validation has measured.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("smart.targets: no {metric} is recorded; did you mean {nearest}? Recorded are {recorded}")]
pub struct Unrecorded {
    metric: String,
    nearest: String,
    /// All names, separated by commas.
    recorded: String,
}

/// A metric and where it should get to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Target {
    pub metric: String,
    /// Higher is better.
    pub rises: bool,
    /// `None` means that only its progress counts.
    pub value: Option<f64>,
}

/// Decision after a leg.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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

/// `smart_report.json`: what was trained, and what was decided after each leg.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub targets: Vec<Target>,
    pub legs: Vec<Leg>,
    /// Largest PSS of a rank in each leg, bytes: a trainer that starts afresh does not grow.
    pub peak_pss_bytes: Vec<u64>,
}

impl Report {
    /// The legs that lie within the first `done` epochs: what came after is trained again.
    pub fn until(mut self, done: usize) -> Self {
        self.legs.retain(|leg| leg.epochs <= done);
        self.peak_pss_bytes.resize(self.legs.len(), 0);
        self
    }

    /// Epochs at the end of the leg that trains on after `done` epochs.
    pub fn next_end(&self, config: &SmartConfig, done: usize) -> usize {
        let mut end = self.legs.last().map_or(config.leg_epochs, |last| last.epochs + config.increment);
        while end < done {
            end += config.increment;
        }
        end.min(config.max_total_epochs)
    }
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

    /// `None` means fewer than two values.
    fn gain(&self, values: &[f64], window: usize) -> Option<f64> {
        let recent = &values[values.len().saturating_sub(window)..];
        (recent.len() >= 2).then_some(())?;
        let (older, newer) = recent.split_at(recent.len() / 2);
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        let fell = mean(older) - mean(newer);
        Some(if self.rises { -fell } else { fell })
    }
}

/// Checks that every named target is among the metrics of `records`, once there was a validation.
///
/// # Errors
/// One is not: a loop that waits for it would train to the last epoch.
pub fn check_recorded(targets: &[Target], records: &[MetricsRecord]) -> Result<(), Unrecorded> {
    let names = records.iter().flat_map(|record| record.metrics.keys().map(String::as_str));
    let recorded: BTreeSet<&str> = names.chain(["loss"]).collect();
    if !recorded.iter().any(|name| name.starts_with("val.")) {
        return Ok(());
    }
    // Without a value it is the monitored metric, which ranks check.
    let mut named = targets.iter().filter(|target| target.value.is_some());
    let Some(target) = named.find(|target| !recorded.contains(target.metric.as_str())) else { return Ok(()) };
    let far = |name: &&&str| strsim::damerau_levenshtein(name, &target.metric);
    Err(Unrecorded {
        metric: target.metric.clone(),
        nearest: recorded.iter().min_by_key(far).copied().unwrap_or_default().to_owned(),
        recorded: recorded.into_iter().collect::<Vec<_>>().join(", "),
    })
}

/// Judges the leg that ended after `epochs` epochs, from all records of the run.
pub fn judge(config: &SmartConfig, targets: &[Target], records: &[MetricsRecord], epochs: usize) -> Leg {
    let behind = records.iter().position(|record| record.epoch > epochs as u64).unwrap_or(records.len());
    let all: Vec<Vec<f64>> = targets.iter().map(|target| target.values(&records[..behind])).collect();
    let gains: Vec<Option<f64>> =
        targets.iter().zip(&all).map(|(target, values)| target.gain(values, config.window)).collect();
    let met = targets.iter().zip(&all).all(|(target, values)| target.is_met(values));
    // A metric with one value cannot be called stuck; one without values says nothing.
    let measured = || gains.iter().zip(&all).filter(|(_, values)| !values.is_empty());
    let goes_on = |gain: &Option<f64>| gain.is_none_or(|gain| gain > config.threshold);
    let progress = measured().next().is_none() || measured().any(|(gain, _)| goes_on(gain));
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

/// Summary of a leg, for the user.
pub fn said(language: Language, leg: &Leg) -> String {
    let zh = language == Language::Zh;
    let epochs = leg.epochs;
    let mut text = match epochs {
        _ if zh => format!("智能训练：共 {epochs} 轮"),
        1 => "smart: 1 epoch".into(),
        _ => format!("smart: {epochs} epochs"),
    };
    for ((metric, value), (_, gain)) in leg.values.iter().zip(&leg.gains) {
        text += &match value {
            Some(value) if zh => format!("，{metric} {value:.5}"),
            Some(value) => format!(", {metric} {value:.5}"),
            None if zh => format!("，没有 {metric} 的记录"),
            None => format!(", no {metric} recorded"),
        };
        text += &match gain {
            Some(gain) if zh => format!("（改善 {gain:.5}）"),
            Some(gain) => format!(" (better by {gain:.5})"),
            None => String::new(),
        };
    }
    text + &match &leg.decision {
        Decision::GoOn { up_to } if zh => format!("：继续训练至第 {up_to} 轮"),
        Decision::GoOn { up_to } => format!(": going on to {up_to}"),
        Decision::TargetsMet if zh => "：已达到全部目标".into(),
        Decision::TargetsMet => ": all targets met".into(),
        Decision::NoProgress if zh => "：不再有进展".into(),
        Decision::NoProgress => ": no progress any more".into(),
        Decision::EpochsDone if zh => "：已达到 smart.max_total_epochs".into(),
        Decision::EpochsDone => ": smart.max_total_epochs reached".into(),
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
            epoch: epoch as u64 + 1,
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
    fn the_smart_loop_goes_on_while_a_target_gets_better() {
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

    #[test]
    fn a_resumed_run_goes_on_with_the_leg_that_holds_its_epoch_and_keeps_the_legs_before() {
        let smart = SmartConfig { leg_epochs: 2, increment: 2, max_total_epochs: 7, ..SmartConfig::default() };
        let falling = records("val.loss", (0..8).map(|epoch| 1.0 - 0.1 * f64::from(epoch)));
        let targets = targets(&config(Some("val.loss<=0"))).unwrap();
        let legs: Vec<Leg> = [2, 4, 6].map(|epochs| judge(&smart, &targets, &falling, epochs)).into();
        // Each by what was recorded up to its own end.
        assert_eq!(legs.iter().map(|leg| leg.values[0].1.unwrap()).collect::<Vec<_>>(), [0.9, 0.7, 0.5]);
        let report = Report { targets, legs: legs.clone(), peak_pss_bytes: vec![1, 2, 3] };
        let text = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report, "{text}");
        let kept = report.clone().until(5);
        assert_eq!((&kept.legs[..], &kept.peak_pss_bytes[..]), (&legs[..2], &[1, 2][..]));
        let ends = [4, 5, 6, 7].map(|done| report.clone().until(done).next_end(&smart, done));
        assert_eq!(ends, [6, 6, 7, 7]);
        // A run that began without legs: it has none behind it, whatever was trained.
        let none = Report::default();
        assert_eq!([0, 2, 3, 7].map(|done| none.next_end(&smart, done)), [2, 2, 4, 7]);
    }

    #[test]
    fn a_target_that_was_never_measured_is_an_error_and_no_progress() {
        let flat = records("val.mae_deg", vec![0.7; 100]);
        let wrong = targets(&config(Some("val.mae_dge<=6"))).unwrap();
        assert_eq!(check_recorded(&wrong, &[]), Ok(()), "before the first validation");
        let text = check_recorded(&wrong, &flat).unwrap_err().to_string();
        assert_eq!(
            text,
            "smart.targets: no val.mae_dge is recorded; did you mean val.mae_deg? Recorded are loss, val.mae_deg"
        );
        assert_eq!(check_recorded(&targets(&config(Some("val.mae_deg<=6, loss<=1"))).unwrap(), &flat), Ok(()));
        assert_eq!(after(Some("val.mae_deg<=0.2, val.mae_dge<=6"), &flat, 100), Decision::NoProgress);
        assert_eq!(after(Some("val.mae_deg<=0.2"), &flat[..1], 100), Decision::GoOn { up_to: 150 });
    }

    #[test]
    fn a_leg_is_told_in_both_languages() {
        let leg = |epochs| {
            let (values, gains) = (vec![("loss".to_owned(), Some(0.5))], vec![("loss".to_owned(), Some(0.25))]);
            Leg { epochs, values, gains, decision: Decision::GoOn { up_to: 3 } }
        };
        assert_eq!(said(Language::En, &leg(1)), "smart: 1 epoch, loss 0.50000 (better by 0.25000): going on to 3");
        assert!(said(Language::En, &leg(2)).starts_with("smart: 2 epochs, "));
        assert_eq!(said(Language::Zh, &leg(2)), "智能训练：共 2 轮，loss 0.50000（改善 0.25000）：继续训练至第 3 轮");
    }
}
