//! Who is watched: the ranks of a run, a process with its children, or the machine alone.

use crate::advise;
use host::machine::{inner_ranks, is_first_here, lent_bytes};
use procfs::process::Process;
use serde::de::DeserializeOwned;
use spec::config::Language;
use spec::contract::{MetricsRecord, NodeRecord, Summary, env, shown};
use spec::plan::Plan;
use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Longest line of a record that is looked for at the end of a file.
const LAST_BYTES: u64 = 64 << 10;

/// Target of the monitor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// A run by its folder, absolute and without links.
    Run(PathBuf),
    Pid(i32),
    Machine,
}

/// One process under watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// `rank 0`, `launch`, or the program's name and number.
    pub label: String,
    pub pid: i32,
}

/// Latest values in a run's records.
#[derive(Clone, Debug, Default)]
pub struct RunNow {
    pub plan: Option<Plan>,
    /// Language of the run's messages.
    pub language: Option<Language>,
    pub metrics: Option<MetricsRecord>,
    pub node: Option<NodeRecord>,
}

impl Subject {
    /// `run X`, `pid N`, `this machine`.
    pub fn title(&self) -> String {
        match self {
            Subject::Run(path) => format!("run {}", shown(path.file_name().unwrap_or_default())),
            Subject::Pid(pid) => match Process::new(*pid).and_then(|process| process.stat()) {
                Ok(stat) => format!("{}, pid {pid}", clean(&stat.comm)),
                Err(_) => format!("pid {pid}"),
            },
            Subject::Machine => "this machine".into(),
        }
    }

    /// Name of the run.
    pub fn run_name(&self) -> Option<String> {
        match self {
            Subject::Run(path) => Some(path.file_name()?.to_string_lossy().into_owned()),
            Subject::Pid(_) | Subject::Machine => None,
        }
    }

    /// Its processes now: ranks in their order; or the process, then its children.
    pub fn members(&self) -> Vec<Member> {
        match self {
            Subject::Run(path) => ranks_of(&path.join("job.json")),
            Subject::Pid(pid) => family(*pid),
            Subject::Machine => Vec::new(),
        }
    }

    /// How it ended, in words, once nothing of it runs; see [`end_of_run`].
    pub fn end(&self, last_ranks: SystemTime) -> String {
        match self {
            Subject::Run(path) => end_of_run(path, last_ranks),
            Subject::Pid(_) | Subject::Machine => "it has ended".into(),
        }
    }

    /// Records of a run; empty for anything else.
    pub fn records(&self) -> RunNow {
        let Subject::Run(path) = self else { return RunNow::default() };
        let plan = std::fs::read(path.join("plan.json")).ok().and_then(|text| serde_json::from_slice(&text).ok());
        RunNow {
            plan,
            language: advise::language(path),
            metrics: last_line(&path.join("metrics.jsonl")),
            node: last_line(&path.join("memory.node.jsonl")),
        }
    }
}

/// How a run ended, in words. `last_ranks`: when a rank was last seen; an older summary is of an attempt or leg before.
fn end_of_run(folder: &Path, last_ranks: SystemTime) -> String {
    let path = folder.join("summary.json");
    // A file's time is that of the last tick of a coarse clock.
    let fresh = |time: SystemTime| time + Duration::from_secs(1) >= last_ranks;
    let is_fresh = || path.metadata().and_then(|meta| meta.modified()).is_ok_and(fresh);
    let summary: Option<Summary> = std::fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok());
    // The clock may have been set back: names of starts are certain, where there are any.
    let is_known = |summary: &Summary| match start_of(folder) {
        Some(start) if !start.is_empty() => summary.start == start,
        _ => is_fresh(),
    };
    let Some(summary) = summary.filter(is_known) else {
        return "it ended without a summary: its launcher was killed, or ends just now".into();
    };
    let reason = summary.reason.map_or(String::new(), |reason| format!(": {reason}"));
    format!("{} after {} steps{reason}", summary.status.text().replace('_', " "), summary.steps)
}

/// Name of the start that `job.json` is of.
fn start_of(folder: &Path) -> Option<String> {
    let job: serde_json::Value = serde_json::from_slice(&std::fs::read(folder.join("job.json")).ok()?).ok()?;
    Some(job.get("start")?.as_str()?.to_owned())
}

/// The launcher of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launcher {
    pid: i32,
    /// In clock ticks since the machine's start: another process of this number has another one.
    started: u64,
}

