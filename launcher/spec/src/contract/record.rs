//! Records on disk.

use super::{CacheMode, Event, Level, Phase, RunStatus};
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

/// One line of `metrics.jsonl`; the task's metrics follow under `train.` and `val.` names, rates of its groups of parameters
/// under `lr.` names. JSON has no NaN or infinity: such a
/// value is written as `null` and read back as NaN.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MetricsRecord {
    /// End of the step, seconds since the Unix epoch.
    #[serde(default)]
    pub t: f64,
    pub step: u64,
    /// The running one, counted from 1.
    pub epoch: u64,
    #[serde(deserialize_with = "number")]
    pub loss: f64,
    #[serde(deserialize_with = "number")]
    pub lr: f64,
    #[serde(deserialize_with = "number")]
    pub samples_per_s: f64,
    #[serde(deserialize_with = "number")]
    pub data_wait_s: f64,
    #[serde(deserialize_with = "number")]
    pub step_s: f64,
    #[serde(deserialize_with = "number")]
    pub grad_norm: f64,
    #[serde(deserialize_with = "number")]
    pub scale: f64,
    pub cache_hit_rate: Option<f64>,
    /// Where batches go to a device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<InputRecord>,
    /// Files left out so far, at opening and since.
    #[serde(default)]
    pub files_skipped: u64,
    /// Flattened, because the file's format is public: one object per line, with the metrics beside the other names, as tools
    /// for tables (`pandas.read_json(lines=True)`) expect it.
    #[serde(flatten, deserialize_with = "numbers")]
    pub metrics: BTreeMap<String, f64>,
}

fn number<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f64::NAN))
}

fn numbers<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<String, f64>, D::Error> {
    let found = BTreeMap::<String, Option<f64>>::deserialize(from)?;
    Ok(found.into_iter().map(|(name, value)| (name, value.unwrap_or(f64::NAN))).collect())
}

/// Copies by rank 0 to its device since the previous record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct InputRecord {
    pub bytes: u64,
    /// Those among them that went straight from the page cache.
    pub direct_bytes: u64,
    /// Bytes whose copies were timed, and the device's time for them, seconds; 0 on a CPU.
    pub timed_bytes: u64,
    pub device_s: f64,
}

/// One line of `memory.rank<R>.jsonl`. Bytes throughout; `t` in seconds since the Unix epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MemoryRecord {
    pub t: f64,
    pub step: u64,
    pub phase: Phase,
    pub rss_bytes: u64,
    pub pss_bytes: u64,
    pub uss_bytes: u64,
    pub shared_bytes: u64,
    pub system_used_bytes: u64,
    pub system_total_bytes: u64,
    pub gpu_allocated_bytes: u64,
    pub gpu_reserved_bytes: u64,
    pub gpu_peak_bytes: u64,
    /// Bytes in use on the device by all processes, as the driver counts.
    #[serde(default)]
    pub gpu_used_bytes: u64,
    #[serde(default)]
    pub gpu_total_bytes: u64,
    /// How often the allocator asked the driver for memory: flat in steady training.
    #[serde(default)]
    pub gpu_device_allocs: u64,
    pub cache_bytes: u64,
    pub cache_hits: u64,
    pub cache_misses: u64,
    /// Largest RSS since the phase began, as the kernel saw it between the records.
    #[serde(default)]
    pub rss_peak_bytes: u64,
    /// RSS by kind, never older than the record: own memory (heap, stacks), and pages of files (libraries).
    #[serde(default)]
    pub anon_bytes: u64,
    #[serde(default)]
    pub file_bytes: u64,
    /// Most own memory since the phase began, by the kernel's peak; 0: not known.
    #[serde(default)]
    pub anon_peak_bytes: u64,
    /// The part that Headroom accounts for itself; see [`Held`].
    #[serde(default)]
    pub held: Held,
}

/// Parts of a rank's host memory that are counted where they are held: the most since the record before. Bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Held {
    /// Weights, gradients, moments and moving average; none where they lie on a device.
    pub model_bytes: u64,
    /// The part of the model that lies in memory shared by the node's ranks: gradients, where ranks meet there.
    pub model_shared_bytes: u64,
    /// Batch slots of the training loader, and of validation while it lasts.
    pub slots_bytes: u64,
    pub val_slots_bytes: u64,
    /// Buffers of the threads that decode.
    pub scratch_bytes: u64,
    /// Decoded chunks that the rank keeps for itself.
    pub chunks_bytes: u64,
    /// Copies for a checkpoint.
    pub staging_bytes: u64,
    /// This rank's part of the memory that ranks meet in, gradients left out.
    pub meeting_bytes: u64,
    /// All tensors in host memory at once, those of the model that are the rank's own among them.
    pub tensors_bytes: u64,
}

