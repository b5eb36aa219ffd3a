//! Every byte of the node, line by line, with checked arithmetic: an absurd config is an error, not a panic.

use super::constants::*;
use super::emg::{self, product, sum};
use super::table::{bytes_text, count, grouped};
use super::{BudgetLine, BudgetPlan, GpuPlan, Plan, PlanError};
use crate::config::{Budget, CachePolicy, Config, LossType, OptimizerKind};
use crate::machine::{DatasetFacts, Machine};

/// Makes all lines; adds to the draft's notes.
pub(super) fn budget(
    config: &Config,
    machine: &Machine,
    dataset: &DatasetFacts,
    draft: &mut Plan,
) -> Result<BudgetPlan, PlanError> {
    check_cache_size(config, machine)?;
    let (total_bytes, formula) = total(config, machine)?;
    let sizes = Sizes::of(config, draft)?;
    let ranks = draft.topology.local_world_size as u64;
    let cuda = draft.topology.device == "cuda";
    let mut lines = vec![reserve(machine, total_bytes), launcher()];
    lines.push(per_rank("runtime", runtime_bytes(cuda), ranks, format!("libtorch and allocator × {ranks} ranks"))?);
    let device_lines = [sizes.model_state(ranks)?, sizes.activations(ranks)?];
    let gpu = if cuda {
        Some(gpu_plan(machine, &device_lines))
    } else {
        lines.extend(device_lines);
        None
    };
    lines.extend(sizes.staging(draft, ranks)?);
    lines.push(decode_scratch(draft, ranks)?);
    lines.push(sizes.checkpoint()?);
    let used = sum(&lines.iter().map(|line| line.bytes).collect::<Vec<_>>()).ok_or(OVERFLOW)?;
    let room = total_bytes.saturating_sub(used);
    let line = page_cache(config, dataset, room);
    let (page_cache_bytes, cache_policy) = (line.bytes, cache_policy(config, line.bytes).to_owned());
    lines.push(line);
    Ok(BudgetPlan { total_bytes, lines, page_cache_bytes, cache_policy, formula, gpu })
}

const OVERFLOW: PlanError = PlanError::Overflow {
    what: "the memory plan",
    keys: "train.batch_size, data.window_size, train.num_workers, train.prefetch_factor, model sizes and the number of ranks",
};

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
    once("reserve", others.saturating_add(margin), formula)
}

fn launcher() -> BudgetLine {
    once("launcher", LAUNCHER_BYTES, "launch itself".into())
}

fn runtime_bytes(cuda: bool) -> u64 {
    if cuda { RUNTIME_CUDA_HOST_BYTES } else { RUNTIME_CPU_BYTES }
}

/// One device's lines: its rank's share of the model, and what CUDA itself takes.
fn gpu_plan(machine: &Machine, rank_lines: &[BudgetLine]) -> GpuPlan {
    let context = once("CUDA runtime", RUNTIME_CUDA_DEVICE_BYTES, "context and library workspaces".into());
    let one = |line: &BudgetLine| BudgetLine { bytes: line.per_rank_bytes.unwrap_or(line.bytes), ..line.clone() };
    let lines = std::iter::once(context).chain(rank_lines.iter().map(one)).collect();
    GpuPlan { total_bytes: machine.gpus.iter().map(|gpu| gpu.memory_free_bytes).min().unwrap_or(0), lines }
}

/// What the model and its samples weigh.
struct Sizes {
    parameters: u64,
    /// Optimizer moments per parameter.
    moments: u64,
    ema: u64,
    activation_scalars: u64,
    sample_bytes: u64,
    /// Bytes of one sample's part of each field: EMG `[T, 16]`, joint angles `[T, 20]`.
    field_bytes: [u64; 2],
    /// Samples whose activations are held at once, gradients of activations included.
    held_samples: u64,
}

impl Sizes {
    fn of(config: &Config, draft: &Plan) -> Result<Self, PlanError> {
        let window = config.data.window_size as u64;
        let field = |columns: usize| product(&[window, columns as u64, F32_BYTES]).ok_or(OVERFLOW);
        let field_bytes = [field(config.data.emg_channels)?, field(config.data.joint_angles_channels)?];
        let (numerator, denominator) = ACTIVATION_FACTOR;
        let loss_terms = if config.train.loss_type == LossType::MseMae { 2 } else { 1 };
        let held = (draft.batch.micro_batch as u64).checked_mul(numerator).ok_or(OVERFLOW)?.div_ceil(denominator);
        Ok(Self {
            parameters: emg::parameters(&config.model).ok_or(OVERFLOW)?,
            moments: match config.train.optimizer {
                OptimizerKind::Adam | OptimizerKind::Adamw => 2,
                OptimizerKind::Sgd => u64::from(config.train.momentum > 0.0),
            },
            ema: u64::from(config.train.ema_decay.is_some()),
            activation_scalars: emg::activation_scalars(&config.model, window, loss_terms).ok_or(OVERFLOW)?,
            sample_bytes: sum(&field_bytes).ok_or(OVERFLOW)?,
            field_bytes,
            // Validation keeps nothing for backward: its samples count once at most.
            held_samples: held.max(draft.batch.val_batch as u64),
        })
    }

