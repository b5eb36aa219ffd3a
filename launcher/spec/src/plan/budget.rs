//! Every byte of the node, line by line, with checked arithmetic: an absurd config is an error, not a panic.

use super::constants::*;
use super::model::ModelLines;
use super::page_cache::PageCache;
use super::sizes::{once, per_rank, product, sum};
use super::table::{bytes_text, count, grouped};
use super::{BudgetLine, BudgetPlan, GpuPlan, Plan, PlanError};
use crate::config::{Budget, Config};
use crate::contract::{DataSizes, Device, LineId, Machine, Measured, ModelSizes};

/// Makes all lines; adds to the draft's notes.
pub(super) fn budget(
    config: &Config,
    machine: &Machine,
    measured: &Measured,
    draft: &mut Plan,
) -> Result<BudgetPlan, PlanError> {
    check_cache_size(config, machine)?;
    let (total_bytes, formula) = total(config, machine)?;
    let Measured { model, data, .. } = measured;
    draft.data = data.facts.clone();
    draft.notes.extend(model.short.iter().map(|why| format!("model sizes: {why}")));
    let ranks = draft.topology.local_world_size as u64;
    let cuda = draft.topology.device == Device::Cuda;
    let of_model = ModelLines::new(config, model, draft.topology.world_size, draft.batch.global_batch == 0);
    let mut lines = vec![reserve(machine, total_bytes)];
    let forks = crate::task::find(&config.task).and_then(|task| task.interpreter(config)).is_some_and(|how| how.forks);
    lines.extend(runtime(draft, model, cuda, ranks)?);
    if model.interpreter_bytes > 0 && !cuda {
        share_interpreter(&mut lines, model, forks, ranks)?;
    }
    let state = of_model.state(ranks)?;
    let gpu = if cuda {
        let mut of_rank = vec![state, of_model.device_activations(draft, ranks)?];
        of_rank.extend(of_model.recorded_step(config, draft, ranks)?);
        Some(gpu_plan(machine, model, &of_rank, ranks))
    } else {
        lines.push(state);
        lines.extend(of_model.activations(draft, ranks)?);
        None
    };
    lines.extend(of_model.staging(config, draft, ranks)?);
    lines.extend(decoding(data, draft, ranks)?);
    if !cuda && ranks > 1 {
        let formula = format!("staging of sums in shared memory, {}", bytes_text(MEETING_BYTES));
        lines.push(per_rank(LineId::Collectives, MEETING_BYTES, ranks, formula)?);
    }
    lines.push(of_model.checkpoint()?);
    let used = sum(&lines.iter().map(|line| line.bytes).collect::<Vec<_>>())?;
    let room = total_bytes.saturating_sub(used).saturating_sub(launcher_line(ranks, 0).bytes);
    let cache = PageCache::new(config, data);
    let line = cache.line(room);
    lines.insert(1, launcher_line(ranks, cache.entries(line.bytes)));
    let (page_cache_bytes, cache_policy) = (line.bytes, cache.policy(line.bytes));
    lines.push(line);
    draft.notes.extend(cache.too_small(draft, page_cache_bytes));
    Ok(BudgetPlan { total_bytes, lines, page_cache_bytes, cache_policy, formula, gpu })
}

