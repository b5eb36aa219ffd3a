//! Text of the watch's events and advice, in the guides' words: English and Chinese.

use super::level::{is_gpu, share};
use spec::config::Language;
use spec::contract::{Cause, Effect, Event, Fill, Level, LevelChange, Program, Relief, Source};

const MIB: f64 = (1u64 << 20) as f64;
const GIB: f64 = (1u64 << 30) as f64;

/// MiB and GiB written MB and GB, as in the guides.
pub fn size(bytes: u64) -> String {
    if bytes >= 1 << 30 { format!("{:.1}GB", bytes as f64 / GIB) } else { format!("{:.1}MB", bytes as f64 / MIB) }
}

fn pick<'a>(language: Language, en: &'a str, zh: &'a str) -> &'a str {
    match language {
        Language::En => en,
        Language::Zh => zh,
    }
}

/// Mark and name of a level.
fn title(language: Language, level: Level) -> &'static str {
    match (level, language) {
        (Level::Normal, Language::En) => "memory is back to normal",
        (Level::Normal, Language::Zh) => "内存恢复正常",
        (Level::Note, Language::En) => "🟡 note",
        (Level::Note, Language::Zh) => "🟡 注意",
        (Level::Warning, Language::En) => "🟠 warning",
        (Level::Warning, Language::Zh) => "🟠 警告",
        (Level::Critical, Language::En) => "🔴 critical",
        (Level::Critical, Language::Zh) => "🔴 危险",
    }
}

fn source(language: Language, source: Source) -> String {
    let zh = language == Language::Zh;
    match source {
        Source::Budget if zh => "内存预算".into(),
        Source::Budget => "memory budget".into(),
        Source::System if zh => "系统内存".into(),
        Source::System => "system memory".into(),
        Source::Cgroup if zh => "cgroup 内存".into(),
        Source::Cgroup => "cgroup limit".into(),
        Source::Gpu(index) if zh => format!("GPU {index} 内存"),
        Source::Gpu(index) => format!("GPU {index} memory"),
    }
}

/// How full a source is; a limit is named behind the share of it.
fn fullness(language: Language, at: &Fill) -> String {
    let (name, percent) = (source(language, at.source), 100.0 * share(at));
    match (language, at.source) {
        (Language::En, Source::Budget | Source::Cgroup) => format!("{percent:.1}% of the {name}"),
        _ => format!("{name} {percent:.1}%"),
    }
}

/// The text of an event, perhaps of several lines.
pub fn event_text(language: Language, event: &Event) -> String {
    match event {
        Event::Level { changes, cause } => levels(language, changes, cause).join("\n"),
        Event::Continued => pick(language, "the run continues in new processes", "运行由新进程继续").into(),
        Event::Relieved { action, effect: done, before_bytes, after_bytes } => {
            let what = relief(language, action) + &effect(language, done);
            relieved(language, &what, *before_bytes, *after_bytes)
        }
        Event::Unanswered { action } => unanswered(language, &relief(language, action)),
        Event::Cache { shrinks, wanted_bytes, before_bytes, after_bytes } => {
            let wanted = wanted_bytes.map(|bytes| wanted(language, bytes)).unwrap_or_default();
            let what = cache(language, *shrinks).to_owned() + &wanted;
            relieved(language, &what, *before_bytes, *after_bytes)
        }
        Event::Leak { rank, bytes_per_step, steps_left, hours_left } => {
            leak(language, *rank, *bytes_per_step, *steps_left, *hours_left)
        }
        Event::Suspended { ranks } => suspended(language, ranks),
        Event::RanAgain { ranks, seconds } => run_again(language, ranks, *seconds),
        Event::DidNotRun { seconds } => did_not_run(language, *seconds),
        Event::Stop { at, cause } => stop_reason(language, at, cause),
        Event::Unstoppable { at, cause } => unstoppable(language, &stop_reason(language, at, cause)),
        Event::Failed { text, .. } | Event::Text { text } => text.clone(),
    }
}

