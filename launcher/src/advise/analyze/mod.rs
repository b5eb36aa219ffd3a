//! Numbers from a run's records: range, trend, peaks by phase, and the plan against the truth.

use super::growth::Growth;
use super::log::{Run, starts};
use crate::watch::event_text;
use serde::Serialize;
use serde::ser::{SerializeStruct, Serializer};
use spec::config::Language;
use spec::contract::{Held, LineId, MemoryRecord, NodeRecord, Phase};
use spec::plan::{BudgetLine, Plan, bytes_text};
use std::fmt::{self, Display};

/// Lowest, mean and highest: GiB of what was used, percent of what there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Range {
    pub least: f64,
    pub mean: f64,
    pub most: f64,
}

/// A line of the budget beside what was seen of it, bytes: of one rank, the one with most, where the line is per rank.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Check {
    pub name: &'static str,
    pub planned_bytes: u64,
    pub measured_bytes: u64,
    /// Claimed as a bound alone: it may be far above.
    pub bound: bool,
}

/// Planned over measured up to which a line counts as true.
const TRUE_UP_TO: f64 = 1.15;

/// Verdict on one line of the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Never below, and at most 15 % above.
    True,
    /// Below what was used: a promise broken.
    TooSmall,
    TooLarge,
    /// Above by more than 15 %, and claimed as a bound.
    Bound,
    NotMeasured,
}

impl Verdict {
    pub fn word(self) -> &'static str {
        match self {
            Self::True => "true",
            Self::TooSmall => "too small",
            Self::TooLarge => "too large",
            Self::Bound => "a bound",
            Self::NotMeasured => "not measured",
        }
    }
}

impl Check {
    fn new(name: &'static str, planned_bytes: u64, measured_bytes: u64) -> Self {
        Self { name, planned_bytes, measured_bytes, bound: false }
    }

    pub fn verdict(&self) -> Verdict {
        match self.ratio() {
            None if self.bound => Verdict::Bound,
            None => Verdict::NotMeasured,
            Some(_) if self.measured_bytes > self.planned_bytes => Verdict::TooSmall,
            Some(ratio) if ratio <= TRUE_UP_TO => Verdict::True,
            Some(_) if self.bound => Verdict::Bound,
            Some(_) => Verdict::TooLarge,
        }
    }

    /// Planned over measured. `None` means that nothing was measured.
    pub fn ratio(&self) -> Option<f64> {
        (self.measured_bytes > 0).then(|| self.planned_bytes as f64 / self.measured_bytes as f64)
    }
}

impl Serialize for Check {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("Check", 5)?;
        fields.serialize_field("name", &self.name)?;
        fields.serialize_field("planned_bytes", &self.planned_bytes)?;
        fields.serialize_field("measured_bytes", &self.measured_bytes)?;
        fields.serialize_field("ratio", &self.ratio())?;
        fields.serialize_field("verdict", &self.verdict())?;
        fields.end()
    }
}

/// See [`analyze`].
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Analysis {
    pub samples: usize,
    pub duration_s: f64,
    /// A log that ends within a sample.
    pub cut_short: bool,
    pub used: Range,
    /// Share of the machine's memory, percent; of all programs.
    pub machine_percent: Option<Range>,
    /// Share of the fullest device's memory, percent; of all programs.
    pub gpu_percent: Option<Range>,
    pub growth: Growth,
    /// Highest own (unique) bytes of any rank, by phase, the first phase first.
    #[serde(serialize_with = "as_map")]
    pub by_phase: Vec<(Phase, u64)>,
    /// Checks of the last start alone, because plan.json describes that one.
    pub checks: Vec<Check>,
    /// How often the ranks were started.
    pub starts: usize,
    /// Messages and actions: seconds since the start, text. Plots number them in this order, from 1.
    pub events: Vec<(f64, String)>,
}

