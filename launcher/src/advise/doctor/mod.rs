//! Symptom, cause, and what to change, from what a run has left behind.

mod ended;
mod pressure;
mod speed;

use super::growth::Growth;
use super::log::Run;
use spec::config::Language;

/// One finding. All three are sentences for the user; a cause may have several lines.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Finding {
    /// `unfinished`, `failed`, `killed`, `oom`, `stopped`, `pressure`, `data_wait`, `hit_rate`, `slower`, `leak`, `skipped`.
    pub kind: &'static str,
    pub symptom: String,
    pub cause: String,
    pub change: String,
}

/// Everything that can be said of `run`, the worst first; empty: nothing is wrong.
pub fn doctor(run: &Run, language: Language) -> Vec<Finding> {
    let zh = language == Language::Zh;
    let mut findings = ended::ended(run, zh);
    let others = [
        pressure::pressure(run, zh),
        pressure::of_log(run, zh),
        leak(run, zh),
        speed::waiting(run, zh),
        speed::hits(run, zh),
        speed::slower(run, zh),
        skipped(run, zh),
    ];
    findings.extend(others.into_iter().flatten());
    findings
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

fn leak(run: &Run, zh: bool) -> Option<Finding> {
    let growth = Growth::of(run);
    let (what, rate) = growth.rate()?;
    let of_rank = matches!(growth, Growth::Rank { .. });
    finding(
        "leak",
        say(zh, format!("{growth}"), format!("{what} 持续增长：{rate}")),
        if of_rank {
            say(
                zh,
                "something is kept from step to step: tensors in a list, a growing cache, a history",
                "某些对象被逐步保留：列表中的张量、增长的缓存或历史记录",
            )
        } else {
            say(zh, "the log does not tell which program it is", "日志未指明是哪个程序")
        },
        if of_rank {
            say(
                zh,
                "memory.rank<R>.jsonl shows the phase in which it grows; until it is found, --max-restarts and log.save_every_steps",
                "memory.rank<R>.jsonl 显示增长所在阶段；找到之前可使用 --max-restarts 与 log.save_every_steps",
            )
        } else {
            say(
                zh,
                "`launch monitor --run RUN` or --pid PID watches one job alone; of a run `launch analyze RUN` names rank and phase",
                "`launch monitor --run RUN` 或 --pid PID 只监视一个任务；`launch analyze RUN` 指出进程与阶段",
            )
        },
    )
}

fn skipped(run: &Run, zh: bool) -> Option<Finding> {
    let files = run.summary.as_ref().map(|s| s.files_skipped).filter(|files| *files > 0)?;
    finding(
        "skipped",
        say(
            zh,
            format!("{files} file{} left out", if files == 1 { " was" } else { "s were" }),
            format!("跳过了 {files} 个文件"),
        ),
        say(zh, "they cannot be read or hold what they must not", "文件无法读取或内容不符"),
        say(
            zh,
            "rank0.log names each; data.skip_bad: false stops at the first",
            "rank0.log 列出每个文件；data.skip_bad: false 会在第一个处停止",
        ),
    )
}

#[cfg(test)]
mod tests;
