//! Probes of this machine: facts, no decisions.

use serde::{Deserialize, Serialize};

/// What the planner needs to know of a node. Bytes throughout.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Cores this process may run on (affinity and cgroup quota).
    pub cores: usize,
    /// `MemTotal`.
    pub memory_total_bytes: u64,
    /// `MemAvailable`.
    pub memory_available_bytes: u64,
    pub swap_total_bytes: u64,
    /// Tightest memory limit of this process's cgroup and its ancestors; absent: none.
    pub cgroup_limit_bytes: Option<u64>,
    /// Bytes in use in the cgroup that sets the limit, page cache that can be reclaimed left out.
    pub cgroup_used_bytes: Option<u64>,
    /// 1 or 2; absent: no memory controller found.
    pub cgroup_version: Option<u32>,
    /// Size of a page, bytes.
    pub page_bytes: u64,
    pub gpus: Vec<Gpu>,
    /// Why no GPU is usable although a driver is present; absent: none was tried or all is well.
    pub gpu_note: Option<String>,
    pub numa_nodes: usize,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Gpu {
    pub index: u32,
    pub name: String,
    pub memory_total_bytes: u64,
    pub memory_free_bytes: u64,
}