fn as_map<S: Serializer>(pairs: &[(Phase, u64)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(pairs.iter().map(|(phase, bytes)| (phase, bytes)))
}

impl Range {
    /// `None`: of nothing.
    fn of(values: &[f64]) -> Option<Self> {
        let least = values.iter().copied().reduce(f64::min)?;
        let most = values.iter().copied().reduce(f64::max)?;
        Some(Self { least, mean: values.iter().sum::<f64>() / values.len() as f64, most })
    }
}

/// Numbers of a run or of a monitor's log. Pure.
pub fn analyze(run: &Run) -> Analysis {
    let used = run.used_gib();
    let values: Vec<f64> = used.iter().map(|point| point.1).collect();
    Analysis {
        samples: used.len(),
        duration_s: used.last().map_or(0.0, |last| last.0) - used.first().map_or(0.0, |first| first.0),
        cut_short: run.cut_short,
        used: Range::of(&values).unwrap_or_default(),
        machine_percent: machine_percent(run),
        gpu_percent: gpu_percent(run),
        growth: Growth::of(run),
        by_phase: by_phase(run),
        checks: run.plan.as_ref().map(|plan| checks(&Last::of(run), plan)).unwrap_or_default(),
        starts: run.memory.first().map_or(0, |records| starts(in_start(records)).len()),
        events: events(run),
    }
}

fn share(used: u64, total: u64) -> f64 {
    100.0 * used as f64 / total.max(1) as f64
}

fn machine_percent(run: &Run) -> Option<Range> {
    let monitor = run.monitor.iter().map(|sample| sample.ram_percent);
    let ranks = run.memory.iter().flatten().map(|r| share(r.system_used_bytes, r.system_total_bytes));
    Range::of(&monitor.chain(ranks).collect::<Vec<_>>())
}

/// Use of the fullest device at each moment.
fn gpu_percent(run: &Run) -> Option<Range> {
    let monitor = run.monitor.iter().filter_map(|sample| sample.gpu_memory_percent);
    let fullest =
        |record: &NodeRecord| record.gpus.iter().map(|gpu| share(gpu.used_bytes, gpu.total_bytes)).reduce(f64::max);
    let watched: Vec<f64> = monitor.chain(run.node.iter().filter_map(fullest)).collect();
    let own = || {
        let records = run.memory.iter().flatten().filter(|record| record.gpu_total_bytes > 0);
        records.map(|record| share(record.gpu_used_bytes, record.gpu_total_bytes)).collect::<Vec<_>>()
    };
    // The watch sees no device where training was not planned for one, or it is off.
    Range::of(&watched).or_else(|| Range::of(&own()))
}

/// In the order in which rank 0, then the others, came to them.
fn by_phase(run: &Run) -> Vec<(Phase, u64)> {
    let mut peaks: Vec<(Phase, u64)> = Vec::new();
    for record in run.memory.iter().flatten() {
        match peaks.iter_mut().find(|(phase, _)| *phase == record.phase) {
            Some((_, peak)) => *peak = record.uss_bytes.max(*peak),
            None => peaks.push((record.phase, record.uss_bytes)),
        }
    }
    peaks
}

fn in_start(records: &[MemoryRecord]) -> impl Iterator<Item = bool> {
    records.iter().map(|record| record.phase == Phase::Start)
}

/// Records of the last start. The plan on disk belongs to it, since each start writes a plan.
struct Last<'a> {
    /// By rank; steps count from the one that it went on from.
    memory: Vec<Vec<MemoryRecord>>,
    node: Vec<&'a NodeRecord>,
    /// Peak by the launcher, where it counted this start alone.
    peak_bytes: Option<u64>,
}

impl<'a> Last<'a> {
    fn of(run: &'a Run) -> Self {
        let last = |records: &Vec<MemoryRecord>| {
            let records = &records[starts(in_start(records)).last().copied().unwrap_or(0)..];
            let from = records.iter().find(|record| record.phase != Phase::Start).map_or(0, |record| record.step);
            let of = |record: &MemoryRecord| MemoryRecord { step: record.step.saturating_sub(from), ..*record };
            records.iter().map(of).collect()
        };
        let memory: Vec<Vec<MemoryRecord>> = run.memory.iter().map(last).collect();
        let again = run.memory.iter().zip(&memory).any(|(all, last)| all.len() > last.len());
        let began = memory.iter().filter_map(|records| records.first()).map(|record| record.t).reduce(f64::min);
        // A first start begins with the launcher, before its ranks.
        let began = began.filter(|_| again).unwrap_or(f64::NEG_INFINITY);
        let peak_bytes = run.summary.as_ref().filter(|summary| summary.restarts == 0 && !run.open_ended);
        Self {
            memory,
            node: run.node.iter().filter(|record| record.t >= began).collect(),
            peak_bytes: peak_bytes.map(|summary| summary.peak_node_bytes),
        }
    }
}

