//! The plan: topology and every byte of the node's budget, by name.
//!
//! Architecture invariant: pure. `plan(config, machine, dataset, request)` reads nothing else.

use serde::{Deserialize, Serialize};

/// A decided run. Bytes throughout.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    pub topology: Topology,
    pub batch: BatchPlan,
    pub loader: LoaderPlan,
    pub budget: BudgetPlan,
    /// What was changed or is worth knowing, one sentence each, printed once.
    pub notes: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Topology {
    /// `cpu` or `cuda`.
    pub device: String,
    /// Ranks on this node.
    pub local_world_size: usize,
    /// Ranks of the whole job.
    pub world_size: usize,
    pub nnodes: usize,
    pub node_rank: usize,
    /// Device index of each local rank; empty on CPU.
    pub devices: Vec<u32>,
    /// Compute threads (intra-op) of each rank.
    pub threads_per_rank: usize,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BatchPlan {
    /// Samples of one optimizer step over the whole job: the same for every world size.
    pub global_batch: usize,
    /// Most samples that a rank puts through one forward and backward pass.
    pub micro_batch: usize,
    /// Most micro-batches a rank runs per optimizer step.
    pub micro_steps: usize,
    pub val_batch: usize,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LoaderPlan {
    /// Loader threads per rank; 0: batches are made on the step's own thread.
    pub threads: usize,
    /// Batch slots per rank, each holds `micro_batch` samples.
    pub slots: usize,
    /// Bytes of decoded chunks that a rank may keep for itself.
    pub chunk_cache_bytes: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BudgetPlan {
    /// What Headroom may use of this node.
    pub total_bytes: u64,
    pub lines: Vec<BudgetLine>,
    /// What is left for the page cache after every line.
    pub page_cache_bytes: u64,
}

/// One named part of the budget. `bytes` counts the whole node: `per_rank_bytes × ranks` where a line is per rank.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BudgetLine {
    pub name: String,
    pub bytes: u64,
    pub per_rank_bytes: Option<u64>,
    /// How the number came about, in words and factors.
    pub formula: String,
}