impl Launcher {
    /// Finds the run of the rank `pid`. After its launcher was killed a rank has another parent until it ends: the
    /// launcher is recognised by its name, which is this program's.
    pub fn of(pid: i32) -> Option<Self> {
        let stat = |pid: i32| Process::new(pid).and_then(|process| process.stat()).ok();
        let (parent, own) = (stat(stat(pid)?.ppid)?, stat(i32::try_from(std::process::id()).ok()?)?);
        (parent.comm == own.comm).then_some(Self { pid: parent.pid, started: parent.starttime })
    }

    pub fn lives(&self) -> bool {
        let stat = Process::new(self.pid).and_then(|process| process.stat());
        stat.is_ok_and(|stat| stat.starttime == self.started && stat.state != 'Z')
    }

    /// Bytes that PSS leaves out because this monitor maps the same program.
    pub fn lent_bytes(&self) -> u64 {
        lent_bytes(self.pid)
    }

    pub fn member(&self) -> Member {
        Member { label: "launch".into(), pid: self.pid }
    }
}

/// The folders of runs of this machine that have a living rank, without links.
pub fn living_runs() -> BTreeSet<PathBuf> {
    let jobs = processes().filter(|process| !is_zombie(process)).filter_map(|process| variable(&process, env::JOB));
    let folder = |job: OsString| real(Path::new(&job)).parent().map(Path::to_owned);
    jobs.filter_map(folder).collect()
}

/// How often the run of the rank `pid` was started again. A program under `--exec` has torchrun's name for it alone.
pub fn restarts(pid: i32) -> Option<u64> {
    let process = Process::new(pid).ok()?;
    let named = |name| variable(&process, name)?.to_str()?.parse().ok();
    named(env::RESTARTS).or_else(|| named(env::ELASTIC_RESTART_COUNT))
}

