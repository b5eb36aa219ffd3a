//! Every byte of the node, line by line, with checked arithmetic: an absurd config is an error, not a panic.

use super::constants::*;
use super::table::{bytes_text, count, grouped};
use super::task::{OVERFLOW, SampleSizes, TaskSizes, once, per_rank, product, sum};
use super::{BudgetLine, BudgetPlan, GpuPlan, Plan, PlanError};
use crate::config::{Budget, CachePolicy, Config, OptimizerKind, ShuffleMode};
use crate::contract::{CacheMode, DatasetFacts, Device, LineId, Machine};

/// Makes all lines; adds to the draft's notes.
pub(super) fn budget(
    config: &Config,
    machine: &Machine,
    dataset: &DatasetFacts,
    draft: &mut Plan,
) -> Result<BudgetPlan, PlanError> {
    check_cache_size(config, machine)?;
    let (total_bytes, formula) = total(config, machine)?;
    let sizes = Sizes::of(config, dataset)?;
    draft.data = sizes.task.facts.clone();
    let ranks = draft.topology.local_world_size as u64;
    let cuda = draft.topology.device == Device::Cuda;
    let mut lines = vec![reserve(machine, total_bytes)];
    lines.extend(runtime(draft, sizes.task.library_bytes, cuda, ranks)?);
    let model = sizes.model_state(ranks)?;
    let gpu = if cuda {
        Some(gpu_plan(machine, &[model, sizes.device_activations(draft, ranks)?], ranks))
    } else {
        lines.push(model);
        lines.extend(sizes.activations(draft, ranks)?);
        None
    };
    lines.extend(sizes.staging(config, draft, ranks)?);
    lines.extend(sizes.decoding(draft, ranks)?);
    if !cuda && ranks > 1 {
        let formula = format!("staging of sums in shared memory, {}", bytes_text(MEETING_BYTES));
        lines.push(per_rank(LineId::Collectives, MEETING_BYTES, ranks, formula)?);
    }
    lines.push(sizes.checkpoint()?);
    let used = sum(&lines.iter().map(|line| line.bytes).collect::<Vec<_>>()).ok_or(OVERFLOW)?;
    let room = total_bytes.saturating_sub(used).saturating_sub(launcher(ranks, 0).bytes);
    let line = sizes.page_cache(config, dataset, sizes.beside_directory(room));
    lines.insert(1, launcher(ranks, sizes.entries(line.bytes)));
    let (page_cache_bytes, cache_policy) = (line.bytes, sizes.cache_policy(config, line.bytes));
    lines.push(line);
    draft.notes.extend(small_cache(config, dataset, draft, page_cache_bytes));
    Ok(BudgetPlan { total_bytes, lines, page_cache_bytes, cache_policy, formula, gpu })
}

/// `memory.budget` of the smaller of physical memory and cgroup limit.
fn total(config: &Config, machine: &Machine) -> Result<(u64, String), PlanError> {
    let basis = machine.memory_bytes();
    let limited = machine.cgroup_limit_bytes.is_some_and(|limit| limit == basis);
    let source = if limited { "cgroup limit" } else { "memory" };
    match config.memory.budget {
        Budget::Bytes(bytes) if basis > 0 && bytes > basis => Err(PlanError::Budget(format!(
            "{} is more than the {} of {source} here; set it to {} or less",
            bytes_text(bytes),
            bytes_text(basis),
            bytes_text(basis)
        ))),
        Budget::Bytes(bytes) => Ok((bytes, format!("memory.budget, of {} {source}", bytes_text(basis)))),
        Budget::Percent(_) if basis == 0 => Err(PlanError::Budget(
            "a share cannot be taken: this machine's memory could not be read; write a size such as 8GiB".into(),
        )),
        Budget::Percent(percent) if percent > 0.0 && percent <= 100.0 => {
            let bytes = ((basis as f64 * percent / 100.0) as u64).min(basis);
            Ok((bytes, format!("{percent} % of {} {source}", bytes_text(basis))))
        }
        Budget::Percent(percent) => Err(PlanError::Budget(format!("{percent} % is no share: write 1 % to 100 %"))),
    }
}

