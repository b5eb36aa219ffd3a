//! Who is watched: the ranks of a run, a process with its children, or the machine alone.

use crate::contract::{MetricsRecord, NodeRecord, env};
use crate::plan::Plan;
use procfs::process::Process;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Longest line of a record that is looked for at the end of a file.
const LAST_BYTES: u64 = 64 << 10;

/// What is watched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// A run by its folder, absolute.
    Run(PathBuf),
    Pid(i32),
    Machine,
}

/// One process under watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// `rank 0`, `launch`, or the program's name.
    pub label: String,
    pub pid: i32,
}

/// What a run's records say last.
#[derive(Clone, Debug, Default)]
pub struct RunNow {
    pub plan: Option<Plan>,
    pub metrics: Option<MetricsRecord>,
    pub node: Option<NodeRecord>,
}

impl Subject {
    /// `run X`, `pid N`, `this machine`.
    pub fn title(&self) -> String {
        match self {
            Subject::Run(path) => format!("run {}", path.file_name().unwrap_or_default().to_string_lossy()),
            Subject::Pid(pid) => match Process::new(*pid).and_then(|process| process.stat()) {
                Ok(stat) => format!("{}, pid {pid}", stat.comm),
                Err(_) => format!("pid {pid}"),
            },
            Subject::Machine => "this machine".into(),
        }
    }

    /// Its processes now: ranks in their order, then `launch`; or the process, then its children.
    pub fn members(&self) -> Vec<Member> {
        match self {
            Subject::Run(path) => ranks_of(&path.join("job.json")),
            Subject::Pid(pid) => family(*pid),
            Subject::Machine => Vec::new(),
        }
    }

    /// Records of a run; empty for anything else.
    pub fn records(&self) -> RunNow {
        let Subject::Run(path) = self else { return RunNow::default() };
        let plan = std::fs::read(path.join("plan.json")).ok().and_then(|text| serde_json::from_slice(&text).ok());
        RunNow {
            plan,
            metrics: last_line(&path.join("metrics.jsonl")),
            node: last_line(&path.join("memory.node.jsonl")),
        }
    }
}

/// The folder of a run of this machine that has a living rank, any of them.
pub fn living_run() -> Option<PathBuf> {
    let job = processes().find_map(|process| variable(&process, env::JOB))?;
    PathBuf::from(job).parent().map(Path::to_owned)
}

fn processes() -> impl Iterator<Item = Process> {
    procfs::process::all_processes().into_iter().flatten().flatten()
}

/// A variable of the process's environment as it was started; absent as well where it may not be read.
fn variable(process: &Process, name: &str) -> Option<String> {
    let environment = process.environ().ok()?;
    environment.get(OsStr::new(name)).map(|value| value.to_string_lossy().into_owned())
}

fn ranks_of(job: &Path) -> Vec<Member> {
    let mut ranks = BTreeMap::new();
    let mut parent = None;
    for process in processes().filter(|process| variable(process, env::JOB).is_some_and(|of| Path::new(&of) == job)) {
        let rank = variable(&process, env::RANK).and_then(|rank| rank.parse::<u32>().ok()).unwrap_or(0);
        let Ok(stat) = process.stat().map(|stat| (stat.ppid, stat.state)) else { continue };
        // A zombie has nothing left to be watched.
        if stat.1 != 'Z' {
            parent = Some(stat.0);
            ranks.insert(rank, process.pid);
        }
    }
    let label = |(rank, pid): (u32, i32)| Member { label: format!("rank {rank}"), pid };
    let mut members: Vec<Member> = ranks.into_iter().map(label).collect();
    members.extend(parent.map(|pid| Member { label: "launch".into(), pid }));
    members
}

/// `pid` and all that descend from it.
fn family(pid: i32) -> Vec<Member> {
    let stats: Vec<_> =
        processes().filter_map(|process| process.stat().ok()).filter(|stat| stat.state != 'Z').collect();
    let member = |pid: i32| {
        let stat = stats.iter().find(|stat| stat.pid == pid)?;
        Some(Member { label: stat.comm.clone(), pid })
    };
    let mut found: Vec<Member> = member(pid).into_iter().collect();
    let mut next = 0;
    while let Some(parent) = found.get(next).map(|member| member.pid) {
        let children = stats.iter().filter(|stat| stat.ppid == parent).filter_map(|stat| member(stat.pid));
        found.extend(children.collect::<Vec<_>>());
        next += 1;
    }
    found
}

/// The last whole line of a file of JSON lines.
fn last_line<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let mut file = std::fs::File::open(path).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LAST_BYTES))).ok()?;
    let mut end = Vec::new();
    file.read_to_end(&mut end).ok()?;
    end.split(|byte| *byte == b'\n').rev().find_map(|line| serde_json::from_slice(line).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_found_with_its_children_and_a_missing_one_is_nobody() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let members = Subject::Pid(std::process::id() as i32).members();
        let _ = child.kill();
        assert!(members.iter().any(|member| member.pid == child.id() as i32), "{members:?}");
        let _ = child.wait();
        assert_eq!(members[0].pid, std::process::id() as i32);
        assert_eq!(Subject::Pid(i32::MAX).members(), []);
    }

    #[test]
    fn the_last_whole_line_counts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let line = |step| serde_json::to_string(&MetricsRecord { step, ..Default::default() }).unwrap();
        std::fs::write(&path, format!("{}\n{}\n{{\"step\":", line(1), line(2))).unwrap();
        assert_eq!(last_line::<MetricsRecord>(&path).unwrap().step, 2);
        assert!(last_line::<MetricsRecord>(&dir.path().join("none")).is_none());
    }
}
