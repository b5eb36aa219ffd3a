//! A run in a few values, and runs beside each other.

use super::log::{Run, json};
use crate::run_dir::STAGES;
use host::stamp::time_stamp;
use serde::Serialize;
use serde_json::Value;
use spec::contract::{RunStatus, Summary};
use spec::plan::{Plan, bytes_text};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, SystemTime};

/// How a run stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    Running,
    /// Its last start left no summary and no process.
    #[default]
    Unfinished,
    Finished,
    EarlyStopped,
    Stopped,
    Failed,
}

impl Standing {
    pub fn text(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Unfinished => "unfinished",
            Self::Finished => "finished",
            Self::EarlyStopped => "early stopped",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
        }
    }
}

/// A run in a few values.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Overview {
    pub name: String,
    pub standing: Standing,
    pub task: String,
    /// Seconds since the Unix epoch.
    pub began: f64,
    pub steps: u64,
    pub epochs: u64,
    pub best: Option<spec::contract::Best>,
    pub metrics: BTreeMap<String, f64>,
    pub samples_per_s: f64,
    pub wall_s: f64,
    pub peak_bytes: u64,
    pub budget_bytes: u64,
    /// Sum of the plan's lines.
    pub planned_bytes: u64,
    pub restarts: u32,
    pub ranks: usize,
    pub reason: Option<String>,
    pub host: Option<String>,
    pub commit: Option<String>,
    pub command: Option<String>,
}

impl Overview {
    /// Reads the run in `folder` without its records. `None`: it is no run. `living`: its processes are there.
    pub fn read(folder: &Path, living: bool) -> Option<Self> {
        let job: Value = json(&folder.join("job.json")).unwrap_or_default();
        let plan: Option<Plan> = json(&folder.join("plan.json"));
        if job.is_null() && plan.is_none() {
            return None;
        }
        let text = |pointer: &str| job.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
        let summary: Option<Summary> = json(&folder.join("summary.json"));
        // A summary of an earlier start says nothing of this one.
        let summary = summary.filter(|summary| summary.start == text("/start"));
        let standing = match &summary {
            _ if living => Standing::Running,
            None => Standing::Unfinished,
            Some(summary) => match summary.status {
                RunStatus::Finished => Standing::Finished,
                RunStatus::EarlyStopped => Standing::EarlyStopped,
                RunStatus::Stopped => Standing::Stopped,
                RunStatus::Failed => Standing::Failed,
                RunStatus::Unknown => Standing::Unfinished,
            },
        };
        let words = job.pointer("/origin/command").and_then(Value::as_array);
        let command = words.map(|words| words.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" "));
        let origin = |name: &str| Some(text(&format!("/origin/{name}")).to_owned()).filter(|text| !text.is_empty());
        let plan = plan.unwrap_or_default();
        let summary = summary.unwrap_or_default();
        let best = summary.best.clone();
        Some(Self {
            name: name_of(folder),
            standing,
            task: text("/config/task").to_owned(),
            began: began(folder, &job),
            steps: summary.steps,
            epochs: summary.epochs,
            best,
            metrics: summary.metrics,
            samples_per_s: summary.samples_per_s,
            wall_s: summary.wall_s,
            peak_bytes: summary.peak_node_bytes,
            budget_bytes: plan.budget.total_bytes,
            planned_bytes: plan.budget.need_bytes(),
            restarts: summary.restarts,
            ranks: plan.topology.world_size,
            reason: summary.reason,
            host: origin("host"),
            commit: origin("commit"),
            command,
        })
    }

    /// Fills in what only records tell of a run that has no summary yet.
    #[must_use]
    pub fn with_records(mut self, run: &Run) -> Self {
        if let Some(last) = run.metrics.last() {
            self.steps = self.steps.max(last.step);
            if self.samples_per_s == 0.0 && last.samples_per_s.is_finite() {
                self.samples_per_s = last.samples_per_s;
            }
        }
        let peak = run.node.iter().map(|record| record.job_bytes).max().unwrap_or(0);
        self.peak_bytes = self.peak_bytes.max(peak);
        if self.wall_s == 0.0 {
            self.wall_s = run.node.last().map_or(0.0, |last| last.t - run.began());
        }
        self
    }

    /// Names and values for people.
    pub fn rows(&self) -> Vec<(String, String)> {
        let mut rows = vec![
            ("status".to_owned(), self.standing.text().to_owned()),
            ("task".into(), self.task.clone()),
            ("began".into(), date(self.began)),
            ("steps".into(), self.steps.to_string()),
            ("epochs".into(), self.epochs.to_string()),
            ("ranks".into(), self.ranks.to_string()),
            ("time".into(), duration(self.wall_s)),
            ("samples/s".into(), number(self.samples_per_s)),
            ("peak memory".into(), bytes_text(self.peak_bytes)),
            ("planned".into(), bytes_text(self.planned_bytes)),
            ("budget".into(), bytes_text(self.budget_bytes)),
            ("restarts".into(), self.restarts.to_string()),
        ];
        if let Some(best) = &self.best {
            rows.push((format!("best {}", best.metric), format!("{} at step {}", number(best.value), best.step)));
        }
        rows.extend(self.metrics.iter().map(|(name, value)| (name.clone(), number(*value))));
        let words =
            [("reason", &self.reason), ("host", &self.host), ("commit", &self.commit), ("command", &self.command)];
        rows.extend(words.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value.clone()?))));
        rows
    }
}

