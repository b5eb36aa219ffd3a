#![doc = include_str!("README.md")]
//!
//!
//! # Parts
//!
//! ```text
//! sample ──► level (three, per source) ──► words (warnings, advice)
//!    │          └────────► ladder (what is given back, in order) ──► [`Hands`]: ranks, page cache
//!    ├──► leak (slope of each rank over steps)
//!    └──► memory.node.jsonl, peaks, explain (after a kill)
//! ```
//! [`Watch::run`] is a thread's work; all decisions are pure functions of time and samples. [`ease`] looks once, before the start.
//!
//! Architecture invariant: takes no part in training; it reaches ranks and page cache through [`Hands`] alone.

mod explain;
mod findings;
mod ladder;
mod leak;
mod level;
mod records;
mod sample;
mod start;
mod watcher;
mod words;

pub use explain::Killed;
pub use findings::{Findings, Peaks};
pub use leak::{Leak, Trend};
pub use sample::{ProcessNow, Sample, Sampler};
pub use start::{Before, ease};
pub use watcher::Watch;
pub use words::{advice, event_text, pre_flight, stopped};

use rustix::process::Signal;
use spec::config::{Config, Language};
use spec::contract::{LineId, Relief, Relieved};
use spec::plan::Plan;
use std::path::{Path, PathBuf};

/// Facts about a job that the watch needs.
#[derive(Clone, Debug, PartialEq)]
pub struct WatchSpec {
    /// Warn and respond; else memory is only measured.
    pub warn: bool,
    pub response: bool,
    /// Shares, 0 to 1.
    pub ram: [f64; 3],
    pub gpu: [f64; 3],
    pub stop: f64,
    /// Seconds.
    pub period_s: f64,
    pub recover_s: f64,
    pub language: Language,
    /// Folder for `memory.node.jsonl`. `None` means no records.
    pub run_dir: Option<PathBuf>,
    /// The run continues in new processes: the records say so.
    pub again: bool,
    /// Ranks are a user's own program: what they start counts as theirs, and a stop is asked for by a signal at once.
    pub foreign: bool,
    pub planned: Planned,
}

/// The plan's numbers that matter here. Bytes of the node; zero: not known.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Planned {
    pub budget_bytes: u64,
    /// Lines of ranks, launcher and page cache: the budget without its reserve.
    pub job_bytes: u64,
    /// Memory that one rank may have for itself: see [`Plan::rank_bytes`].
    pub rank_bytes: u64,
    /// Its lines, for explanations.
    pub rank_lines: Vec<(LineId, u64)>,
    /// One device: its lines, which the free memory of the fullest device has to hold.
    pub gpu_bytes: Option<u64>,
    pub threads: usize,
    pub micro_batch: usize,
}

impl WatchSpec {
    /// Measures and nothing more.
    pub fn silent() -> Self {
        Self::of(&Config::default(), &Plan::default(), None).quiet()
    }

    fn quiet(self) -> Self {
        Self { warn: false, response: false, ..self }
    }

    /// As config and plan say; `run_dir` gets the records.
    pub fn of(config: &Config, plan: &Plan, run_dir: Option<&Path>) -> Self {
        let watch = &config.watch;
        let spec = Self {
            warn: true,
            response: watch.response,
            ram: watch.ram_percent.map(|percent| percent / 100.0),
            gpu: watch.gpu_percent.map(|percent| percent / 100.0),
            stop: watch.stop_percent / 100.0,
            period_s: watch.period,
            recover_s: watch.recover,
            language: config.log.language,
            run_dir: run_dir.map(Path::to_owned),
            again: false,
            foreign: false,
            planned: Planned::of(plan),
        };
        if watch.enabled { spec } else { Self { run_dir: None, ..spec.quiet() } }
    }
}

impl Planned {
    fn of(plan: &Plan) -> Self {
        let budget = &plan.budget;
        let rank_lines = budget.lines.iter().filter_map(|line| Some((line.name, line.per_rank_bytes?))).collect();
        Self {
            budget_bytes: budget.total_bytes,
            job_bytes: budget.need_bytes().saturating_sub(budget.line_bytes(LineId::Reserve)),
            rank_bytes: plan.rank_bytes(),
            rank_lines,
            gpu_bytes: budget.gpu.as_ref().map(|gpu| gpu.need_bytes()),
            threads: plan.loader.threads,
            micro_batch: plan.batch.micro_batch,
        }
    }
}

/// Messages to the running watch.
#[derive(Clone, Debug, PartialEq)]
pub enum Told {
    /// Rank 0 has done this step.
    Step(u64),
    /// A rank's answer to an order.
    Relieved { rank: u32, relieved: Relieved },
    /// The user wants memory back now.
    Now,
}

/// The page cache as the watch sees it. Bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheNow {
    pub capacity_bytes: u64,
    /// Wanted and present size.
    pub wanted_bytes: u64,
    pub resident_bytes: u64,
}

/// The signal by which a user's program is asked for a checkpoint and its end.
pub const REQUEST: Signal = Signal::USR1;

/// Actions of the watch. Calls must not block.
pub trait Hands: Sync {
    fn say(&self, text: &str);
    /// Memory of the job, for the progress bar.
    fn job_bytes(&self, bytes: u64);
    /// Sends an order to every rank.
    fn relieve(&self, order: u64, action: &Relief);
    /// Ranks that did not obey [`Relief::Stop`] are asked by a signal.
    fn stop(&self);
    fn cache(&self) -> Option<CacheNow>;
    /// Returns what was set.
    fn resize_cache(&self, bytes: u64) -> u64;
}
