//! Reasons why a run is slow: waiting for data, a low hit rate, slowing down.

use super::{Finding, finding, say};
use crate::advise::log::Run;
use spec::contract::{CacheMode, Event, MetricsRecord, Relief};
use spec::plan::bytes_text;

/// A fifth of the step spent waiting for data is worth a word.
const WAIT_SHARE: f64 = 0.2;
/// Hit rate of a warm cache, below which most of the work is done again.
const LOW_HITS: f64 = 0.5;
/// Later steps against the fastest tenth: slower than half is worth a word.
const SLOWED: f64 = 0.5;
/// Records to look at before anything is said about speed.
const LEAST_RECORDS: usize = 5;

/// True if an event holds the loader back, false if it releases the loader; `None` for other events.
fn loader_held(event: &Event) -> Option<bool> {
    match event {
        Event::Relieved { action, .. } | Event::Unanswered { action } => match action {
            Relief::PausePrefetch => Some(true),
            Relief::Resume => Some(false),
            _ => None,
        },
        _ => None,
    }
}

/// From when to when the watch held the loader back, seconds since the Unix epoch.
fn held(run: &Run) -> Vec<(f64, f64)> {
    let mut spans: Vec<(f64, f64)> = Vec::new();
    for record in &run.node {
        match (record.event.as_ref().and_then(loader_held), spans.last_mut()) {
            (Some(true), Some(last)) if last.1 == f64::INFINITY => {}
            (Some(true), _) => spans.push((record.t, f64::INFINITY)),
            (Some(false), Some(last)) => last.1 = last.1.min(record.t),
            _ => {}
        }
    }
    spans
}

fn within(spans: &[(f64, f64)], record: &MetricsRecord) -> bool {
    spans.iter().any(|(from, to)| record.t >= *from && record.t - record.step_s <= *to)
}

/// Share of the steps spent waiting. `None` means too few steps to judge.
fn wait_share<'a>(records: impl Iterator<Item = &'a MetricsRecord>) -> Option<f64> {
    let (count, wait, step) = records.fold((0, 0.0, 0.0), |(n, w, s), r| (n + 1, w + r.data_wait_s, s + r.step_s));
    (count >= LEAST_RECORDS && step > 0.0).then(|| wait / step)
}

pub(super) fn waiting(run: &Run, zh: bool) -> Option<Finding> {
    // The first steps fill caches and say little.
    let records = run.metrics.get(1..)?;
    let share = wait_share(records.iter()).filter(|share| *share > WAIT_SHARE)?;
    let spans = held(run);
    let free = wait_share(records.iter().filter(|record| !within(&spans, record)));
    let by_watch = !spans.is_empty() && free.is_none_or(|share| share <= WAIT_SHARE);
    let percent = 100.0 * if by_watch { share } else { free.unwrap_or(share) };
    let (cause, change) = if by_watch { held_back(zh) } else { slow_data(run, zh) };
    finding(
        "data_wait",
        say(zh, format!("{percent:.0} % of the steps is waiting for data"), format!("{percent:.0} % 的时间在等待数据")),
        cause,
        change,
    )
}

fn held_back(zh: bool) -> (String, String) {
    let cause = say(
        zh,
        "the watch held prefetching back while memory was short, to give memory back",
        "内存紧张期间，内存监视暂停了预取以归还内存",
    );
    let change = say(
        zh,
        "more loader threads would take more memory: end the pressure, see there",
        "增加加载线程会占用更多内存：请先解决内存紧张，见相应条目",
    );
    (cause, change)
}

fn slow_data(run: &Run, zh: bool) -> (String, String) {
    let uncached = run.plan.as_ref().is_some_and(|plan| {
        let off = plan.budget.cache_policy == CacheMode::Off || plan.budget.page_cache_bytes == 0;
        off && plan.loader.chunk_cache_bytes == 0 && !plan.budget.lines.is_empty()
    });
    if uncached {
        let cause = say(
            zh,
            "the page cache is off and there is no chunk cache: every sample is read and decoded anew",
            "页缓存已关闭且没有块缓存：每个样本都重新读取和解码",
        );
        let change = say(
            zh,
            "data.cache: auto, with memory.budget for it, or data.chunk_cache_size: 64MiB",
            "data.cache: auto（memory.budget 需留出空间），或 data.chunk_cache_size: 64MiB",
        );
        return (cause, change);
    }
    if low_hits(run).is_some() {
        return (
            say(zh, "most entries are read and decoded again", "大部分数据被重复读取和解码"),
            say(zh, "see the hit rate below", "见下方命中率"),
        );
    }
    let change = say(
        zh,
        "train.num_workers and train.prefetch_factor up; each thread's memory is in the plan",
        "增大 train.num_workers 和 train.prefetch_factor；计划中列出每个线程的内存",
    );
    (say(zh, "too few loader threads, or too little ahead", "加载线程过少或预取不足"), change)
}

