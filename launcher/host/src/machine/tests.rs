//! Probes on fixture trees: cgroup v1, v2, hybrid, nested, containers.

use super::*;
use std::path::Path;

const GIB: u64 = 1 << 30;
const UNLIMITED: &str = "9223372036854771712\n";
const MEMINFO: &str = "MemTotal:       16777216 kB\nMemFree:         4194304 kB\nMemAvailable:    8388608 kB\n\
                       Cached:          2097152 kB\nSwapTotal:       1048576 kB\nHugePages_Total:       0\n";

/// Writes `path → text` below a new root.
fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let path = root.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    root
}

fn machine(root: &Path) -> Machine {
    Probe { root: root.to_owned() }.machine()
}

const V1_MOUNTS: &str = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
                         35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n";
const V1_GROUPS: &str = "4:memory:/batch/job\n2:cpu,cpuacct:/batch\n1:name=systemd:/\n";
const V2_MOUNT: &str = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";

#[test]
fn v1_takes_the_tightest_ancestor_and_leaves_file_cache_out() {
    let root = tree(&[
        ("proc/meminfo", MEMINFO),
        ("proc/self/cgroup", V1_GROUPS),
        ("proc/self/mountinfo", V1_MOUNTS),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", UNLIMITED),
        ("sys/fs/cgroup/memory/batch/memory.limit_in_bytes", "4294967296\n"),
        ("sys/fs/cgroup/memory/batch/memory.usage_in_bytes", "3221225472\n"),
        (
            "sys/fs/cgroup/memory/batch/memory.stat",
            "inactive_file 5\ntotal_inactive_file 1073741824\ntotal_active_file 1048576\n",
        ),
        ("sys/fs/cgroup/memory/batch/job/memory.limit_in_bytes", UNLIMITED),
    ]);
    let machine = machine(root.path());
    let used = 2 * GIB - (1 << 20);
    assert_eq!((machine.cgroup_version, machine.cgroup_limit_bytes), (Some(1), Some(4 * GIB)));
    assert_eq!((machine.cgroup_used_bytes, machine.cgroup_room_bytes), (Some(used), Some(4 * GIB - used)));
    assert_eq!(machine.memory_bytes(), 4 * GIB);
    assert_eq!(machine.memfd_room_bytes(), 4 * GIB - used);
}

#[test]
fn v1_without_any_limit_has_none() {
    let root = tree(&[
        ("proc/meminfo", MEMINFO),
        ("proc/self/cgroup", V1_GROUPS),
        ("proc/self/mountinfo", V1_MOUNTS),
        ("sys/fs/cgroup/memory/batch/job/memory.limit_in_bytes", UNLIMITED),
        ("sys/fs/cgroup/memory/batch/job/memory.stat", "hierarchical_memory_limit 9223372036854771712\n"),
    ]);
    let machine = machine(root.path());
    assert_eq!((machine.cgroup_version, machine.cgroup_limit_bytes, machine.cgroup_room_bytes), (Some(1), None, None));
    assert_eq!(machine.memory_bytes(), 16 * GIB);
}

#[test]
fn v1_sees_the_limit_of_an_ancestor_above_a_containers_mount() {
    let root = tree(&[
        ("proc/self/cgroup", "4:memory:/docker/abc\n"),
        ("proc/self/mountinfo", "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", UNLIMITED),
        ("sys/fs/cgroup/memory/memory.usage_in_bytes", "1024\n"),
        ("sys/fs/cgroup/memory/memory.stat", "hierarchical_memory_limit 2147483648\n"),
    ]);
    let machine = machine(root.path());
    assert_eq!((machine.cgroup_limit_bytes, machine.cgroup_used_bytes), (Some(2 * GIB), Some(1024)));
}

#[test]
fn v2_nested_limits_room_and_quota() {
    let root = tree(&[
        ("proc/self/cgroup", "0::/user/run\n"),
        ("proc/self/mountinfo", V2_MOUNT),
        ("sys/fs/cgroup/cgroup.controllers", "cpu memory pids\n"),
        ("sys/fs/cgroup/user/memory.max", "10737418240\n"),
        ("sys/fs/cgroup/user/memory.current", "10200547328\n"),
        ("sys/fs/cgroup/user/cpu.max", "100000 100000\n"),
        ("sys/fs/cgroup/user/run/memory.max", "8589934592\n"),
        ("sys/fs/cgroup/user/run/memory.current", "2147483648\n"),
        ("sys/fs/cgroup/user/run/memory.stat", "anon 7\nactive_file 1000\ninactive_file 73741824\n"),
        ("sys/fs/cgroup/user/run/cpu.max", "max 100000\n"),
    ]);
    let machine = machine(root.path());
    assert_eq!((machine.cgroup_version, machine.cgroup_limit_bytes), (Some(2), Some(8 * GIB)));
    assert_eq!(machine.cgroup_used_bytes, Some(2 * GIB - 73_742_824));
    // The ancestor's siblings leave 512 MiB, less than the own limit does.
    assert_eq!(machine.cgroup_room_bytes, Some(512 << 20));
    assert_eq!(machine.cores, 1);
}

