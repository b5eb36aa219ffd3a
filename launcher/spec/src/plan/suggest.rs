//! The smallest single changes that make a plan fit, each found by planning again.

use super::constants::MIB;
use super::table::bytes_text;
use super::{Plan, Request, draft, fits};
use crate::config::{Budget, Config};
use crate::contract::{Machine, Measured};
use std::fmt;

/// One change that fits on its own.
#[derive(Clone, Debug, PartialEq)]
pub struct Suggestion {
    pub change: Change,
    /// Value now.
    pub from: u64,
    /// Nearest value that fits.
    pub to: u64,
    /// Bytes that the changed plan needs on the node.
    pub need_bytes: u64,
}

/// Which number to change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// `train.microbatch`: keeps the global batch, so it comes first.
    Microbatch,
    BatchSize,
    ValBatchSize,
    NumWorkers,
    PrefetchFactor,
    /// `data.chunk_cache_size`, bytes.
    ChunkCache,
    /// `--ranks`.
    Ranks,
    /// `memory.budget`, bytes.
    Budget,
}

impl Change {
    fn key(self) -> &'static str {
        match self {
            Self::Microbatch => "train.microbatch",
            Self::BatchSize => "train.batch_size",
            Self::ValBatchSize => "train.val_batch_size",
            Self::NumWorkers => "train.num_workers",
            Self::PrefetchFactor => "train.prefetch_factor",
            Self::ChunkCache => "data.chunk_cache_size",
            Self::Ranks => "--ranks",
            Self::Budget => "memory.budget",
        }
    }

    /// Makes the change.
    pub fn apply(self, value: u64, config: &mut Config, request: &mut Request) {
        let count = usize::try_from(value).unwrap_or(usize::MAX);
        match self {
            Self::Microbatch => config.train.microbatch = Some(count),
            Self::BatchSize => config.train.batch_size = count,
            Self::ValBatchSize => config.train.val_batch_size = Some(count),
            Self::NumWorkers => config.train.num_workers = Some(count),
            Self::PrefetchFactor => config.train.prefetch_factor = count,
            Self::ChunkCache => config.data.chunk_cache_size = value,
            Self::Ranks => request.ranks = Some(count),
            Self::Budget => config.memory.budget = Budget::Bytes(value),
        }
    }
}

impl fmt::Display for Suggestion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let needs = bytes_text(self.need_bytes);
        let key = self.change.key();
        match self.change {
            Change::Ranks => write!(f, "--ranks {} instead of {} (needs {needs})", self.to, self.from),
            Change::Budget => {
                write!(f, "memory.budget: {}MiB instead of {} (needs {needs})", self.to / MIB, bytes_text(self.from))
            }
            Change::Microbatch => {
                write!(f, "{key}: {} instead of {} (needs {needs}; the global batch stays)", self.to, self.from)
            }
            _ => write!(f, "{key}: {} instead of {} (needs {needs})", self.to, self.from),
        }
    }
}

/// Up to this many values are tried one by one; beyond, by bisection.
const TRIED_ONE_BY_ONE: u64 = 2048;

/// All single changes that fit, in the order of [`Change`].
pub(super) fn all(
    config: &Config,
    machine: &Machine,
    measured: &Measured,
    request: &Request,
    refused: &Plan,
) -> Vec<Suggestion> {
    let search = Search { config, machine, measured, request };
    let batch = config.train.batch_size as u64;
    // A pass has no batch but that of evaluation.
    let (micro_batch, batch) = if request.infers { (0, 0) } else { (refused.batch.micro_batch as u64, batch) };
    let val_batch = if request.infers { refused.batch.val_batch } else { config.train.val_batch_size.unwrap_or(0) };
    let lower = [
        (Change::Microbatch, micro_batch, 1),
        (Change::BatchSize, batch, 1),
        (Change::ValBatchSize, val_batch as u64, 1),
        (Change::NumWorkers, refused.loader.threads as u64, 0),
        (Change::PrefetchFactor, config.train.prefetch_factor as u64, 1),
        (Change::ChunkCache, config.data.chunk_cache_size, 0),
        (Change::Ranks, refused.topology.local_world_size as u64, 1),
    ];
    let mut found: Vec<_> =
        lower.iter().filter_map(|(change, from, least)| search.lower(*change, *from, *least)).collect();
    found.extend(search.raise_budget(refused.budget.total_bytes));
    found
}

struct Search<'a> {
    config: &'a Config,
    machine: &'a Machine,
    measured: &'a Measured,
    request: &'a Request,
}

impl Search<'_> {
    /// Least need of the changed plan in bytes if it fits.
    fn need(&self, change: Change, value: u64) -> Option<u64> {
        let (mut config, mut request) = (self.config.clone(), self.request.clone());
        change.apply(value, &mut config, &mut request);
        let plan = draft(&config, self.machine, self.measured, &request).ok()?;
        fits(&plan).then(|| plan.budget.least_bytes())
    }

    /// Largest value below `from`, and not below `least`, that fits.
    fn lower(&self, change: Change, from: u64, least: u64) -> Option<Suggestion> {
        if from <= least {
            return None;
        }
        let to = if from - least <= TRIED_ONE_BY_ONE {
            (least..from).rev().find(|value| self.need(change, *value).is_some())?
        } else {
            // Need falls with the value: `low` fits, `high` does not.
            self.need(change, least)?;
            let (mut low, mut high) = (least, from);
            while high - low > 1 {
                let middle = low + (high - low) / 2;
                if self.need(change, middle).is_some() { low = middle } else { high = middle }
            }
            low
        };
        Some(Suggestion { change, from, to, need_bytes: self.need(change, to)? })
    }

    /// Smallest budget in whole MiB that fits, up to what the machine has free: beyond, each byte of budget is a byte
    /// that others use already.
    fn raise_budget(&self, now_bytes: u64) -> Option<Suggestion> {
        let free = self.machine.memory_available_bytes.min(self.machine.cgroup_room_bytes.unwrap_or(u64::MAX));
        let most = self.machine.memory_bytes().min(free) / MIB;
        let (mut low, mut high) = (now_bytes / MIB, most);
        let need = |mib: u64| self.need(Change::Budget, mib.saturating_mul(MIB));
        if high <= low || need(high).is_none() {
            return None;
        }
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if need(middle).is_some() { high = middle } else { low = middle }
        }
        Some(Suggestion { change: Change::Budget, from: now_bytes, to: high * MIB, need_bytes: need(high)? })
    }
}
