//! Contents of a run's page.

use crate::advise::{self, Analysis, Finding, Overview, Run};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use spec::contract::{MetricsRecord, NodeRecord};
use spec::plan::bytes_text;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Most points of a curve: more than a screen has columns.
const MOST_POINTS: usize = 600;
/// Most bytes of all pictures of a run.
const PICTURE_BYTES: u64 = 1 << 20;
const MOST_PICTURES: usize = 6;
const MOST_EVENTS: usize = 200;

/// One run, ready for the page.
#[derive(Clone, Debug, Default)]
pub struct Gathered {
    pub name: String,
    pub overview: Overview,
    /// Keys of its config with their values.
    pub config: BTreeMap<String, String>,
    pub data: Value,
}

/// Collects what the page shows of a run.
pub fn gather(run: &Run, overview: Overview, analysis: &Analysis, findings: &[Finding]) -> Gathered {
    let checks: Vec<Value> = analysis
        .checks
        .iter()
        .map(|check| {
            json!({"name": check.name, "planned": check.planned_bytes, "measured": check.measured_bytes,
                   "verdict": check.verdict().word()})
        })
        .collect();
    let findings: Vec<Value> = findings
        .iter()
        .map(|finding| json!({"symptom": finding.symptom, "cause": finding.cause, "change": finding.change}))
        .collect();
    let data = json!({
        "name": overview.name,
        "curves": curves(&run.metrics),
        "memory": memory(run),
        "events": analysis.events.iter().take(MOST_EVENTS).collect::<Vec<_>>(),
        "checks": checks,
        "findings": findings,
        "pictures": pictures(&run.path),
        "config": std::fs::read_to_string(run.path.join("config.yaml")).unwrap_or_default(),
    });
    let config = advise::flat_config(&run.path);
    Gathered { name: overview.name.clone(), overview, config, data }
}

/// Rows of facts: a name, then a value per run.
pub(super) fn facts(runs: &[Gathered]) -> Vec<Vec<String>> {
    let rows = runs.iter().map(|run| run.overview.rows()).collect::<Vec<_>>();
    advise::side_by_side(&rows)
}

/// Keys whose values differ: the key, then a value per run.
pub(super) fn differs(runs: &[Gathered]) -> Vec<Vec<String>> {
    if runs.len() < 2 {
        return Vec::new();
    }
    let configs: Vec<&BTreeMap<String, String>> = runs.iter().map(|run| &run.config).collect();
    advise::differing(&configs)
}

fn curves(metrics: &[MetricsRecord]) -> Vec<Value> {
    let mut all: BTreeMap<&str, (Vec<u64>, Vec<f64>)> = BTreeMap::new();
    let mut add = |name, step, value: f64| {
        let (x, y) = all.entry(name).or_default();
        x.push(step);
        y.push(value);
    };
    for record in metrics {
        add("loss", record.step, record.loss);
        add("learning rate", record.step, record.lr);
        add("samples/s", record.step, record.samples_per_s);
        add("data wait, s", record.step, record.data_wait_s);
        add("gradient norm", record.step, record.grad_norm);
        if let Some(rate) = record.cache_hit_rate {
            add("cache hit rate", record.step, rate);
        }
        for (name, value) in &record.metrics {
            add(name, record.step, *value);
        }
    }
    // The loss first, then what the task measures, then speed.
    let order = |name: &str| match name {
        "loss" => 0,
        name if name.ends_with(".loss") => 1,
        name if name.starts_with("val.") || name.starts_with("train.") => 2,
        "learning rate" => 3,
        _ => 4,
    };
    let mut named: Vec<_> = all.into_iter().collect();
    named.sort_by_key(|(name, _)| (order(name), *name));
    named.iter().map(|(name, (x, y))| curve(name, x, y)).collect()
}

fn curve(name: &str, x: &[u64], y: &[f64]) -> Value {
    let kept = thinned(y);
    let value = |index: &usize| y[*index].is_finite().then_some(rounded(y[*index]));
    let (x, y): (Vec<u64>, Vec<Option<f64>>) = kept.iter().map(|index| (x[*index], value(index))).unzip();
    json!({"name": name, "x": x, "y": y})
}

/// Six digits are more than a screen shows.
fn rounded(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}

/// Points of a curve that keep its look: of each part the lowest and the highest, in their order.
fn thinned(y: &[f64]) -> Vec<usize> {
    if y.len() <= MOST_POINTS {
        return (0..y.len()).collect();
    }
    let parts = MOST_POINTS / 2;
    let mut kept = Vec::with_capacity(MOST_POINTS + 2);
    for part in 0..parts {
        let range = part * y.len() / parts..(part + 1) * y.len() / parts;
        let finite = |index: &usize| y[*index].is_finite();
        let least = range.clone().filter(finite).min_by(|a, b| y[*a].total_cmp(&y[*b])).unwrap_or(range.start);
        let most = range.clone().filter(finite).max_by(|a, b| y[*a].total_cmp(&y[*b])).unwrap_or(range.start);
        kept.extend([least.min(most), least.max(most)]);
    }
    kept.extend([0, y.len() - 1]);
    kept.sort_unstable();
    kept.dedup();
    kept
}

