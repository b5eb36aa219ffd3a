//! Short memory, and who took it: by the records of the node, never by guess.

use super::{Finding, finding, say};
use crate::advise::log::Run;
use crate::watch::advice;
use spec::config::Language;
use spec::contract::{Event, Level, LineId, NodeRecord};
use spec::plan::{Plan, bytes_text};

/// Peak of the node over its budget.
const NEAR_BUDGET: f64 = 0.9;
/// Growth of others that counts, of what there is: as the watch has it.
const GROWN: u64 = 50;
/// Share of what there is, taken by others from the start, that leaves too little.
const CROWDED: f64 = 0.5;
/// Shares of a log's samples, percent, from which on memory was short: the watch's own levels of warning.
const LOG_RAM_PERCENT: f64 = 80.0;
const LOG_GPU_PERCENT: f64 = 90.0;

/// Memory that can fill up: the machine's, or that of the cgroup that binds closer. Bytes.
struct Room {
    group: bool,
    used: u64,
    total: u64,
    job: u64,
}

impl Room {
    fn of(record: &NodeRecord) -> Self {
        let (total, job) = (record.system_total_bytes, record.job_bytes);
        let system = Self { group: false, used: total.saturating_sub(record.system_available_bytes), total, job };
        let group = record.cgroup.and_then(|group| {
            Some(Self {
                group: true,
                used: group.used_bytes,
                total: group.limit_bytes.filter(|bytes| *bytes > 0)?,
                job,
            })
        });
        group.filter(|group| group.share() >= system.share()).unwrap_or(system)
    }

    /// The same kind at another moment.
    fn like(&self, record: &NodeRecord) -> Self {
        match record.cgroup {
            Some(group) if self.group => Self { used: group.used_bytes, job: record.job_bytes, ..*self },
            _ => {
                let used = record.system_total_bytes.saturating_sub(record.system_available_bytes);
                Self { used, job: record.job_bytes, ..*self }
            }
        }
    }

    fn share(&self) -> f64 {
        self.used as f64 / self.total.max(1) as f64
    }

    fn others(&self) -> u64 {
        self.used.saturating_sub(self.job)
    }
}

enum Cause {
    /// Others grew by so many bytes beside the job.
    Others {
        grown: u64,
        group: bool,
    },
    /// They had so many from the start.
    Crowded {
        others: u64,
        total: u64,
    },
    /// The job is above its plan, or near its budget.
    Job,
    Device {
        percent: f64,
    },
    Unknown,
}

fn is_short(record: &NodeRecord) -> bool {
    record.level >= Level::Warning
}

pub(super) fn pressure(run: &Run, zh: bool) -> Option<Finding> {
    let plan = run.plan.as_ref()?;
    let short = run.node.iter().filter(|record| is_short(record)).count();
    let sampled = run.node.iter().map(|record| record.job_bytes).max().unwrap_or(0);
    let peak = run.summary.as_ref().map_or(0, |summary| summary.peak_node_bytes).max(sampled);
    if short == 0 && !is_full(plan, peak) {
        return None;
    }
    let found = cause(run, plan, peak);
    let (peak, budget) = (bytes_text(peak), bytes_text(plan.budget.total_bytes));
    let samples = if short == 1 { "sample" } else { "samples" };
    let symptom = if short > 0 {
        say(
            zh,
            format!("memory was short in {short} {samples}; the job's peak was {peak}, its budget {budget}"),
            format!("{short} 个采样内存紧张；任务峰值 {peak}，预算 {budget}"),
        )
    } else {
        say(zh, format!("the job's peak was {peak}, its budget {budget}"), format!("任务峰值 {peak}，预算 {budget}"))
    };
    let mut text = in_words(&found, &peak, &budget, zh);
    let language = if zh { Language::Zh } else { Language::En };
    if let (Cause::Others { .. } | Cause::Unknown, Some(said)) = (&found, advised(run, language)) {
        text += &say(zh, format!("\nthe watch said: {said}"), format!("\n内存监视的提示：{said}"));
    }
    finding("pressure", symptom, text, change(&found, zh))
}

/// Near the budget, and beyond what the plan meant to use of it: a plan may fill its budget.
fn is_full(plan: &Plan, peak: u64) -> bool {
    let total = plan.budget.total_bytes;
    let near = total > 0 && peak as f64 > NEAR_BUDGET * total as f64;
    near && peak > planned(plan)
}

/// All lines but the reserve, bytes.
fn planned(plan: &Plan) -> u64 {
    plan.budget.need_bytes().saturating_sub(plan.budget.line_bytes(LineId::Reserve))
}

