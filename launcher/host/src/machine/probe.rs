//! Facts from `/proc` and `/sys`, below a root that tests replace.

use super::{Machine, cgroup};
use crate::disk::free_disk_bytes;
use rustix::thread::sched_getaffinity;
use std::path::PathBuf;

/// Where to look: `/` on a machine, a fixture tree in tests.
#[derive(Clone, Debug)]
pub struct Probe {
    pub root: PathBuf,
}

impl Default for Probe {
    fn default() -> Self {
        Self { root: "/".into() }
    }
}

impl Probe {
    /// Everything but GPUs. What cannot be read is zero or absent; `cores` is at least 1.
    pub fn machine(&self) -> Machine {
        let members = cgroup::parse_memberships(&self.text("proc/self/cgroup"));
        let mounts = cgroup::parse_mounts(&self.text("proc/self/mountinfo"));
        let memory = cgroup::memory_limit(&self.root, &members, &mounts);
        let quota = cgroup::cpu_quota(&self.root, &members, &mounts);
        let meminfo = self.text("proc/meminfo");
        let bytes = |key| meminfo_bytes(&meminfo, key).unwrap_or(0);
        // Kernels before 3.14, and some sandboxes, have no MemAvailable.
        let estimate = bytes("MemFree").saturating_add(bytes("Cached"));
        Machine {
            cores: affinity_cores().min(quota.unwrap_or(usize::MAX)).max(1),
            memory_total_bytes: bytes("MemTotal"),
            memory_available_bytes: meminfo_bytes(&meminfo, "MemAvailable").unwrap_or(estimate),
            swap_total_bytes: bytes("SwapTotal"),
            cgroup_limit_bytes: memory.limit_bytes,
            cgroup_used_bytes: memory.used_bytes,
            cgroup_room_bytes: memory.room_bytes,
            cgroup_version: memory.version,
            page_bytes: rustix::param::page_size() as u64,
            gpus: Vec::new(),
            gpu_note: None,
            numa_nodes: self.numa_nodes().max(1),
            shm_room_bytes: Some(self.root.join("dev/shm"))
                .filter(|shm| shm.is_dir())
                .and_then(|shm| free_disk_bytes(&shm)),
        }
    }

    /// Folder of this process's memory cgroup, and the version. `None` means that no memory controller can be seen.
    pub fn memory_group(&self) -> Option<(u32, PathBuf)> {
        let members = cgroup::parse_memberships(&self.text("proc/self/cgroup"));
        let mounts = cgroup::parse_mounts(&self.text("proc/self/mountinfo"));
        let (version, folders) = cgroup::memory_groups(&self.root, &members, &mounts)?;
        folders.into_iter().next().map(|own| (version, own))
    }

    /// Folders `node<N>` of sysfs.
    fn numa_nodes(&self) -> usize {
        let Ok(entries) = std::fs::read_dir(self.root.join("sys/devices/system/node")) else {
            return 0;
        };
        let is_node = |name: &str| name.strip_prefix("node").is_some_and(|n| n.parse::<u32>().is_ok());
        entries.flatten().filter(|entry| entry.file_name().to_str().is_some_and(is_node)).count()
    }

    pub(super) fn text(&self, path: &str) -> String {
        std::fs::read_to_string(self.root.join(path)).unwrap_or_default()
    }
}

/// Cores of this process's affinity mask.
fn affinity_cores() -> usize {
    let counted = sched_getaffinity(None).map(|set| set.count() as usize);
    // The mask is shorter than some machines have cores; the standard library then knows better.
    counted.unwrap_or_else(|_| std::thread::available_parallelism().map_or(1, |n| n.get()))
}

/// `Key:  123 kB` in bytes; the file's kB are KiB.
pub(super) fn meminfo_bytes(text: &str, key: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok()?.checked_mul(1024)
}
