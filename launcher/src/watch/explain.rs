//! Why a rank was killed, from what was seen before and counted after: in English and Chinese.

use super::findings::Findings;
use super::words::size;
use host::machine::{MemoryMeter, MemoryNow};
use spec::config::Language;
use spec::contract::Program;
use std::path::Path;

/// Facts about a rank that was ended by SIGKILL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Killed {
    /// The kernel counted a kill for memory meanwhile.
    pub for_memory: bool,
    /// Lines for the user, one fact each.
    pub lines: Vec<String>,
}

/// How things stand after it.
#[derive(Clone, Debug, Default)]
pub struct After {
    pub memory: MemoryNow,
    /// The process that was the largest of others has ended too.
    pub largest_is_gone: bool,
}

impl Findings {
    /// Explains the SIGKILL of the rank at `index` (in the job's list), which has just ended.
    pub fn explain_kill(&self, index: usize) -> Killed {
        let largest = self.fullest.as_ref().and_then(|fullest| fullest.largest_other.as_ref());
        let after = After {
            memory: self.meter.as_ref().map(MemoryMeter::read).unwrap_or_default(),
            largest_is_gone: largest.is_some_and(|other| !Path::new(&format!("/proc/{}", other.pid)).exists()),
        };
        killed(self, index, &after)
    }
}

/// Explains the SIGKILL of the rank at `index`.
pub fn killed(findings: &Findings, index: usize, after: &After) -> Killed {
    let (in_group, on_node) = kills(findings, &after.memory);
    let for_memory = in_group > 0 || on_node > 0;
    let mut lines = vec![who_did_it(findings, in_group, on_node)];
    lines.extend(last_seen(findings, index));
    lines.extend(what_grew(findings, index));
    lines.extend(others(findings, after));
    if for_memory {
        lines.push(match findings.language {
            Language::En if findings.foreign => {
                "to go on: use fewer ranks, smaller batches or a smaller --cache, or let \
                                                 --max-restarts N start the program again"
                    .into()
            }
            Language::Zh if findings.foreign => {
                "继续训练：减少进程数、批次大小或 --cache；或由 --max-restarts N 重新启动程序".into()
            }
            Language::En => "to go on: --resume auto with a smaller train.microbatch or memory.budget, or let \
                             --max-restarts N do it"
                .into(),
            Language::Zh => {
                "继续训练：用 --resume auto，并减小 train.microbatch 或 memory.budget；或由 --max-restarts N 自动完成"
                    .into()
            }
        });
    }
    Killed { for_memory, lines }
}

/// Kills for memory since the start: in the job's cgroup, and on the node.
fn kills(findings: &Findings, after: &MemoryNow) -> (u64, u64) {
    let Some(base) = &findings.base else { return (0, 0) };
    let of = |memory: &MemoryNow| memory.group.map_or(0, |group| group.oom_kills);
    (of(after).saturating_sub(of(&base.memory)), after.oom_kills.saturating_sub(base.memory.oom_kills))
}

fn who_did_it(findings: &Findings, in_group: u64, on_node: u64) -> String {
    let zh = findings.language == Language::Zh;
    let group = findings.fullest.as_ref().and_then(|fullest| fullest.sample.memory.group);
    let used = group.and_then(|group| Some((size(group.used_bytes), size(group.limit_bytes?))));
    let processes = |count: u64| format!("{count} process{}", if count == 1 { "" } else { "es" });
    match (in_group, on_node) {
        (1.., _) if zh => {
            let used = used.map(|(used, limit)| format!("（此前最多占用 {used} / {limit}）"));
            format!("内核因内存不足终止了本任务 cgroup 中的 {in_group} 个进程{}", used.unwrap_or_default())
        }
        (1.., _) => {
            let used = used.map(|(used, limit)| format!(" (at the fullest seen before, {used} of {limit} were used)"));
            let processes = processes(in_group);
            format!("the kernel killed {processes} of this job's cgroup for memory{}", used.unwrap_or_default())
        }
        (0, 1..) if zh => format!("自启动以来，内核因内存不足在本节点终止了 {on_node} 个进程"),
        (0, 1..) => format!("the kernel killed {} on this node for memory since the start", processes(on_node)),
        _ if zh => "内核没有因内存不足终止进程的记录：有人发送了 SIGKILL（kill -9，或作业管理器）".into(),
        _ => "the kernel counted no kill for memory: someone sent SIGKILL (kill -9, a job manager)".into(),
    }
}

