//! What the records of a run say in numbers: range, trend, peaks by phase, and the plan against the truth.

use super::log::Run;
use crate::contract::MemoryRecord;
use crate::plan::{BudgetLine, Plan, bytes_text};
use crate::watch::Trend;
use std::collections::BTreeMap;
use std::fmt::{self, Display};

/// Lowest, mean and highest of what was used, GiB.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Range {
    pub least: f64,
    pub mean: f64,
    pub most: f64,
}

/// A part of the budget beside what was seen of it, bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    pub name: String,
    pub planned_bytes: u64,
    pub measured_bytes: u64,
}

impl Check {
    /// The plan was too small: a promise broken.
    pub fn broken(&self) -> bool {
        self.measured_bytes > self.planned_bytes
    }

    /// Planned over measured; absent: nothing was measured.
    pub fn ratio(&self) -> Option<f64> {
        (self.measured_bytes > 0).then(|| self.planned_bytes as f64 / self.measured_bytes as f64)
    }
}

/// See [`analyze`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Analysis {
    pub samples: usize,
    pub duration_s: f64,
    pub used: Range,
    /// Highest share of the machine's memory, percent; of all programs.
    pub most_percent: Option<f64>,
    /// Growth that goes on: rank and bytes per step.
    pub leak: Option<(usize, f64)>,
    /// Highest own (unique) bytes of any rank, by phase.
    pub by_phase: BTreeMap<String, u64>,
    pub checks: Vec<Check>,
    /// What the watch said or did: seconds since the start, text.
    pub events: Vec<(f64, String)>,
}

/// Numbers of a run or of a monitor's log. Pure.
pub fn analyze(run: &Run) -> Analysis {
    let used = run.used_gib();
    let values = || used.iter().map(|point| point.1);
    let least = values().fold(f64::INFINITY, f64::min);
    let range = Range {
        least: if least.is_finite() { least } else { 0.0 },
        mean: values().sum::<f64>() / used.len().max(1) as f64,
        most: values().fold(0.0, f64::max),
    };
    Analysis {
        samples: used.len(),
        duration_s: used.last().map_or(0.0, |last| last.0) - used.first().map_or(0.0, |first| first.0),
        used: range,
        most_percent: most_percent(run),
        leak: leak(run),
        by_phase: by_phase(run),
        checks: run.plan.as_ref().map(|plan| checks(run, plan)).unwrap_or_default(),
        events: events(run),
    }
}

fn most_percent(run: &Run) -> Option<f64> {
    let monitor = run.monitor.iter().map(|sample| sample.ram_percent);
    let share = |used: u64, total: u64| 100.0 * used as f64 / total.max(1) as f64;
    let ranks = run.memory.iter().flatten().map(|r| share(r.system_used_bytes, r.system_total_bytes));
    monitor.chain(ranks).reduce(f64::max)
}

fn leak(run: &Run) -> Option<(usize, f64)> {
    run.memory.iter().enumerate().find_map(|(rank, records)| {
        let mut trend = Trend::default();
        records.iter().for_each(|record| trend.add(record.step, record.uss_bytes));
        Some((rank, trend.leak()?.bytes_per_step))
    })
}

fn by_phase(run: &Run) -> BTreeMap<String, u64> {
    let mut peaks = BTreeMap::new();
    for record in run.memory.iter().flatten() {
        let peak: &mut u64 = peaks.entry(record.phase.clone()).or_default();
        *peak = record.uss_bytes.max(*peak);
    }
    peaks
}

/// The page cache and the launcher have records of their own. Lines of a rank share one process: what can be told apart
/// by the moment at which memory came is checked in [`rank_checks`].
fn checks(run: &Run, plan: &Plan) -> Vec<Check> {
    let own = |name: &str| line(plan, name).map_or(0, |line| line.bytes);
    let mut checks = rank_checks(run, plan);
    let launcher = run.node.iter().map(|record| record.launcher_bytes).max().unwrap_or(0);
    checks.push(Check { name: "launcher".into(), planned_bytes: own("launcher"), measured_bytes: launcher });
    let cache = run.memory.iter().flatten().map(|record| record.cache_bytes);
    let cache = cache.chain(run.node.iter().map(|record| record.cache_bytes)).max().unwrap_or(0);
    if plan.budget.page_cache_bytes > 0 {
        let planned_bytes = plan.budget.page_cache_bytes;
        checks.push(Check { name: "page cache".into(), planned_bytes, measured_bytes: cache });
    }
    let node = run.node.iter().map(|record| record.job_bytes);
    let node = node.chain(run.summary.as_ref().map(|summary| summary.peak_node_bytes)).max().unwrap_or(0);
    let planned_bytes = plan.budget.need_bytes().saturating_sub(own("reserve"));
    checks.push(Check { name: "all of the job".into(), planned_bytes, measured_bytes: node });
    checks
}

