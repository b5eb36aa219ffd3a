//! The loop's [`Observer`]: progress to the launcher, records to the run folder, memory lines, last words.

use super::error::train_code_of;
use super::{RankError, panic_text};
use crate::comm::{Collective, CommError};
use crate::own_loop::{MemorySummary, explain};
use crate::report::Reporter;
use crate::report::memory::{MemorySampler, MemorySnapshot};
use crate::report::records::RecordWriter;
use crate::task::Journal;
use crate::train::{Observer, TrainError};
use cache::client::CacheClient;
use host::journal;
use spec::contract::{MetricsRecord, Phase, Progress, Relieved};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Observer of rank `rank`.
pub struct RankObserver {
    pub rank: usize,
    pub reporter: Reporter,
    pub memory: MemorySampler,
    /// Rank 0's metrics.jsonl.
    pub records: Option<RecordWriter>,
    pub memory_every: u64,
    /// Where validation leaves its values and pictures.
    pub run_dir: PathBuf,
    /// The first step of this process is still to come.
    pub first: bool,
    pub phase: Phase,
    /// The node's page cache, where there is one.
    pub cache: Option<Arc<CacheClient>>,
    /// Rank 0's, where the task keeps one.
    pub journal: Option<Box<dyn Journal>>,
    /// Ended when training fails; absent on a CPU.
    pub on_device: Option<Arc<dyn Collective>>,
}

/// Last words about an error of training, and what explains it; once.
pub fn tell_failure(reporter: &Reporter, rank: usize, error: &TrainError) {
    if reporter.has_failed() {
        return;
    }
    let step = match error {
        TrainError::NonFinite { step, .. }
        | TrainError::OutOfMemory { step, .. }
        | TrainError::OutOfMemoryTogether { step, .. } => Some(*step),
        _ => None,
    };
    if let TrainError::OutOfMemory { rank: at, message, .. } = error
        && *at == rank
    {
        explain(message, &MemorySummary::now()).into_iter().for_each(|line| reporter.line(line));
    }
    reporter.failed(train_code_of(error, rank), step, error.to_string());
}

/// Ends what a failed rank left on its device, which may wait for other ranks for good.
pub fn end_device_work(collective: &dyn Collective, error: &dyn std::error::Error) {
    collective.abort(CommError::GivenUp { error: error.to_string() });
}

impl RankObserver {
    /// Share of the node's lookups that found their entry so far, as last heard from the directory: what the bar and the
    /// summary show.
    fn hit_rate(&self) -> Option<f64> {
        self.cache.as_ref().and_then(|cache| cache.node_stats().hit_rate())
    }
}

/// `metrics/val_step_N.json`: the values of one validation, without their prefix.
fn write_validation(run_dir: &Path, step: u64, values: &BTreeMap<String, f64>) -> std::io::Result<()> {
    // JSON has no NaN: what is not finite is left out.
    let finite = values.iter().filter(|(_, value)| value.is_finite());
    let short: BTreeMap<&str, f64> =
        finite.map(|(name, value)| (name.strip_prefix("val.").unwrap_or(name), *value)).collect();
    let text = serde_json::to_vec_pretty(&short)?;
    write_whole(&run_dir.join("metrics"), &format!("val_step_{step}.json"), &text)
}

/// Writes a sibling and renames it: no reader sees half a file.
pub fn write_whole(folder: &Path, name: &str, bytes: &[u8]) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let sibling = folder.join(format!("{name}.tmp-{}", std::process::id()));
    // Training waits for it: not long.
    journal::replace(&folder.join(name), &sibling, bytes, Duration::ZERO)
}

impl Observer for RankObserver {
    fn phase(&mut self, phase: Phase, step: u64) {
        self.memory.step(step);
        if self.phase != phase {
            self.phase = phase;
            self.memory.phase(phase);
        }
    }

    fn step(&mut self, progress: &Progress) {
        self.memory.step(progress.step);
        if std::mem::take(&mut self.first) {
            self.memory.phase(Phase::FirstStep);
            self.memory.phase(progress.phase);
        }
        let counts_steps = progress.phase != Phase::Predict;
        if counts_steps && self.memory_every > 0 && progress.step.is_multiple_of(self.memory_every) {
            self.memory.print(&format!("Step {}", progress.step));
        }
        if self.rank == 0 {
            let cache_hit_rate = self.hit_rate();
            self.reporter.progress(Progress { cache_hit_rate, ..progress.clone() });
        }
    }

    fn record(&mut self, record: &MetricsRecord) {
        let record = MetricsRecord { cache_hit_rate: self.hit_rate(), ..record.clone() };
        if let Some(records) = &self.records
            && let Err(error) = records.write(&record)
        {
            self.reporter.line(format!("warning: metrics.jsonl: {error}"));
        }
        let validated = record.metrics.keys().any(|name| name.starts_with("val."));
        if let Some(journal) = self.journal.as_mut().filter(|_| validated)
            && let Err(problem) = journal.epoch(&record)
        {
            self.reporter.line(format!("warning: {problem}"));
        }
    }

    fn files(&mut self, files: Vec<(String, Vec<u8>)>) {
        for (name, bytes) in files {
            if let Err(error) = write_whole(&self.run_dir, &name, &bytes) {
                self.reporter.line(format!("warning: {name}: {error}"));
            }
        }
    }

    fn validated(&mut self, step: u64, values: &BTreeMap<String, f64>, picture: Option<Result<Vec<u8>, String>>) {
        if self.rank != 0 {
            return;
        }
        if let Err(error) = write_validation(&self.run_dir, step, values) {
            self.reporter.line(format!("metrics/val_step_{step}.json: {error}"));
        }
        let written = match picture {
            Some(Ok(png)) => write_whole(&self.run_dir.join("images"), &format!("step-{step}.png"), &png),
            Some(Err(problem)) => Err(std::io::Error::other(problem)),
            None => Ok(()),
        };
        if let Err(error) = written {
            self.reporter.line(format!("images/step-{step}.png: {error}"));
        }
    }

    fn line(&mut self, text: String) {
        if self.rank == 0 {
            self.reporter.line(text);
        }
    }

    fn uss_bytes(&mut self) -> u64 {
        MemorySnapshot::take().map_or(0, |now| now.uss_bytes)
    }

    fn failing(&mut self, error: &TrainError) {
        // First: the launcher is to know the cause before other ranks feel it.
        tell_failure(&self.reporter, self.rank, error);
        if let Some(collective) = &self.on_device {
            end_device_work(&**collective, error);
        }
    }

    fn panicking(&mut self) {
        let error = RankError::Panic(panic_text());
        self.reporter.failed(error.exit_code(), None, error.to_string());
        if let Some(collective) = &self.on_device {
            end_device_work(&**collective, &error);
        }
    }

    fn relieved(&mut self, answer: Relieved) {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let (before, after) = (mib(answer.uss_before_bytes), mib(answer.uss_after_bytes));
        self.reporter.line(format!("relief {}: {} (USS {before:.1} → {after:.1} MB)", answer.order, answer.text));
        self.reporter.relieved(answer);
    }
}
