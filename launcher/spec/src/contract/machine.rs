//! Facts on a machine and on a data set, as the launcher found them.

use serde::{Deserialize, Serialize};

/// Facts on a node that the planner needs. Bytes throughout.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Cores this process may run on (affinity and cgroup quota).
    pub cores: usize,
    /// `MemTotal`.
    pub memory_total_bytes: u64,
    /// `MemAvailable`.
    pub memory_available_bytes: u64,
    pub swap_total_bytes: u64,
    /// Tightest memory limit of this process's cgroup and its ancestors. `None` means no limit.
    pub cgroup_limit_bytes: Option<u64>,
    /// Bytes in use in the cgroup that sets the limit, page cache that can be reclaimed left out.
    pub cgroup_used_bytes: Option<u64>,
    /// Least room (limit less use) over this cgroup and its ancestors: siblings may fill an ancestor whose limit is not
    /// the tightest. `None` means no limit.
    #[serde(default)]
    pub cgroup_room_bytes: Option<u64>,
    /// 1 or 2. `None` means that no memory controller was found.
    pub cgroup_version: Option<u32>,
    /// Size of a page, bytes.
    pub page_bytes: u64,
    pub gpus: Vec<Gpu>,
    /// Reason why no GPU is usable although a driver is present. `None` means that no driver was found or all GPUs
    /// work.
    pub gpu_note: Option<String>,
    pub numa_nodes: usize,
    /// Free bytes of the tmpfs at `/dev/shm`. `None` means that it is not mounted. It does not bound a memfd: see
    /// [`Machine::memfd_room_bytes`].
    #[serde(default)]
    pub shm_room_bytes: Option<u64>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Gpu {
    pub index: u32,
    pub name: String,
    pub memory_total_bytes: u64,
    pub memory_free_bytes: u64,
}

impl Machine {
    /// Smaller of physical memory and cgroup limit, bytes; 0: unknown.
    pub fn memory_bytes(&self) -> u64 {
        match (self.memory_total_bytes, self.cgroup_limit_bytes) {
            (0, limit) => limit.unwrap_or(0),
            (total, limit) => total.min(limit.unwrap_or(u64::MAX)),
        }
    }

    /// Bytes that a new memfd could hold now. Its pages are shared memory on the kernel's own mount: no tmpfs size
    /// bounds them, but they count against `MemAvailable` and the cgroup of whoever touches them first, and without
    /// swap they cannot be reclaimed.
    pub fn memfd_room_bytes(&self) -> u64 {
        self.memory_available_bytes.min(self.cgroup_room_bytes.unwrap_or(u64::MAX))
    }
}

/// Facts on a data set that need no knowledge of its format.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatasetFacts {
    /// Something is at the path, even if it holds no file.
    pub exists: bool,
    pub files: usize,
    pub bytes: u64,
    /// Checksum of the path and of every file's name, size and time of change: a file that comes, goes or changes gives
    /// another one.
    pub digest: u64,
}
