//! A memory cgroup for the ranks, where one may be made: the kernel then reclaims or slows them at the budget, and what
//! ends them, if anything, is their own limit and not the node's choice of a process to kill.

use super::cgroup::Cgroup;
use host::machine::Probe;
use std::fs;
use std::path::{Path, PathBuf};

/// Limits of the ranks together, bytes. The page cache's pages are the launcher's and do not count here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Reclaimed and slowed above (v2 `memory.high`, v1 `memory.soft_limit_in_bytes`).
    pub high_bytes: u64,
    /// Never above (v2 `memory.max`, v1 `memory.limit_in_bytes`).
    pub max_bytes: u64,
}

/// The group, and its folder for the meter.
pub struct MemoryGroup {
    pub cgroup: Cgroup,
    pub dir: PathBuf,
}

/// Checks that ranks can have a memory cgroup here.
///
/// # Errors
/// The reason why not, in words. A system without memory cgroups is no error: there, nobody can have one.
pub fn may_limit() -> Result<(), String> {
    if Probe::default().memory_group().is_none() {
        return Ok(());
    }
    // No number of bytes is above it.
    let none = i64::MAX as u64 / 4096 * 4096;
    let made = MemoryGroup::make(Limits { high_bytes: none, max_bytes: none })?;
    made.cgroup.end(100);
    Ok(())
}

impl MemoryGroup {
    /// # Errors
    /// The reason, in words.
    pub fn make(limits: Limits) -> Result<Self, String> {
        let (version, own) = Probe::default().memory_group().ok_or("this system shows no memory cgroup")?;
        Self::make_below(&own, version, limits)
    }

    fn make_below(own: &Path, version: u32, limits: Limits) -> Result<Self, String> {
        let refused = |what: &'static str| {
            let shown = own.display();
            move |e: std::io::Error| format!("{shown} may not be {what} ({e})")
        };
        if version == 2 {
            // Children have the controller only where the parent passes it on; it may not while it holds processes.
            let passed = own.join("cgroup.subtree_control");
            let has = fs::read_to_string(&passed).unwrap_or_default().split_whitespace().any(|c| c == "memory");
            if !has {
                fs::write(&passed, "+memory").map_err(refused("divided"))?;
            }
        }
        let (cgroup, dir) = Cgroup::make_in(own).map_err(refused("divided"))?;
        let files = match version {
            2 => [("memory.high", limits.high_bytes), ("memory.max", limits.max_bytes)],
            _ => [("memory.soft_limit_in_bytes", limits.high_bytes), ("memory.limit_in_bytes", limits.max_bytes)],
        };
        for (file, bytes) in files {
            if let Err(e) = fs::write(dir.join(file), bytes.to_string()) {
                cgroup.end(1);
                return Err(refused("limited")(e));
            }
        }
        if version == 2 {
            // At its limit the job ends whole, not a rank at a time; kernels before 4.19 do without.
            let _ = fs::write(dir.join("memory.oom.group"), "1");
        }
        Ok(Self { cgroup, dir })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { high_bytes: 1 << 30, max_bytes: 5 << 28 };

    /// Where this machine permits it: limits are in place, a member is charged there, and nothing is left.
    #[test]
    fn a_group_has_its_limits_and_leaves_nothing() {
        let made = match MemoryGroup::make(LIMITS) {
            Ok(made) => made,
            Err(why) => return println!("no memory cgroup here: {why}"),
        };
        let text = |file: &str| fs::read_to_string(made.dir.join(file)).unwrap_or_default();
        let all = text("memory.max") + &text("memory.limit_in_bytes");
        assert_eq!(all.trim(), LIMITS.max_bytes.to_string());
        let soft = text("memory.high") + &text("memory.soft_limit_in_bytes");
        assert_eq!(soft.trim(), LIMITS.high_bytes.to_string());
        assert!(made.cgroup.open_procs().is_ok());
        assert!(made.cgroup.end(1000) && !made.dir.exists());
    }

    #[test]
    fn what_is_not_permitted_is_said_with_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let why = MemoryGroup::make_below(&folder.path().join("none"), 1, LIMITS).err().unwrap();
        assert!(why.contains("may not be divided") && why.contains("none"), "{why}");
    }
}