/// The guides refuse a cache above half of the memory.
fn check_cache_size(config: &Config, machine: &Machine) -> Result<(), PlanError> {
    let Some(asked_gb) = config.data.cache_size_gb else {
        return Ok(());
    };
    if !(asked_gb.is_finite() && asked_gb >= 0.0) {
        return Err(PlanError::Invalid(format!("data.cache_size_gb is {asked_gb}: a size of 0 or more is needed")));
    }
    let memory_bytes = machine.memory_bytes();
    let most = memory_bytes as f64 / 2.0 / GIB as f64;
    if memory_bytes > 0 && asked_gb > most {
        let fits_gb = (most * 10.0).floor() / 10.0;
        return Err(PlanError::CacheTooLarge { asked_gb, fits_gb, memory_bytes });
    }
    Ok(())
}

/// What others use already beyond what the budget leaves to them, and a margin. Others count against physical memory
/// and against the cgroup's limit; the worse of the two binds.
fn reserve(machine: &Machine, total_bytes: u64) -> BudgetLine {
    // What can be had now, beside the budget's complement.
    let beyond = |basis: u64, room: u64| total_bytes.saturating_sub(room.min(basis));
    let physical = match machine.memory_total_bytes {
        0 => 0,
        basis => beyond(basis, machine.memory_available_bytes),
    };
    let limit = machine.cgroup_limit_bytes.map(|limit| {
        let room = limit.saturating_sub(machine.cgroup_used_bytes.unwrap_or(0));
        beyond(limit, room.min(machine.cgroup_room_bytes.unwrap_or(u64::MAX)))
    });
    let others = physical.max(limit.unwrap_or(0));
    let margin = (total_bytes / MARGIN_DIVISOR).clamp(MARGIN_MIN_BYTES, MARGIN_MAX_BYTES);
    let mut formula = format!("margin {}", bytes_text(margin));
    if others > 0 {
        formula += &format!(" + {} of the budget that others use already", bytes_text(others));
    }
    once(LineId::Reserve, others.saturating_add(margin), formula)
}

/// The launcher with its directory of the page cache's entries.
fn launcher(ranks: u64, entries: u64) -> BudgetLine {
    let own = LAUNCHER_BYTES.saturating_add(ranks.saturating_mul(LAUNCHER_PER_RANK_BYTES));
    let mut formula = "launch itself".to_owned();
    if entries > 0 {
        formula += &format!(", and {} entries of the page cache × {DIRECTORY_ENTRY_BYTES} B", grouped(entries));
    }
    let directory = entries.saturating_mul(DIRECTORY_ENTRY_BYTES);
    let line = once(LineId::Launcher, own.saturating_add(directory), formula);
    // Tables double: they may be twice as large as their entries need.
    if directory > own / 10 { line.bounded() } else { line }
}

/// What ranks are before they hold a model or a sample.
fn runtime(draft: &Plan, library_bytes: u64, cuda: bool, ranks: u64) -> Result<Vec<BudgetLine>, PlanError> {
    if cuda {
        let formula = format!("libtorch, CUDA and allocator × {}, estimate", count(ranks as usize, "rank"));
        return Ok(vec![per_rank(LineId::Runtime, RUNTIME_CUDA_HOST_BYTES, ranks, formula)?]);
    }
    let files = "pages of libtorch's files, the same for all ranks; a bound".to_owned();
    // Compute threads, loader threads of training and of validation.
    let threads = (draft.topology.threads_per_rank as u64).saturating_add(2 * draft.loader.threads as u64);
    let bytes = threads.checked_mul(THREAD_BYTES).and_then(|bytes| bytes.checked_add(RUNTIME_CPU_BYTES));
    let formula = format!("libtorch's tables and heap, {}", count(threads as usize, "thread"));
    Ok(vec![
        once(LineId::Libraries, library_bytes, files).bounded(),
        per_rank(LineId::Runtime, bytes.ok_or(OVERFLOW)?, ranks, formula)?,
    ])
}

/// One device's lines: its rank's share of the model, and what CUDA itself takes.
fn gpu_plan(machine: &Machine, rank_lines: &[BudgetLine], ranks: u64) -> GpuPlan {
    let context = once(LineId::CudaRuntime, RUNTIME_CUDA_DEVICE_BYTES, "context and library workspaces".into());
    let one = |line: &BudgetLine| BudgetLine { bytes: line.per_rank_bytes.unwrap_or(line.bytes), ..line.clone() };
    let lines = std::iter::once(context).chain(rank_lines.iter().map(one)).collect();
    let free = machine.gpus.iter().map(|gpu| gpu.memory_free_bytes).min().unwrap_or(0);
    // Where ranks share a device, each has its part of it.
    let sharing = ranks.div_ceil((machine.gpus.len() as u64).max(1)).max(1);
    GpuPlan { total_bytes: free / sharing, lines }
}

