//! What a task tells the planner: sizes of its model, its samples and its data set.

use super::constants::*;
use super::{BudgetLine, PlanError, deblur, emg};
use crate::config::Config;
use crate::contract::{CacheMode, DatasetFacts, LineId};

type SizesOf = fn(&Config, &DatasetFacts) -> Option<TaskSizes>;

/// What gives each task's sizes, by its name: those of [`crate::config::TASKS`].
const SIZES: &[(&str, SizesOf)] = &[("emg", emg::sizes), ("deblur", deblur::sizes)];

/// Sizes of a task. Adding one adds its room here and one line to [`SIZES`].
pub(super) struct TaskSizes {
    /// Scalars of the model.
    pub parameters: u64,
    pub train: SampleSizes,
    pub val: SampleSizes,
    /// Scalars that a step holds whatever its batch.
    pub step_scalars: u64,
    /// A rank's heap over what these and the samples' heap scalars weigh, in training and in validation, as fractions.
    pub heap_factors: [(u64, u64); 2],
    /// The same on a device, over [`SampleSizes::device_scalars`].
    pub device_factor: (u64, u64),
    /// Pages of files that its ranks map, on a CPU.
    pub library_bytes: u64,
    /// Bytes of the smallest usual entry of a page cache that holds all, and of one that is short of room.
    pub entry_bytes: [u64; 2],
    /// Bytes that a loader thread has in hand while it decodes.
    pub scratch_bytes: u64,
    /// Bytes of all entries that the page cache can use, and where the number comes from.
    pub useful_bytes: u64,
    pub useful: String,
    /// That number is no estimate: entries beyond it there are none.
    pub useful_is_exact: bool,
    /// The policy that `data.cache: auto` stands for.
    pub auto_policy: CacheMode,
    /// Facts on the data set, one sentence each, for the plan's headline.
    pub facts: Vec<String>,
}

/// One sample of a split.
#[derive(Clone, Debug, Default)]
pub(super) struct SampleSizes {
    /// Bytes of each field in a batch slot.
    pub fields: Vec<u64>,
    /// Scalars that it holds in tensors at the peak of a step, of training or of validation.
    pub activation_scalars: u64,
    /// Scalars that the heap has to place for it, those that die on the way too.
    pub heap_scalars: u64,
    /// The same on a device, where other kernels run.
    pub device_scalars: u64,
}

impl TaskSizes {
    /// # Errors
    /// A product overflows, or the task is none.
    pub fn of(config: &Config, dataset: &DatasetFacts) -> Result<Self, PlanError> {
        let unknown = || PlanError::Invalid(format!("task {} has no sizes to plan with", config.task));
        let (_, sizes) = SIZES.iter().find(|(task, _)| *task == config.task).ok_or_else(unknown)?;
        sizes(config, dataset).ok_or(OVERFLOW)
    }
}

/// Bytes of decoded chunks that a rank may keep for itself: only a data set of chunks keeps any.
pub(super) fn chunk_cache_bytes(config: &Config) -> u64 {
    if config.task == "emg" { config.data.chunk_cache_size } else { 0 }
}

pub(super) const OVERFLOW: PlanError = PlanError::Overflow {
    what: "the memory plan",
    keys: "train.batch_size, data.window_size, train.num_workers, train.prefetch_factor, model sizes and the number of ranks",
};

impl SampleSizes {
    pub fn bytes(&self) -> Option<u64> {
        sum(&self.fields)
    }

    /// One slot: each field `[samples, …]`, rounded up to whole cache lines.
    pub fn slot_bytes(&self, samples: u64) -> Option<u64> {
        let field = |bytes: &u64| samples.checked_mul(*bytes)?.checked_next_multiple_of(FIELD_ALIGN_BYTES);
        self.fields.iter().try_fold(0u64, |slot, bytes| slot.checked_add(field(bytes)?))
    }
}

pub(super) fn product(factors: &[u64]) -> Option<u64> {
    factors.iter().try_fold(1u64, |product, factor| product.checked_mul(*factor))
}

pub(super) fn sum(terms: &[u64]) -> Option<u64> {
    terms.iter().try_fold(0u64, |sum, term| sum.checked_add(*term))
}

pub(super) fn once(name: LineId, bytes: u64, formula: String) -> BudgetLine {
    BudgetLine { name, bytes, formula, ..BudgetLine::default() }
}

pub(super) fn per_rank(name: LineId, bytes: u64, ranks: u64, formula: String) -> Result<BudgetLine, PlanError> {
    let all = bytes.checked_mul(ranks).ok_or(OVERFLOW)?;
    Ok(BudgetLine { name, bytes: all, per_rank_bytes: Some(bytes), formula, bound: false })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_of_the_config_has_sizes() {
        let names: Vec<&str> = SIZES.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, crate::config::TASKS);
        let config = Config { task: "knitting".into(), ..Config::default() };
        let error = TaskSizes::of(&config, &DatasetFacts::default()).err().unwrap().to_string();
        assert!(error.contains("task knitting has no sizes"), "{error}");
    }
}