/// By the fullest record of those in which memory was short, against the first record of the same processes: what the job
/// took since then is planned for, what others took is not.
fn cause(run: &Run, plan: &Plan, peak: u64) -> Cause {
    let fullest = |a: &&NodeRecord, b: &&NodeRecord| Room::of(a).share().total_cmp(&Room::of(b).share());
    let Some(worst) = run.node.iter().filter(|record| is_short(record)).max_by(fullest) else { return Cause::Job };
    let room = Room::of(worst);
    let first = run.node.iter().find(|record| record.job_bytes > 0).unwrap_or(worst);
    let before = room.like(first).others();
    let grown = room.others().saturating_sub(before);
    let over = Some(planned(plan)).filter(|bytes| *bytes > 0).map_or(0, |bytes| room.job.saturating_sub(bytes));
    let devices = worst.gpus.iter().map(|gpu| 100.0 * gpu.used_bytes as f64 / gpu.total_bytes.max(1) as f64);
    let device = devices.reduce(f64::max).filter(|percent| *percent / 100.0 > room.share());
    match device {
        _ if grown > room.total / GROWN && grown > over => Cause::Others { grown, group: room.group },
        Some(percent) => Cause::Device { percent },
        None if is_full(plan, peak) => Cause::Job,
        None if before as f64 > CROWDED * room.total as f64 => Cause::Crowded { others: before, total: room.total },
        None => Cause::Unknown,
    }
}

/// The watch's advice at the first level that counts.
fn advised(run: &Run, language: Language) -> Option<String> {
    run.node.iter().filter(|record| is_short(record)).find_map(|record| match &record.event {
        Some(Event::Level { cause, .. }) => Some(advice(language, cause)),
        _ => None,
    })
}

fn in_words(cause: &Cause, peak: &str, budget: &str, zh: bool) -> String {
    match cause {
        Cause::Others { grown, group } => {
            let grown = bytes_text(*grown);
            let place = if *group { "in the job's cgroup" } else { "on this machine" };
            let chinese = if *group { "同一 cgroup 中" } else { "本机" };
            say(
                zh,
                format!("other programs {place} took {grown} more than at the start"),
                format!("{chinese}其他程序比启动时多占用 {grown}"),
            )
        }
        Cause::Crowded { others, total } => {
            let (others, total) = (bytes_text(*others), bytes_text(*total));
            say(
                zh,
                format!("other programs held {others} of {total} from the start"),
                format!("其他程序从一开始就占用 {total} 中的 {others}"),
            )
        }
        Cause::Job => say(
            zh,
            format!("the job itself used {peak} of its budget of {budget}, more than planned"),
            format!("任务本身使用了预算 {budget} 中的 {peak}，超出计划"),
        ),
        Cause::Device { percent } => {
            say(zh, format!("a device's memory was {percent:.1} % full"), format!("设备内存占用 {percent:.1} %"))
        }
        Cause::Unknown => {
            say(zh, "neither the job nor others stand out in the records", "记录中任务和其他程序都没有明显异常")
        }
    }
}

fn change(cause: &Cause, zh: bool) -> String {
    match cause {
        Cause::Others { .. } | Cause::Crowded { .. } => say(
            zh,
            "end them or wait for them, or lower memory.budget so that they have room beside this job",
            "结束或等待这些程序，或降低 memory.budget 为它们留出空间",
        ),
        Cause::Device { .. } => say(
            zh,
            "train.microbatch or train.batch_size down, or train.amp: bf16",
            "减小 train.microbatch 或 train.batch_size，或使用 train.amp: bf16",
        ),
        Cause::Job | Cause::Unknown => say(
            zh,
            "data.cache_size_gb, train.num_workers or train.prefetch_factor down; `launch plan` shows what each line takes",
            "减小 data.cache_size_gb、train.num_workers 或 train.prefetch_factor；`launch plan` 显示每一项的占用",
        ),
    }
}

/// Finding from a monitor's log, which holds levels but no causes.
pub(super) fn of_log(run: &Run, zh: bool) -> Option<Finding> {
    let ram = run.monitor.iter().map(|sample| sample.ram_percent).reduce(f64::max)?;
    let gpu = run.monitor.iter().filter_map(|sample| sample.gpu_memory_percent).fold(0.0, f64::max);
    let parts = [("RAM", ram, LOG_RAM_PERCENT), ("GPU", gpu, LOG_GPU_PERCENT)];
    let full: Vec<String> = parts
        .iter()
        .filter(|(_, most, from)| most >= from)
        .map(|(name, most, _)| format!("{name} {most:.1} %"))
        .collect();
    (!full.is_empty()).then_some(())?;
    finding(
        "pressure",
        say(zh, format!("memory was nearly full: {}", full.join(", ")), format!("内存接近用满：{}", full.join("，"))),
        say(zh, "the log does not tell whose memory it is", "日志未指明内存由谁占用"),
        if gpu >= LOG_GPU_PERCENT { change(&Cause::Device { percent: gpu }, zh) } else { change(&Cause::Unknown, zh) },
    )
}