/// What tensors of one pass hold.
struct Live {
    samples: usize,
    /// Bytes of a sample, and of all with what does not grow with them.
    each: u64,
    bytes: u64,
}

/// The one that holds more, and what it is.
fn larger<'a>(training: &'a Live, validation: &'a Live) -> (&'a Live, String) {
    let (live, one) =
        if training.bytes >= validation.bytes { (training, "sample") } else { (validation, "validation sample") };
    (live, format!("{} × {}", count(live.samples, one), bytes_text(live.each)))
}

fn times(bytes: u64, (numerator, denominator): (u64, u64)) -> Result<u64, PlanError> {
    bytes.checked_mul(numerator).map(|bytes| bytes.div_ceil(denominator)).ok_or(OVERFLOW)
}

/// What the model and its samples weigh.
struct Sizes {
    task: TaskSizes,
    /// Optimizer moments per parameter.
    moments: u64,
    ema: u64,
}

impl Sizes {
    fn of(config: &Config, dataset: &DatasetFacts) -> Result<Self, PlanError> {
        Ok(Self {
            task: TaskSizes::of(config, dataset)?,
            moments: match config.train.optimizer {
                OptimizerKind::Adam | OptimizerKind::Adamw => 2,
                OptimizerKind::Sgd => u64::from(config.train.momentum > 0.0),
            },
            ema: u64::from(config.train.ema_decay.is_some()),
        })
    }

    /// Weights, gradients, moments and moving average, all f32.
    fn model_state(&self, ranks: u64) -> Result<BudgetLine, PlanError> {
        let copies = 2 + self.moments + self.ema;
        let bytes = product(&[self.task.parameters, F32_BYTES, copies]).ok_or(OVERFLOW)?;
        let ema = if self.ema > 0 { " + EMA" } else { "" };
        let formula = format!(
            "{} parameters × 4 B × {copies} (weights + gradients + {} moments{ema})",
            grouped(self.task.parameters),
            self.moments
        );
        per_rank(LineId::ModelState, bytes, ranks, formula)
    }

    /// Bytes that a step of training and one of validation hold in tensors beside the model.
    fn live(&self, draft: &Plan, of: impl Fn(&SampleSizes) -> u64) -> Result<[Live; 2], PlanError> {
        let live = |samples: usize, sizes: &SampleSizes| {
            let each = product(&[of(sizes), F32_BYTES]).ok_or(OVERFLOW)?;
            Ok(Live { samples, each, bytes: product(&[samples as u64, each]).ok_or(OVERFLOW)? })
        };
        Ok([live(draft.batch.micro_batch, &self.task.train)?, live(draft.batch.val_batch, &self.task.val)?])
    }

    /// What tensors of a step hold at once on a CPU: the larger of training and validation, which keeps nothing for backward.
    /// And what the heap takes beside them: pieces that fit nothing, and what libraries keep from the first step on.
    fn activations(&self, draft: &Plan, ranks: u64) -> Result<[BudgetLine; 2], PlanError> {
        let [mut training, validation] = self.live(draft, |sizes| sizes.activation_scalars)?;
        let step = product(&[self.task.step_scalars, F32_BYTES]).ok_or(OVERFLOW)?;
        training.bytes = training.bytes.checked_add(step).ok_or(OVERFLOW)?;
        let [mut heap, val_heap] = self.live(draft, |sizes| sizes.heap_scalars)?;
        heap.bytes = heap.bytes.checked_add(step).ok_or(OVERFLOW)?;
        let [in_training, in_validation] = self.task.heap_factors;
        let heap = times(heap.bytes, in_training)?.max(times(val_heap.bytes, in_validation)?);
        let (held, what) = larger(&training, &validation);
        let beside = if step > 0 { format!(" + {} whatever the batch", bytes_text(step)) } else { String::new() };
        let activations = per_rank(LineId::Activations, held.bytes, ranks, format!("{what}{beside}"))?;
        let further = (draft.topology.threads_per_rank as u64).saturating_sub(1);
        let threads = further.checked_mul(STEP_CPU_PER_THREAD_BYTES).ok_or(OVERFLOW)?;
        let bytes = sum(&[heap.saturating_sub(held.bytes), STEP_CPU_BYTES, threads]).ok_or(OVERFLOW)?;
        // How tensors of one step after the other fall into place differs from run to run.
        let formula = "pieces between tensors, and what libraries keep; a bound".to_owned();
        Ok([activations, per_rank(LineId::Heap, bytes, ranks, formula)?.bounded()])
    }

