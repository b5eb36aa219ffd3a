//! Control groups, v1, v2 and both at once (hybrid): memory limits and CPU quotas that bind this process.
//!
//! A process is in one group per hierarchy (`/proc/self/cgroup`); `/proc/self/mountinfo` shows where a hierarchy is
//! mounted. Every ancestor binds too, so each look-up walks from the own group up to the mount point.

use std::path::{Component, Path, PathBuf};

/// At and above this a v1 limit means none: the kernel writes `i64::MAX` cut to whole pages.
const V1_UNLIMITED_BYTES: u64 = 1 << 62;

/// One line of `/proc/self/cgroup`: no controllers for the v2 hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Membership {
    pub controllers: Vec<String>,
    pub path: String,
    pub version: u32,
}

/// One cgroup mount of `/proc/self/mountinfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mount {
    /// Which group of the hierarchy shows at the mount point; containers mount their own group.
    pub root: String,
    pub point: PathBuf,
    pub version: u32,
    /// Super options; v1 names its controllers here.
    pub options: Vec<String>,
}

/// Limits on this process's memory. Bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct MemoryLimit {
    pub version: Option<u32>,
    pub limit_bytes: Option<u64>,
    pub used_bytes: Option<u64>,
    pub room_bytes: Option<u64>,
}