#[test]
fn v2_high_binds_like_max() {
    let root = tree(&[
        ("proc/self/cgroup", "0::/\n"),
        ("proc/self/mountinfo", V2_MOUNT),
        ("sys/fs/cgroup/cgroup.controllers", "memory\n"),
        ("sys/fs/cgroup/memory.max", "max\n"),
        ("sys/fs/cgroup/memory.high", "1073741824\n"),
    ]);
    assert_eq!(machine(root.path()).cgroup_limit_bytes, Some(GIB));
}

#[test]
fn v2_container_whose_path_lies_outside_of_the_mount() {
    for path in ["0::/../../host.slice/job\n", "0::/kubepods/pod1/c1\n"] {
        let root = tree(&[
            ("proc/self/cgroup", path),
            ("proc/self/mountinfo", "30 23 0:26 /kubepods/pod2 /sys/fs/cgroup ro - cgroup2 cgroup rw\n"),
            ("sys/fs/cgroup/cgroup.controllers", "cpu memory\n"),
            ("sys/fs/cgroup/memory.max", "3221225472\n"),
        ]);
        assert_eq!(machine(root.path()).cgroup_limit_bytes, Some(3 * GIB), "{path}");
    }
}

#[test]
fn a_group_that_is_not_shown_falls_back_to_its_nearest_ancestor() {
    let root = tree(&[
        ("proc/self/cgroup", "4:memory:/docker/abc\n"),
        ("proc/self/mountinfo", "35 31 0:32 / /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "1073741824\n"),
    ]);
    assert_eq!(machine(root.path()).cgroup_limit_bytes, Some(GIB));
}

#[test]
fn hybrid_takes_memory_from_v1() {
    let mounts = format!("{V1_MOUNTS}41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n");
    let root = tree(&[
        ("proc/self/cgroup", "4:memory:/job\n1:cpu:/\n0::/\n"),
        ("proc/self/mountinfo", &mounts),
        ("sys/fs/cgroup/unified/cgroup.controllers", "hugetlb\n"),
        ("sys/fs/cgroup/unified/memory.max", "1\n"),
        ("sys/fs/cgroup/memory/job/memory.limit_in_bytes", "2147483648\n"),
        ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n"),
    ]);
    let machine = machine(root.path());
    assert_eq!((machine.cgroup_version, machine.cgroup_limit_bytes), (Some(1), Some(2 * GIB)));
}

#[test]
fn a_unified_mount_without_memory_controller_sets_no_limit() {
    let root = tree(&[
        ("proc/self/cgroup", "0::/\n"),
        ("proc/self/mountinfo", V2_MOUNT),
        ("sys/fs/cgroup/cgroup.controllers", "hugetlb\n"),
        ("sys/fs/cgroup/memory.max", "4096\n"),
    ]);
    let machine = machine(root.path());
    assert_eq!((machine.cgroup_version, machine.cgroup_limit_bytes), (None, None));
}

#[test]
fn v1_quota_of_a_core_and_a_half_is_one_core() {
    let root = tree(&[
        ("proc/self/cgroup", V1_GROUPS),
        ("proc/self/mountinfo", V1_MOUNTS),
        ("sys/fs/cgroup/cpu,cpuacct/batch/cpu.cfs_quota_us", "150000\n"),
        ("sys/fs/cgroup/cpu,cpuacct/batch/cpu.cfs_period_us", "100000\n"),
    ]);
    assert_eq!(machine(root.path()).cores, 1);
}

#[test]
fn meminfo_and_numa_nodes() {
    let root = tree(&[
        ("proc/meminfo", MEMINFO),
        ("sys/devices/system/node/node0/cpulist", "0\n"),
        ("sys/devices/system/node/node1/cpulist", "1\n"),
        ("sys/devices/system/node/online", "0-1\n"),
    ]);
    let machine = machine(root.path());
    assert_eq!((machine.memory_total_bytes, machine.memory_available_bytes), (16 * GIB, 8 * GIB));
    assert_eq!((machine.swap_total_bytes, machine.numa_nodes), (GIB, 2));
}

#[test]
fn without_memavailable_free_and_cached_stand_in() {
    let root = tree(&[("proc/meminfo", "MemTotal: 4096 kB\nMemFree: 1024 kB\nCached: 512 kB\n")]);
    assert_eq!(machine(root.path()).memory_available_bytes, 1536 << 10);
}

#[test]
fn an_empty_root_or_garbage_gives_absent_facts() {
    let empty = machine(tree(&[]).path());
    assert_eq!((empty.memory_total_bytes, empty.cgroup_version, empty.numa_nodes), (0, None, 1));
    assert!(empty.cores >= 1);
    let garbage = tree(&[
        ("proc/meminfo", "MemTotal: lots\nMemAvailable: 99999999999999999999 kB\n"),
        ("proc/self/cgroup", "4\n::\nmemory\n4:memory\n"),
        ("proc/self/mountinfo", "a b - cgroup\n - cgroup2\n35 31 0:32 / /x rw cgroup\n"),
    ]);
    let machine = machine(garbage.path());
    assert_eq!((machine.memory_total_bytes, machine.cgroup_limit_bytes), (0, None));
}

#[test]
fn memory_is_read_again_with_events_of_v1_and_the_jobs_own_group() {
    let root = tree(&[
        ("proc/meminfo", MEMINFO),
        ("proc/vmstat", "nr_free_pages 7\noom_kill 3\n"),
        (
            "proc/pressure/memory",
            "some avg10=1.50 avg60=0 avg300=0 total=5\nfull avg10=0.25 avg60=0 avg300=0 total=1\n",
        ),
        ("proc/self/cgroup", V1_GROUPS),
        ("proc/self/mountinfo", V1_MOUNTS),
        ("sys/fs/cgroup/memory/batch/job/memory.limit_in_bytes", "4294967296\n"),
        ("sys/fs/cgroup/memory/batch/job/memory.usage_in_bytes", "3221225472\n"),
        ("sys/fs/cgroup/memory/batch/job/memory.stat", "total_active_file 1073741824\ntotal_inactive_file 0\n"),
        ("sys/fs/cgroup/memory/batch/job/memory.failcnt", "9\n"),
        ("sys/fs/cgroup/memory/batch/job/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n"),
        ("sys/fs/cgroup/memory/batch/job/ranks/memory.oom_control", "oom_kill_disable 0\noom_kill 2\n"),
    ]);
    let child = root.path().join("sys/fs/cgroup/memory/batch/job/ranks");
    let now = MemoryMeter::new(&Probe { root: root.path().to_owned() }, Some(&child)).read();
    assert_eq!((now.total_bytes, now.available_bytes, now.oom_kills), (16 * GIB, 8 * GIB, 3));
    assert_eq!(now.pressure, Some(Pressure { some_avg10: 1.5, full_avg10: 0.25 }));
    let group = now.group.unwrap();
    assert_eq!((group.used_bytes, group.limit_bytes), (2 * GIB, Some(4 * GIB)));
    assert_eq!((group.oom_kills, group.max_events, group.high_events), (3, 9, 0));
}

#[test]
fn memory_is_read_again_with_events_and_pressure_of_v2() {
    let root = tree(&[
        ("proc/meminfo", MEMINFO),
        ("proc/self/cgroup", "0::/a/b\n"),
        ("proc/self/mountinfo", V2_MOUNT),
        ("sys/fs/cgroup/a/b/cgroup.controllers", "memory cpu\n"),
        ("sys/fs/cgroup/a/b/memory.max", "8589934592\n"),
        ("sys/fs/cgroup/a/b/memory.current", "1073741824\n"),
        ("sys/fs/cgroup/a/b/memory.events", "low 0\nhigh 4\nmax 5\noom 1\noom_kill 2\n"),
        ("sys/fs/cgroup/a/b/memory.pressure", "some avg10=7.00 avg60=0\nfull avg10=3.00 avg60=0\n"),
    ]);
    let now = MemoryMeter::new(&Probe { root: root.path().to_owned() }, None).read();
    let group = now.group.unwrap();
    assert_eq!((group.version, group.limit_bytes, group.used_bytes), (2, Some(8 * GIB), GIB));
    assert_eq!((group.oom_kills, group.high_events, group.max_events), (2, 4, 5));
    assert_eq!(now.pressure.map(|p| p.full_avg10), Some(3.0));
}

#[test]
fn v1_counts_the_use_of_the_group_that_states_the_limit_not_of_the_whole_machine() {
    let root = tree(&[
        ("proc/meminfo", MEMINFO),
        ("proc/self/cgroup", V1_GROUPS),
        ("proc/self/mountinfo", V1_MOUNTS),
        ("sys/fs/cgroup/memory/memory.usage_in_bytes", "15032385536\n"),
        ("sys/fs/cgroup/memory/batch/job/memory.limit_in_bytes", "4294967296\n"),
        ("sys/fs/cgroup/memory/batch/job/memory.usage_in_bytes", "1073741824\n"),
        ("sys/fs/cgroup/memory/batch/job/memory.stat", "hierarchical_memory_limit 4294967296\n"),
    ]);
    let machine = machine(root.path());
    assert_eq!((machine.cgroup_used_bytes, machine.cgroup_room_bytes), (Some(GIB), Some(3 * GIB)));
}

#[test]
fn this_machine_is_probed_and_can_be_planned_for() {
    let machine = super::probe();
    assert!(machine.cores >= 1 && machine.memory_total_bytes >= machine.memory_available_bytes);
    assert!(machine.memory_total_bytes > 0 && machine.page_bytes.is_power_of_two());
    let mut config = spec::config::Config::default();
    let request = spec::plan::Request { gpus: Some(3), ..Default::default() };
    let mut measured = spec::contract::Measured::default();
    measured.model.train.fields = vec![1000];
    let refused = |config: &_| spec::plan::plan(config, &machine, &measured, &request).err();
    assert!(refused(&config).is_none_or(|error| !error.to_string().is_empty()));
    config.train.batch_size = 1 << 40;
    assert!(refused(&config).is_some());
}