    /// The same on a device, with the pieces that its allocator keeps.
    fn device_activations(&self, draft: &Plan, ranks: u64) -> Result<BudgetLine, PlanError> {
        let [training, validation] = self.live(draft, |sizes| sizes.device_scalars)?;
        let (held, what) = larger(&training, &validation);
        let factor = self.task.device_factor;
        let bytes = times(held.bytes, factor)?;
        let factor = factor.0 as f64 / factor.1 as f64;
        let factor = if factor == 1.0 { String::new() } else { format!(" × {factor}") };
        per_rank(LineId::Activations, bytes, ranks, format!("{what}{factor}, assumed"))
    }

    /// Slots of the training and the validation loader; the latter keeps none ahead but one per thread.
    fn staging(&self, config: &Config, draft: &Plan, ranks: u64) -> Result<[BudgetLine; 2], PlanError> {
        let (batch, loader) = (&draft.batch, &draft.loader);
        let val_slots = (loader.threads as u64).checked_add(EXTRA_SLOTS).ok_or(OVERFLOW)?;
        let val_batch = match config.data.max_val_windows {
            0 => batch.val_batch,
            most => batch.val_batch.min(most),
        };
        let line = |name: LineId, slots: u64, samples: usize, sizes: &SampleSizes| {
            let slot = sizes.slot_bytes(samples as u64).ok_or(OVERFLOW)?;
            let bytes = slots.checked_mul(slot).ok_or(OVERFLOW)?;
            let sample = grouped(sizes.bytes().ok_or(OVERFLOW)?);
            per_rank(name, bytes, ranks, format!("{slots} slots × {} × {sample} B", count(samples, "sample")))
        };
        Ok([
            line(LineId::StagingSlots, loader.slots as u64, batch.micro_batch, &self.task.train)?,
            line(LineId::ValidationSlots, val_slots, val_batch, &self.task.val)?,
        ])
    }

    /// Rank 0 copies what it saves, so that training goes on while a thread writes. Gradients are not saved.
    fn checkpoint(&self) -> Result<BudgetLine, PlanError> {
        let copies = 1 + self.moments + self.ema;
        let bytes = product(&[self.task.parameters, F32_BYTES, copies]).ok_or(OVERFLOW)?;
        // Names and places of all tensors: a few KiB, and more where there are many small ones.
        let names = (bytes / 24).saturating_add(STAGING_NAMES_BYTES);
        let formula = format!("rank 0: {} parameters × 4 B × {copies}, and their names", grouped(self.task.parameters));
        Ok(once(LineId::CheckpointStaging, bytes.checked_add(names).ok_or(OVERFLOW)?, formula))
    }

    /// Buffers of the threads that decode, and decoded chunks that a rank keeps for itself: bounds both, since chunks are of
    /// any size, and kept only where the page cache has no room.
    fn decoding(&self, draft: &Plan, ranks: u64) -> Result<Vec<BudgetLine>, PlanError> {
        // Without loader threads the step's own thread decodes.
        let threads = (draft.loader.threads as u64).max(1);
        let (each, kept) = (self.task.scratch_bytes, draft.loader.chunk_cache_bytes);
        let bytes = threads.checked_mul(each).ok_or(OVERFLOW)?;
        let formula = format!("{} × {}; a bound", count(threads as usize, "thread"), bytes_text(each));
        let mut lines = vec![per_rank(LineId::DecodeScratch, bytes, ranks, formula)?.bounded()];
        if kept > 0 {
            let formula = "data.chunk_cache_size, for what the page cache has no room for; a bound";
            lines.push(per_rank(LineId::ChunkCache, kept, ranks, formula.into())?.bounded());
        }
        Ok(lines)
    }

    /// Entries of a page cache of so many bytes.
    fn entries(&self, cache_bytes: u64) -> u64 {
        let [all, short] = self.task.entry_bytes;
        cache_bytes
            .div_ceil(if cache_bytes.saturating_add(PAGE_BYTES) > self.task.useful_bytes { all } else { short }.max(1))
    }