fn line<'a>(plan: &'a Plan, name: &str) -> Option<&'a BudgetLine> {
    plan.budget.lines.iter().find(|line| line.name == name)
}

/// What a rank held when training began (libraries' pages, heap, weights and moments), and what batches added: activations,
/// slots of both loaders, scratch, the copy for checkpoints, which share one heap; the rank with most of each. The heap is
/// not given back between steps, so that its size afterwards is its peak. The chunk cache is left out: it is a bound, for what
/// the page cache has no room for.
fn rank_checks(run: &Run, plan: &Plan) -> Vec<Check> {
    let each: Vec<RankUse> = run.memory.iter().filter_map(|records| RankUse::of(records)).collect();
    if each.is_empty() {
        return Vec::new();
    }
    let per_rank = |name: &str| line(plan, name).and_then(|line| line.per_rank_bytes).unwrap_or(0);
    let sum = |names: &[&str]| names.iter().map(|name| per_rank(name)).sum::<u64>();
    let scratch = per_rank("decode scratch").saturating_sub(plan.loader.chunk_cache_bytes);
    let staging = line(plan, "checkpoint staging").map_or(0, |line| line.bytes);
    let most = |of: &dyn Fn(&RankUse) -> u64| each.iter().map(of).max().unwrap_or(0);
    let check = |name: &str, planned_bytes, measured_bytes| Check { name: name.into(), planned_bytes, measured_bytes };
    let start = sum(&["runtime", "model state"]);
    let batches = sum(&["activations", "staging slots", "validation slots"]) + scratch + staging;
    vec![
        check("runtime, model", start, most(&|rank| rank.start)),
        check("batches", batches, most(&|rank| rank.batches)),
        check("rank, in all", start + batches, most(&|rank| rank.start + rank.batches)),
    ]
}

/// Memory of one rank by what it came for, bytes.
#[derive(Clone, Copy, Debug, Default)]
struct RankUse {
    start: u64,
    batches: u64,
}

impl RankUse {
    /// `None`: records without the kinds of memory, as older ones are, or training never began.
    fn of(records: &[MemoryRecord]) -> Option<Self> {
        let first = records.iter().position(|record| record.phase == "train")?;
        let before = records.get(first).map(|record| record.anon_bytes).filter(|bytes| *bytes > 0)?;
        let most = records[first..].iter().map(|record| record.anon_bytes).max().unwrap_or(before);
        let files = records.iter().map(|record| record.file_bytes).max().unwrap_or(0);
        Some(Self { start: before + files, batches: most.saturating_sub(before) })
    }
}

fn events(run: &Run) -> Vec<(f64, String)> {
    let began = run.node.first().map_or(0.0, |record| record.t);
    run.node.iter().filter_map(|record| Some((record.t - began, record.event.clone()?))).collect()
}

impl Display for Analysis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "samples      {} over {:.1} s", self.samples, self.duration_s)?;
        let Range { least, mean, most } = self.used;
        writeln!(f, "memory       least {least:.2}, mean {mean:.2}, most {most:.2} GiB")?;
        if let Some(percent) = self.most_percent {
            writeln!(f, "machine      at most {percent:.1} % full, by all programs")?;
        }
        match self.leak {
            Some((rank, slope)) => {
                writeln!(
                    f,
                    "trend        rank {rank} grows by {} per 1000 steps",
                    bytes_text((1000.0 * slope) as u64)
                )?;
            }
            None => writeln!(f, "trend        no growth that goes on")?,
        }
        self.phases(f)?;
        self.table(f)?;
        for (at, text) in &self.events {
            writeln!(f, "{at:>9.1} s  {text}")?;
        }
        Ok(())
    }
}

