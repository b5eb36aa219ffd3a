//! Records to read: a run's folder, or the JSON log of a monitor.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use spec::config::Language;
use spec::contract::{MemoryRecord, MetricsRecord, NodeRecord, Summary, shown};
use spec::job::Job;
use spec::plan::Plan;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};

const GIB: f64 = (1u64 << 30) as f64;

/// Why a run or log cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("{path}: no such run or log: give a run's folder (runs/NAME), its name, or a monitor's JSON log", path = shown(.0))]
    Missing(PathBuf),
    #[error("{path}: {problem}; expected a run's folder, or a JSON array of samples as `launch monitor` writes it", path = shown(path))]
    Malformed { path: PathBuf, problem: String },
    #[error("{path}: one file of a run's records; give the run's folder: {folder}", path = shown(path), folder = shown(folder))]
    Records { path: PathBuf, folder: PathBuf },
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
    /// Language of the run's messages, where it is known.
    pub language: Option<Language>,
    pub plan: Option<Plan>,
    pub summary: Option<Summary>,
    pub metrics: Vec<MetricsRecord>,
    /// By rank.
    pub memory: Vec<Vec<MemoryRecord>>,
    pub node: Vec<NodeRecord>,
    /// Samples of a monitor, when a log was given instead of a run.
    pub monitor: Vec<MonitorSample>,
    /// The log ends within a sample, which is left out.
    pub cut_short: bool,
    /// The last start has no summary: it is still running, or nothing could write one.
    pub open_ended: bool,
    /// Its processes are alive.
    pub living: bool,
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
        let summary: Option<Summary> = json(&lines("summary.json"));
        let job: Option<Job> = json(&lines("job.json"));
        let (mut metrics, mut node): (Vec<MetricsRecord>, Vec<NodeRecord>) = (
            json_lines(&lines("metrics.jsonl")).unwrap_or_default(),
            json_lines(&lines("memory.node.jsonl")).unwrap_or_default(),
        );
        let mut times: Vec<Vec<&mut f64>> = memory
            .iter_mut()
            .map(|records: &mut Vec<MemoryRecord>| records.iter_mut().map(|r| &mut r.t).collect())
            .collect();
        times.push(node.iter_mut().map(|record| &mut record.t).collect());
        times.push(metrics.iter_mut().map(|record| &mut record.t).collect());
        forwards(&mut times);
        let is_of_job = |summary: &Summary| match &job {
            // Names of starts are certain; times of files go by a clock that may have been set back.
            Some(job) if !job.start.is_empty() => summary.start == job.start,
            _ => !is_older(&lines("summary.json"), &lines("job.json")),
        };
        Ok(Self {
            open_ended: !summary.as_ref().is_some_and(is_of_job),
            language: language(&path),
            plan,
            summary,
            metrics,
            node,
            memory,
            path,
            ..Self::default()
        })
    }

    fn read_log(path: PathBuf) -> Result<Self, LogError> {
        let malformed = |problem: String| LogError::Malformed { path: path.clone(), problem };
        if path.extension().is_some_and(|extension| extension == "jsonl") {
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
            return Err(LogError::Records { folder: folder.to_owned(), path });
        }
        let text = std::fs::read_to_string(&path).map_err(|e| malformed(e.to_string()))?;
        let (values, cut_short) = array(&text).map_err(|e| malformed(e.to_string()))?;
        let monitor = values.into_iter().enumerate().map(|(index, value)| sample(index + 1, value));
        let mut monitor: Vec<MonitorSample> = monitor.collect::<Result<_, _>>().map_err(malformed)?;
        // A monitor that was started again in the same file begins at zero.
        forwards(&mut [monitor.iter_mut().map(|sample| &mut sample.elapsed_time).collect()]);
        if monitor.is_empty() {
            return Err(malformed("it holds no samples".into()));
        }
        Ok(Self { path, monitor, cut_short, ..Self::default() })
    }

    /// First moment in the records, seconds since the Unix epoch: zero of every clock shown to the user.
    pub fn began(&self) -> f64 {
        let ranks = self.memory.iter().filter_map(|records| records.first()).map(|record| record.t);
        let node = self.node.first().map(|record| record.t);
        ranks.chain(node).reduce(f64::min).unwrap_or(0.0)
    }

    /// (seconds since the start, GiB) of what was watched: the job where its memory is known, else the whole machine.
    pub fn used_gib(&self) -> Vec<(f64, f64)> {
        if !self.monitor.is_empty() {
            return self.monitor.iter().map(|s| (s.elapsed_time, s.job_gb.unwrap_or(s.ram_used_gb))).collect();
        }
        let began = self.began();
        if !self.node.is_empty() {
            return self.node.iter().map(|r| (r.t - began, r.job_bytes as f64 / GIB)).collect();
        }
        let ranks = self.memory.first().into_iter().flatten();
        ranks.map(|r| (r.t - began, r.pss_bytes as f64 / GIB)).collect()
    }
}