fn last_seen(findings: &Findings, index: usize) -> Option<String> {
    let seen = findings.seen.get(index)?.last.as_ref()?;
    let (rank, step) = (findings.ranks.get(index)?, seen.step);
    let (own, pss, uss) = (size(seen.now.own_bytes), size(seen.now.pss_bytes), size(seen.now.uss_bytes));
    let planned = Some(findings.planned.rank_bytes).filter(|bytes| *bytes > 0).map(size);
    Some(match findings.language {
        Language::En => {
            let plan = planned.map(|planned| format!(" of {planned} planned")).unwrap_or_default();
            format!("rank {rank} was last seen at step {step} with {own}{plan} as its own (PSS {pss}, USS {uss})")
        }
        Language::Zh => {
            let plan = planned.map(|planned| format!("（计划 {planned}）")).unwrap_or_default();
            format!("rank {rank} 最后一次采样在第 {step} 步：自有内存 {own}{plan}，PSS {pss}，USS {uss}")
        }
    })
}

/// Which rank grew since its first step, and which line of the plan that passes.
fn what_grew(findings: &Findings, index: usize) -> Option<String> {
    let zh = findings.language == Language::Zh;
    let seen = findings.seen.get(index)?;
    let (first, last) = (seen.first.as_ref()?, seen.last.as_ref()?);
    let grown = size(last.now.own_bytes.saturating_sub(first.now.own_bytes));
    let steps = last.step.saturating_sub(first.step);
    let over = last.now.own_bytes.saturating_sub(findings.planned.rank_bytes);
    let largest = findings.planned.rank_lines.iter().max_by_key(|(_, bytes)| *bytes);
    let line = match largest.map(|(name, bytes)| (name, size(*bytes))) {
        Some((name, bytes)) if over > 0 && zh => {
            format!("；超出计划 {}，计划中最大的一项是 {name} ({bytes})", size(over))
        }
        Some((name, bytes)) if over > 0 => {
            format!("; that is {} over its plan, whose largest line is {name} ({bytes})", size(over))
        }
        _ => String::new(),
    };
    Some(if zh {
        format!("它在 {steps} 步内增长了 {grown}{line}")
    } else {
        format!("it grew by {grown} over {steps} steps{line}")
    })
}

fn others(findings: &Findings, after: &After) -> Option<String> {
    let (base, fullest) = (findings.base.as_ref()?, findings.fullest.as_ref()?);
    let (before, now) = match (base.others_in_group_bytes(), fullest.sample.others_in_group_bytes()) {
        (Some(before), Some(now)) if fullest.sample.is_limited() => (before, now),
        _ => (base.others_bytes(), fullest.sample.others_bytes()),
    };
    let (now, grown) = (size(now), size(now.saturating_sub(before)));
    let largest = fullest.largest_other.as_ref().map(|Program { name, pid, bytes }| (name, pid, size(*bytes)));
    Some(match findings.language {
        Language::En => {
            let gone = if after.largest_is_gone { ", which has ended too" } else { "" };
            let who = largest.map(|(name, pid, bytes)| format!(", the largest: {name} (pid {pid}, {bytes}){gone}"));
            let who = who.unwrap_or_default();
            format!("others beside this job used {now} then, {grown} more than at its start{who}")
        }
        Language::Zh => {
            let gone = if after.largest_is_gone { "，它也已结束" } else { "" };
            let who = largest.map(|(name, pid, bytes)| format!("，其中最大的是 {name} (pid {pid}, {bytes}){gone}"));
            format!("当时其他程序占用 {now}，比启动时多 {grown}{}", who.unwrap_or_default())
        }
    })
}