fn memory(run: &Run) -> Value {
    let job: Vec<f64> = run.node.iter().map(|record| record.job_bytes as f64).collect();
    let kept = thinned(&job);
    let records: Vec<&NodeRecord> = kept.iter().map(|index| &run.node[*index]).collect();
    let began = run.began();
    let x: Vec<f64> = records.iter().map(|record| ((record.t - began) * 10.0).round() / 10.0).collect();
    let ranks: BTreeSet<u32> = records.iter().flat_map(|record| record.ranks.iter().map(|rank| rank.rank)).collect();
    let mut series: Vec<(String, Vec<u64>)> = vec![
        ("page cache".into(), records.iter().map(|record| record.cache_bytes).collect()),
        ("launcher".into(), records.iter().map(|record| record.launcher_bytes).collect()),
    ];
    for rank in ranks {
        let own = |record: &&NodeRecord| record.ranks.iter().find(|of| of.rank == rank).map_or(0, |of| of.uss_bytes);
        series.push((format!("rank {rank}"), records.iter().map(own).collect()));
    }
    // Libraries, and memory that ranks meet in.
    let rest = |index: usize| {
        let known = series.iter().fold(0u64, |sum, (_, y)| sum.saturating_add(y[index]));
        records[index].job_bytes.saturating_sub(known)
    };
    let shared: Vec<u64> = (0..records.len()).map(rest).collect();
    series.push(("shared by ranks".into(), shared));
    series.retain(|(_, y)| y.iter().any(|bytes| *bytes > 0));
    let series: Vec<Value> = series.iter().map(|(name, y)| json!({"name": name, "y": y})).collect();
    let budget = run.plan.as_ref().map(|plan| plan.budget.total_bytes).filter(|bytes| *bytes > 0);
    json!({"x": x, "series": series, "budget": budget, "peak": job.iter().copied().reduce(f64::max).map(|b| bytes_text(b as u64))})
}

/// The last pictures that are small enough together.
fn pictures(folder: &Path) -> Vec<Value> {
    let mut files: Vec<_> = folder
        .join("images")
        .read_dir()
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|ext| ext == "png"))
        .collect();
    let step = |path: &Path| {
        path.file_stem().and_then(|stem| stem.to_str()?.rsplit('-').next()?.parse::<u64>().ok()).unwrap_or(u64::MAX)
    };
    files.sort_by_key(|path| step(path));
    let (mut left, mut found) = (PICTURE_BYTES, Vec::new());
    for path in files.iter().rev().take(MOST_PICTURES) {
        let Ok(png) = std::fs::read(path) else { continue };
        let Some(rest) = left.checked_sub(png.len() as u64) else { continue };
        left = rest;
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        found.push(json!({"name": name, "src": format!("data:image/png;base64,{}", STANDARD.encode(png))}));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use spec::contract::RankMemory;

    #[test]
    fn a_long_curve_keeps_its_peaks_and_ends() {
        let mut y: Vec<f64> = (0..10_000).map(|n| (f64::from(n) / 500.0).sin()).collect();
        (y[4321], y[7000]) = (9.0, f64::NAN);
        let kept = thinned(&y);
        assert!(kept.len() <= MOST_POINTS + 2 && kept.contains(&4321), "{}", kept.len());
        assert_eq!((kept.first(), kept.last()), (Some(&0), Some(&9999)));
        assert!(kept.is_sorted());
        assert_eq!(thinned(&[1.0, 2.0]), [0, 1]);
        assert_eq!(rounded(0.123_456_789), 0.123_457);
    }

    #[test]
    fn ranks_of_a_later_node_have_their_own_numbers_whatever_these_are() {
        let rank = |rank| RankMemory { rank, uss_bytes: u64::MAX, ..RankMemory::default() };
        let ranks = vec![rank(7), rank(u32::MAX)];
        let node = vec![NodeRecord { t: 1.0, job_bytes: u64::MAX, ranks, ..NodeRecord::default() }];
        let found = memory(&Run { node, ..Run::default() });
        let names: Vec<&str> = found["series"].as_array().unwrap().iter().filter_map(|s| s["name"].as_str()).collect();
        assert_eq!(names, ["rank 7", "rank 4294967295"]);
    }

    #[test]
    fn values_that_are_not_finite_are_gaps() {
        let record = |step, loss| MetricsRecord { step, loss, ..MetricsRecord::default() };
        let found = curves(&[record(1, 0.5), record(2, f64::NAN)]);
        assert_eq!((&found[0]["name"], &found[0]["y"]), (&"loss".into(), &json!([0.5, null])));
    }
}