/// One check per line of the host's table that a run leaves a trace of, then sums. What the plan counts per rank is
/// compared with the rank that used most.
fn checks(run: &Last, plan: &Plan) -> Vec<Check> {
    let of_interpreter = plan.budget.lines.iter().find(|line| line.name == LineId::Interpreter);
    // Ranks that were forked have it in common; the kernel counts it as each rank's own.
    let common = of_interpreter.filter(|line| line.per_rank_bytes.is_none()).map_or(0, |line| line.bytes);
    let own = of_interpreter.and_then(|line| line.per_rank_bytes).unwrap_or(0);
    let ranks: Vec<RankUse> = run.memory.iter().filter_map(|records| RankUse::of(records, common)).collect();
    let node = NodeUse::of(run, &ranks, common);
    let measured = |line: &BudgetLine| {
        Some(match line.name {
            LineId::Launcher => node.launcher,
            LineId::Libraries => node.libraries,
            LineId::PageCache => node.cache,
            LineId::Runtime => most(&ranks, |rank| rank.runtime).saturating_sub(own),
            LineId::ModelState => most(&ranks, |rank| rank.held.model_bytes),
            LineId::Activations => most(&ranks, |rank| rank.activations),
            LineId::Heap => most(&ranks, |rank| rank.heap),
            LineId::StagingSlots => most(&ranks, |rank| rank.held.slots_bytes),
            LineId::ValidationSlots => most(&ranks, |rank| rank.held.val_slots_bytes),
            LineId::DecodeScratch => most(&ranks, |rank| rank.held.scratch_bytes),
            LineId::ChunkCache => most(&ranks, |rank| rank.held.chunks_bytes),
            LineId::Collectives => most(&ranks, |rank| rank.held.meeting_bytes),
            LineId::CheckpointStaging => most(&ranks, |rank| rank.held.staging_bytes),
            LineId::Program => most(&ranks, RankUse::all),
            LineId::Reserve | LineId::CudaRuntime | LineId::Interpreter | LineId::RecordedStep | LineId::Other => {
                return None;
            }
        })
    };
    let check = |line: &BudgetLine| {
        let planned = line.per_rank_bytes.unwrap_or(line.bytes);
        Some(Check { bound: line.bound, ..Check::new(line.name.text(), planned, measured(line)?) })
    };
    let mut checks: Vec<Check> = plan.budget.lines.iter().filter(|line| line.bytes > 0).filter_map(check).collect();
    // Sums use the measured bytes for lines that are bounds.
    let claimed = |line: &BudgetLine, planned: u64| match measured(line) {
        Some(used) if line.bound => used.min(planned),
        _ => planned,
    };
    if !ranks.is_empty() {
        let each = plan.budget.lines.iter().filter_map(|line| Some(claimed(line, line.per_rank_bytes?)));
        checks.push(sum(
            "a rank, in all",
            each.sum::<u64>() + plan.budget.line_bytes(LineId::CheckpointStaging),
            most(&ranks, RankUse::all),
        ));
    }
    let parts =
        plan.budget.lines.iter().filter(|line| line.name != LineId::Reserve).map(|line| match line.per_rank_bytes {
            Some(each) => claimed(line, each) * (line.bytes / each.max(1)),
            None => claimed(line, line.bytes),
        });
    checks.push(sum("all of the job", parts.sum(), node.job));
    checks
}

/// Parts reach their peaks at different times: their sum is a bound.
fn sum(name: &'static str, planned_bytes: u64, measured_bytes: u64) -> Check {
    Check { bound: true, ..Check::new(name, planned_bytes, measured_bytes) }
}

fn most(ranks: &[RankUse], of: impl Fn(&RankUse) -> u64) -> u64 {
    ranks.iter().map(of).max().unwrap_or(0)
}

/// The node's parts, bytes.
struct NodeUse {
    launcher: u64,
    /// Pages of files that a rank maps: the same files, and so the same pages, in every rank.
    libraries: u64,
    cache: u64,
    job: u64,
}

impl NodeUse {
    /// Ranks reach their peaks in the same step, which samples of the node hit by chance alone: the job's is their sum, or what
    /// was sampled where that is more.
    fn of(run: &Last, ranks: &[RankUse], common: u64) -> Self {
        let launcher = run.node.iter().map(|record| record.launcher_bytes).max().unwrap_or(0);
        let cache = run.node.iter().map(|record| record.cache_bytes);
        let cache = cache.chain(run.memory.iter().flatten().map(|record| record.cache_bytes)).max().unwrap_or(0);
        let libraries = most(ranks, |rank| rank.libraries);
        let sampled = run.node.iter().map(|record| record.job_bytes);
        let sampled = sampled.chain(run.peak_bytes).max().unwrap_or(0);
        let parts = launcher + libraries + cache + common + ranks.iter().map(RankUse::all).sum::<u64>();
        Self { launcher, libraries, cache, job: if ranks.is_empty() { sampled } else { parts.max(sampled) } }
    }
}

