//! Search for growth without end: of a rank over its steps, or of a monitor's log over time.

use super::log::Run;
use crate::watch::Trend;
use serde::Serialize;
use spec::plan::bytes_text;
use std::fmt::{self, Display};

const GIB: f64 = (1u64 << 30) as f64;
/// A log's clock in whole steps of a trend, per second.
const TICKS: f64 = 1000.0;

/// Verdict on growth.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum Growth {
    /// Too little to judge by.
    NotJudged { samples: u64, needed: u64 },
    /// No lasting growth.
    None,
    /// A rank's own memory grows.
    Rank { rank: usize, bytes_per_step: f64 },
    /// The target of a monitor grows: the job where it knew one, else the machine.
    Watched { job: bool, bytes_per_hour: f64 },
}

impl Default for Growth {
    fn default() -> Self {
        Self::NotJudged { samples: 0, needed: Trend::NEEDED }
    }
}

impl Growth {
    pub fn of(run: &Run) -> Self {
        if !run.monitor.is_empty() {
            return watched(run);
        }
        let mut samples = 0;
        for (rank, records) in run.memory.iter().enumerate() {
            let mut trend = Trend::default();
            records.iter().for_each(|record| trend.add(record.step, record.uss_bytes));
            if let Some(leak) = trend.leak() {
                return Self::Rank { rank, bytes_per_step: leak.bytes_per_step };
            }
            samples = trend.samples().max(samples);
        }
        none(samples)
    }

    /// Name of what grows, and its rate.
    pub fn rate(&self) -> Option<(String, String)> {
        match self {
            Self::NotJudged { .. } | Self::None => None,
            Self::Rank { rank, bytes_per_step } => Some((
                format!("rank {rank}"),
                format!("{} per 1000 steps", bytes_text((1000.0 * bytes_per_step) as u64)),
            )),
            Self::Watched { job, bytes_per_hour } => {
                let what = if *job { "the job" } else { "the machine's use" };
                Some((what.into(), format!("{} per hour", bytes_text(*bytes_per_hour as u64))))
            }
        }
    }
}

fn watched(run: &Run) -> Growth {
    let mut trend = Trend::default();
    for (at, gib) in run.used_gib() {
        trend.add((at * TICKS) as u64 + 1, (gib * GIB) as u64);
    }
    let job = run.monitor.iter().all(|sample| sample.job_gb.is_some());
    match trend.leak() {
        Some(leak) => Growth::Watched { job, bytes_per_hour: leak.bytes_per_step * TICKS * 3600.0 },
        None => none(trend.samples()),
    }
}

fn none(samples: u64) -> Growth {
    if samples < Trend::NEEDED { Growth::NotJudged { samples, needed: Trend::NEEDED } } else { Growth::None }
}

impl Display for Growth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self, self.rate()) {
            (_, Some((what, rate))) => write!(f, "{what} grows by {rate} and does not stop"),
            (Self::NotJudged { samples, needed }, _) => {
                write!(f, "not judged: {samples} samples at different steps, {needed} are needed")
            }
            _ => write!(f, "no lasting growth"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::log::MonitorSample;
    use super::*;

    /// A log of so many samples, five seconds apart.
    fn log(samples: u32, gib: impl Fn(f64) -> f64) -> Run {
        let sample = |i: u32| MonitorSample {
            elapsed_time: 5.0 * f64::from(i),
            ram_used_gb: gib(f64::from(i)),
            ..Default::default()
        };
        Run { monitor: (0..samples).map(sample).collect(), ..Run::default() }
    }

    #[test]
    fn a_logs_straight_rise_is_growth_and_a_short_log_is_not_judged() {
        let rising = Growth::of(&log(300, |i| 8.0 + 6.0 * i / 299.0));
        let Growth::Watched { job: false, bytes_per_hour } = rising else { panic!("{rising:?}") };
        assert!((bytes_per_hour / GIB - 14.4).abs() < 0.2, "{bytes_per_hour}");
        assert!(rising.to_string().starts_with("the machine's use grows by 14.45 GiB per hour"), "{rising}");
        assert_eq!(Growth::of(&log(300, |_| 8.0)), Growth::None);
        let short = Growth::of(&log(60, |i| i));
        assert_eq!(short, Growth::NotJudged { samples: 60, needed: Trend::NEEDED });
        assert!(short.to_string().contains("60 samples at different"), "{short}");
    }

    #[test]
    fn as_many_samples_as_are_needed_are_enough() {
        let of = |samples: u64| Growth::of(&log(samples as u32, |i| 1.0 + i));
        assert!(matches!(of(Trend::NEEDED), Growth::Watched { .. }));
        assert!(matches!(of(Trend::NEEDED - 1), Growth::NotJudged { .. }));
    }
}
