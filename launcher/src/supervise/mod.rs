//! Children, process groups, signals, first failure.
//!
//! One loop waits on pidfds, control sockets, output pipes and a pipe of signals (`job`); what it sees is judged by a
//! pure part (`verdict`). A forked guard and a cgroup (`unix`, `cgroup`) see to it that nothing outlives a killed
//! launcher.
//!
//! Architecture invariant: knows neither tensors nor YAML; prints nothing itself, all goes to a [`Watcher`].

mod cgroup;
mod child;
mod env;
mod failure;
mod job;
mod limits;
mod lines;
mod orders;
mod record;
mod reports;
mod unix;
mod verdict;
mod zygote;

pub use child::has_ended;
pub use env::{Meeting, ranks};
pub use failure::Failure;
pub use job::POLL;
pub use limits::{Limits, may_limit};
pub use unix::{Signals, prepare_helper};
pub use verdict::{End, signal_name};

use crate::watch::{Peaks, WatchSpec};
use cache::PolicyKind;
use rustix::process::Signal;
use spec::contract::cache::CacheStats;
use spec::contract::{self, Ended, Progress, RecordGap, Summary, exit};
use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// A job: one program, started once per rank.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Looked up in PATH when it holds no slash.
    pub program: PathBuf,
    pub args: Vec<OsString>,
    /// The program, with the words `zygote FD`, forks the ranks once it is ready; where it refuses, they are spawned.
    pub forks: bool,
    /// Added to the launcher's own environment for every rank.
    pub env: Vec<(String, String)>,
    pub ranks: Vec<RankSpec>,
    /// Folder that gets `rank<R>.log` with the full output of each rank, appended; it must exist.
    pub log_dir: Option<PathBuf>,
    /// From asking ranks to end to SIGKILL.
    pub grace: Duration,
    /// Give ranks a control socket (`HEADROOM_CONTROL_FD`) and the node's memfd (`HEADROOM_COMM_FD`).
    pub control: bool,
    /// Host a shared page cache for the ranks (`HEADROOM_CACHE_FD`, `HEADROOM_CACHE_MEMFD`), or, where `env` names a
    /// [`env::CACHE_DOOR`](spec::contract::env::CACHE_DOOR), for every process that comes in by it.
    pub cache: Option<CacheSpec>,
    /// How memory is watched beside the job.
    pub watch: WatchSpec,
    /// A memory cgroup for the ranks, where one may be made.
    pub limits: Option<Limits>,
}

/// The node's page cache, made anew for every attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheSpec {
    pub capacity_bytes: u64,
    pub policy: PolicyKind,
}

#[derive(Clone, Debug, Default)]
pub struct RankSpec {
    /// Number within the whole job.
    pub rank: u32,
    pub env: Vec<(String, String)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    Out,
    Err,
    /// A line sent over the control socket.
    Control,
}

/// Display of a running job. Calls must not block: `ready` says when output has to wait.
pub trait Watcher: Sync {
    fn line(&self, rank: u32, stream: Stream, text: &str);
    /// The launcher's own words.
    fn note(&self, text: &str);
    fn progress(&self, _progress: &Progress) {}
    /// Sum of PSS over the job, bytes.
    fn memory(&self, _node_bytes: u64) {}
    /// False: leave the ranks' output in their pipes for now.
    fn ready(&self) -> bool {
        true
    }
    /// The launcher is about to be stopped (Ctrl-Z) and has to leave the terminal tidy.
    fn pause(&self) {}
}

/// How a job went.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Exit code for the launcher.
    pub exit_code: u8,
    pub first_failure: Option<Failure>,
    /// Every attempt that failed, this one included.
    pub ended: Vec<Ended>,
    /// First signal that the user sent to stop the job.
    pub stopped_by: Option<i32>,
    /// Why the watch stopped it.
    pub stopped_for: Option<String>,
    /// The first failure is a kill for memory.
    pub killed_for_memory: bool,
    /// Over all attempts, as are the peaks.
    pub wall: Duration,
    pub peaks: Peaks,
    /// Peaks of the last attempt, because the plan beside them is that of the last attempt.
    pub last_peaks: Peaks,
    /// How often the job was started again.
    pub restarts: u32,
    /// The last state that a rank reported.
    pub progress: Option<Progress>,
    /// Counters of the last attempt's page cache.
    pub cache: Option<CacheStats>,
    /// Times in which records or logs could not be written, over all attempts.
    pub gaps: Vec<RecordGap>,
    /// The summary of rank 0, where it could not write the file.
    pub summary: Option<Summary>,
}