    /// What `room` has for entries, when each also takes a place in the launcher's directory.
    fn beside_directory(&self, room: u64) -> u64 {
        let each = self.task.entry_bytes[1].max(1);
        let share = u128::from(room) * u128::from(each) / u128::from(each.saturating_add(DIRECTORY_ENTRY_BYTES));
        // One entry may be a part.
        u64::try_from(share).unwrap_or(room).saturating_sub(DIRECTORY_ENTRY_BYTES)
    }

    /// The page cache: what is left of the budget, cut by the config and by what the data set can use.
    fn page_cache(&self, config: &Config, dataset: &DatasetFacts, room: u64) -> BudgetLine {
        let cap = config.data.cache_size_gb.map(|gb| (gb * GIB as f64) as u64);
        let useful = self.task.useful_bytes;
        let capacity = room.min(cap.unwrap_or(u64::MAX)).min(useful) / PAGE_BYTES * PAGE_BYTES;
        let off = config.data.cache == CachePolicy::Off;
        let bytes = if off { 0 } else { capacity };
        let cut = match capacity {
            _ if off => "data.cache is off".to_owned(),
            _ if dataset.is_empty() => "no data set to keep".to_owned(),
            _ if room <= useful && room <= cap.unwrap_or(u64::MAX) => "all that is left".to_owned(),
            _ if cap.is_some_and(|cap| cap <= useful) => "cut by data.cache_size_gb".to_owned(),
            _ => self.task.useful.clone(),
        };
        let policy = self.cache_policy(config, bytes);
        let share = (bytes as f64 / useful.max(1) as f64).min(1.0);
        let rate = match policy {
            // What stays is hit in every epoch.
            CacheMode::Pin => format!(", steady hit rate {:.1} %", 100.0 * share),
            _ if self.task.useful_is_exact && bytes >= useful => ", steady hit rate 100.0 %".into(),
            // An entry that is read several times in an epoch may hit in between, too.
            CacheMode::NextUse if self.task.useful_is_exact => {
                format!(", steady hit rate {:.1} % or more", 100.0 * share)
            }
            _ => String::new(),
        };
        once(LineId::PageCache, bytes, if bytes == 0 { cut } else { format!("{cut}, policy {policy}{rate}") })
    }

    fn cache_policy(&self, config: &Config, bytes: u64) -> CacheMode {
        match config.data.cache {
            _ if bytes == 0 => CacheMode::Off,
            CachePolicy::Off => CacheMode::Off,
            CachePolicy::Auto => self.task.auto_policy,
            CachePolicy::NextUse => CacheMode::NextUse,
            CachePolicy::Pin => CacheMode::Pin,
            CachePolicy::Lru => CacheMode::Lru,
        }
    }
}

/// A cache that is too small for the order of samples, in numbers.
fn small_cache(config: &Config, dataset: &DatasetFacts, draft: &Plan, bytes: u64) -> Option<String> {
    let useful = dataset.bytes.saturating_mul(DECODED_OVER_DISK) / PAGE_BYTES * PAGE_BYTES;
    if bytes == 0 || bytes >= useful || !config.data.shuffle {
        return None;
    }
    let pages = bytes / ENTRY_BYTES;
    let (window, ranks) = (config.data.shuffle_window as u64, draft.topology.local_world_size as u64);
    let holds =
        format!("the page cache of {} holds about {pages} pages of {}", bytes_text(bytes), bytes_text(ENTRY_BYTES));
    let wanted = window.saturating_mul(WINDOWS_HELD);
    match config.data.shuffle_mode {
        ShuffleMode::Block if pages < wanted => Some(format!(
            "{holds}; data.shuffle_mode: block draws samples from {window} at a time and needs about {WINDOWS_HELD} × {window} = \
             {wanted} to read each once: lower data.shuffle_window to {}, or raise data.cache_size_gb or memory.budget",
            (pages / WINDOWS_HELD).max(1)
        )),
        ShuffleMode::Global => {
            let batch = ranks.saturating_mul(draft.batch.micro_batch as u64);
            (pages < batch.saturating_mul(2)).then(|| {
                format!(
                    "{holds}; the samples of one batch of {} may lie in {batch}, and half of the cache is for batches ahead: most \
                     reads will pass it by; data.shuffle_mode: block needs far fewer",
                    count(ranks as usize, "rank")
                )
            })
        }
        _ => None,
    }
}
