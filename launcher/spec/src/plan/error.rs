//! Why a plan was refused, with the way out.

use super::table::bytes_text;
use super::{GpuPlan, Plan, Suggestion};

#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PlanError {
    /// A device is missing and `--strict` forbids to do without.
    #[error("{problem}; leave out --strict to {fallback}")]
    Device { problem: String, fallback: String },
    /// The lines of the budget exceed it.
    #[error(
        "the memory plan does not fit: it needs {}, {} more than the budget of {} ({}){}",
        bytes_text(*.need_bytes), bytes_text(.need_bytes.saturating_sub(*.budget_bytes)),
        bytes_text(*.budget_bytes), .what, way_out(.suggestions)
    )]
    DoesNotFit {
        need_bytes: u64,
        budget_bytes: u64,
        /// Which budget, and its largest lines.
        what: String,
        /// Single changes that fit, each tried.
        suggestions: Vec<Suggestion>,
    },
    /// `data.cache_size_gb` above half of the memory.
    #[error(
        "data.cache_size_gb is {asked_gb}: more than half of this machine's {}; set it to {fits_gb} or less",
        bytes_text(*.memory_bytes)
    )]
    CacheTooLarge { asked_gb: f64, fits_gb: f64, memory_bytes: u64 },
    /// `memory.budget` cannot be had.
    #[error("memory.budget: {0}")]
    Budget(String),
    /// A user's own program and its page cache exceed the budget.
    #[error(
        "the memory plan of the program does not fit: it needs {} of a budget of {}; {advice}",
        bytes_text(*.need_bytes), bytes_text(*.total_bytes)
    )]
    Program { need_bytes: u64, total_bytes: u64, advice: String },
    /// A key or flag with which no plan can be made.
    #[error("{0}")]
    Invalid(String),
    /// A product does not fit 64 bits.
    #[error("{what} is beyond any machine: the number of bytes overflows; check {keys}")]
    Overflow { what: &'static str, keys: &'static str },
}

impl PlanError {
    pub(super) fn does_not_fit(draft: Plan, suggestions: Vec<Suggestion>) -> Self {
        let mut lines: Vec<_> = draft.budget.lines.iter().filter(|line| line.bytes > 0).collect();
        lines.sort_by_key(|line| std::cmp::Reverse(line.bytes));
        let largest: Vec<_> =
            lines.iter().take(3).map(|line| format!("{} {}", line.name, bytes_text(line.bytes))).collect();
        let what = format!("{}; largest lines: {}", draft.budget.formula, largest.join(", "));
        let (need_bytes, budget_bytes) = (draft.budget.need_bytes(), draft.budget.total_bytes);
        Self::DoesNotFit { need_bytes, budget_bytes, what, suggestions }
    }

    pub(super) fn gpu_does_not_fit(gpu: &GpuPlan, suggestions: Vec<Suggestion>) -> Self {
        let (need_bytes, budget_bytes) = (gpu.need_bytes(), gpu.total_bytes);
        Self::DoesNotFit { need_bytes, budget_bytes, what: "free memory of the fullest GPU".into(), suggestions }
    }
}

fn way_out(suggestions: &[Suggestion]) -> String {
    if suggestions.is_empty() {
        return "; no single change of batch size, threads, prefetch, ranks or budget fits: lower several, or free \
                memory on this machine"
            .into();
    }
    let lines: Vec<_> = suggestions.iter().map(|suggestion| format!("\n  {suggestion}")).collect();
    format!("; any one of these fits:{}", lines.concat())
}
