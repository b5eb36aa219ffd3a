//! Memory of processes, as `/proc` has it: the one reader of this package.

use procfs::process::{MMapPath, MemoryMap, Process};
use spec::contract::{Program, env};

/// Resident memory of a process, bytes; reading it takes microseconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Resident {
    pub rss: u64,
    /// The part that is no file and not shared.
    pub anonymous: u64,
}

/// How a process shares its pages, bytes. Reading it walks the page tables: about 10 ms per 500 MB.
#[derive(Clone, Copy, Debug, Default)]
pub struct Shares {
    pub pss: u64,
    /// PSS of shared memory (memfd, tmpfs): the page cache and the ranks' meeting place.
    pub pss_shmem: u64,
    pub uss: u64,
    pub shared: u64,
}

impl Resident {
    /// `None`: the process has ended or may not be read.
    pub fn of(pid: i32) -> Option<Self> {
        let statm = Process::new(pid).and_then(|process| process.statm()).ok()?;
        let page = rustix::param::page_size() as u64;
        Some(Self { rss: statm.resident * page, anonymous: statm.resident.saturating_sub(statm.shared) * page })
    }
}

impl Shares {
    /// `None`: the process has ended or may not be read.
    pub fn of(pid: i32) -> Option<Self> {
        let rollup = Process::new(pid).and_then(|process| process.smaps_rollup()).ok()?;
        let map = rollup.memory_map_rollup.into_iter().next()?;
        let of = |key: &str| bytes(&map, key);
        Some(Self {
            pss: of("Pss"),
            pss_shmem: of("Pss_Shmem"),
            uss: of("Private_Clean") + of("Private_Dirty"),
            shared: of("Shared_Clean") + of("Shared_Dirty"),
        })
    }
}

fn bytes(map: &MemoryMap, key: &str) -> u64 {
    map.extension.map.get(key).copied().unwrap_or(0)
}

/// Processes that descend from `pid`, in no order; without `pid` itself.
pub fn descendants(pid: i32) -> Vec<i32> {
    let (mut found, mut next) = (vec![pid], 0);
    while let Some(parent) = found.get(next).copied() {
        found.extend(children(parent));
        next += 1;
    }
    found.split_off(1)
}

/// True if the process `pid` has a handler for `signal`, which would else end it.
pub fn catches(pid: i32, signal: i32) -> bool {
    let caught = Process::new(pid).and_then(|process| process.status()).map_or(0, |status| status.sigcgt);
    signal > 0 && caught >> (signal - 1) & 1 == 1
}

/// The processes of a job that a request by `signal` reaches: of each line of descent from `pid` the first that has a handler.
pub fn first_that_catch(pid: i32, signal: i32) -> Vec<i32> {
    let (mut found, mut next) = (Vec::new(), vec![pid]);
    while let Some(pid) = next.pop() {
        if catches(pid, signal) {
            found.push(pid);
        } else {
            next.extend(children(pid));
        }
    }
    found
}

/// Number and count of ranks by a process's environment, as torchrun sets it. `None`: it says nothing of ranks, or may not be read.
pub fn place_of(pid: i32) -> Option<(u32, u32)> {
    let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
    place_in(&environment)
}

/// True if the environment of process `pid` makes it the first rank of this machine.
pub fn is_first_here(pid: i32) -> bool {
    let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    number_in(&environment, env::LOCAL_RANK).or_else(|| number_in(&environment, env::RANK)) == Some(0)
}

fn place_in(environment: &[u8]) -> Option<(u32, u32)> {
    let number = |name| number_in(environment, name);
    // Lightning gives its children no RANK.
    let rank = number(env::RANK).or_else(|| number(env::LOCAL_RANK));
    rank.zip(number(env::WORLD_SIZE)).filter(|(rank, world)| rank < world)
}

fn number_in(environment: &[u8], name: &str) -> Option<u32> {
    let mut values =
        environment.split(|byte| *byte == 0).filter_map(|pair| pair.strip_prefix(name.as_bytes())?.strip_prefix(b"="));
    std::str::from_utf8(values.next_back()?).ok()?.trim().parse().ok()
}