/// The hit rate, where it is low and could be higher: in a single epoch nothing can be found again.
fn low_hits(run: &Run) -> Option<f64> {
    let summary = run.summary.as_ref()?;
    let cache = &summary.cache;
    let lookups = cache.hits + cache.misses + cache.bypasses;
    let rate = (cache.policy != CacheMode::Off && lookups > 0).then(|| cache.hits as f64 / lookups as f64)?;
    (rate < LOW_HITS && summary.epochs > 1).then_some(rate)
}

pub(super) fn hits(run: &Run, zh: bool) -> Option<Finding> {
    let rate = 100.0 * low_hits(run)?;
    let cache = &run.summary.as_ref()?.cache;
    let (policy, size) = (&cache.policy, bytes_text(cache.capacity_bytes));
    let lru = *policy == CacheMode::Lru;
    let small = say(zh, format!("{size} are little beside the data"), format!("{size} 的缓存相对数据过小"));
    finding(
        "hit_rate",
        say(
            zh,
            format!("the page cache hits {rate:.1} % ({policy}, {size})"),
            format!("页缓存命中率 {rate:.1} %（{policy}，{size}）"),
        ),
        if lru {
            let drops = say(
                zh,
                "lru drops what is needed next when samples are shuffled",
                "打乱顺序时 lru 会丢弃即将使用的数据",
            );
            say(zh, format!("{small}, and {drops}"), format!("{small}，且{drops}"))
        } else {
            small
        },
        if lru {
            say(
                zh,
                "data.cache: auto keeps what fits; for more hits more memory.budget or data.cache_size_gb",
                "data.cache: auto 保留放得下的部分；要更高命中率请增大 memory.budget 或 data.cache_size_gb",
            )
        } else {
            say(
                zh,
                "more memory.budget or data.cache_size_gb; else data.shuffle_mode: block, which reads each page once per epoch",
                "增大 memory.budget 或 data.cache_size_gb；否则使用 data.shuffle_mode: block，每页每轮只读一次",
            )
        },
    )
}

pub(super) fn slower(run: &Run, zh: bool) -> Option<Finding> {
    let timed: Vec<&MetricsRecord> = run.metrics.iter().filter(|r| r.samples_per_s > 0.0).collect();
    (timed.len() >= 4 * LEAST_RECORDS).then_some(())?;
    let median = |records: &[&MetricsRecord]| {
        let mut sorted: Vec<f64> = records.iter().map(|record| record.samples_per_s).collect();
        sorted.sort_by(f64::total_cmp);
        sorted[sorted.len() / 2]
    };
    let quarter = timed.len() / 4;
    let last = &timed[timed.len() - quarter..];
    let (early, late) = (median(&timed[..quarter]), median(last));
    (late < SLOWED * early).then_some(())?;
    let spans = held(run);
    let by_watch = last.iter().filter(|record| within(&spans, record)).count() > quarter / 2;
    let (cause, change) = if by_watch {
        held_back(zh)
    } else {
        let cause = say(zh, "cores, disk or memory are shared with others now", "核心、磁盘或内存正与其他程序共享");
        let change = say(
            zh,
            "memory.node.jsonl names events and pressure; fewer ranks: --ranks",
            "memory.node.jsonl 记录事件与压力；减少进程：--ranks",
        );
        (cause, change)
    };
    finding(
        "slower",
        say(
            zh,
            format!("the last quarter ran at {late:.0} samples/s, the first at {early:.0}"),
            format!("最后四分之一为 {late:.0} 样本/秒，最初为 {early:.0}"),
        ),
        cause,
        change,
    )
}