#[cfg(test)]
mod tests {
    use super::super::findings::{Fullest, Moment, Seen};
    use super::super::{Planned, ProcessNow, Sample};
    use super::*;
    use host::machine::GroupNow;
    use spec::contract::LineId;

    fn memory(used: u64, oom_kills: u64) -> MemoryNow {
        let group =
            GroupNow { version: 1, used_bytes: used, limit_bytes: Some(2 << 30), oom_kills, ..GroupNow::default() };
        MemoryNow { total_bytes: 8 << 30, available_bytes: 4 << 30, group: Some(group), ..MemoryNow::default() }
    }

    fn findings() -> Findings {
        let moment = |step, own: u64| {
            let (pss_bytes, uss_bytes) = (own + (100 << 20), own - (100 << 20));
            let now = ProcessNow { own_bytes: own, pss_bytes, uss_bytes, ..ProcessNow::default() };
            Some(Moment { step, now })
        };
        let sample = |used| Sample { memory: memory(used, 0), ..Sample::default() };
        Findings {
            ranks: vec![3],
            planned: Planned {
                rank_bytes: 300 << 20,
                rank_lines: vec![(LineId::Runtime, 192 << 20), (LineId::Activations, 108 << 20)],
                ..Planned::default()
            },
            base: Some(sample(1 << 30)),
            // State after the kill.
            last: Some(sample(600 << 20)),
            fullest: Some(Fullest {
                sample: sample(2 << 30),
                largest_other: Some(Program { name: "hog".into(), pid: 42, bytes: 1 << 30 }),
                ..Fullest::default()
            }),
            seen: vec![Seen { first: moment(1, 200 << 20), last: moment(37, 700 << 20) }],
            ..Findings::default()
        }
    }

    #[test]
    fn a_kill_for_memory_names_counter_last_record_growth_and_others() {
        let after = After { memory: memory(1 << 30, 1), largest_is_gone: true };
        let killed = killed(&findings(), 0, &after);
        assert!(killed.for_memory);
        let text = killed.lines.join("\n");
        for part in [
            "killed 1 process of this job's cgroup for memory (at the fullest seen before, 2.0GB of 2.0GB were used)",
            "rank 3 was last seen at step 37 with 700.0MB of 300.0MB planned as its own (PSS 800.0MB, USS 600.0MB)",
            "grew by 500.0MB over 36 steps; that is 400.0MB over its plan, whose largest line is runtime (192.0MB)",
            "others beside this job used 2.0GB then, 1.0GB more than at its start, the largest: hog (pid 42, 1.0GB), which has ended too",
            "--max-restarts",
        ] {
            assert!(text.contains(part), "{part}\nis not in\n{text}");
        }
    }

    #[test]
    fn a_kill_by_hand_is_told_apart() {
        let killed = killed(&findings(), 0, &After { memory: memory(1 << 30, 0), ..After::default() });
        assert!(!killed.for_memory && killed.lines[0].contains("someone sent SIGKILL"), "{killed:?}");
    }

    #[test]
    fn in_chinese_no_line_is_english() {
        let findings = Findings { language: Language::Zh, ..findings() };
        let after = After { memory: memory(1 << 30, 1), largest_is_gone: true };
        let killed = killed(&findings, 0, &after);
        assert_eq!(killed.lines.len(), 5, "{killed:?}");
        for line in &killed.lines {
            assert!(!line.is_ascii() && !line.contains("the ") && !line.contains("used"), "{line}");
        }
        assert!(killed.lines[0].ends_with("（此前最多占用 2.0GB / 2.0GB）"), "{killed:?}");
    }
}