/// Ranks that the process `pid` of a job has started itself, such as torchrun's: number and process, of each the first that
/// was started. Their environment names another number of ranks than that of `pid`.
pub fn inner_ranks(pid: i32) -> Vec<(u32, i32)> {
    let outer = place_of(pid).map(|(_, world)| world);
    let (mut found, mut next) = (Vec::new(), vec![pid]);
    while let Some(parent) = next.pop() {
        for child in children(parent) {
            match place_of(child) {
                Some((rank, world)) if Some(world) != outer => found.push((rank, child)),
                _ => next.push(child),
            }
        }
    }
    found.sort_unstable();
    found
}

/// Children of all threads of a process.
fn children(pid: i32) -> Vec<i32> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let of_thread = |thread: std::fs::DirEntry| std::fs::read_to_string(thread.path().join("children")).ok();
    threads
        .filter_map(of_thread)
        .flat_map(|text| text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .collect()
}

/// The process with the largest RSS that is not one of `ours` and descends from none of them. Looks at every process of the node, or at those of this
/// process's memory cgroup and below.
pub fn largest_other(ours: &[i32], in_group: bool) -> Option<Program> {
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    let ours: Vec<i32> = ours.iter().flat_map(|pid| [vec![*pid], descendants(*pid)].concat()).collect();
    let group = memory_group_of(own).filter(|_| in_group);
    let inside =
        |pid: i32| group.as_ref().is_none_or(|group| memory_group_of(pid).is_some_and(|at| at.starts_with(group)));
    let stats = procfs::process::all_processes().ok()?.flatten().filter_map(|process| process.stat().ok());
    let others = stats.filter(|stat| stat.pid != own && !ours.contains(&stat.pid) && inside(stat.pid));
    let largest = others.max_by_key(|stat| stat.rss)?;
    let bytes = largest.rss * rustix::param::page_size() as u64;
    (bytes > 0).then_some(Program { name: largest.comm, pid: largest.pid, bytes })
}

/// Path of a process's memory cgroup, v1 or v2.
fn memory_group_of(pid: i32) -> Option<String> {
    let groups = Process::new(pid).and_then(|process| process.cgroups()).ok()?.0;
    let v1 = groups.iter().find(|group| group.controllers.iter().any(|name| name == "memory"));
    v1.or(groups.iter().find(|group| group.hierarchy == 0)).map(|group| group.pathname.clone())
}

/// Bytes that PSS leaves out of the memory of process `pid` because this process, where both are the same program, maps
/// that program's file as well.
pub fn lent_bytes(pid: i32) -> u64 {
    let found = || {
        let own = Process::myself().and_then(|process| Ok((process.exe()?, process.maps()?))).ok()?;
        let program = own.1.iter().find(|map| map.pathname == MMapPath::Path(own.0.clone()))?;
        let maps = Process::new(pid).and_then(|process| process.smaps()).ok()?;
        let of_it = |map: &&MemoryMap| (map.dev, map.inode) == (program.dev, program.inode);
        Some(maps.iter().filter(of_it).map(|map| lent(bytes(map, "Rss"), bytes(map, "Pss"))).sum())
    };
    found().unwrap_or(0)
}

