//! The plan of a user's own program: what is known of it is what its last run took.

use super::budget::{launcher_line, reserve, total};
use super::table::{bytes_text, count};
use super::{BudgetLine, BudgetPlan, Plan, PlanError, Topology};
use crate::config::Config;
use crate::contract::{CacheMode, LineId, Machine};

/// Bytes of an entry that the directory's table is sized for: programs' samples are larger mostly.
const ENTRY_BYTES: u64 = 16 << 10;
const MIB: u64 = 1 << 20;

/// Sizes of a program, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProgramSizes {
    pub cache_bytes: u64,
    /// Most own memory of a rank in the last run; `None`: there was none.
    pub last_rank_bytes: Option<u64>,
    /// Refuse what does not fit; else a note says so.
    pub strict: bool,
}

/// A plan for the ranks of a program.
///
/// # Errors
/// The machine cannot give the budget, or, where it is asked for, the lines do not fit into it.
pub fn program_plan(
    config: &Config,
    machine: &Machine,
    topology: Topology,
    sizes: &ProgramSizes,
) -> Result<Plan, PlanError> {
    let ProgramSizes { cache_bytes, last_rank_bytes, strict } = *sizes;
    let (total_bytes, formula) = total(config, machine)?;
    let ranks = topology.local_world_size as u64;
    let line = |name, bytes, formula: String| BudgetLine { name, bytes, formula, ..BudgetLine::default() };
    let mut lines = vec![reserve(machine, total_bytes), launcher_line(ranks, cache_bytes / ENTRY_BYTES)];
    let mut notes = Vec::new();
    match last_rank_bytes {
        Some(each) => lines.push(BudgetLine {
            per_rank_bytes: Some(each),
            ..line(
                LineId::Program,
                each.saturating_mul(ranks),
                format!(
                    "{} × {}, the most in its last run",
                    count(topology.local_world_size, "rank"),
                    bytes_text(each)
                ),
            )
        }),
        None => notes
            .push("the program's own memory is not known yet: this run measures it, the next one plans with it".into()),
    }
    if cache_bytes > 0 {
        lines.push(line(LineId::PageCache, cache_bytes, "--cache, for samples that all ranks share".into()));
    }
    let cache_policy = if cache_bytes > 0 { CacheMode::NextUse } else { CacheMode::Off };
    let budget = BudgetPlan { total_bytes, lines, page_cache_bytes: cache_bytes, cache_policy, formula, gpu: None };
    let need_bytes = budget.need_bytes();
    if need_bytes > total_bytes {
        let rest = total_bytes.saturating_sub(need_bytes - cache_bytes);
        let advice = match (cache_bytes, rest) {
            (0, _) => "use fewer ranks, a larger --memory-budget, or end other programs".to_owned(),
            (_, ..MIB) => {
                "leave --cache out, use fewer ranks or a larger --memory-budget, or end other programs".to_owned()
            }
            (_, rest) => format!("give --cache {}MiB or less, use fewer ranks, or end other programs", rest >> 20),
        };
        let error = PlanError::Program { need_bytes, total_bytes, advice };
        if strict {
            return Err(error);
        }
        notes.push(error.to_string());
    }
    Ok(Plan { topology, budget, notes, ..Plan::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        Machine { cores: 8, memory_total_bytes: 16 << 30, memory_available_bytes: 15 << 30, ..Machine::default() }
    }

    fn planned(cache_bytes: u64, last: Option<u64>) -> Result<Plan, PlanError> {
        let topology = Topology { local_world_size: 3, ..Topology::default() };
        let sizes = ProgramSizes { cache_bytes, last_rank_bytes: last, strict: true };
        program_plan(&Config::default(), &machine(), topology, &sizes)
    }

    #[test]
    fn what_the_last_run_took_is_planned_with() {
        let first = planned(2 << 30, None).unwrap();
        assert_eq!((first.budget.page_cache_bytes, first.budget.line_bytes(LineId::Program)), (2 << 30, 0));
        assert!(first.notes[0].contains("not known yet"), "{:?}", first.notes);
        let second = planned(2 << 30, Some(1 << 30)).unwrap();
        assert_eq!((second.budget.line_bytes(LineId::Program), second.rank_bytes()), (3 << 30, 1 << 30));
        assert!(second.budget.need_bytes() < second.budget.total_bytes && second.notes.is_empty());
    }

    #[test]
    fn what_does_not_fit_is_refused_with_what_would() {
        let error = planned(20 << 30, Some(1 << 30)).unwrap_err().to_string();
        assert!(error.contains("give --cache ") && error.contains("MiB or less"), "{error}");
        assert!(
            planned(0, Some(9 << 30)).unwrap_err().to_string().contains("use fewer ranks, a larger --memory-budget")
        );
        assert!(planned(1 << 20, Some(9 << 30)).unwrap_err().to_string().contains("leave --cache out"));
    }
}