/// Without links, where it can be resolved.
fn real(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

/// A zombie has nothing left to be watched.
fn is_zombie(process: &Process) -> bool {
    process.stat().map_or(true, |stat| stat.state == 'Z')
}

fn processes() -> impl Iterator<Item = Process> {
    procfs::process::all_processes().into_iter().flatten().flatten()
}

/// A variable of the process's environment as it was started; absent as well where it may not be read.
fn variable(process: &Process, name: &str) -> Option<OsString> {
    let environment = process.environ().ok()?;
    environment.get(OsStr::new(name)).cloned()
}

fn ranks_of(job: &Path) -> Vec<Member> {
    let job = real(job);
    let of_job = |process: &Process| variable(process, env::JOB).is_some_and(|of| real(Path::new(&of)) == job);
    let found = processes().filter(of_job).filter_map(|process| {
        let stat = process.stat().ok().filter(|stat| stat.state != 'Z')?;
        let rank = variable(&process, env::RANK).and_then(|rank| rank.to_str()?.parse().ok()).unwrap_or(0);
        Some(Found { pid: stat.pid, parent: stat.ppid, started: stat.starttime, rank })
    });
    let member = |(rank, pid)| Member { label: format!("rank {rank}"), pid };
    with_inner(numbered(found.collect())).into_iter().map(member).collect()
}

/// In the place of one program the ranks that it has started itself (torchrun, Lightning), if there are any.
fn with_inner(ranks: Vec<(u64, i32)>) -> Vec<(u64, i32)> {
    let [(_, program)] = ranks[..] else { return ranks };
    let inner = inner_ranks(program);
    if inner.is_empty() {
        return ranks;
    }
    // One that started no first rank is that itself.
    let own = (!inner.iter().any(|(_, pid)| is_first_here(*pid))).then_some((0, program));
    own.into_iter().chain(inner.into_iter().map(|(rank, pid)| (u64::from(rank), pid))).collect()
}

/// A process of a job.
#[derive(Clone, Copy, Debug)]
struct Found {
    pid: i32,
    parent: i32,
    /// In clock ticks since the machine's start.
    started: u64,
    /// By its first environment.
    rank: u64,
}

/// Ranks by number. What a rank starts has its environment, and is none; ranks that one process forked have the environment of
/// the first of them, and were forked in their order.
fn numbered(mut found: Vec<Found>) -> Vec<(u64, i32)> {
    let pids: BTreeSet<i32> = found.iter().map(|of| of.pid).collect();
    found.retain(|of| !pids.contains(&of.parent));
    found.sort_by_key(|of| (of.rank, of.started, of.pid));
    let mut next = 0;
    let number = |of: Found| {
        let rank = of.rank.max(next);
        next = rank.saturating_add(1);
        (rank, of.pid)
    };
    found.into_iter().map(number).collect()
}

/// `pid` and all that descend from it.
fn family(pid: i32) -> Vec<Member> {
    let stats: Vec<_> =
        processes().filter_map(|process| process.stat().ok()).filter(|stat| stat.state != 'Z').collect();
    let member = |pid: i32| {
        let stat = stats.iter().find(|stat| stat.pid == pid)?;
        Some(Member { label: format!("{} {pid}", clean(&stat.comm)), pid })
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

/// A process may call itself anything, escape codes included.
fn clean(name: &str) -> String {
    name.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
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
    fn a_ranks_own_children_are_no_ranks_and_forked_ones_count_on() {
        let of = |pid, parent, rank| Found { pid, parent, started: 9, rank };
        let spawned = vec![of(20, 10, 0), of(21, 10, 1), of(30, 20, 0), of(31, 30, 0), of(32, 21, 1)];
        assert_eq!(numbered(spawned), [(0, 20), (1, 21)]);
        let forked = vec![of(22, 10, 4), of(21, 10, 4), of(20, 10, 4), of(40, 21, 4)];
        assert_eq!(numbered(forked), [(4, 20), (5, 21), (6, 22)]);
        assert_eq!(numbered(vec![of(20, 1, 3), of(21, 1, 5)]), [(3, 20), (5, 21)]);
    }

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
    fn a_run_is_found_through_a_link_and_by_another_spelling() {
        let dir = tempfile::tempdir().unwrap();
        let (runs, link) = (dir.path().join("runs"), dir.path().join("link"));
        std::fs::create_dir_all(runs.join("a")).unwrap();
        std::fs::write(runs.join("a/job.json"), "{}").unwrap();
        std::os::unix::fs::symlink(&runs, &link).unwrap();
        let mut rank = std::process::Command::new("sleep");
        let mut rank = rank.arg("60").env(env::JOB, link.join("a/job.json")).env(env::RANK, "3").spawn().unwrap();
        // Its environment is there a moment after it has been started.
        let look = || Subject::Run(dir.path().join("runs/../runs/a")).members();
        let found = std::iter::repeat_with(look).take(1000).find(|found| !found.is_empty()).unwrap_or_default();
        let living = living_runs();
        let _ = rank.kill();
        let _ = rank.wait();
        assert_eq!(found, [Member { label: "rank 3".into(), pid: rank.id() as i32 }]);
        assert!(living.contains(&runs.join("a").canonicalize().unwrap()), "{living:?}");
        assert!(Subject::Run(runs.join("a")).members().is_empty());
    }

    #[test]
    fn a_launcher_is_its_number_and_its_start() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let started = Process::new(child.id() as i32).unwrap().stat().unwrap().starttime;
        let launcher = Launcher { pid: child.id() as i32, started };
        let other = Launcher { started: started + 1, ..launcher.clone() };
        let (lives, other) = (launcher.lives(), other.lives());
        let _ = child.kill();
        let killed = std::iter::repeat_with(|| launcher.lives()).take(100_000).any(|lives| !lives);
        let _ = child.wait();
        assert!(lives && !other && killed && !launcher.lives());
        assert_eq!(Launcher::of(i32::MAX), None);
    }

    #[test]
    fn an_end_is_told_by_the_summary_of_this_attempt_alone() {
        let dir = tempfile::tempdir().unwrap();
        let now = SystemTime::now();
        assert!(end_of_run(dir.path(), now).contains("without a summary"));
        let summary = Summary { status: spec::contract::RunStatus::EarlyStopped, steps: 340, ..Summary::default() };
        std::fs::write(dir.path().join("summary.json"), serde_json::to_vec(&summary).unwrap()).unwrap();
        assert_eq!(end_of_run(dir.path(), now), "early stopped after 340 steps");
        assert!(end_of_run(dir.path(), now + Duration::from_secs(60)).contains("without a summary"));
        std::fs::write(dir.path().join("job.json"), r#"{"start": "b"}"#).unwrap();
        assert!(end_of_run(dir.path(), now).contains("without a summary"), "of another start");
        let summary = Summary { start: "b".into(), ..summary };
        std::fs::write(dir.path().join("summary.json"), serde_json::to_vec(&summary).unwrap()).unwrap();
        let late = now + Duration::from_secs(7200);
        assert_eq!(end_of_run(dir.path(), late), "early stopped after 340 steps", "the clock was set back");
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
