//! Records on disk and the job that a launcher hands to its ranks.

use crate::config::Config;
use crate::plan::Plan;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Everything a rank needs to know besides its environment; written to the run folder before ranks start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Job {
    pub version: u32,
    pub config: Config,
    pub plan: Plan,
    /// `runs/<name>`, absolute.
    pub run_dir: PathBuf,
    /// Checkpoint folder to resume from, absolute; absent: start afresh.
    pub resume: Option<PathBuf>,
}

/// One line of `metrics.jsonl`; the task's metrics follow under `train.` and `val.` names.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MetricsRecord {
    /// End of the step, seconds since the Unix epoch.
    #[serde(default)]
    pub t: f64,
    pub step: u64,
    pub epoch: u64,
    pub loss: f64,
    pub lr: f64,
    pub samples_per_s: f64,
    pub data_wait_s: f64,
    pub step_s: f64,
    pub grad_norm: f64,
    pub scale: f64,
    pub cache_hit_rate: Option<f64>,
    #[serde(flatten)]
    pub metrics: BTreeMap<String, f64>,
}

/// One line of `memory.rank<R>.jsonl`. Bytes throughout; `t` in seconds since the Unix epoch.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MemoryRecord {
    pub t: f64,
    pub step: u64,
    pub phase: String,
    pub rss_bytes: u64,
    pub pss_bytes: u64,
    pub uss_bytes: u64,
    pub shared_bytes: u64,
    pub system_used_bytes: u64,
    pub system_total_bytes: u64,
    pub gpu_allocated_bytes: u64,
    pub gpu_reserved_bytes: u64,
    pub gpu_peak_bytes: u64,
    pub cache_bytes: u64,
    pub cache_hits: u64,
    pub cache_misses: u64,
    /// Largest RSS since the phase began, as the kernel saw it between the records.
    #[serde(default)]
    pub rss_peak_bytes: u64,
}

/// `summary.json`. Rank 0 writes the training part; the launcher adds what only it knows (peaks over ranks, restarts).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// `finished`, `stopped`, `early_stopped` or `failed`.
    pub status: String,
    pub steps: u64,
    pub epochs: u64,
    pub wall_s: f64,
    pub train_s: f64,
    pub samples_per_s: f64,
    pub metrics: BTreeMap<String, f64>,
    /// Names in `metrics` that a person wants to see first.
    #[serde(default)]
    pub headline: Vec<String>,
    /// Best value of the monitored metric and the step it was reached at.
    pub best: Option<Best>,
    pub peak_pss_bytes_per_rank: Vec<u64>,
    /// Peak of the sum of PSS over all processes of the job, launcher included.
    pub peak_node_bytes: u64,
    pub cache: CacheSummary,
    pub files_skipped: u64,
    pub restarts: u32,
    /// Why a run was stopped, where someone said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// How often `memory.cleanup_every` released what is kept for speed.
    #[serde(default)]
    pub memory_cleanups: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Best {
    pub metric: String,
    pub value: f64,
    pub step: u64,
}

/// The node's page cache over the run. Whoever hosts its directory writes it; default: there was none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CacheSummary {
    /// `pin`, `lru`, `next_use`, or `off`.
    pub policy: String,
    pub capacity_bytes: u64,
    pub used_bytes: u64,
    pub hits: u64,
    pub misses: u64,
    pub evictions: u64,
    pub bypasses: u64,
}

impl CacheSummary {
    pub fn of(policy: &str, stats: &super::cache::CacheStats) -> Self {
        Self {
            policy: policy.to_owned(),
            capacity_bytes: stats.capacity_bytes,
            used_bytes: stats.used_bytes,
            hits: stats.hits,
            misses: stats.misses,
            evictions: stats.evictions,
            bypasses: stats.bypasses,
        }
    }
}

impl Default for CacheSummary {
    fn default() -> Self {
        Self { policy: "off".into(), capacity_bytes: 0, used_bytes: 0, hits: 0, misses: 0, evictions: 0, bypasses: 0 }
    }
}