/// Lines of levels that changed together; advice comes once, behind the first.
fn levels(language: Language, changes: &[LevelChange], cause: &Cause) -> Vec<String> {
    let of_each = changes.iter().enumerate().flat_map(|(index, change)| {
        let lines = level_lines(language, change, cause);
        let count = if index == 0 { lines.len() } else { 1 };
        lines.into_iter().take(count)
    });
    of_each.collect()
}

/// The lines of a change of level: where things stand, then advice that fits the cause.
fn level_lines(language: Language, change: &LevelChange, cause: &Cause) -> Vec<String> {
    let LevelChange { level, at } = *change;
    let percent = 100.0 * share(&at);
    let (full, used, total) = (fullness(language, &at), size(at.used_bytes), size(at.total_bytes));
    let first = format!("{}: {full} ({used} / {total})", title(language, level));
    if level == Level::Normal {
        return vec![first];
    }
    let mut lines = vec![first];
    if level == Level::Critical && at.source == Source::System {
        // The guide's own two lines.
        lines.push(match language {
            Language::En => format!("⚠️  WARNING: System memory usage is critically high ({percent:.1}%)!"),
            Language::Zh => format!("⚠️  警告：系统内存使用率过高 ({percent:.1}%)！"),
        });
        lines.push(
            pick(
                language,
                "   Consider reducing CACHE_SIZE_GB or NUM_WORKERS in config.",
                "   建议在配置中减小 CACHE_SIZE_GB 或 NUM_WORKERS。",
            )
            .into(),
        );
    }
    if level == Level::Note && language == Language::Zh && !is_gpu(at.source) {
        lines.push("⚠️ 内存使用率较高，建议减小批次大小".into());
    }
    lines.push(format!("   {}", advice(language, cause)));
    lines
}

/// The change of settings that fits a cause.
pub fn advice(language: Language, cause: &Cause) -> String {
    let zh = language == Language::Zh;
    match cause {
        Cause::Others { grown_bytes, largest } => {
            let who = largest.as_ref().map(|Program { name, pid, bytes }| (name, pid, size(*bytes)));
            let grown = size(*grown_bytes);
            match who {
                Some((name, pid, bytes)) if zh => {
                    format!(
                        "其他程序自启动以来多占用 {grown}，最大的是 {name} (pid {pid}, {bytes})：请关闭它，或降低 memory.budget"
                    )
                }
                Some((name, pid, bytes)) => format!(
                    "other programs took {grown} since the start, the largest is {name} (pid {pid}, {bytes}): end it, or \
                     lower memory.budget"
                ),
                None if zh => format!("其他程序自启动以来多占用 {grown}：请关闭它们，或降低 memory.budget"),
                None => format!("other programs took {grown} since the start: end them, or lower memory.budget"),
            }
        }
        Cause::Rank { rank, over_bytes } if zh => format!(
            "rank {rank} 比计划多用 {}：请减小 train.microbatch 或 train.batch_size，或减少 train.num_workers",
            size(*over_bytes)
        ),
        Cause::Rank { rank, over_bytes } => format!(
            "rank {rank} uses {} more than planned: lower train.microbatch (the global batch stays), train.batch_size or \
             train.num_workers",
            size(*over_bytes)
        ),
        Cause::PageCache { bytes } if zh => format!("页缓存占用 {}：可减小 data.cache_size_gb", size(*bytes)),
        Cause::PageCache { bytes } => {
            format!("the page cache holds {}: data.cache_size_gb makes it smaller", size(*bytes))
        }
        Cause::Device if zh => "请减小 train.microbatch 或 train.batch_size，或使用 train.amp: bf16".into(),
        Cause::Device => "lower train.microbatch or train.batch_size, or set train.amp: bf16".into(),
        Cause::Unknown if zh => "建议减小 train.batch_size、train.num_workers 或 data.cache_size_gb".into(),
        Cause::Unknown => "lower train.batch_size, train.num_workers or data.cache_size_gb".into(),
    }
}