impl Held {
    /// The most of each part.
    pub fn max(&self, other: &Self) -> Self {
        Self {
            model_bytes: self.model_bytes.max(other.model_bytes),
            model_shared_bytes: self.model_shared_bytes.max(other.model_shared_bytes),
            slots_bytes: self.slots_bytes.max(other.slots_bytes),
            val_slots_bytes: self.val_slots_bytes.max(other.val_slots_bytes),
            scratch_bytes: self.scratch_bytes.max(other.scratch_bytes),
            chunks_bytes: self.chunks_bytes.max(other.chunks_bytes),
            staging_bytes: self.staging_bytes.max(other.staging_bytes),
            meeting_bytes: self.meeting_bytes.max(other.meeting_bytes),
            tensors_bytes: self.tensors_bytes.max(other.tensors_bytes),
        }
    }

    /// Bytes that belong to this rank alone, without the tensors of steps.
    pub fn own_bytes(&self) -> u64 {
        let model = self.model_bytes.saturating_sub(self.model_shared_bytes);
        let parts = [self.slots_bytes, self.val_slots_bytes, self.scratch_bytes, self.chunks_bytes, self.staging_bytes];
        parts.into_iter().fold(model, u64::saturating_add)
    }
}

/// One line of `memory.node.jsonl`, by the launcher. Bytes throughout; `t` in seconds since the Unix epoch.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NodeRecord {
    pub t: f64,
    /// Last step that rank 0 reported.
    pub step: u64,
    pub level: Level,
    pub system_total_bytes: u64,
    /// `MemAvailable`.
    pub system_available_bytes: u64,
    /// File cache of the kernel, without shared memory.
    pub file_cache_bytes: u64,
    /// Memory behind Headroom's page cache.
    pub cache_bytes: u64,
    /// All processes of the job and the page cache, shared pages counted once.
    pub job_bytes: u64,
    pub launcher_bytes: u64,
    pub ranks: Vec<RankMemory>,
    pub cgroup: Option<CgroupMemory>,
    /// Share of the last ten seconds, percent, in which some (all) tasks waited for memory.
    pub psi_some_avg10: Option<f64>,
    pub psi_full_avg10: Option<f64>,
    pub gpus: Vec<GpuUse>,
    /// Event of the watch at this moment, if there was one.
    #[serde(default, deserialize_with = "super::event::event_or_text", skip_serializing_if = "Option::is_none")]
    pub event: Option<Event>,
}

/// One rank, as seen from outside. PSS and shared bytes are read from time to time and carried on by the growth of RSS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankMemory {
    pub rank: u32,
    pub rss_bytes: u64,
    pub pss_bytes: u64,
    pub uss_bytes: u64,
    pub shared_bytes: u64,
}

/// The cgroup that binds the job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CgroupMemory {
    pub version: u32,
    /// File cache that can be reclaimed left out.
    pub used_bytes: u64,
    pub limit_bytes: Option<u64>,
    /// Processes that the kernel killed for memory in it.
    pub oom_kills: u64,
    /// How often it was held at `memory.high` (v2), and at its hard limit (v2 `max`, v1 `failcnt`).
    pub high_events: u64,
    pub max_events: u64,
}

/// One device by NVML, all its users together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuUse {
    pub index: u32,
    pub used_bytes: u64,
    pub total_bytes: u64,
}

