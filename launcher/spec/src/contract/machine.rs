//! Facts on a machine and on a data set, as the launcher found them.

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
    /// Least room (limit less use) over this cgroup and its ancestors: siblings may fill an ancestor whose limit is not
    /// the tightest. Absent: no limit.
    #[serde(default)]
    pub cgroup_room_bytes: Option<u64>,
    /// 1 or 2; absent: no memory controller found.
    pub cgroup_version: Option<u32>,
    /// Size of a page, bytes.
    pub page_bytes: u64,
    pub gpus: Vec<Gpu>,
    /// Why no GPU is usable although a driver is present; absent: none was tried or all is well.
    pub gpu_note: Option<String>,
    pub numa_nodes: usize,
    /// Free bytes of the tmpfs at `/dev/shm`; absent: not mounted. A memfd is not bound by it: see
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

/// Facts on a data set. Bytes are those on disk, compressed where files are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatasetFacts {
    /// Something is at the path, be it without recordings.
    pub exists: bool,
    /// Files `.h5` and `.hdf5`.
    pub files: usize,
    pub bytes: u64,
    pub largest_file_bytes: u64,
    /// Pictures and what belongs to them.
    #[serde(default)]
    pub frames: FrameFacts,
}

/// Facts on a data set of pictures with a spike camera's streams.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrameFacts {
    /// Files `.png`, `.jpg` and `.jpeg`.
    pub images: usize,
    /// Rows and columns by the header of one `.png`; 0: there is none.
    pub height: usize,
    pub width: usize,
    /// Files `.dat`, and the size of the largest.
    pub spike_files: usize,
    pub spike_file_bytes: u64,
    /// One of them begins with zeros and ones alone, and holds a one: a byte per spike, not a bit.
    pub spikes_are_bytes: bool,
    /// Files `.npy`, all together.
    pub voxel_bytes: u64,
}

impl DatasetFacts {
    /// No file of any task's data is there.
    pub fn is_empty(&self) -> bool {
        self.files == 0 && self.bytes == 0 && self.frames.images == 0
    }
}