impl Outcome {
    /// Stopped by `signal` while no rank ran; `last`: the attempt before.
    pub(crate) fn stopped_by(signal: Signal, trains: bool, last: Option<Self>) -> Self {
        let number = signal.as_raw();
        let code = if trains { exit::UNSTARTED } else { End::Signal(number).exit_code() };
        match last {
            Some(last) => Self { stopped_by: Some(number), ..last },
            None => Self {
                exit_code: code,
                first_failure: None,
                ended: Vec::new(),
                stopped_by: Some(number),
                stopped_for: None,
                killed_for_memory: false,
                wall: Duration::ZERO,
                peaks: Peaks::default(),
                last_peaks: Peaks::default(),
                restarts: 0,
                progress: None,
                cache: None,
                gaps: Vec::new(),
                summary: None,
            },
        }
    }

    /// Description of the failure, or `None` if the attempt succeeded.
    fn ended(&self, attempt: u32) -> Option<Ended> {
        let failure = self.first_failure.as_ref()?;
        Some(Ended {
            attempt,
            step: failure.step.or(self.progress.as_ref().map(|last| last.step)),
            code: self.exit_code,
            words: failure.words(),
            for_memory: self.killed_for_memory,
        })
    }
}

/// Runs a job to its end on the calling thread, which must not end before (PDEATHSIG is tied to it).
///
/// # Errors
/// When a rank cannot be started (those already running are killed), the page cache has no room, or the system refuses a
/// pipe, memfd or signal handler. Failures of ranks are no errors: see [`Outcome`].
pub fn run(spec: &Spec, watcher: &dyn Watcher) -> io::Result<Outcome> {
    run_with_restarts(0, |_, _| Ok(spec.clone()), watcher, &Signals::take()?)
}

/// Runs a job, and again after a failure, at most `max_restarts` times. `spec` gets the number of restarts so far and how
/// the last attempt ended, and gives the job to run (a new port, where to resume, a smaller plan). Stops on request are final,
/// and of Headroom's own ranks wrong usage and impossible plans. `signals` are the caller's: one that came before is not lost.
pub fn run_with_restarts(
    max_restarts: u32,
    mut spec: impl FnMut(u32, Option<&Outcome>) -> io::Result<Spec>,
    watcher: &dyn Watcher,
    signals: &Signals,
) -> io::Result<Outcome> {
    let (started, mut restarts, mut peaks, mut ended) = (Instant::now(), 0, Peaks::default(), Vec::new());
    let mut gaps = Vec::new();
    let mut last: Option<Outcome> = None;
    loop {
        let mut spec = spec(restarts, last.as_ref())?;
        for rank in spec.ranks.iter_mut().filter(|rank| !rank.env.is_empty()) {
            rank.env.push((contract::env::ELASTIC_RESTART_COUNT.to_owned(), restarts.to_string()));
            rank.env.push((contract::env::ELASTIC_MAX_RESTARTS.to_owned(), max_restarts.to_string()));
        }
        // It may have come before there was any rank, or while the job was made ready again.
        if let Some(signal) = signals.asked_to_end() {
            return Ok(Outcome::stopped_by(signal, spec.control, last));
        }
        let outcome = job::run(&spec, watcher, signals)?;
        peaks.raise(&outcome.peaks);
        ended.extend(outcome.ended(restarts));
        gaps.extend(outcome.gaps.iter().cloned());
        let (wall, peaks, ended) = (started.elapsed(), peaks.clone(), ended.clone());
        let outcome = Outcome { restarts, wall, peaks, ended, gaps: gaps.clone(), ..outcome };
        let Some(failure) = &outcome.first_failure else {
            return Ok(outcome);
        };
        // Codes of other programs mean other things.
        let is_final = spec.control && matches!(outcome.exit_code, exit::USAGE | exit::PLAN);
        let hopeless = is_final || outcome.stopped_by.is_some();
        if hopeless || restarts >= max_restarts {
            return Ok(outcome);
        }
        restarts += 1;
        watcher.note(&format!("{failure}"));
        watcher.note(&format!("starting again ({restarts} of {max_restarts} restarts)"));
        last = Some(outcome);
    }
}