/// Language of a run's messages, by its `job.json`.
pub fn language(run_dir: &Path) -> Option<Language> {
    // Runs of other versions too, whose other keys may have moved.
    let job: serde_json::Value = json(&run_dir.join("job.json"))?;
    Language::deserialize(job.pointer("/config/log/language")?).ok()
}

/// Where a rank's processes begin in its records: each begins with [`spec::contract::Phase::Start`], and these tell which are of it.
pub fn starts(in_start: impl Iterator<Item = bool>) -> Vec<usize> {
    let mut before = false;
    let begins = |(index, now): (usize, bool)| {
        let begins = now && !before;
        before = now;
        (begins || index == 0).then_some(index)
    };
    in_start.enumerate().filter_map(begins).collect()
}

/// Makes time go forwards in files whose records were written one after the other, where the clock was set back between
/// two: what follows begins where the earlier part ended. Each list holds the times of one file. Files that saw the same
/// changes of the clock are shifted alike, so that they stay in step.
pub fn forwards(files: &mut [Vec<&mut f64>]) {
    let jumps: Vec<Vec<(usize, f64)>> = files.iter().map(|times| jumps(times)).collect();
    let most = jumps.iter().map(Vec::len).max().unwrap_or(0);
    let alike = |number: usize| {
        let of_file = |jumps: &Vec<(usize, f64)>| (jumps.len() == most).then(|| jumps[number].1);
        jumps.iter().filter_map(of_file).fold(0.0, f64::max)
    };
    for (times, jumps) in files.iter_mut().zip(&jumps) {
        let (mut shift, mut next) = (0.0, jumps.iter().enumerate().peekable());
        for (index, time) in times.iter_mut().enumerate() {
            if let Some((number, (_, by))) = next.next_if(|(_, (at, _))| *at == index) {
                shift += if jumps.len() == most { alike(number) } else { *by };
            }
            **time += shift;
        }
    }
}

/// Where the clock was set back: index of the first record after it, and by how much at least.
fn jumps(times: &[&mut f64]) -> Vec<(usize, f64)> {
    let pairs = times.windows(2).enumerate();
    pairs.filter(|(_, pair)| *pair[1] < *pair[0]).map(|(index, pair)| (index + 1, *pair[0] - *pair[1])).collect()
}

/// The elements of a JSON array, and whether it is cut short, so that the last elements are not there.
fn array(text: &str) -> serde_json::Result<(Vec<serde_json::Value>, bool)> {
    let error = match serde_json::from_str(text) {
        Ok(values) => return Ok((values, false)),
        Err(error) if error.is_eof() => error,
        Err(error) => return Err(error),
    };
    // A brace may stand within the sample that is cut: some are tried.
    let ends = text.rmatch_indices('}').take(8).map(|(at, _)| at + 1);
    let whole = ends.filter_map(|end| serde_json::from_str(&format!("{}]", &text[..end])).ok()).next();
    whole.map(|values| (values, true)).ok_or(error)
}

/// The log's `number`th sample; a problem in words.
fn sample(number: usize, value: serde_json::Value) -> Result<MonitorSample, String> {
    if let Some(key) = ["ram_used_gb", "elapsed_time"].into_iter().find(|key| value.get(key).is_none()) {
        return Err(format!("sample {number} has no {key}"));
    }
    serde_json::from_value(value).map_err(|error| format!("sample {number}: {error}"))
}

/// By more than the second within which a copied folder's files are written.
fn is_older(file: &Path, than: &Path) -> bool {
    let changed = |path: &Path| path.metadata().and_then(|of| of.modified());
    let age = changed(than).ok().zip(changed(file).ok()).and_then(|(than, file)| than.duration_since(file).ok());
    age.is_some_and(|age| age.as_secs_f64() > 1.0)
}

/// `what` as a path, or below `runs_dir`.
///
/// # Errors
/// Neither is there.
pub fn locate(what: &Path, runs_dir: &Path) -> Result<PathBuf, LogError> {
    let found = [what.to_path_buf(), runs_dir.join(what)].into_iter().find(|path| path.exists());
    found.ok_or_else(|| LogError::Missing(what.to_path_buf()))
}

/// A JSON file; `None` where it is missing or malformed.
pub fn json<T: DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

/// All records of a file; `None` where there is no such file.
fn json_lines<T: DeserializeOwned>(path: &Path) -> Option<Vec<T>> {
    let mut records = Vec::new();
    each_record(path, |record| records.push(record)).ok().map(|()| records)
}

/// Calls `each` with every record of a file, in order, and keeps none. A line cut short by a kill is passed over, and so is what
/// cannot be read behind it.
///
/// # Errors
/// The file cannot be opened.
pub fn each_record<T: DeserializeOwned>(path: &Path, each: impl FnMut(T)) -> io::Result<()> {
    let lines = BufReader::new(std::fs::File::open(path)?).split(b'\n').map_while(Result::ok);
    lines.filter_map(|line| serde_json::from_slice(without_zeros(&line)).ok()).for_each(each);
    Ok(())
}