/// The effect that an order is to have.
fn relief(language: Language, relief: &Relief) -> String {
    let zh = language == Language::Zh;
    match relief {
        Relief::PausePrefetch => pick(language, "prefetching is paused", "暂停预取").into(),
        Relief::Decoders { threads } if zh => format!("解码线程减至每个 rank {threads} 个"),
        Relief::Decoders { threads } => format!("at most {threads} decoding threads per rank"),
        Relief::TrimAllocators => pick(language, "allocators give back what is free", "释放分配器的空闲内存").into(),
        Relief::HalveMicroBatch => pick(
            language,
            "micro-batch halved, accumulation doubled: the global batch stays",
            "微批次减半、梯度累积加倍：全局批次不变",
        )
        .into(),
        Relief::Stop { .. } => pick(language, "checkpoint, then a clean stop", "保存检查点，然后正常停止").into(),
        Relief::Resume => pick(
            language,
            "pressure is over: prefetching and decoding threads as planned",
            "内存压力已解除：预取与解码线程恢复原计划",
        )
        .into(),
    }
}

/// Ranks by number, as in `rank 1` or `ranks 1, 2`.
fn named(ranks: &[u32]) -> String {
    let numbers: Vec<String> = ranks.iter().map(u32::to_string).collect();
    format!("rank{} {}", if ranks.len() == 1 { "" } else { "s" }, numbers.join(", "))
}

/// Ranks that do not run.
fn suspended(language: Language, ranks: &[u32]) -> String {
    let ranks = named(ranks);
    match language {
        Language::Zh => {
            format!("{ranks} 已被暂停（SIGSTOP 或 cgroup 冻结）：其余进程等待，这段时间不计入 train.step_timeout")
        }
        Language::En => format!(
            "{ranks} suspended (stopped by a signal, or its cgroup is frozen): the others wait, and this time does not count \
             towards train.step_timeout; continue with kill -CONT, or thaw the cgroup"
        ),
    }
}

/// They run again.
fn run_again(language: Language, ranks: &[u32], seconds: f64) -> String {
    let ranks = named(ranks);
    match language {
        Language::Zh => format!("{ranks} 已恢复运行，暂停了 {seconds:.1} 秒"),
        Language::En => format!("{ranks} continued after {seconds:.1} s of suspension"),
    }
}

/// The launcher itself was suspended.
fn did_not_run(language: Language, seconds: f64) -> String {
    match language {
        Language::Zh => format!("作业被暂停了 {seconds:.1} 秒：这段时间不计入任何时限"),
        Language::En => format!("the job was suspended for {seconds:.1} s: this time counts towards no limit"),
    }
}

/// Result of an order, with bytes before and after over all ranks.
fn relieved(language: Language, what: &str, before: u64, after: u64) -> String {
    let (before, after) = (size(before), size(after));
    match language {
        Language::En => format!("memory: {what}: {before} → {after}"),
        Language::Zh => format!("内存：{what}：{before} → {after}"),
    }
}

/// No rank has answered an order.
fn unanswered(language: Language, what: &str) -> String {
    match language {
        Language::En => format!("memory: {what}: asked for, no rank has answered yet"),
        Language::Zh => format!("内存：{what}：已请求，rank 尚未答复"),
    }
}

/// The answer of the ranks to an order, printed behind [`relief`].
fn effect(language: Language, effect: &Effect) -> String {
    match (effect, language) {
        (Effect::Done, _) => String::new(),
        (Effect::Halved { micro_batch: [from, to], accumulation: [was, is] }, Language::En) => {
            format!(" (micro-batch {from} → {to}, accumulation {was} → {is})")
        }
        (Effect::Halved { micro_batch: [from, to], accumulation: [was, is] }, Language::Zh) => {
            format!("（微批次 {from} → {to}，累积 {was} → {is}）")
        }
        (Effect::Smallest, Language::En) => " (it is one sample already: nothing to halve)".into(),
        (Effect::Smallest, Language::Zh) => "（微批次已是一个样本，无法再减）".into(),
        (Effect::NotDone, Language::En) => " (not done: the run has ended)".into(),
        (Effect::NotDone, Language::Zh) => "（未执行：训练已结束）".into(),
    }
}