/// By how much PSS would be larger with one process fewer that maps the same: `rss / n` became `rss / (n + 1)`.
fn lent(rss: u64, pss: u64) -> u64 {
    let others = rss.saturating_sub(pss);
    if others == 0 {
        return 0;
    }
    let before = (rss as f64 * pss as f64 / others as f64) as u64;
    before.min(rss).saturating_sub(pss)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::CommandExt;

    #[test]
    fn pages_shared_with_the_monitor_are_counted_as_without_it() {
        assert_eq!(lent(3000, 3000), 0, "nobody else maps them");
        assert_eq!(lent(3000, 1500), 1500, "the monitor alone");
        assert_eq!(lent(3000, 1000), 500, "the monitor and a third");
        assert_eq!(lent(3000, 2000), 1000, "half of them");
        assert_eq!(lent(0, 0), 0);
    }

    #[test]
    fn ranks_are_read_from_an_environment() {
        assert_eq!(place_in(b"A=1\0RANK=2\0WORLD_SIZE=4\0"), Some((2, 4)));
        assert_eq!(place_in(b"LOCAL_RANK=1\0WORLD_SIZE=2\0"), Some((1, 2)));
        assert_eq!(place_in(b"RANK=0\0WORLD_SIZE=1\0RANK=3\0WORLD_SIZE=8"), Some((3, 8)));
        for odd in [&b""[..], b"RANK=1\0", b"RANK=x\0WORLD_SIZE=2", b"RANK=2\0WORLD_SIZE=2", b"MYRANK=0\0WORLD_SIZE=2"]
        {
            assert_eq!(place_in(odd), None);
        }
    }

    #[test]
    fn ranks_inside_a_process_are_found_by_descent() {
        // The shell in between is another rank of one; its children say that they are two.
        let script = "RANK=0 WORLD_SIZE=2 sleep 60 & RANK=1 WORLD_SIZE=2 sh -c 'sleep 60 & wait' & wait";
        let mut outer = std::process::Command::new("sh")
            .args(["-c", script])
            .env("RANK", "0")
            .env("WORLD_SIZE", "1")
            .process_group(0)
            .spawn()
            .unwrap();
        let pid = outer.id() as i32;
        let began = std::time::Instant::now();
        while descendants(pid).len() < 3 || inner_ranks(pid).len() < 2 {
            assert!(began.elapsed().as_secs() < 60);
        }
        let found = inner_ranks(pid);
        let ranks: Vec<u32> = found.iter().map(|(rank, _)| *rank).collect();
        let firsts: Vec<bool> = found.iter().map(|(_, pid)| is_first_here(*pid)).collect();
        let group = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process_group(group, rustix::process::Signal::KILL).unwrap();
        outer.wait().unwrap();
        assert_eq!((ranks, firsts), (vec![0, 1], vec![true, false]));
    }

    #[test]
    fn processes_with_a_handler_are_found_below_those_without() {
        // The outer shell has none, one of the inner shells has, and so has what that one starts.
        let script = "sh -c 'trap : USR1; sleep 60 & wait' & sleep 60 & wait";
        let mut outer = std::process::Command::new("sh").args(["-c", script]).process_group(0).spawn().unwrap();
        let pid = outer.id() as i32;
        let began = std::time::Instant::now();
        let usr1 = rustix::process::Signal::USR1.as_raw();
        while descendants(pid).len() < 3 || first_that_catch(pid, usr1).is_empty() {
            assert!(began.elapsed().as_secs() < 60);
        }
        let found = first_that_catch(pid, usr1);
        let (own, below) = (catches(pid, usr1), descendants(pid));
        let other = largest_other(&[pid, std::process::id() as i32], false).map(|program| program.pid);
        let group = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process_group(group, rustix::process::Signal::KILL).unwrap();
        outer.wait().unwrap();
        assert!(found.len() == 1 && below.contains(&found[0]) && !own, "{found:?}");
        assert!(other.is_none_or(|other| !below.contains(&other)));
        assert!(!catches(i32::MAX, usr1) && !catches(pid, 0));
    }

    #[test]
    fn parts_of_this_process_are_no_more_than_the_whole_and_others_are_found() {
        let own = std::process::id() as i32;
        let (now, shares) = (Resident::of(own).unwrap(), Shares::of(own).unwrap());
        assert!(now.anonymous > 0 && now.anonymous <= now.rss, "{now:?}");
        assert!(shares.uss > 0 && shares.uss <= shares.pss && shares.pss_shmem <= shares.pss, "{shares:?}");
        assert!(Resident::of(i32::MAX).is_none() && Shares::of(i32::MAX).is_none());
        assert!(largest_other(&[], false).unwrap().bytes > 0);
    }
}