/// A writer that continues at its old place in a file that was truncated leaves zero bytes before its line.
fn without_zeros(line: &[u8]) -> &[u8] {
    &line[line.iter().position(|byte| *byte != 0).unwrap_or(line.len())..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guides_own_log_is_read_and_a_missing_one_is_an_error() {
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
        std::fs::write(
            &path,
            r#"[{"ram_used_gb": 1, "elapsed_time": 0}, {"ram_used_gb": 2, "elapsed_time": 5}, {"ram_u"#,
        )
        .unwrap();
        let run = Run::read(&path, Path::new("runs")).unwrap();
        assert_eq!((run.monitor.len(), run.cut_short), (2, true));
        std::fs::write(&path, r#"[{"ram_used_gb": 1, "elapsed_time": 0}, {"a": 2}]"#).unwrap();
        let error = Run::read(&path, Path::new("runs")).unwrap_err().to_string();
        assert!(error.contains("sample 2 has no ram_used_gb; expected"), "{error}");
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
    fn one_file_of_a_run_leads_to_its_folder() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory.rank0.jsonl");
        std::fs::write(&path, "{}\n").unwrap();
        let error = Run::read(&path, Path::new("runs")).unwrap_err().to_string();
        assert!(error.ends_with(&format!("give the run's folder: {}", dir.path().display())), "{error}");
    }

    #[test]
    fn a_summary_of_an_earlier_start_leaves_the_end_open() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, age_s: u64| {
            std::fs::write(dir.path().join(name), serde_json::to_vec(&Summary::default()).unwrap()).unwrap();
            let file = std::fs::File::options().write(true).open(dir.path().join(name)).unwrap();
            file.set_modified(std::time::SystemTime::now() - std::time::Duration::from_secs(age_s)).unwrap();
        };
        let open = || Run::read(dir.path(), Path::new("runs")).unwrap().open_ended;
        std::fs::write(dir.path().join("plan.json"), serde_json::to_vec(&Plan::default()).unwrap()).unwrap();
        assert!(open());
        write("summary.json", 20);
        write("job.json", 40);
        assert!(!open());
        write("job.json", 5);
        assert!(open());
    }

    #[test]
    fn each_process_begins_with_its_start() {
        let of = |phases: &[&str]| starts(phases.iter().map(|phase| *phase == "start"));
        assert_eq!(of(&["start", "start", "train", "val", "start", "train"]), [0, 4]);
        assert_eq!(of(&["train", "start"]), [0, 1], "the records begin before it");
        assert_eq!(of(&[]), Vec::<usize>::new());
    }

    #[test]
    fn a_summary_of_this_start_counts_whatever_the_clock_said() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: serde_json::Value, age_s: u64| {
            std::fs::write(dir.path().join(name), serde_json::to_vec(&text).unwrap()).unwrap();
            let file = std::fs::File::options().write(true).open(dir.path().join(name)).unwrap();
            file.set_modified(std::time::SystemTime::now() - std::time::Duration::from_secs(age_s)).unwrap();
        };
        let job = |start: &str| {
            let job = Job {
                version: 2,
                config: spec::config::Config::default(),
                plan: Plan::default(),
                run_dir: "runs/a".into(),
                resume: None,
                start: start.into(),
                resume_split: None,
                work: spec::job::Work::Train,
                earlier: Vec::new(),
                origin: None,
            };
            serde_json::to_value(job).unwrap()
        };
        let summary = Summary { start: "a".into(), ..Summary::default() };
        let open = || Run::read(dir.path(), Path::new("runs")).unwrap().open_ended;
        write("plan.json", serde_json::to_value(Plan::default()).unwrap(), 0);
        write("summary.json", serde_json::to_value(summary).unwrap(), 7200);
        write("job.json", job("a"), 0);
        assert!(!open(), "the clock was set back by two hours while it ran");
        write("job.json", job("b"), 9000);
        assert!(open(), "an earlier start's summary, by its time a later one's");
    }

    #[test]
    fn time_goes_forwards_after_the_clock_was_set_back() {
        let mut clock = [100.0, 102.0, 50.0, 52.0, 49.0, 60.0];
        forwards(&mut [clock.iter_mut().collect()]);
        assert_eq!(clock, [100.0, 102.0, 102.0, 104.0, 104.0, 115.0]);
        // Set back by an hour between two starts: the launcher's records go on longer and begin earlier.
        let (mut node, mut rank, mut steady) =
            ([1000.0, 1102.0, -2400.0, -2390.0], [1001.0, 1100.0, -2395.0], [5.0, 5.0, 9.0]);
        forwards(&mut [node.iter_mut().collect(), rank.iter_mut().collect(), steady.iter_mut().collect()]);
        assert_eq!((node, rank), ([1000.0, 1102.0, 1102.0, 1112.0], [1001.0, 1100.0, 1107.0]));
        assert_eq!(steady, [5.0, 5.0, 9.0]);
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