/// Lines `hierarchy:controllers:path`; a path may hold colons.
pub(super) fn parse_memberships(text: &str) -> Vec<Membership> {
    let parse = |line: &str| {
        let mut parts = line.splitn(3, ':');
        let (id, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        let controllers: Vec<_> = controllers.split(',').filter(|c| !c.is_empty()).map(str::to_owned).collect();
        let version = if id == "0" && controllers.is_empty() { 2 } else { 1 };
        Some(Membership { controllers, path: path.to_owned(), version })
    };
    text.lines().filter_map(parse).collect()
}

/// Fields: id, parent, device, root, mount point, options, optional fields, `-`, type, source, super options (proc(5)).
pub(super) fn parse_mounts(text: &str) -> Vec<Mount> {
    let parse = |line: &str| {
        let (front, back) = line.split_once(" - ")?;
        let mut front = front.split(' ').skip(3);
        let (root, point) = (unescape(front.next()?), unescape(front.next()?));
        let mut back = back.split(' ');
        let version = match back.next()? {
            "cgroup" => 1,
            "cgroup2" => 2,
            _ => return None,
        };
        let options = back.nth(1).unwrap_or("").split(',').map(str::to_owned).collect();
        Some(Mount { root, point: point.into(), version, options })
    };
    text.lines().filter_map(parse).collect()
}

/// Undoes mountinfo's octal escapes of blank, tab, newline and backslash.
fn unescape(text: &str) -> String {
    let escapes = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    escapes.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

/// Folders of the own group and all its visible ancestors, own group first; empty: the hierarchy is not mounted.
///
/// In a container the path of `/proc/self/cgroup` may lie outside of what is mounted (it is the host's path, or begins
/// with `/..` in a cgroup namespace): then the mount point itself is the nearest group that can be seen.
fn chain(root: &Path, mounts: &[&Mount], path: &str) -> Vec<PathBuf> {
    let inside = |mount: &&&Mount| relative(&mount.root, path).is_some();
    let Some(mount) = mounts.iter().find(inside).or(mounts.first()) else {
        return Vec::new();
    };
    let point = under(root, &mount.point);
    let mut folder = point.join(relative(&mount.root, path).unwrap_or_default());
    let mut folders = Vec::new();
    while folder.starts_with(&point) {
        if folder.is_dir() {
            folders.push(folder.clone());
        }
        if !folder.pop() {
            break;
        }
    }
    folders
}

/// `path` below the mount's root; `None`: outside.
fn relative(mount_root: &str, path: &str) -> Option<PathBuf> {
    let rest = Path::new(path).strip_prefix(mount_root).ok()?;
    let plain = rest.components().all(|part| matches!(part, Component::Normal(_)));
    plain.then(|| rest.to_owned())
}

/// An absolute path of the machine, below a (fixture) root.
pub(super) fn under(root: &Path, absolute: &Path) -> PathBuf {
    root.join(absolute.strip_prefix("/").unwrap_or(absolute))
}

/// Folders of the hierarchy that has `controller`; v1 wins where both are mounted, since a controller is in one only.
fn controller_chain(
    root: &Path,
    members: &[Membership],
    mounts: &[Mount],
    controller: &str,
) -> Option<(u32, Vec<PathBuf>)> {
    let has = |names: &[String]| names.iter().any(|name| name == controller);
    let v1: Vec<_> = mounts.iter().filter(|m| m.version == 1 && has(&m.options)).collect();
    if let Some(member) = members.iter().find(|m| m.version == 1 && has(&m.controllers)).filter(|_| !v1.is_empty()) {
        return Some((1, chain(root, &v1, &member.path)));
    }
    let v2: Vec<_> = mounts.iter().filter(|m| m.version == 2).collect();
    let member = members.iter().find(|m| m.version == 2)?;
    let folders = chain(root, &v2, &member.path);
    // A hybrid mount has a v2 hierarchy without this controller.
    let listed =
        |folder: &PathBuf| read(folder, "cgroup.controllers").split_whitespace().any(|name| name == controller);
    folders.iter().any(listed).then_some((2, folders))
}

/// Tightest limit over the own group and its ancestors.
pub(super) fn memory_limit(root: &Path, members: &[Membership], mounts: &[Mount]) -> MemoryLimit {
    let Some((version, folders)) = controller_chain(root, members, mounts, "memory") else {
        return MemoryLimit::default();
    };
    let bound = |folder: &PathBuf| {
        let limit = limit_bytes(folder, version)?;
        Some((limit, used_bytes(folder, version)))
    };
    let mut bounds: Vec<(u64, u64)> = folders.iter().filter_map(bound).collect();
    // One that a visible group states itself is not hidden, and its use is known.
    let hidden = hidden_v1_limit(&folders, version);
    bounds.extend(hidden.filter(|(hidden, _)| bounds.iter().all(|(limit, _)| hidden < limit)));
    let tightest = bounds.iter().min_by_key(|(limit, _)| *limit);
    MemoryLimit {
        version: Some(version),
        limit_bytes: tightest.map(|(limit, _)| *limit),
        used_bytes: tightest.map(|(_, used)| *used),
        room_bytes: bounds.iter().map(|(limit, used)| limit.saturating_sub(*used)).min(),
    }
}

/// Version and folders of the groups that bind this process's memory, own first.
pub(super) fn memory_groups(root: &Path, members: &[Membership], mounts: &[Mount]) -> Option<(u32, Vec<PathBuf>)> {
    controller_chain(root, members, mounts, "memory").filter(|(_, folders)| !folders.is_empty())
}

/// Limit of one group. `None` means no limit.
pub(super) fn limit_bytes(folder: &Path, version: u32) -> Option<u64> {
    if version == 1 { v1_limit(folder) } else { v2_limit(folder) }
}

fn v1_limit(folder: &Path) -> Option<u64> {
    number(&read(folder, "memory.limit_in_bytes")).filter(|limit| *limit < V1_UNLIMITED_BYTES)
}

/// `memory.high` binds as `memory.max` does: above it the kernel stalls every allocation.
fn v2_limit(folder: &Path) -> Option<u64> {
    let of = |name| number(&read(folder, name));
    [of("memory.max"), of("memory.high")].into_iter().flatten().min()
}

/// v1 also states the tightest limit over *all* ancestors, those above a container's mount included; their use
/// cannot be seen, so the topmost visible group's stands in.
fn hidden_v1_limit(folders: &[PathBuf], version: u32) -> Option<(u64, u64)> {
    let (own, top) = (folders.first()?, folders.last()?);
    let limit = stat(&read(own, "memory.stat"), "hierarchical_memory_limit")?;
    (version == 1 && limit < V1_UNLIMITED_BYTES).then(|| (limit, used_bytes(top, version)))
}

/// Use less file cache. Shared memory (memfd, tmpfs) is no file cache: it sits in the anon lists.
pub(super) fn used_bytes(folder: &Path, version: u32) -> u64 {
    let (file, prefix) = if version == 1 { ("memory.usage_in_bytes", "total_") } else { ("memory.current", "") };
    let statistics = read(folder, "memory.stat");
    let list = |name: &str| stat(&statistics, &format!("{prefix}{name}")).unwrap_or(0);
    let cached = list("active_file").saturating_add(list("inactive_file"));
    number(&read(folder, file)).unwrap_or(0).saturating_sub(cached)
}

/// Whole cores that the tightest CPU quota grants, at least 1. `None` means no quota.
pub(super) fn cpu_quota(root: &Path, members: &[Membership], mounts: &[Mount]) -> Option<usize> {
    let (version, folders) = controller_chain(root, members, mounts, "cpu")?;
    let quota = |folder: &PathBuf| {
        let (quota, period) = match version {
            1 => (number(&read(folder, "cpu.cfs_quota_us")), number(&read(folder, "cpu.cfs_period_us"))),
            _ => {
                let text = read(folder, "cpu.max");
                let mut words = text.split_whitespace();
                (words.next().and_then(number), words.next().and_then(number))
            }
        };
        let cores = quota?.checked_div(period.unwrap_or(100_000))?;
        usize::try_from(cores.max(1)).ok()
    };
    folders.iter().filter_map(quota).min()
}

/// `name value` in a flat-keyed file.
pub(super) fn stat(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ').and_then(number))
}

/// `max` and `-1`, which mean none, are no numbers.
fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

pub(super) fn read(folder: &Path, name: &str) -> String {
    std::fs::read_to_string(folder.join(name)).unwrap_or_default()
}