/// Memory of one rank by what it came for, bytes.
#[derive(Clone, Copy, Debug, Default)]
struct RankUse {
    /// Own memory before the first step, without what is counted where it is held.
    runtime: u64,
    /// Tensors of a step at once, without the model's.
    activations: u64,
    /// Memory added by the steps: the kernel's peak minus all of these.
    heap: u64,
    held: Held,
    libraries: u64,
    /// The kernel's peak of own memory.
    own: u64,
}

impl RankUse {
    /// Without `common` bytes of own memory, which the ranks share. `None`: records without these numbers, as older ones are, or
    /// training never began.
    fn of(records: &[MemoryRecord], common: u64) -> Option<Self> {
        let first = records.iter().position(|record| record.phase == Phase::Train && record.held.model_bytes > 0)?;
        // Memory is counted a moment after it came: the least is the one without such a moment.
        let start = records[first..].iter().take_while(|record| record.step == 0);
        let runtime = start.map(|record| record.anon_bytes.saturating_sub(record.held.own_bytes())).min()?;
        let mut used = Self { runtime: runtime.saturating_sub(common), ..Self::default() };
        let (mut phase, mut there, mut grown) = (Phase::Other, Held::default(), 0);
        for record in &records[first..] {
            used.held = used.held.max(&record.held);
            // The kernel's peak is of the phase so far. Slots come and go with theirs, and copies for a checkpoint when written;
            // buffers share one heap with steps that keeps its size: what was once held is not taken for a step's.
            if phase != record.phase {
                (phase, there) = (record.phase, Held::default());
            }
            there = there.max(&record.held);
            let kept = Held {
                model_bytes: used.held.model_bytes,
                model_shared_bytes: used.held.model_shared_bytes,
                scratch_bytes: used.held.scratch_bytes,
                chunks_bytes: used.held.chunks_bytes,
                ..there
            };
            grown = record.anon_peak_bytes.saturating_sub(runtime + kept.own_bytes()).max(grown);
            let model = used.held.model_bytes.saturating_sub(used.held.model_shared_bytes);
            used.activations = record.held.tensors_bytes.saturating_sub(model).max(used.activations);
            used.libraries = used.libraries.max(record.file_bytes);
            used.own = used.own.max(record.anon_peak_bytes.saturating_sub(common));
        }
        used.heap = grown.saturating_sub(used.activations);
        Some(used)
    }

    /// All but the libraries.
    fn all(&self) -> u64 {
        self.own + self.held.model_shared_bytes + self.held.meeting_bytes
    }
}

fn events(run: &Run) -> Vec<(f64, String)> {
    let (began, language) = (run.began(), run.language.unwrap_or(Language::En));
    let text = |record: &NodeRecord| Some((record.t - began, event_text(language, record.event.as_ref()?)));
    run.node.iter().filter_map(text).collect()
}

impl Display for Analysis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cut = if self.cut_short { ", as far as whole: the log is cut short" } else { "" };
        writeln!(f, "samples      {} over {:.1} s{cut}", self.samples, self.duration_s)?;
        let Range { least, mean, most } = self.used;
        writeln!(f, "memory       least {least:.2}, mean {mean:.2}, most {most:.2} GiB")?;
        for (what, share) in [("machine", self.machine_percent), ("GPU", self.gpu_percent)] {
            if let Some(Range { mean, most, .. }) = share {
                writeln!(f, "{what:<12} mean {mean:.1}, at most {most:.1} % full, by all programs")?;
            }
        }
        writeln!(f, "trend        {}", self.growth)?;
        self.phases(f)?;
        self.table(f)?;
        for (index, (at, text)) in self.events.iter().enumerate() {
            let text = text.replace('\n', "\n                 ");
            writeln!(f, "{:>3}  {at:>8.1} s  {text}", index + 1)?;
        }
        Ok(())
    }
}

impl Analysis {
    fn phases(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (phase, bytes)) in self.by_phase.iter().enumerate() {
            let head = if index == 0 { "peak of a rank, own bytes" } else { "" };
            writeln!(f, "{head:<25}  {phase:<12} {:>10}", bytes_text(*bytes))?;
        }
        Ok(())
    }

    fn table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.checks.is_empty() {
            return Ok(());
        }
        if self.starts > 1 {
            writeln!(f, "the ranks were started {} times: the last start beside its plan", self.starts)?;
        }
        writeln!(f, "{:<20}{:>12}{:>12}  planned / measured", "budget line", "planned", "measured")?;
        for check in &self.checks {
            let (planned, measured) = (bytes_text(check.planned_bytes), bytes_text(check.measured_bytes));
            let ratio = check.ratio().map(|ratio| format!("{ratio:.2}  ")).unwrap_or_default();
            writeln!(f, "{:<20}{planned:>12}{measured:>12}  {ratio}{}", check.name, check.verdict().word())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
