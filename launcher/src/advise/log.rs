//! What there is to read: a run's folder, or the JSON log of a monitor.

use crate::config::Language;
use crate::contract::{Job, MemoryRecord, MetricsRecord, NodeRecord, Summary};
use crate::plan::Plan;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

const GIB: f64 = (1u64 << 30) as f64;

/// Why a run or log cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("{path}: no such run or log: give a run's folder (runs/NAME), its name, or a monitor's JSON log", path = .0.display())]
    Missing(PathBuf),
    #[error("{path}: {problem}; expected a run's folder, or a JSON array of samples as `launch monitor` writes it", path = path.display())]
    Malformed { path: PathBuf, problem: String },
}

/// One sample of a monitor's log, in the first guide's form.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct MonitorSample {
    pub ram_used_gb: f64,
    pub ram_total_gb: f64,
    pub ram_percent: f64,
    /// Whatever the writer's clock said; not interpreted.
    pub timestamp: serde_json::Value,
    pub gpu_allocated_gb: Option<f64>,
    pub gpu_reserved_gb: Option<f64>,
    pub gpu_total_gb: Option<f64>,
    /// Reserved over total.
    pub gpu_memory_percent: Option<f64>,
    /// Seconds since the monitor began.
    pub elapsed_time: f64,
    /// Memory of the watched processes together; absent in logs of other monitors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub job_gb: Option<f64>,
}

/// Everything that a run has left behind; what is absent is empty.
#[derive(Clone, Debug, Default)]
pub struct Run {
    pub path: PathBuf,
    /// Of the run's own messages; English where it is not known.
    pub language: Option<Language>,
    pub plan: Option<Plan>,
    pub summary: Option<Summary>,
    pub metrics: Vec<MetricsRecord>,
    /// By rank.
    pub memory: Vec<Vec<MemoryRecord>>,
    pub node: Vec<NodeRecord>,
    /// Samples of a monitor, when a log was given instead of a run.
    pub monitor: Vec<MonitorSample>,
}

impl Run {
    /// Reads `what`: a folder, a file, or the name of a run below `runs_dir`.
    ///
    /// # Errors
    /// There is no such thing, or it is neither.
    pub fn read(what: &Path, runs_dir: &Path) -> Result<Self, LogError> {
        let path = locate(what, runs_dir)?;
        if path.is_dir() { Self::read_folder(path) } else { Self::read_log(path) }
    }

    fn read_folder(path: PathBuf) -> Result<Self, LogError> {
        let plan: Option<Plan> = json(&path.join("plan.json"));
        let mut memory = Vec::new();
        while let Some(lines) = json_lines(&path.join(format!("memory.rank{}.jsonl", memory.len()))) {
            memory.push(lines);
        }
        if plan.is_none() && memory.is_empty() {
            let problem = "neither plan.json nor memory.rank0.jsonl is in it".into();
            return Err(LogError::Malformed { path, problem });
        }
        let lines = |name: &str| path.join(name);
        Ok(Self {
            language: json::<Job>(&path.join("job.json")).map(|job| job.config.log.language),
            plan,
            summary: json(&lines("summary.json")),
            metrics: json_lines(&lines("metrics.jsonl")).unwrap_or_default(),
            node: json_lines(&lines("memory.node.jsonl")).unwrap_or_default(),
            memory,
            monitor: Vec::new(),
            path,
        })
    }

    fn read_log(path: PathBuf) -> Result<Self, LogError> {
        let malformed = |problem: String| LogError::Malformed { path: path.clone(), problem };
        let text = std::fs::read_to_string(&path).map_err(|e| malformed(e.to_string()))?;
        let monitor: Vec<MonitorSample> = serde_json::from_str(&text).map_err(|e| malformed(e.to_string()))?;
        if monitor.is_empty() {
            return Err(malformed("it holds no samples".into()));
        }
        Ok(Self { path, monitor, ..Self::default() })
    }

    /// (seconds since the start, GiB) of what was watched: the job where its memory is known, else the whole machine.
    pub fn used_gib(&self) -> Vec<(f64, f64)> {
        if !self.monitor.is_empty() {
            return self.monitor.iter().map(|s| (s.elapsed_time, s.job_gb.unwrap_or(s.ram_used_gb))).collect();
        }
        if let Some(first) = self.node.first() {
            return self.node.iter().map(|r| (r.t - first.t, r.job_bytes as f64 / GIB)).collect();
        }
        let Some(ranks) = self.memory.first() else { return Vec::new() };
        let began = ranks.first().map_or(0.0, |r| r.t);
        ranks.iter().map(|r| (r.t - began, r.pss_bytes as f64 / GIB)).collect()
    }
}

/// `what` as a path, or below `runs_dir`.
///
/// # Errors
/// Neither is there.
pub fn locate(what: &Path, runs_dir: &Path) -> Result<PathBuf, LogError> {
    let found = [what.to_path_buf(), runs_dir.join(what)].into_iter().find(|path| path.exists());
    found.ok_or_else(|| LogError::Missing(what.to_path_buf()))
}

fn json<T: DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

/// The lines that are whole; absent: no such file. A line cut short by a kill is passed over.
fn json_lines<T: DeserializeOwned>(path: &Path) -> Option<Vec<T>> {
    let lines = BufReader::new(std::fs::File::open(path).ok()?).split(b'\n').map_while(Result::ok);
    Some(lines.filter_map(|line| serde_json::from_slice(&line).ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn item_47_the_guides_own_log_is_read_and_a_missing_one_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory_log_20241205_143022.json");
        let text = r#"[{"ram_used_gb": 7.5, "ram_total_gb": 16.0, "ram_percent": 46.9, "timestamp": "2024-12-05T14:30:22",
            "gpu_allocated_gb": 1.5, "gpu_reserved_gb": 2.0, "gpu_total_gb": 8.0, "gpu_memory_percent": 25.0, "elapsed_time": 0.0},
            {"ram_used_gb": 8.0, "ram_total_gb": 16.0, "ram_percent": 50.0, "timestamp": 1733409027.5, "elapsed_time": 5.0}]"#;
        std::fs::write(&path, text).unwrap();
        let run = Run::read(&path, Path::new("runs")).unwrap();
        assert_eq!(run.used_gib(), [(0.0, 7.5), (5.0, 8.0)]);
        let missing = Run::read(Path::new("no/such.json"), dir.path()).unwrap_err().to_string();
        assert!(missing.starts_with("no/such.json: no such run or log"), "{missing}");
        std::fs::write(&path, "[]").unwrap();
        assert!(Run::read(&path, Path::new("runs")).unwrap_err().to_string().contains("no samples"));
        std::fs::write(&path, "{").unwrap();
        assert!(matches!(Run::read(&path, Path::new("runs")), Err(LogError::Malformed { .. })));
    }

    #[test]
    fn a_folder_that_is_no_run_is_said_to_be_none() {
        let dir = tempfile::tempdir().unwrap();
        let error = Run::read(dir.path(), Path::new("runs")).unwrap_err().to_string();
        assert!(error.contains("neither plan.json nor memory.rank0.jsonl"), "{error}");
    }

    #[test]
    fn half_a_line_is_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let line = serde_json::to_string(&MemoryRecord { pss_bytes: 1 << 30, ..Default::default() }).unwrap();
        std::fs::write(dir.path().join("memory.rank0.jsonl"), format!("{line}\n{{\"t\":3")).unwrap();
        let run = Run::read(dir.path(), Path::new("runs")).unwrap();
        assert_eq!(run.used_gib(), [(0.0, 1.0)]);
    }
}
