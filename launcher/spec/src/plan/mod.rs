#![doc = include_str!("README.md")]
//!
//! `topology` decides ranks and batch, `budget` adds up the lines (`passes`, `model`, `page_cache`), `suggest` finds what would
//! fit, `table` prints. Sizes of a task's model and data are measured by `rank describe` and come in as [`Measured`]: no task
//! is named here.

mod budget;
mod constants;
mod error;
mod model;
mod page_cache;
mod passes;
mod program;
mod shapes;
mod sizes;
mod smaller;
mod suggest;
mod table;
#[cfg(test)]
mod tests;
mod topology;

pub use constants::{CUDA_TRAINS, DIRECTORY_ENTRY_BYTES};
pub use error::PlanError;
pub use program::{ProgramSizes, program_plan};
pub use shapes::Shape;
pub use smaller::{Smaller, smaller};
pub use suggest::{Change, Suggestion};
pub use table::bytes_text;
pub use topology::{choose_device, node_share};

use crate::config::{Config, DeviceChoice};
use crate::contract::{CacheMode, Device, LineId, Machine, Measured};
use serde::{Deserialize, Serialize};

/// Wishes of the command line. `None` leaves the choice to config and machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// `--gpus`: ranks per node, one per GPU; CPU ranks where there is no GPU.
    pub gpus: Option<usize>,
    /// `--ranks`: ranks of this node, whatever the devices.
    pub ranks: Option<usize>,
    /// `--device`; `Auto`: the config's `train.device`.
    pub device: DeviceChoice,
    /// `--strict`: refuse instead of falling back.
    pub strict: bool,
    pub nnodes: usize,
    pub node_rank: usize,
    /// Ranks of each node, as the launchers exchanged them. Empty means that every node equals this one.
    pub nodes: Vec<NodeShare>,
    /// Nothing is trained: a model runs over data, as in an evaluation, a prediction or a stage's pass.
    pub infers: bool,
}

/// Contribution of one node to a job of several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeShare {
    pub ranks: usize,
    /// Ranks that were asked for there, whatever is present: the global batch counts these.
    pub asked: usize,
}

impl Default for Request {
    fn default() -> Self {
        let (nnodes, node_rank, nodes) = (1, 0, Vec::new());
        let (device, strict, infers) = (DeviceChoice::Auto, false, false);
        Self { gpus: None, ranks: None, device, strict, nnodes, node_rank, nodes, infers }
    }
}

/// Decides ranks, batch, loader and every byte of the budget.
///
/// # Errors
/// A device is missing (`strict`), the lines do not fit (with the smallest single changes that do), or the config asks
/// for the impossible.
pub fn plan(config: &Config, machine: &Machine, measured: &Measured, request: &Request) -> Result<Plan, PlanError> {
    let draft = draft(config, machine, measured, request)?;
    let need_bytes = draft.budget.need_bytes();
    if need_bytes > draft.budget.total_bytes {
        let suggestions = suggest::all(config, machine, measured, request, &draft);
        return Err(PlanError::does_not_fit(draft, suggestions));
    }
    match &draft.budget.gpu {
        Some(gpu) if gpu.need_bytes() > gpu.total_bytes => {
            let suggestions = suggest::all(config, machine, measured, request, &draft);
            Err(PlanError::gpu_does_not_fit(gpu, suggestions))
        }
        _ => Ok(draft),
    }
}

/// Bytes that Headroom may use of `machine`: `memory.budget` of the smaller of physical memory and cgroup limit.
///
/// # Errors
/// This machine cannot give the budget.
pub fn budget_bytes(config: &Config, machine: &Machine) -> Result<u64, PlanError> {
    Ok(budget::total(config, machine)?.0)
}

/// Device on which ranks train.
pub fn device_of(config: &Config, machine: &Machine, request: &Request) -> Device {
    topology::device_of(config, machine, request)
}

/// A plan with all its lines, whether or not they fit.
fn draft(config: &Config, machine: &Machine, measured: &Measured, request: &Request) -> Result<Plan, PlanError> {
    let mut notes = Vec::new();
    let topology = topology::topology(config, machine, request, &mut notes)?;
    let batch = topology::batch(config, request, &topology)?;
    let loader = topology::loader(config, machine, measured, &topology, &mut notes)?;
    let mut plan = Plan { topology, batch, loader, budget: BudgetPlan::default(), notes, data: Vec::new() };
    plan.budget = budget::budget(config, machine, measured, &mut plan)?;
    Ok(plan)
}