/// When the run began first: its folder's own records know, else the file that was written first.
fn began(folder: &Path, job: &Value) -> f64 {
    let first = job.pointer("/origin/first_t").and_then(Value::as_f64);
    let seconds = |path: &Path| {
        let changed = path.metadata().and_then(|meta| meta.modified()).ok()?;
        Some(changed.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_secs_f64())
    };
    first.or_else(|| seconds(&folder.join("job.json"))).or_else(|| seconds(&folder.join("plan.json"))).unwrap_or(0.0)
}

fn name_of(folder: &Path) -> String {
    let part = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    match folder.parent() {
        Some(root) if root.join(STAGES).is_file() => format!("{}/{}", part(root), part(folder)),
        _ => part(folder),
    }
}

/// Four digits.
pub fn number(value: f64) -> String {
    match value.abs() {
        _ if !value.is_finite() => value.to_string(),
        0.0 => "0".into(),
        size if !(1e-4..1e7).contains(&size) => format!("{value:.3e}"),
        size => {
            let digits = (3 - size.log10().floor() as i64).clamp(0, 8) as usize;
            let text = format!("{value:.digits$}");
            match text.contains('.') {
                true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
                false => text,
            }
        }
    }
}

/// `47.3 s`, `12 min 5 s`, `3 h 2 min`.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.max(0.0) as u64;
    match whole {
        0..60 => format!("{seconds:.1} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole / 60 % 60),
    }
}

/// `2025-11-20 16:20` UTC.
pub fn date(t: f64) -> String {
    let since = Duration::try_from_secs_f64(t).unwrap_or_default();
    let stamp = time_stamp(SystemTime::UNIX_EPOCH + since);
    let part = |from: usize, to: usize| stamp.get(from..to).unwrap_or_default();
    format!("{}-{}-{} {}:{}", part(0, 4), part(4, 6), part(6, 8), part(9, 11), part(11, 13))
}

/// Rows of several runs joined by their names: a name, then a value per run; what a run lacks is empty.
pub fn side_by_side(runs: &[Vec<(String, String)>]) -> Vec<Vec<String>> {
    let mut names: Vec<&String> = Vec::new();
    for (name, _) in runs.iter().flatten() {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let value = |run: &Vec<(String, String)>, name: &String| {
        run.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone()).unwrap_or_default()
    };
    let row = |name: &String| {
        let mut row = vec![name.clone()];
        row.extend(runs.iter().map(|run| value(run, name)));
        row
    };
    names.into_iter().map(row).collect()
}

