//! Why a rank was killed, from what was seen before and counted after.

use super::watcher::Findings;
use super::words::size;
use crate::machine::MemoryNow;

/// What is known of a rank that was ended by SIGKILL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Killed {
    /// The kernel counted a kill for memory meanwhile.
    pub for_memory: bool,
    /// For people, one fact per line.
    pub lines: Vec<String>,
}

/// What is known when the rank at `index` has ended by SIGKILL; `after`: the node's memory now.
pub fn killed(findings: &Findings, index: usize, after: &MemoryNow) -> Killed {
    let (in_group, on_node) = kills(findings, after);
    let for_memory = in_group > 0 || on_node > 0;
    let mut lines = vec![who_did_it(findings, in_group, on_node)];
    lines.extend(last_seen(findings, index));
    lines.extend(what_grew(findings, index));
    lines.extend(others(findings));
    if for_memory {
        lines.push(
            "to go on: --resume auto with a smaller train.microbatch or memory.budget, or let --max-restarts N do it"
                .into(),
        );
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
    let last = findings.last.as_ref().and_then(|sample| sample.memory.group);
    let limit =
        last.and_then(|group| Some(format!(" ({} of {} used)", size(group.used_bytes), size(group.limit_bytes?))));
    match (in_group, on_node) {
        (1.., _) => format!(
            "the kernel killed {in_group} process{} of this job's cgroup for memory{}",
            if in_group == 1 { "" } else { "es" },
            limit.unwrap_or_default()
        ),
        (0, 1..) => format!(
            "the kernel killed {on_node} process{} on this node for memory since the start",
            if on_node == 1 { "" } else { "es" }
        ),
        _ => "the kernel counted no kill for memory: someone sent SIGKILL (kill -9, a job manager)".into(),
    }
}

fn last_seen(findings: &Findings, index: usize) -> Option<String> {
    let seen = findings.seen.get(index)?.last.as_ref()?;
    let rank = findings.ranks.get(index)?;
    let planned = findings.planned.rank_bytes;
    let plan = if planned > 0 { format!(", planned {}", size(planned)) } else { String::new() };
    let (pss, uss) = (size(seen.now.pss_bytes), size(seen.now.uss_bytes));
    Some(format!("rank {rank} was last seen at step {} with PSS {pss}, USS {uss}{plan}", seen.step))
}

/// Which rank grew since its first step, and which line of the plan that passes.
fn what_grew(findings: &Findings, index: usize) -> Option<String> {
    let seen = findings.seen.get(index)?;
    let (first, last) = (seen.first.as_ref()?, seen.last.as_ref()?);
    let grown = last.now.own_bytes.saturating_sub(first.now.own_bytes);
    let steps = last.step.saturating_sub(first.step);
    let over = last.now.own_bytes.saturating_sub(findings.planned.rank_bytes);
    let largest = findings.planned.rank_lines.iter().max_by_key(|(_, bytes)| *bytes);
    let line = match largest {
        Some((name, bytes)) if over > 0 && findings.planned.rank_bytes > 0 => {
            format!("; that is {} over its plan, whose largest line is {name} ({})", size(over), size(*bytes))
        }
        _ => String::new(),
    };
    Some(format!("it grew by {} over {steps} steps{line}", size(grown)))
}

fn others(findings: &Findings) -> Option<String> {
    let (base, last) = (findings.base.as_ref()?, findings.last.as_ref()?);
    let (before, now) = match (base.others_in_group_bytes(), last.others_in_group_bytes()) {
        (Some(before), Some(now)) if last.memory.group.is_some_and(|group| group.limit_bytes.is_some()) => {
            (before, now)
        }
        _ => (base.others_bytes(), last.others_bytes()),
    };
    let grown = now.saturating_sub(before);
    let largest = findings.largest_other.as_ref();
    let who = largest.map(|(name, pid, bytes)| format!(", the largest: {name} (pid {pid}, {})", size(*bytes)));
    Some(format!(
        "others beside this job used {}, {} more than at its start{}",
        size(now),
        size(grown),
        who.unwrap_or_default()
    ))
}

#[cfg(test)]
mod tests {
    use super::super::watcher::{Moment, Seen};
    use super::super::{Planned, ProcessNow, Sample};
    use super::*;
    use crate::machine::GroupNow;

    fn memory(used: u64, oom_kills: u64) -> MemoryNow {
        let group =
            GroupNow { version: 1, used_bytes: used, limit_bytes: Some(2 << 30), oom_kills, ..GroupNow::default() };
        MemoryNow { total_bytes: 8 << 30, available_bytes: 4 << 30, group: Some(group), ..MemoryNow::default() }
    }

    fn findings() -> Findings {
        let moment = |step, own: u64| {
            let now = ProcessNow { own_bytes: own, pss_bytes: own, uss_bytes: own, ..ProcessNow::default() };
            Some(Moment { step, now })
        };
        let sample = |used| Sample { memory: memory(used, 0), ..Sample::default() };
        Findings {
            ranks: vec![3],
            planned: Planned {
                rank_bytes: 300 << 20,
                rank_lines: vec![("runtime".into(), 192 << 20), ("activations".into(), 108 << 20)],
                ..Planned::default()
            },
            base: Some(sample(1 << 30)),
            last: Some(sample(2 << 30)),
            seen: vec![Seen { first: moment(1, 200 << 20), last: moment(37, 700 << 20) }],
            largest_other: Some(("hog".into(), 42, 1 << 30)),
            ..Findings::default()
        }
    }

    #[test]
    fn a_kill_for_memory_names_counter_last_record_growth_and_others() {
        let killed = killed(&findings(), 0, &memory(1 << 30, 1));
        assert!(killed.for_memory);
        let text = killed.lines.join("\n");
        for part in [
            "killed 1 process of this job's cgroup for memory (2.0GB of 2.0GB used)",
            "rank 3 was last seen at step 37 with PSS 700.0MB, USS 700.0MB, planned 300.0MB",
            "grew by 500.0MB over 36 steps; that is 400.0MB over its plan, whose largest line is runtime (192.0MB)",
            "others beside this job used 2.0GB, 1.0GB more than at its start, the largest: hog (pid 42, 1.0GB)",
            "--max-restarts",
        ] {
            assert!(text.contains(part), "{part}\nis not in\n{text}");
        }
    }

    #[test]
    fn a_kill_by_hand_is_told_apart() {
        let killed = killed(&findings(), 0, &memory(1 << 30, 0));
        assert!(!killed.for_memory && killed.lines[0].contains("someone sent SIGKILL"), "{killed:?}");
    }
}