impl Analysis {
    fn phases(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (phase, bytes)) in self.by_phase.iter().enumerate() {
            let head = if index == 0 { "peak of a rank, own bytes" } else { "" };
            writeln!(f, "{head:<25}  {phase:<12} {:>10}", bytes_text(*bytes))?;
        }
        Ok(())
    }

    fn table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.checks.is_empty() {
            return Ok(());
        }
        writeln!(f, "{:<16}{:>12}{:>12}  planned / measured", "budget line", "planned", "measured")?;
        for check in &self.checks {
            let (planned, measured) = (bytes_text(check.planned_bytes), bytes_text(check.measured_bytes));
            let verdict = match check.ratio() {
                None => "not measured".to_owned(),
                Some(ratio) if check.broken() => format!("{ratio:.2}  too small"),
                Some(ratio) => format!("{ratio:.2}"),
            };
            writeln!(f, "{:<16}{planned:>12}{measured:>12}  {verdict}", check.name)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::log::MonitorSample;
    use super::*;
    use crate::contract::NodeRecord;

    fn run() -> Run {
        let mut plan = Plan::default();
        let line = |name: &str, bytes: u64, per_rank_bytes| BudgetLine {
            name: name.into(),
            bytes,
            per_rank_bytes,
            formula: String::new(),
        };
        plan.budget.lines = vec![
            line("launcher", 16 << 20, None),
            line("runtime", 400 << 20, Some(200 << 20)),
            line("staging slots", 100 << 20, Some(50 << 20)),
            line("page cache", 1 << 30, None),
        ];
        plan.budget.page_cache_bytes = 1 << 30;
        let record = |t: u64, phase: &str, mib: u64| MemoryRecord {
            t: t as f64,
            step: t,
            phase: phase.into(),
            uss_bytes: mib << 20,
            anon_bytes: mib << 20,
            file_bytes: 70 << 20,
            cache_bytes: 512 << 20,
            system_used_bytes: 1 << 30,
            system_total_bytes: 4 << 30,
            ..Default::default()
        };
        let node = |t: u64, event: Option<&str>| NodeRecord {
            t: t as f64,
            launcher_bytes: 5 << 20,
            job_bytes: (1 + t) << 30,
            event: event.map(str::to_owned),
            ..Default::default()
        };
        Run {
            plan: Some(plan),
            memory: vec![
                vec![record(0, "open", 90), record(1, "train", 100), record(5, "train", 210), record(9, "val", 180)],
                vec![record(0, "open", 95), record(1, "train", 100), record(5, "train", 260), record(9, "val", 270)],
            ],
            node: vec![node(0, None), node(2, Some("paused prefetching"))],
            ..Run::default()
        }
    }

    #[test]
    fn item_47_statistics_trend_and_peaks_by_phase() {
        let found = analyze(&run());
        assert_eq!((found.samples, found.duration_s), (2, 2.0));
        assert_eq!(found.used, Range { least: 1.0, mean: 2.0, most: 3.0 });
        assert_eq!(found.most_percent, Some(25.0));
        assert_eq!(found.by_phase["train"], 260 << 20);
        assert_eq!(found.events, [(2.0, "paused prefetching".to_owned())]);
        assert!(found.leak.is_none());
    }

    #[test]
    fn the_plan_is_held_against_the_truth_line_by_line() {
        let found = analyze(&run());
        let check = |name: &str| found.checks.iter().find(|check| check.name == name).unwrap().clone();
        let start = check("runtime, model");
        assert_eq!((start.planned_bytes, start.measured_bytes), (200 << 20, 170 << 20));
        assert_eq!((check("batches").planned_bytes, check("batches").measured_bytes), (50 << 20, 170 << 20));
        assert!(check("batches").broken() && !start.broken());
        assert_eq!(check("page cache").ratio(), Some(2.0));
        assert_eq!(check("launcher").measured_bytes, 5 << 20);
        let text = found.to_string();
        assert!(text.contains("batches             50.0 MiB   170.0 MiB  0.29  too small"), "{text}");
        assert!(text.contains("2.0 s  paused prefetching"), "{text}");
    }

    #[test]
    fn a_monitors_log_and_nothing_at_all_are_analysed() {
        let sample = |t: f64, gb: f64| MonitorSample {
            elapsed_time: t,
            ram_used_gb: gb,
            ram_percent: 10.0 * gb,
            ..Default::default()
        };
        let log = Run { monitor: vec![sample(0.0, 4.0), sample(5.0, 6.0)], ..Run::default() };
        let found = analyze(&log);
        assert_eq!((found.used.mean, found.most_percent), (5.0, Some(60.0)));
        assert_eq!(analyze(&Run::default()), Analysis::default());
    }
}
