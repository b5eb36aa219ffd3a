//! Results of a watch: peaks, and the facts that explain a kill.

use super::Planned;
use super::records::{Records, record};
use super::sample::{ProcessNow, Sample, unix_time};
use host::machine::MemoryMeter;
use spec::config::Language;
use spec::contract::{Event, Level, NodeRecord, Program, RecordGap};
use std::path::Path;

/// Proportional set sizes, bytes: shared pages count once over the job.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peaks {
    /// In the order of the job's ranks.
    pub pss_bytes_per_rank: Vec<u64>,
    /// The same without shared memory.
    pub own_bytes_per_rank: Vec<u64>,
    /// Peak of the sum over all ranks and the launcher.
    pub node_bytes: u64,
    pub launcher_bytes: u64,
}

impl Peaks {
    /// Raises each peak to at least that of `other`.
    pub fn raise(&mut self, other: &Peaks) {
        let of_ranks = |peaks: &mut Vec<u64>, others: &[u64]| {
            peaks.resize(peaks.len().max(others.len()), 0);
            peaks.iter_mut().zip(others).for_each(|(peak, new)| *peak = (*peak).max(*new));
        };
        of_ranks(&mut self.pss_bytes_per_rank, &other.pss_bytes_per_rank);
        of_ranks(&mut self.own_bytes_per_rank, &other.own_bytes_per_rank);
        self.node_bytes = self.node_bytes.max(other.node_bytes);
        self.launcher_bytes = self.launcher_bytes.max(other.launcher_bytes);
    }

    pub(super) fn see(&mut self, sample: &Sample) {
        let now = Peaks {
            pss_bytes_per_rank: sample.ranks.iter().map(|rank| rank.pss_bytes).collect(),
            own_bytes_per_rank: sample.ranks.iter().map(|rank| rank.own_bytes).collect(),
            node_bytes: sample.pss_bytes(),
            launcher_bytes: sample.launcher.pss_bytes,
        };
        self.raise(&now);
    }
}

/// A rank at one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moment {
    pub step: u64,
    pub now: ProcessNow,
}

/// A rank's first sample after a step, and its last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    pub first: Option<Moment>,
    pub last: Option<Moment>,
}

/// The fullest sample of late, while every rank was there.
#[derive(Clone, Debug, Default)]
pub struct Fullest {
    /// Seconds since the watch began.
    pub at: f64,
    pub sample: Sample,
    /// The largest process of others at that moment; `None` where it was not looked for.
    pub largest_other: Option<Program>,
}

/// Results of the watch at its end.
#[derive(Clone, Debug)]
pub struct Findings {
    pub peaks: Peaks,
    /// Why the watch ended the run.
    pub stopped_for: Option<String>,
    pub language: Language,
    /// The ranks are a user's own program.
    pub foreign: bool,
    pub ranks: Vec<u32>,
    pub planned: Planned,
    pub base: Option<Sample>,
    pub last: Option<Sample>,
    pub fullest: Option<Fullest>,
    pub seen: Vec<Seen>,
    pub meter: Option<MemoryMeter>,
    /// The level last recorded.
    pub level: Level,
    /// Times in which `memory.node.jsonl` could not be written.
    pub gaps: Vec<RecordGap>,
}

impl Default for Findings {
    fn default() -> Self {
        Self {
            peaks: Peaks::default(),
            stopped_for: None,
            language: Language::En,
            foreign: false,
            ranks: Vec::new(),
            planned: Planned::default(),
            base: None,
            last: None,
            fullest: None,
            seen: Vec::new(),
            meter: None,
            level: Level::default(),
            gaps: Vec::new(),
        }
    }
}

impl Findings {
    /// Writes one more record, with the event that ended the attempt; returns the error text if that fails.
    pub fn keep(&mut self, run_dir: Option<&Path>, event: Event) -> Option<String> {
        let last = self.last.as_ref()?;
        let step = self.seen.iter().filter_map(|seen| seen.last).map(|moment| moment.step).max().unwrap_or(0);
        let (mut records, error) = Records::open(run_dir);
        let now = NodeRecord { t: unix_time(), ..record(last, &self.ranks, step, self.level) };
        let (gaps, lost) = {
            let failing = records.write(0.0, || now, Some(event));
            let (gaps, lost) = records.close();
            (gaps, lost.or(failing))
        };
        self.gaps.extend(gaps);
        error.or(lost)
    }
}
