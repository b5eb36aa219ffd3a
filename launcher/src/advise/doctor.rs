//! Symptom, cause, and what to change, from what a run has left behind.

use super::log::Run;
use crate::config::Language;
use crate::plan::bytes_text;
use crate::watch::Trend;

/// A fifth of the step spent waiting for data is worth a word.
const WAIT_SHARE: f64 = 0.2;
/// Hit rate of a warm cache, below which most of the work is done again.
const LOW_HITS: f64 = 0.5;
/// Later steps against the fastest tenth: slower than half is worth a word.
const SLOWED: f64 = 0.5;
/// Peak of the node over its budget.
const NEAR_BUDGET: f64 = 0.9;
/// Records to look at before anything is said about speed.
const LEAST_RECORDS: usize = 5;

/// One thing found. All three are sentences for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// `oom`, `pressure`, `data_wait`, `hit_rate`, `slower`, `leak`, `skipped`.
    pub kind: &'static str,
    pub symptom: String,
    pub cause: String,
    pub change: String,
}

/// Everything that can be said of `run`, the worst first; empty: nothing is wrong.
pub fn doctor(run: &Run, language: Language) -> Vec<Finding> {
    let zh = language == Language::Zh;
    [
        killed(run, zh),
        pressure(run, zh),
        leak(run, zh),
        waiting(run, zh),
        hits(run, zh),
        slower(run, zh),
        skipped(run, zh),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn finding(
    kind: &'static str,
    symptom: String,
    cause: impl Into<String>,
    change: impl Into<String>,
) -> Option<Finding> {
    Some(Finding { kind, symptom, cause: cause.into(), change: change.into() })
}

/// One of two texts.
fn say(zh: bool, en: impl Into<String>, chinese: impl Into<String>) -> String {
    if zh { chinese.into() } else { en.into() }
}

fn killed(run: &Run, zh: bool) -> Option<Finding> {
    let summary = run.summary.as_ref()?;
    let reason = summary.reason.clone().filter(|_| summary.status == "failed" || summary.restarts > 0)?;
    let restarts = summary.restarts;
    finding(
        "oom",
        say(zh, format!("a rank was killed ({restarts} restarts)"), format!("有进程被终止（重启 {restarts} 次）")),
        reason,
        say(
            zh,
            "lower memory.budget, or take a smaller config (low_memory); --max-restarts 1 goes on with a smaller plan by itself",
            "降低 memory.budget，或使用更小的配置（low_memory）；--max-restarts 1 会自动以更小的计划继续",
        ),
    )
}

fn pressure(run: &Run, zh: bool) -> Option<Finding> {
    let worst = run.node.iter().filter(|record| record.level == "critical" || record.level == "warning").count();
    let (summary, plan) = (run.summary.as_ref(), run.plan.as_ref()?);
    let peak = summary.map_or(0, |s| s.peak_node_bytes).max(run.node.iter().map(|r| r.job_bytes).max().unwrap_or(0));
    let full = peak as f64 > NEAR_BUDGET * plan.budget.total_bytes as f64 && plan.budget.total_bytes > 0;
    if worst == 0 && !full {
        return None;
    }
    let (peak, budget) = (bytes_text(peak), bytes_text(plan.budget.total_bytes));
    let others = run.node.iter().any(|r| r.system_available_bytes < r.system_total_bytes / 10);
    finding(
        "pressure",
        say(
            zh,
            format!("memory was short in {worst} samples; the job's peak was {peak} of {budget}"),
            format!("{worst} 个采样内存紧张；任务峰值 {peak}，预算 {budget}"),
        ),
        if others {
            say(zh, "others filled the machine beside this job", "本机其他程序占满了内存")
        } else {
            say(zh, "the job itself came near its budget", "任务本身接近预算")
        },
        say(
            zh,
            "data.cache_size_gb, train.num_workers or train.prefetch_factor down; `launch plan` shows what each line takes",
            "减小 data.cache_size_gb、train.num_workers 或 train.prefetch_factor；`launch plan` 显示每一项的占用",
        ),
    )
}

fn leak(run: &Run, zh: bool) -> Option<Finding> {
    let of_rank = |records: &Vec<crate::contract::MemoryRecord>| {
        let mut trend = Trend::default();
        records.iter().for_each(|record| trend.add(record.step, record.uss_bytes));
        trend.leak()
    };
    let (rank, leak) = run.memory.iter().enumerate().find_map(|(rank, records)| Some((rank, of_rank(records)?)))?;
    let per_thousand = bytes_text((1000.0 * leak.bytes_per_step) as u64);
    finding(
        "leak",
        say(
            zh,
            format!("rank {rank} grows by {per_thousand} per 1000 steps and does not stop"),
            format!("rank {rank} 每 1000 步增长 {per_thousand}，且没有停止"),
        ),
        say(
            zh,
            "something is kept from step to step: tensors in a list, a growing cache, a history",
            "某些对象被逐步保留：列表中的张量、增长的缓存或历史记录",
        ),
        say(
            zh,
            "memory.rank<R>.jsonl shows the phase in which it grows; until it is found, --max-restarts and log.save_every_steps",
            "memory.rank<R>.jsonl 显示增长所在阶段；找到之前可使用 --max-restarts 与 log.save_every_steps",
        ),
    )
}

fn waiting(run: &Run, zh: bool) -> Option<Finding> {
    // The first steps fill caches and say little.
    let records = run.metrics.get(1..).filter(|records| records.len() >= LEAST_RECORDS)?;
    let (wait, step) = records.iter().fold((0.0, 0.0), |sum, r| (sum.0 + r.data_wait_s, sum.1 + r.step_s));
    let share = wait / step;
    (share > WAIT_SHARE).then_some(())?;
    let percent = 100.0 * share;
    let low = run.summary.as_ref().is_some_and(|s| hit_rate(s).is_some_and(|rate| rate < LOW_HITS));
    finding(
        "data_wait",
        say(zh, format!("{percent:.0} % of the steps is waiting for data"), format!("{percent:.0} % 的时间在等待数据")),
        if low {
            say(zh, "most entries are read and decoded again", "大部分数据被重复读取和解码")
        } else {
            say(zh, "too few loader threads, or too little ahead", "加载线程过少或预取不足")
        },
        if low {
            say(zh, "see the hit rate below", "见下方命中率")
        } else {
            say(
                zh,
                "train.num_workers and train.prefetch_factor up; each thread's memory is in the plan",
                "增大 train.num_workers 和 train.prefetch_factor；计划中列出每个线程的内存",
            )
        },
    )
}

fn hit_rate(summary: &crate::contract::Summary) -> Option<f64> {
    let cache = &summary.cache;
    let lookups = cache.hits + cache.misses + cache.bypasses;
    (cache.policy != "off" && lookups > 0).then(|| cache.hits as f64 / lookups as f64)
}

fn hits(run: &Run, zh: bool) -> Option<Finding> {
    let summary = run.summary.as_ref()?;
    // In a single epoch nothing can be found again.
    let rate = hit_rate(summary).filter(|rate| *rate < LOW_HITS && summary.epochs > 1)?;
    let cache = &summary.cache;
    let lru = cache.policy == "lru";
    finding(
        "hit_rate",
        say(
            zh,
            format!(
                "the page cache hits {:.1} % ({}, {})",
                100.0 * rate,
                cache.policy,
                bytes_text(cache.capacity_bytes)
            ),
            format!("页缓存命中率 {:.1} %（{}，{}）", 100.0 * rate, cache.policy, bytes_text(cache.capacity_bytes)),
        ),
        if lru {
            say(zh, "lru drops what is needed next when samples are shuffled", "打乱顺序时 lru 会丢弃即将使用的数据")
        } else {
            say(zh, "the cache is small beside the data", "缓存相对数据过小")
        },
        if lru {
            say(zh, "data.cache: auto", "data.cache: auto")
        } else {
            say(
                zh,
                "more memory.budget or data.cache_size_gb; else data.shuffle_mode: block, which reads each page once per epoch",
                "增大 memory.budget 或 data.cache_size_gb；否则使用 data.shuffle_mode: block，每页每轮只读一次",
            )
        },
    )
}

fn slower(run: &Run, zh: bool) -> Option<Finding> {
    let rates: Vec<f64> = run.metrics.iter().map(|r| r.samples_per_s).filter(|rate| *rate > 0.0).collect();
    (rates.len() >= 4 * LEAST_RECORDS).then_some(())?;
    let median = |rates: &[f64]| {
        let mut sorted = rates.to_vec();
        sorted.sort_by(f64::total_cmp);
        sorted[sorted.len() / 2]
    };
    let quarter = rates.len() / 4;
    let (early, late) = (median(&rates[..quarter]), median(&rates[rates.len() - quarter..]));
    (late < SLOWED * early).then_some(())?;
    finding(
        "slower",
        say(
            zh,
            format!("the last quarter ran at {late:.0} samples/s, the first at {early:.0}"),
            format!("最后四分之一为 {late:.0} 样本/秒，最初为 {early:.0}"),
        ),
        say(
            zh,
            "cores or memory are shared with others now, or the watch holds prefetching back",
            "核心或内存被其他程序占用，或内存监视暂停了预取",
        ),
        say(
            zh,
            "memory.node.jsonl names events and pressure; fewer ranks: --ranks",
            "memory.node.jsonl 记录事件与压力；减少进程：--ranks",
        ),
    )
}

fn skipped(run: &Run, zh: bool) -> Option<Finding> {
    let files = run.summary.as_ref().map(|s| s.files_skipped).filter(|files| *files > 0)?;
    finding(
        "skipped",
        say(zh, format!("{files} files were left out"), format!("跳过了 {files} 个文件")),
        say(zh, "they cannot be read or hold what they must not", "文件无法读取或内容不符"),
        say(
            zh,
            "rank0.log names each; data.skip_bad: false stops at the first",
            "rank0.log 列出每个文件；data.skip_bad: false 会在第一个处停止",
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::{CacheSummary, MemoryRecord, MetricsRecord, NodeRecord, Summary};
    use crate::plan::Plan;

    fn healthy() -> Run {
        let mut plan = Plan::default();
        plan.budget.total_bytes = 10 << 30;
        let record = |i: u64| MetricsRecord {
            step: i,
            step_s: 0.1,
            data_wait_s: 0.001,
            samples_per_s: 1000.0,
            ..Default::default()
        };
        let memory = |i: u64| MemoryRecord { step: i, uss_bytes: (200 << 20) + (i % 7) * 4096, ..Default::default() };
        let cache = CacheSummary { policy: "pin".into(), hits: 900, misses: 100, ..Default::default() };
        Run {
            plan: Some(plan),
            summary: Some(Summary {
                status: "finished".into(),
                epochs: 3,
                peak_node_bytes: 1 << 30,
                cache,
                ..Default::default()
            }),
            metrics: (0..100).map(record).collect(),
            memory: vec![(0..400).map(memory).collect()],
            ..Run::default()
        }
    }

    fn kinds(run: &Run) -> Vec<&'static str> {
        let found = doctor(run, Language::En);
        assert_eq!(found.len(), doctor(run, Language::Zh).len());
        assert!(found.iter().all(|f| !f.symptom.is_empty() && !f.cause.is_empty() && !f.change.is_empty()));
        found.iter().map(|f| f.kind).collect()
    }

    #[test]
    fn item_72_a_healthy_run_has_no_findings() {
        assert_eq!(kinds(&healthy()), Vec::<&str>::new());
        assert_eq!(kinds(&Run::default()), Vec::<&str>::new());
    }

    #[test]
    fn item_72_each_symptom_is_told_with_its_cause() {
        let mut run = healthy();
        run.metrics.iter_mut().for_each(|r| r.data_wait_s = 0.05);
        assert_eq!(kinds(&run), ["data_wait"]);

        let mut run = healthy();
        run.summary.as_mut().unwrap().cache =
            CacheSummary { policy: "lru".into(), hits: 10, misses: 90, ..Default::default() };
        assert_eq!(kinds(&run), ["hit_rate"]);
        assert_eq!(doctor(&run, Language::En)[0].change, "data.cache: auto");
        run.summary.as_mut().unwrap().epochs = 1;
        assert_eq!(kinds(&run), Vec::<&str>::new());

        let mut run = healthy();
        run.memory[0].iter_mut().enumerate().for_each(|(i, r)| r.uss_bytes = (200 + i as u64) << 20);
        assert_eq!(kinds(&run), ["leak"]);

        let mut run = healthy();
        run.metrics[60..].iter_mut().for_each(|r| r.samples_per_s = 300.0);
        assert_eq!(kinds(&run), ["slower"]);

        let mut run = healthy();
        run.summary.as_mut().unwrap().status = "failed".into();
        run.summary.as_mut().unwrap().reason = Some("rank 1 was killed by the kernel's memory killer".into());
        run.node.push(NodeRecord { level: "critical".into(), ..Default::default() });
        assert_eq!(kinds(&run), ["oom", "pressure"]);
    }
}