/// The page cache changes its size.
fn cache(language: Language, shrinks: bool) -> &'static str {
    match (language, shrinks) {
        (Language::En, true) => "page cache shrinks",
        (Language::En, false) => "page cache grows",
        (Language::Zh, true) => "页缓存缩小",
        (Language::Zh, false) => "页缓存增大",
    }
}

/// The page cache has not reached this size yet.
fn wanted(language: Language, bytes: u64) -> String {
    match language {
        Language::En => format!(" (to be {})", size(bytes)),
        Language::Zh => format!("（目标 {}）", size(bytes)),
    }
}

/// The run was stopped by the watch.
pub fn stopped(language: Language, reason: &str) -> String {
    match language {
        Language::En => format!("stopped for memory: {reason}"),
        Language::Zh => format!("因内存不足而停止：{reason}"),
    }
}

/// Reason for stopping the run, for the console and `summary.json`.
pub fn stop_reason(language: Language, at: &Fill, cause: &Cause) -> String {
    let (full, advice) = (fullness(language, at), advice(language, cause));
    match language {
        Language::En => format!("{full} after all that can be given back was given; {advice}"),
        Language::Zh => format!("已释放全部可释放的内存，仍占用{full}；{advice}"),
    }
}

/// A program that a request to stop would end at once.
fn unstoppable(language: Language, reason: &str) -> String {
    match language {
        Language::En => format!(
            "{reason}\nno process of the program takes SIGUSR1, which would end it without a checkpoint: it goes on, and the kernel may \
             kill it; a program that asks headroom.stopping() at each step, or has a handler of its own, is asked to save and stop"
        ),
        Language::Zh => format!(
            "{reason}\n程序中没有进程处理 SIGUSR1，该信号会使其在保存前终止，因此程序继续运行，但可能被内核终止；在每一步调用 \
             headroom.stopping() 或自行处理该信号的程序，会被要求保存并停止"
        ),
    }
}

/// A rank's memory grows step by step.
fn leak(language: Language, rank: u32, bytes_per_step: f64, steps_left: f64, hours_left: Option<f64>) -> String {
    let mib = bytes_per_step * 1000.0 / MIB;
    let time = |zh: bool| match hours_left {
        Some(hours) if zh => format!("（约 {hours:.1} 小时）"),
        Some(hours) => format!(" ({hours:.1} h)"),
        None => String::new(),
    };
    match language {
        Language::En => format!(
            "memory of rank {rank} grows by {mib:.1} MiB per 1000 steps: a leak? The budget is reached in about \
             {steps_left:.0} steps{}",
            time(false)
        ),
        Language::Zh => format!(
            "rank {rank} 的内存每 1000 步增长 {mib:.1} MiB，可能存在内存泄漏；约 {steps_left:.0} 步{}后达到预算",
            time(true)
        ),
    }
}

/// Before training, where memory is rather full already: what is free, and above 70 % the guide's advice.
pub fn pre_flight(language: Language, available_bytes: u64, percent: f64) -> Vec<String> {
    let free = available_bytes as f64 / GIB;
    let mut lines = vec![match language {
        Language::En => format!("available memory: {free:.1}GB"),
        Language::Zh => format!("可用内存: {free:.1}GB"),
    }];
    if percent > 70.0 {
        lines.push(
            pick(
                language,
                "⚠️ memory usage is high, consider a smaller batch size",
                "⚠️ 内存使用率较高，建议减小批次大小",
            )
            .into(),
        );
    }
    lines
}