/// Checks that the drafted lines fit, on host and GPU.
fn fits(plan: &Plan) -> bool {
    let gpu = plan.budget.gpu.as_ref().is_none_or(|gpu| gpu.need_bytes() <= gpu.total_bytes);
    plan.budget.need_bytes() <= plan.budget.total_bytes && gpu
}

/// A decided run. Bytes throughout.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    pub topology: Topology,
    pub batch: BatchPlan,
    pub loader: LoaderPlan,
    pub budget: BudgetPlan,
    /// Changes and facts worth knowing, one sentence each, printed once.
    pub notes: Vec<String>,
    /// The data set's arithmetic, one sentence each, where the task has any.
    #[serde(default)]
    pub data: Vec<String>,
}

impl Plan {
    /// Memory that one rank may have for itself: its lines, copies for a checkpoint, and its share of the libraries,
    /// whose pages all ranks map. Compare it with PSS without shared memory, which has no part of the page cache.
    pub fn rank_bytes(&self) -> u64 {
        let own: u64 = self.budget.lines.iter().filter_map(|line| line.per_rank_bytes).sum();
        let libraries = self.budget.line_bytes(LineId::Libraries) / self.topology.local_world_size.max(1) as u64;
        own + self.budget.line_bytes(LineId::CheckpointStaging) + libraries
    }
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Topology {
    pub device: Device,
    /// Ranks on this node.
    pub local_world_size: usize,
    /// Ranks of the whole job.
    pub world_size: usize,
    pub nnodes: usize,
    pub node_rank: usize,
    /// Ranks of each node; empty: as many as on this one.
    #[serde(default)]
    pub node_ranks: Vec<usize>,
    /// Device index of each local rank; empty on CPU.
    pub devices: Vec<u32>,
    /// Compute threads (intra-op) of each rank.
    pub threads_per_rank: usize,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BatchPlan {
    /// Samples of one optimizer step over the whole job: the same for every world size. 0: nothing is trained.
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
    /// Bytes that Headroom may use on this node.
    pub total_bytes: u64,
    pub lines: Vec<BudgetLine>,
    /// Bytes of the line `page cache`: what is left after every other line, as far as it is of use.
    pub page_cache_bytes: u64,
    #[serde(default)]
    pub cache_policy: CacheMode,
    /// How `total_bytes` came about.
    #[serde(default)]
    pub formula: String,
    /// Memory of one device; absent on CPU.
    #[serde(default)]
    pub gpu: Option<GpuPlan>,
}

impl BudgetPlan {
    /// Sum of all lines, bytes of the node.
    pub fn need_bytes(&self) -> u64 {
        sum_lines(&self.lines)
    }

    /// The node's bytes of the line `name`; 0 where the plan has no such line.
    pub fn line_bytes(&self, name: LineId) -> u64 {
        self.lines.iter().find(|line| line.name == name).map_or(0, |line| line.bytes)
    }

    /// Least bytes that training needs: all lines but the page cache, which takes the rest.
    pub fn least_bytes(&self) -> u64 {
        self.need_bytes().saturating_sub(self.page_cache_bytes)
    }
}

/// Memory of one device, which one rank has for itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GpuPlan {
    /// Free bytes of the fullest device.
    pub total_bytes: u64,
    pub lines: Vec<BudgetLine>,
}

impl GpuPlan {
    /// Sum of all lines, bytes of one device.
    pub fn need_bytes(&self) -> u64 {
        sum_lines(&self.lines)
    }
}

/// The lines were summed with checks when they were made; a hand-made plan saturates.
fn sum_lines(lines: &[BudgetLine]) -> u64 {
    lines.iter().fold(0, |sum, line| sum.saturating_add(line.bytes))
}

/// One named part of the budget. `bytes` counts the whole node: `per_rank_bytes × ranks` where a line is per rank.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BudgetLine {
    pub name: LineId,
    pub bytes: u64,
    pub per_rank_bytes: Option<u64>,
    /// How the number came about, in words and factors.
    pub formula: String,
    /// Claimed as a bound alone: how much of it is used depends on what is not known here.
    #[serde(default)]
    pub bound: bool,
}

impl BudgetLine {
    fn bounded(self) -> Self {
        Self { bound: true, ..self }
    }
}