    /// Weights, gradients, moments and moving average, all f32.
    fn model_state(&self, ranks: u64) -> Result<BudgetLine, PlanError> {
        let copies = 2 + self.moments + self.ema;
        let bytes = product(&[self.parameters, F32_BYTES, copies]).ok_or(OVERFLOW)?;
        let ema = if self.ema > 0 { " + EMA" } else { "" };
        let formula = format!(
            "{} parameters × 4 B × {copies} (weights + gradients + {} moments{ema})",
            grouped(self.parameters),
            self.moments
        );
        per_rank("model state", bytes, ranks, formula)
    }

    fn activations(&self, ranks: u64) -> Result<BudgetLine, PlanError> {
        let bytes = product(&[self.held_samples, self.activation_scalars, F32_BYTES]).ok_or(OVERFLOW)?;
        let formula = format!(
            "{} samples (micro-batch × 1.1, or validation) × {} each, estimate",
            grouped(self.held_samples),
            bytes_text(self.activation_scalars.saturating_mul(F32_BYTES))
        );
        per_rank("activations", bytes, ranks, formula)
    }

    /// Slots of the training and the validation loader.
    fn staging(&self, draft: &Plan, ranks: u64) -> Result<[BudgetLine; 2], PlanError> {
        let slots = draft.loader.slots as u64;
        let line = |name, samples: usize| {
            let slot = self.slot_bytes(samples as u64).ok_or(OVERFLOW)?;
            let bytes = slots.checked_mul(slot).ok_or(OVERFLOW)?;
            let formula = format!("{slots} slots × {samples} samples × {} B", grouped(self.sample_bytes));
            per_rank(name, bytes, ranks, formula)
        };
        Ok([line("staging slots", draft.batch.micro_batch)?, line("validation slots", draft.batch.val_batch)?])
    }

    /// One slot: each field `[samples, …]`, rounded up to whole cache lines.
    fn slot_bytes(&self, samples: u64) -> Option<u64> {
        let field = |bytes: &u64| samples.checked_mul(*bytes)?.checked_next_multiple_of(FIELD_ALIGN_BYTES);
        self.field_bytes.iter().try_fold(0u64, |slot, bytes| slot.checked_add(field(bytes)?))
    }

    /// Rank 0 copies what it saves, so that training goes on while a thread writes. Gradients are not saved.
    fn checkpoint(&self) -> Result<BudgetLine, PlanError> {
        let copies = 1 + self.moments + self.ema;
        let bytes = product(&[self.parameters, F32_BYTES, copies]).ok_or(OVERFLOW)?;
        let formula = format!("rank 0: {} parameters × 4 B × {copies}", grouped(self.parameters));
        Ok(once("checkpoint staging", bytes, formula))
    }
}

fn decode_scratch(draft: &Plan, ranks: u64) -> Result<BudgetLine, PlanError> {
    // Without loader threads the step's own thread decodes.
    let threads = (draft.loader.threads as u64).max(1);
    let cache = draft.loader.chunk_cache_bytes;
    let bytes = product(&[threads, DECODE_SCRATCH_BYTES]).and_then(|bytes| bytes.checked_add(cache)).ok_or(OVERFLOW)?;
    let scratch = bytes_text(DECODE_SCRATCH_BYTES);
    let threads = count(threads as usize, "thread");
    let formula = format!("{threads} × {scratch} + chunk cache {}", bytes_text(cache));
    per_rank("decode scratch", bytes, ranks, formula)
}

/// The page cache: what is left of the budget, cut by the config and by what the data set can use.
fn page_cache(config: &Config, dataset: &DatasetFacts, room: u64) -> BudgetLine {
    let cap = config.data.cache_size_gb.map(|gb| (gb * GIB as f64) as u64);
    let useful = dataset.bytes.saturating_mul(DECODED_OVER_DISK);
    let capacity = room.min(cap.unwrap_or(u64::MAX)).min(useful) / PAGE_BYTES * PAGE_BYTES;
    let off = config.data.cache == CachePolicy::Off;
    let bytes = if off { 0 } else { capacity };
    let cut = match capacity {
        _ if off => "data.cache is off".to_owned(),
        _ if dataset.bytes == 0 => "no data set to keep".to_owned(),
        _ if room <= useful && room <= cap.unwrap_or(u64::MAX) => "all that is left".to_owned(),
        _ if cap.is_some_and(|cap| cap <= useful) => "cut by data.cache_size_gb".to_owned(),
        _ => format!("{} data set × {DECODED_OVER_DISK}", bytes_text(dataset.bytes)),
    };
    let policy = cache_policy(config, bytes);
    once("page cache", bytes, if bytes == 0 { cut } else { format!("{cut}, policy {policy}") })
}

/// The policy's name. `auto`: one chunk of a session serves many windows, so the one that looks ahead.
fn cache_policy(config: &Config, bytes: u64) -> &'static str {
    match config.data.cache {
        _ if bytes == 0 => "off",
        CachePolicy::Off => "off",
        CachePolicy::Auto | CachePolicy::NextUse => "next_use",
        CachePolicy::Pin => "pin",
        CachePolicy::Lru => "lru",
    }
}

fn once(name: &str, bytes: u64, formula: String) -> BudgetLine {
    BudgetLine { name: name.into(), bytes, per_rank_bytes: None, formula }
}

fn per_rank(name: &str, bytes: u64, ranks: u64, formula: String) -> Result<BudgetLine, PlanError> {
    let all = bytes.checked_mul(ranks).ok_or(OVERFLOW)?;
    Ok(BudgetLine { name: name.into(), bytes: all, per_rank_bytes: Some(bytes), formula })
}