/// `memory.budget` of the smaller of physical memory and cgroup limit.
pub(super) fn total(config: &Config, machine: &Machine) -> Result<(u64, String), PlanError> {
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
        Budget::Percent(percent) => Err(PlanError::Budget(format!("{percent} % is out of range: use 1 % to 100 %"))),
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

/// Bytes that others use beyond what the budget leaves to them, and a margin. Others count against physical memory and
/// against the cgroup's limit; the worse of the two binds.
pub(super) fn reserve(machine: &Machine, total_bytes: u64) -> BudgetLine {
    // Bytes available now, compared with the budget's complement.
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
pub(super) fn launcher_line(ranks: u64, entries: u64) -> BudgetLine {
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

/// Memory of ranks before they hold a model or a sample.
fn runtime(draft: &Plan, model: &ModelSizes, cuda: bool, ranks: u64) -> Result<Vec<BudgetLine>, PlanError> {
    if cuda {
        let (bytes, basis) = match model.gpu {
            Some(gpu) => (gpu.host_bytes, "measured"),
            None => (RUNTIME_CUDA_HOST_BYTES, "assumed"),
        };
        let formula = format!("libtorch, CUDA and allocator × {}, {basis}", count(ranks as usize, "rank"));
        return Ok(vec![per_rank(LineId::Runtime, bytes, ranks, formula)?]);
    }
    let files = "pages of libtorch's files, the same for all ranks; a bound".to_owned();
    let libraries = if model.library_bytes > 0 { model.library_bytes } else { LIBRARY_BYTES };
    // Compute threads, loader threads of training and of validation.
    let threads = (draft.topology.threads_per_rank as u64).saturating_add(2 * draft.loader.threads as u64);
    let bytes = sum(&[RUNTIME_CPU_BYTES.max(model.runtime_bytes), product(&[threads, THREAD_BYTES])?])?;
    let formula = format!("libtorch's tables and heap, {}", count(threads as usize, "thread"));
    Ok(vec![once(LineId::Libraries, libraries, files).bounded(), per_rank(LineId::Runtime, bytes, ranks, formula)?])
}

/// Splits what the user's interpreter takes from the runtime of each rank. Forked ranks share it until they write to it.
fn share_interpreter(
    lines: &mut Vec<BudgetLine>,
    model: &ModelSizes,
    forks: bool,
    ranks: u64,
) -> Result<(), PlanError> {
    let whole = model.interpreter_bytes.min(model.runtime_bytes);
    let Some(runtime) = lines.iter_mut().find(|line| line.name == LineId::Runtime) else { return Ok(()) };
    let each = runtime.per_rank_bytes.unwrap_or(runtime.bytes).saturating_sub(whole);
    if forks {
        let copied = whole / FORK_COPIES;
        let formula = format!("{}, and {} of the interpreter's pages written to", runtime.formula, bytes_text(copied));
        *runtime = per_rank(LineId::Runtime, sum(&[each, copied])?, ranks, format!("{formula}; a bound"))?.bounded();
        lines.push(once(
            LineId::Interpreter,
            whole,
            "Python, PyTorch and the user's modules, shared by all ranks".into(),
        ));
    } else {
        *runtime = per_rank(LineId::Runtime, each, ranks, runtime.formula.clone())?;
        lines.push(per_rank(LineId::Interpreter, whole, ranks, "Python, PyTorch and the user's modules".into())?);
    }
    Ok(())
}

/// One device's lines: its rank's share of the model, and what CUDA itself takes.
fn gpu_plan(machine: &Machine, model: &ModelSizes, rank_lines: &[BudgetLine], ranks: u64) -> GpuPlan {
    let (bytes, basis) = match model.gpu {
        Some(gpu) => (gpu.context_bytes, "measured"),
        None => (RUNTIME_CUDA_DEVICE_BYTES, "assumed"),
    };
    let context = once(LineId::CudaRuntime, bytes, format!("context and library workspaces, {basis}"));
    let one = |line: &BudgetLine| BudgetLine { bytes: line.per_rank_bytes.unwrap_or(line.bytes), ..line.clone() };
    let lines = std::iter::once(context).chain(rank_lines.iter().map(one)).collect();
    let free = machine.gpus.iter().map(|gpu| gpu.memory_free_bytes).min().unwrap_or(0);
    // Where ranks share a device, each has its part of it.
    let sharing = ranks.div_ceil((machine.gpus.len() as u64).max(1)).max(1);
    GpuPlan { total_bytes: free / sharing, lines }
}

/// Buffers of the threads that decode, and decoded chunks that a rank keeps for itself. Both are bounds: chunks are of any
/// size, and are kept only where the page cache has no room.
fn decoding(data: &DataSizes, draft: &Plan, ranks: u64) -> Result<Vec<BudgetLine>, PlanError> {
    // Without loader threads the step's own thread decodes.
    let threads = (draft.loader.threads as u64).max(1);
    let (each, kept) = (data.scratch_bytes, draft.loader.chunk_cache_bytes);
    let formula = format!("{} × {}; a bound", count(threads as usize, "thread"), bytes_text(each));
    let mut lines = vec![per_rank(LineId::DecodeScratch, product(&[threads, each])?, ranks, formula)?.bounded()];
    if kept > 0 {
        let formula = "data.chunk_cache_size, for what the page cache has no room for; a bound";
        lines.push(per_rank(LineId::ChunkCache, kept, ranks, formula.into())?.bounded());
    }
    Ok(lines)
}
