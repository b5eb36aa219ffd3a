//! Memory of the node as it is now, read again and again: the places are found once.

use super::cgroup::{self, Membership, Mount};
use super::probe::{Probe, meminfo_bytes};
use std::path::{Path, PathBuf};

/// Memory of the node at one moment. Bytes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MemoryNow {
    pub total_bytes: u64,
    pub available_bytes: u64,
    /// Kernel's file cache without shared memory.
    pub file_cache_bytes: u64,
    /// The group with the least room. `None` means no memory controller.
    pub group: Option<GroupNow>,
    pub pressure: Option<Pressure>,
    /// Processes that the kernel killed for memory since boot, in any group.
    pub oom_kills: u64,
}

/// One memory cgroup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GroupNow {
    pub version: u32,
    /// File cache that can be reclaimed left out.
    pub used_bytes: u64,
    pub limit_bytes: Option<u64>,
    /// Counted over all groups that are looked at.
    pub oom_kills: u64,
    pub high_events: u64,
    pub max_events: u64,
}

/// PSI: share of the last ten seconds, percent, in which some (all) tasks waited for memory.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pressure {
    pub some_avg10: f64,
    pub full_avg10: f64,
}

/// Reads [`MemoryNow`], a handful of small files each time.
#[derive(Clone, Debug)]
pub struct MemoryMeter {
    root: PathBuf,
    version: u32,
    /// Groups that bind this process, its own first.
    groups: Vec<PathBuf>,
    /// A group below the own one, whose kills v1 counts apart.
    child: Option<PathBuf>,
    pressure: Option<PathBuf>,
}

impl MemoryMeter {
    /// `child`: a memory cgroup that was made for the job.
    pub fn new(probe: &Probe, child: Option<&Path>) -> Self {
        let members: Vec<Membership> = cgroup::parse_memberships(&probe.text("proc/self/cgroup"));
        let mounts: Vec<Mount> = cgroup::parse_mounts(&probe.text("proc/self/mountinfo"));
        let (version, groups) = cgroup::memory_groups(&probe.root, &members, &mounts).unwrap_or_default();
        let of_group = groups.first().map(|own| own.join("memory.pressure"));
        let of_system = Some(probe.root.join("proc/pressure/memory"));
        let pressure = [of_group, of_system].into_iter().flatten().find(|path| path.is_file());
        Self { root: probe.root.clone(), version, groups, child: child.map(Path::to_owned), pressure }
    }

    /// Unreadable values are zero or `None`.
    pub fn read(&self) -> MemoryNow {
        let text = |path: &str| std::fs::read_to_string(self.root.join(path)).unwrap_or_default();
        let meminfo = text("proc/meminfo");
        let bytes = |key| meminfo_bytes(&meminfo, key).unwrap_or(0);
        let pressure = self.pressure.as_ref().and_then(|path| std::fs::read_to_string(path).ok());
        MemoryNow {
            total_bytes: bytes("MemTotal"),
            available_bytes: meminfo_bytes(&meminfo, "MemAvailable").unwrap_or(bytes("MemFree") + bytes("Cached")),
            file_cache_bytes: (bytes("Cached") + bytes("Buffers")).saturating_sub(bytes("Shmem")),
            group: self.group(),
            pressure: pressure.as_deref().map(parse_pressure),
            oom_kills: cgroup::stat(&text("proc/vmstat"), "oom_kill").unwrap_or(0),
        }
    }

    fn group(&self) -> Option<GroupNow> {
        let own = self.groups.first()?;
        let bound = |folder: &PathBuf| {
            let limit = cgroup::limit_bytes(folder, self.version)?;
            Some((limit, cgroup::used_bytes(folder, self.version)))
        };
        let bounds = self.groups.iter().filter_map(bound);
        let tightest = bounds.min_by_key(|(limit, used)| limit.saturating_sub(*used));
        let looked_at = || self.child.iter().chain([own]);
        let count = |v1: &str, key: Option<&str>, v2: &str| {
            looked_at().map(|folder| event(folder, self.version, (v1, key), v2)).sum::<u64>()
        };
        Some(GroupNow {
            version: self.version,
            used_bytes: tightest.map_or_else(|| cgroup::used_bytes(own, self.version), |(_, used)| used),
            limit_bytes: tightest.map(|(limit, _)| limit),
            oom_kills: count("memory.oom_control", Some("oom_kill"), "oom_kill"),
            high_events: count("", None, "high"),
            max_events: count("memory.failcnt", None, "max"),
        })
    }
}

/// An event counter: a file of v1, with a key in it or a plain number, or a key of v2's `memory.events`.
fn event(folder: &Path, version: u32, (file, key): (&str, Option<&str>), v2: &str) -> u64 {
    let found = match (version, key) {
        (2, _) => cgroup::stat(&cgroup::read(folder, "memory.events"), v2),
        (_, _) if file.is_empty() => None,
        (_, Some(key)) => cgroup::stat(&cgroup::read(folder, file), key),
        (_, None) => cgroup::read(folder, file).trim().parse().ok(),
    };
    found.unwrap_or(0)
}

/// `some avg10=0.00 avg60=… total=…` and the same for `full`.
fn parse_pressure(text: &str) -> Pressure {
    let of = |kind: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(kind))?;
        line.split_whitespace().find_map(|word| word.strip_prefix("avg10=")?.parse().ok())
    };
    Pressure { some_avg10: of("some ").unwrap_or(0.0), full_avg10: of("full ").unwrap_or(0.0) }
}