/// `summary.json`. Rank 0 writes the training part; the launcher adds what only it knows (peaks over ranks, restarts).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    pub status: RunStatus,
    pub steps: u64,
    pub epochs: u64,
    pub wall_s: f64,
    pub train_s: f64,
    pub samples_per_s: f64,
    pub metrics: BTreeMap<String, f64>,
    /// Names in `metrics` that a person wants to see first.
    #[serde(default)]
    pub headline: Vec<String>,
    /// Progress of a pass or an evaluation: samples that are done, and whole outputs. `None`: a training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub samples: Option<u64>,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub outputs: u64,
    /// Best value of the monitored metric and the step it was reached at.
    pub best: Option<Best>,
    pub peak_pss_bytes_per_rank: Vec<u64>,
    /// PSS without shared memory: beside the plan's lines of one rank. Of the last attempt, whose plan is in `plan.json`.
    #[serde(default)]
    pub peak_own_bytes_per_rank: Vec<u64>,
    /// Peak of the sum of PSS over all processes of the job, launcher included.
    pub peak_node_bytes: u64,
    pub cache: CacheSummary,
    pub files_skipped: u64,
    pub restarts: u32,
    /// Why the run was stopped, or how its last attempt failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Each attempt that failed, in their order; with restarts the run may have finished all the same.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ended: Vec<Ended>,
    /// Each change that a restart made to need less memory.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reduced: Vec<String>,
    /// How often `memory.cleanup_every` released what is kept for speed.
    #[serde(default)]
    pub memory_cleanups: u64,
    /// Times in which records or logs could not be written.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub record_gaps: Vec<RecordGap>,
    /// The start that this summary is of: [`crate::job::Job::start`].
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub start: String,
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// `metrics.json` of an evaluation. Values that are not finite are null.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// `train`, `val` or `test` of the run's data; `data`: all of other data.
    pub on: String,
    pub data: PathBuf,
    /// File of the weights.
    pub weights: PathBuf,
    /// Step of their checkpoint.
    pub step: Option<u64>,
    pub samples: u64,
    pub files_skipped: u64,
    #[serde(deserialize_with = "numbers")]
    pub metrics: BTreeMap<String, f64>,
    /// Names in `metrics` that a person wants to see first.
    pub headline: Vec<String>,
}

/// A time in which a file of records or a log could not be written.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RecordGap {
    /// Name within the run's folder.
    pub file: String,
    /// From the first failure to the end of the gap, seconds since the Unix epoch.
    pub from_t: f64,
    pub to_t: f64,
    /// Lines that waited and were written at the end of the gap, and lines that are lost.
    pub late: u64,
    pub lost: u64,
    pub error: String,
    /// Lost pieces that a line in the log tells of already.
    #[serde(skip)]
    pub marked: u64,
}

impl fmt::Display for RecordGap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, late, lost, error, .. } = self;
        let seconds = (self.to_t - self.from_t).max(0.0);
        write!(f, "{file}: could not be written for {seconds:.1} s ({error}): {late} lines written late, {lost} lost")
    }
}

/// How an attempt at a run failed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Ended {
    /// From 0; restarts before it.
    pub attempt: u32,
    /// The last step that is known of.
    pub step: Option<u64>,
    pub code: u8,
    /// The failure in one line, then what is known of it, one fact per line.
    pub words: String,
    /// The kernel killed for memory.
    pub for_memory: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Best {
    pub metric: String,
    pub value: f64,
    pub step: u64,
}

/// The node's page cache over the run, written by the host of its directory; the default means that there was none.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CacheSummary {
    pub policy: CacheMode,
    pub capacity_bytes: u64,
    pub used_bytes: u64,
    pub hits: u64,
    pub misses: u64,
    pub evictions: u64,
    pub bypasses: u64,
}

impl CacheSummary {
    pub fn of(policy: CacheMode, stats: &super::cache::CacheStats) -> Self {
        Self {
            policy,
            capacity_bytes: stats.capacity_bytes,
            used_bytes: stats.used_bytes,
            hits: stats.hits,
            misses: stats.misses,
            evictions: stats.evictions,
            bypasses: stats.bypasses,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_are_not_finite_are_written_as_null_and_read_as_nan() {
        let mut record = MetricsRecord { step: 7, loss: f64::NAN, ..MetricsRecord::default() };
        record.input = Some(InputRecord { bytes: 5, ..InputRecord::default() });
        record.metrics.extend([("val.loss".to_owned(), f64::INFINITY), ("val.mae_deg".to_owned(), 6.5)]);
        let line = serde_json::to_string(&record).unwrap();
        assert!(line.contains(r#""loss":null"#) && line.contains(r#""val.loss":null,"val.mae_deg":6.5"#), "{line}");
        let read: MetricsRecord = serde_json::from_str(&line).unwrap();
        assert!(read.loss.is_nan() && read.metrics["val.loss"].is_nan(), "{read:?}");
        assert_eq!((read.step, read.metrics["val.mae_deg"], read.input), (7, 6.5, record.input));
    }
}
