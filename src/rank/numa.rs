//! The cores next to a rank's GPU.
//!
//! On a machine of several memory nodes a copy from the wrong node's memory crosses the link between processors, at a part of
//! the rate. Memory lies on the node of the thread that touches it first: a rank's threads are bound to the cores of its
//! GPU's node before the loader touches a slot.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::path::Path;

/// Binds this thread, and those that it starts from here on, to the cores next to the device at `bus_id`, as far as the
/// process may use them. Returns a line where that changed anything.
pub fn bind(bus_id: &str) -> Option<String> {
    let (node, cores) = cores_of(Path::new("/sys"), bus_id)?;
    let allowed = sched_getaffinity(None).ok()?;
    let mut own = CpuSet::new();
    cores.iter().filter(|&&core| allowed.is_set(core)).for_each(|&core| own.set(core));
    if own.count() == 0 || own.count() == allowed.count() {
        return None;
    }
    sched_setaffinity(None, &own).ok()?;
    Some(format!("bound to the {} cores of memory node {node}, next to the GPU at {bus_id}", own.count()))
}

/// Memory node of the device and the node's cores; `None` where there is one node or none is known.
fn cores_of(sys: &Path, bus_id: &str) -> Option<(usize, Vec<usize>)> {
    let read = |path: String| std::fs::read_to_string(sys.join(path)).ok();
    // -1: the machine does not say.
    let node: usize = read(format!("bus/pci/devices/{bus_id}/numa_node"))?.trim().parse().ok()?;
    let list = read(format!("devices/system/node/node{node}/cpulist"))?;
    Some((node, cores_in(list.trim())?))
}

/// Reads `0-3,8`.
fn cores_in(list: &str) -> Option<Vec<usize>> {
    let mut cores = Vec::new();
    for part in list.split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        cores.extend(first.parse::<usize>().ok()?..=last.parse().ok()?);
    }
    Some(cores.into_iter().filter(|&core| core < CpuSet::MAX_CPU).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_next_to_a_device_are_found_in_sysfs() {
        let sys = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = sys.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("bus/pci/devices/0000:3b:00.0/numa_node", "1\n");
        write("bus/pci/devices/0000:01:00.0/numa_node", "-1\n");
        write("devices/system/node/node1/cpulist", "4-6,12\n");
        assert_eq!(cores_of(sys.path(), "0000:3b:00.0"), Some((1, vec![4, 5, 6, 12])));
        assert_eq!(cores_of(sys.path(), "0000:01:00.0"), None, "the machine does not say");
        assert_eq!(cores_of(sys.path(), "0000:02:00.0"), None);
    }

    #[test]
    fn lists_of_cores_are_read() {
        assert_eq!(cores_in("0-2,5"), Some(vec![0, 1, 2, 5]));
        assert_eq!(cores_in(""), Some(vec![]));
        assert_eq!(cores_in("a-b"), None);
    }
}
