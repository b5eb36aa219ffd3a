//! How a run ended: attempts that failed or were killed, a stop for memory, no end at all.

use super::{Finding, finding, say};
use crate::advise::log::Run;
use spec::contract::{Ended, Level, RunStatus, exit};

/// Exit code after SIGKILL.
const KILLED: u8 = exit::SIGNAL_BASE + 9;

pub(super) fn ended(run: &Run, zh: bool) -> Vec<Finding> {
    let summary = run.summary.as_ref().filter(|_| !run.open_ended);
    let attempts = summary.map(|summary| summary.ended.as_slice()).unwrap_or_default();
    let failures = attempts.iter().filter_map(|ended| failed(run, ended, zh));
    [unfinished(run, zh), untold(run, zh), stopped(run, zh)].into_iter().flatten().chain(failures).collect()
}

/// Neither `launch` nor rank 0 could write how it ended.
fn unfinished(run: &Run, zh: bool) -> Option<Finding> {
    let started = run.plan.is_some() && run.monitor.is_empty();
    (started && run.open_ended && !run.living).then_some(())?;
    let step = run.metrics.last().map(|record| record.step).max(run.node.last().map(|record| record.step)).unwrap_or(0);
    let short = run.node.last().filter(|record| record.level >= Level::Warning);
    let cause = match short {
        Some(record) => say(
            zh,
            format!("launch itself was killed, perhaps for memory: the last record's level is {}", record.level),
            format!("launch 本身被终止，可能因内存不足：最后一条记录的级别为 {}", record.level),
        ),
        None => say(
            zh,
            "launch itself was killed (kill -9, a job manager, the kernel) or the machine went down",
            "launch 本身被终止（kill -9、作业管理器或内核），或机器停机",
        ),
    };
    finding(
        "unfinished",
        say(
            zh,
            format!("the run has no end: no summary.json of its last start; its records reach step {step}"),
            format!("运行没有结束记录：最后一次启动没有 summary.json；记录到第 {step} 步"),
        ),
        cause,
        say(
            zh,
            format!("resume from the newest checkpoint: --name {} --resume auto", name(run)),
            format!("从最新检查点继续：--name {} --resume auto", name(run)),
        ),
    )
}

fn name(run: &Run) -> String {
    run.path.file_name().map_or_else(|| "NAME".into(), |name| name.to_string_lossy().into_owned())
}

/// A failure without an explanation, as older summaries have it.
fn untold(run: &Run, zh: bool) -> Option<Finding> {
    let summary =
        run.summary.as_ref().filter(|summary| summary.status == RunStatus::Failed && summary.ended.is_empty())?;
    let reason = summary.reason.clone();
    finding(
        "failed",
        say(zh, format!("the run failed at step {}", summary.steps), format!("运行在第 {} 步失败", summary.steps)),
        reason.unwrap_or_else(|| say(zh, "rank<R>.log has the error", "错误见 rank<R>.log")),
        say(zh, "what the error names; then continue with --resume auto", "按错误提示处理，然后用 --resume auto 继续"),
    )
}

fn stopped(run: &Run, zh: bool) -> Option<Finding> {
    let summary = run.summary.as_ref().filter(|summary| summary.status == RunStatus::Stopped && !run.open_ended)?;
    let reason =
        summary.reason.clone().filter(|_| summary.ended.iter().all(|ended| ended.attempt < summary.restarts))?;
    let (step, name) = (summary.steps, name(run));
    finding(
        "stopped",
        say(
            zh,
            format!("the watch stopped the run for memory at step {step}, after a checkpoint (code {})", exit::STOPPED),
            format!("内存监视在第 {step} 步保存检查点后停止了运行（代码 {}）", exit::STOPPED),
        ),
        reason,
        say(
            zh,
            format!("make room or lower memory.budget, then continue: --name {name} --resume auto"),
            format!("释放内存或降低 memory.budget，然后继续：--name {name} --resume auto"),
        ),
    )
}

fn failed(run: &Run, ended: &Ended, zh: bool) -> Option<Finding> {
    let summary = run.summary.as_ref()?;
    let killed = ended.code == KILLED;
    let kind = match ended {
        Ended { for_memory: true, .. } => "oom",
        _ if killed => "killed",
        _ => "failed",
    };
    let (mut at, code) = (String::new(), ended.code);
    if let Some(step) = ended.step {
        at = say(zh, format!(" at step {step}"), format!("在第 {step} 步"));
    }
    let what = match kind {
        "oom" => say(zh, "was killed for memory", "因内存不足被终止"),
        "killed" => say(zh, "was killed, not for memory", "被终止，并非因内存不足"),
        _ => say(zh, "failed", "失败"),
    };
    // Attempts before the last were started again.
    let again = ended.attempt < summary.restarts;
    let symptom = if again {
        let number = ended.attempt + 1;
        say(
            zh,
            format!("a rank {what}{at} (code {code}) in attempt {number}; the run was started again"),
            format!("第 {number} 次尝试：有进程{at}{what}（代码 {code}），随后重新启动"),
        )
    } else {
        say(
            zh,
            format!("a rank {what}{at}, and the run ended (code {code})"),
            format!("有进程{at}{what}，运行结束（代码 {code}）"),
        )
    };
    let mut change = advice(ended, zh);
    if again && ended.for_memory && !summary.reduced.is_empty() {
        let changes = summary.reduced.join(", ");
        change =
            say(zh, format!("it went on with less: {changes}; {change}"), format!("已减小后继续：{changes}；{change}"));
    }
    finding(kind, symptom, ended.words.clone(), change)
}

fn advice(ended: &Ended, zh: bool) -> String {
    match ended.code {
        _ if ended.for_memory => say(
            zh,
            "lower memory.budget, or take a smaller config (low_memory); --max-restarts 1 resumes with a smaller plan automatically",
            "降低 memory.budget，或使用更小的配置（low_memory）；--max-restarts 1 会自动以更小的计划继续",
        ),
        KILLED => say(
            zh,
            "find who sent SIGKILL (a person, a job manager's limit): no setting of memory is at fault; continue with --resume auto",
            "查明是谁发送了 SIGKILL（人为或作业管理器的限制）：与内存设置无关；--resume auto 继续",
        ),
        exit::NONFINITE => say(
            zh,
            "a lower train.learning_rate, train.gradient_clip_norm on, train.amp: off or bf16; then --resume auto",
            "降低 train.learning_rate，启用 train.gradient_clip_norm，train.amp: off 或 bf16；然后 --resume auto",
        ),
        exit::DATA => say(
            zh,
            "mend or remove what the error names; data.skip_bad: true leaves such files out",
            "修复或移除错误中指出的文件；data.skip_bad: true 会跳过此类文件",
        ),
        exit::PLAN => say(zh, "one of the changes that the error names", "采用错误中给出的修改之一"),
        exit::CHECKPOINT => say(
            zh,
            "room and permissions in the run's folder, or an earlier checkpoint: --resume RUN/checkpoints/step-<N>",
            "检查运行目录的空间与权限，或使用更早的检查点：--resume RUN/checkpoints/step-<N>",
        ),
        _ => say(
            zh,
            "what the error names; rank<R>.log holds the rank's whole output; continue from the last checkpoint with --resume auto",
            "按错误提示处理；rank<R>.log 保存该进程的全部输出；--resume auto 从最后的检查点继续",
        ),
    }
}