/// Training begins with less than it was asked for, since memory is `percent` full.
pub fn eased(language: Language, percent: f64, changes: &str) -> String {
    match language {
        Language::En => format!("memory is {percent:.1}% full before training, smaller from the start: {changes}"),
        Language::Zh => format!("训练前内存使用率 {percent:.1}%，已自动优化配置: {changes}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scale(source: Source, percent: u64) -> Fill {
        let total = 256 << 30;
        Fill { source, used_bytes: total / 1000 * percent, total_bytes: total }
    }

    fn said(language: Language, level: Level, at: Fill, cause: Cause) -> String {
        event_text(language, &Event::Level { changes: vec![LevelChange { level, at }], cause })
    }

    #[test]
    fn above_ninety_percent_the_guides_two_lines_stand() {
        let text = said(Language::En, Level::Critical, scale(Source::System, 912), Cause::Unknown);
        assert!(text.starts_with("🔴 critical: system memory 91.2% (233.5GB / 256.0GB)\n"), "{text}");
        assert!(text.contains("⚠️  WARNING: System memory usage is critically high (91.2%)!\n"), "{text}");
        assert!(text.contains("\n   Consider reducing CACHE_SIZE_GB or NUM_WORKERS in config.\n"), "{text}");
    }

    #[test]
    fn levels_bear_the_guides_marks_and_names_in_both_languages() {
        for (level, mark) in [(Level::Note, "🟡 注意"), (Level::Warning, "🟠 警告"), (Level::Critical, "🔴 危险")]
        {
            let text = said(Language::Zh, level, scale(Source::System, 750), Cause::Unknown);
            assert!(text.starts_with(mark), "{text}");
        }
        assert!(
            said(Language::En, Level::Note, scale(Source::Gpu(2), 850), Cause::Device).starts_with("🟡 note: GPU 2")
        );
    }

    #[test]
    fn what_came_of_an_order_is_told_in_both_languages() {
        let halved = Effect::Halved { micro_batch: [64, 32], accumulation: [1, 2] };
        assert_eq!(effect(Language::En, &halved), " (micro-batch 64 → 32, accumulation 1 → 2)");
        assert_eq!(effect(Language::Zh, &halved), "（微批次 64 → 32，累积 1 → 2）");
        assert_eq!(effect(Language::Zh, &Effect::Done), "");
        for text in [effect(Language::Zh, &Effect::Smallest), effect(Language::Zh, &Effect::NotDone)] {
            assert!(!text.is_ascii() && !text.contains(' '), "{text}");
        }
    }

    #[test]
    fn pre_flight_prints_what_is_free_and_warns_above_seventy_percent() {
        assert_eq!(pre_flight(Language::Zh, 3 << 29, 50.0), ["可用内存: 1.5GB"]);
        assert_eq!(pre_flight(Language::Zh, 3 << 29, 70.1), ["可用内存: 1.5GB", "⚠️ 内存使用率较高，建议减小批次大小"]);
        assert_eq!(pre_flight(Language::En, 3 << 29, 71.0)[0], "available memory: 1.5GB");
    }

    #[test]
    fn advice_fits_the_cause() {
        let others = Cause::Others {
            grown_bytes: 3 << 30,
            largest: Some(Program { name: "chrome".into(), pid: 42, bytes: 2 << 30 }),
        };
        let text = said(Language::En, Level::Warning, scale(Source::System, 850), others.clone());
        assert!(text.contains("took 3.0GB since the start, the largest is chrome (pid 42, 2.0GB)"), "{text}");
        let rank = Cause::Rank { rank: 1, over_bytes: 300 << 20 };
        let text = said(Language::En, Level::Warning, scale(Source::Budget, 850), rank);
        assert!(text.contains("rank 1 uses 300.0MB more than planned: lower train.microbatch"), "{text}");
        let cache = Cause::PageCache { bytes: 50 << 30 };
        assert!(said(Language::En, Level::Note, scale(Source::System, 750), cache).contains("data.cache_size_gb"));
        let reason = stop_reason(Language::En, &scale(Source::Cgroup, 980), &others);
        assert!(reason.starts_with("98.0% of the cgroup limit after") && reason.contains("chrome"), "{reason}");
    }
}
