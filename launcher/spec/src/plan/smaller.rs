//! The plan of a restart after a kill for memory: the same batches in the same order, with less memory.

use super::suggest::Change;
use super::{Plan, PlanError, Request, plan, table::bytes_text};
use crate::config::{CachePolicy, Config};
use crate::contract::{Machine, Measured};

const GIB: f64 = (1u64 << 30) as f64;

/// A smaller profile.
#[derive(Clone, Debug, PartialEq)]
pub struct Smaller {
    pub config: Config,
    pub plan: Plan,
    /// Description of each change, for the user.
    pub changes: Vec<String>,
}

/// Half of each that leaves results as they are: micro-batch (with twice the accumulation), loader threads, batches ahead,
/// the page cache and each rank's own chunks. `now`: the plan that was too large. `None`: there is nothing left to halve.
///
/// # Errors
/// As [`plan`]: the machine may have less than before.
pub fn smaller(
    config: &Config,
    machine: &Machine,
    measured: &Measured,
    request: &Request,
    now: &Plan,
) -> Result<Option<Smaller>, PlanError> {
    let mut config = config.clone();
    let mut request = request.clone();
    let mut changes = Vec::new();
    let train = &config.train;
    let validation = train.val_batch_size.unwrap_or(now.batch.val_batch);
    let wanted = [
        (Change::Microbatch, "train.microbatch", if request.infers { 1 } else { now.batch.micro_batch }, 1),
        (Change::ValBatchSize, "train.val_batch_size", validation, 1),
        (Change::NumWorkers, "train.num_workers", now.loader.threads, 1),
        (Change::PrefetchFactor, "train.prefetch_factor", train.prefetch_factor, 1),
    ];
    for (change, key, from, least) in wanted {
        let to = from.div_ceil(2);
        if from > least {
            change.apply(to as u64, &mut config, &mut request);
            changes.push(format!("{key}: {from} → {to}"));
        }
    }
    let chunks = config.data.chunk_cache_size;
    if chunks > 4 << 20 {
        Change::ChunkCache.apply(chunks / 2, &mut config, &mut request);
        changes.push(format!("data.chunk_cache_size: {} → {}", bytes_text(chunks), bytes_text(chunks / 2)));
    }
    let cache = now.budget.page_cache_bytes;
    if cache > 0 {
        // Less than 64 MiB left is not worth its pages.
        let half = if cache < 64 << 20 { 0 } else { cache / 2 };
        match half {
            0 => config.data.cache = CachePolicy::Off,
            _ => config.data.cache_size_gb = Some(half as f64 / GIB),
        }
        changes.push(format!("page cache: {} → {}", bytes_text(cache), bytes_text(half)));
    }
    if changes.is_empty() {
        return Ok(None);
    }
    let plan = plan(&config, machine, measured, &request)?;
    Ok(Some(Smaller { config, plan, changes }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        Machine { cores: 8, memory_total_bytes: 16 << 30, memory_available_bytes: 15 << 30, ..Machine::default() }
    }

    #[test]
    fn a_restart_needs_less_and_keeps_the_global_batch() {
        let dataset = crate::plan::tests::with_data(&crate::task::config("emg"), 2 << 30);
        let (mut config, request) = (crate::task::config("emg"), Request { ranks: Some(2), ..Request::default() });
        config.train.num_workers = Some(4);
        let mut now = plan(&config, &machine(), &dataset, &request).unwrap();
        let batch = now.batch.global_batch;
        let first = smaller(&config, &machine(), &dataset, &request, &now).unwrap().unwrap();
        assert_eq!((first.plan.batch.micro_batch, first.plan.batch.micro_steps), (32, 2));
        assert_eq!((first.plan.loader.threads, first.config.train.prefetch_factor), (2, 1));
        assert!(first.changes.contains(&"train.microbatch: 64 → 32".to_owned()), "{:?}", first.changes);
        let mut rounds = 0;
        while let Some(less) = smaller(&config, &machine(), &dataset, &request, &now).unwrap() {
            assert!(less.plan.budget.need_bytes() < now.budget.need_bytes(), "{:?}", less.changes);
            assert_eq!(less.plan.batch.global_batch, batch);
            (config, now) = (less.config, less.plan);
            rounds += 1;
        }
        assert!((6..20).contains(&rounds), "{rounds}");
        assert_eq!((now.batch.micro_batch, now.budget.page_cache_bytes, now.loader.threads), (1, 0, 1));
    }
}
