//! The loop's [`Observer`]: progress to the launcher, records to the run folder, memory lines.

use crate::data::cache::CacheClient;
use crate::report::Reporter;
use crate::report::memory::{MemorySampler, MemorySnapshot};
use crate::report::records::RecordWriter;
use crate::train::Observer;
use launcher::contract::{MetricsRecord, Progress, Relieved};
use std::sync::Arc;

/// What rank `rank` tells.
pub struct RankObserver {
    pub rank: usize,
    pub reporter: Reporter,
    pub memory: MemorySampler,
    /// Rank 0's metrics.jsonl.
    pub records: Option<RecordWriter>,
    pub memory_every: u64,
    /// The first step of this process is still to come.
    pub first: bool,
    pub phase: String,
    /// The node's page cache, where there is one.
    pub cache: Option<Arc<CacheClient>>,
}

impl RankObserver {
    /// Share of this rank's reads that found their bytes in the page cache.
    fn hit_rate(&self) -> Option<f64> {
        self.cache.as_ref().and_then(|cache| cache.stats().hit_rate())
    }
}

impl Observer for RankObserver {
    fn phase(&mut self, phase: &str, step: u64) {
        self.memory.step(step);
        if self.phase != phase {
            self.phase = phase.to_string();
            self.memory.phase(phase);
        }
    }

    fn step(&mut self, progress: &Progress) {
        self.memory.step(progress.step);
        if std::mem::take(&mut self.first) {
            self.memory.phase("first step");
            self.memory.phase("train");
        }
        if self.memory_every > 0 && progress.step.is_multiple_of(self.memory_every) {
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
            self.reporter.line(format!("metrics.jsonl: {error}"));
            self.records = None;
        }
    }

    fn line(&mut self, text: String) {
        if self.rank == 0 {
            self.reporter.line(text);
        }
    }

    fn uss_bytes(&mut self) -> u64 {
        MemorySnapshot::take(None).map_or(0, |now| now.uss_bytes)
    }

    fn relieved(&mut self, answer: Relieved) {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let (before, after) = (mib(answer.uss_before_bytes), mib(answer.uss_after_bytes));
        self.reporter.line(format!("relief {}: {} (USS {before:.1} → {after:.1} MB)", answer.order, answer.text));
        self.reporter.relieved(answer);
    }
}