/// A run's resolved config by key; empty where it has none.
pub fn flat_config(folder: &Path) -> BTreeMap<String, String> {
    let job: Value = json(&folder.join("job.json")).unwrap_or_default();
    let mut found = BTreeMap::new();
    if let Some(config) = job.get("config") {
        flatten(String::new(), config, &mut found);
    }
    found
}

fn flatten(prefix: String, value: &Value, into: &mut BTreeMap<String, String>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let name = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
                flatten(name, value, into);
            }
        }
        Value::String(text) => drop(into.insert(prefix, text.clone())),
        other => drop(into.insert(prefix, other.to_string())),
    }
}

/// Keys whose values differ: the key, then a value per run; a key that a run lacks is empty.
pub fn differing(configs: &[&BTreeMap<String, String>]) -> Vec<Vec<String>> {
    let keys: BTreeSet<&String> = configs.iter().flat_map(|config| config.keys()).collect();
    let row = |key: &&String| {
        let values: Vec<Option<&String>> = configs.iter().map(|config| config.get(*key)).collect();
        let differs = values.windows(2).any(|pair| pair[0] != pair[1]);
        differs.then(|| {
            let mut row = vec![(*key).clone()];
            row.extend(values.into_iter().map(|value| value.cloned().unwrap_or_default()));
            row
        })
    };
    keys.iter().filter_map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_four_digits() {
        let shown = [0.0, 1.5, 123.456, 0.012_345, 98_765.4, 1.0e-9, f64::NAN].map(number);
        assert_eq!(shown, ["0", "1.5", "123.5", "0.01235", "98765", "1.000e-9", "NaN"]);
        assert_eq!([5.0, 65.0, 7321.0].map(duration), ["5.0 s", "1 min 5 s", "2 h 2 min"]);
        assert_eq!(date(951_782_400.0), "2000-02-29 00:00");
    }

    #[test]
    fn only_keys_that_differ_are_named() {
        let a = BTreeMap::from([("seed".into(), "1".into()), ("x".into(), "y".into())]);
        let b = BTreeMap::from([("seed".into(), "2".into()), ("x".into(), "y".into()), ("z".into(), "1".into())]);
        assert_eq!(differing(&[&a, &b]), [vec!["seed", "1", "2"], vec!["z", "", "1"]]);
        assert_eq!(differing(&[&a, &a]), Vec::<Vec<String>>::new());
        let rows = |pairs: &[(&str, &str)]| pairs.iter().map(|p| (p.0.to_owned(), p.1.to_owned())).collect::<Vec<_>>();
        let joined = side_by_side(&[rows(&[("a", "1")]), rows(&[("b", "2"), ("a", "3")])]);
        assert_eq!(joined, [vec!["a", "1", "3"], vec!["b", "", "2"]]);
    }

    #[test]
    fn a_summary_of_another_start_is_none() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Overview::read(dir.path(), false), None);
        let write = |name: &str, value: Value| std::fs::write(dir.path().join(name), value.to_string()).unwrap();
        write("job.json", serde_json::json!({"start": "b", "config": {"task": "emg"}}));
        let summary = Summary { status: RunStatus::Finished, start: "a".into(), steps: 9, ..Summary::default() };
        write("summary.json", serde_json::to_value(&summary).unwrap());
        let found = Overview::read(dir.path(), false).unwrap();
        assert_eq!((found.standing, found.steps, found.task.as_str()), (Standing::Unfinished, 0, "emg"));
        write("summary.json", serde_json::to_value(Summary { start: "b".into(), ..summary }).unwrap());
        assert_eq!(Overview::read(dir.path(), false).unwrap().standing, Standing::Finished);
        assert_eq!(Overview::read(dir.path(), true).unwrap().standing, Standing::Running);
    }
}
