//! Evaluation: every rank runs its share of a split, sums are added over ranks.

use super::{TrainError, amp, to_tensors};
use crate::comm::Collective;
use crate::data::Dataset;
use crate::data::loader::{BatchPlanner, Loader, LoaderSpec, Order, Shuffle};
use crate::task::{Metrics, Model};
use std::collections::BTreeMap;
use std::sync::Arc;
use tch::{Device, Kind, Tensor, no_grad};

/// How a split is read for evaluation.
pub struct EvalSpec {
    pub batch: usize,
    pub threads: usize,
    pub device: Device,
    /// Element type of autocast; absent: none.
    pub narrow: Option<Kind>,
}

/// Runs `model` over all of `dataset`, in order, nothing left out; `prefix` names the split (`val.`).
///
/// `metrics` is reset before and after, so that it may be the one that training uses between epochs.
///
/// # Errors
/// A sample cannot be read, or a peer failed.
pub fn evaluate(
    model: &dyn Model,
    metrics: &mut dyn Metrics,
    dataset: &Arc<dyn Dataset>,
    spec: &EvalSpec,
    collective: &dyn Collective,
    prefix: &str,
) -> Result<BTreeMap<String, f64>, TrainError> {
    metrics.reset();
    if !dataset.is_empty() {
        run_share(model, metrics, dataset, spec, collective)?;
    }
    let sums = reduce_sums(&metrics.sums(), collective)?;
    let values = metrics.values(&sums);
    metrics.reset();
    Ok(values.into_iter().map(|(name, value)| (format!("{prefix}{name}"), value)).collect())
}

fn run_share(
    model: &dyn Model,
    metrics: &mut dyn Metrics,
    dataset: &Arc<dyn Dataset>,
    spec: &EvalSpec,
    collective: &dyn Collective,
) -> Result<(), TrainError> {
    let planner = BatchPlanner {
        order: Order { len: dataset.len() as u64, seed: 0, shuffle: Shuffle::Off },
        global_batch: (spec.batch * collective.world_size()) as u64,
        micro_batch: spec.batch as u64,
        rank: collective.rank() as u64,
        world_size: collective.world_size() as u64,
        drop_last: false,
    }
    .checked()?;
    let loader = LoaderSpec {
        threads: spec.threads,
        slots: spec.threads + 2,
        micro_batch: spec.batch.min(dataset.len()),
        persistent: false,
        ..LoaderSpec::default()
    };
    let mut loader = Loader::new(Arc::clone(dataset), loader)?;
    for host in loader.run(planner.requests(0, 0))? {
        let batch = to_tensors(&host?, spec.device);
        let output = no_grad(|| amp::forward(model, &batch, false, spec.narrow))?;
        metrics.update(&batch, &output);
    }
    Ok(())
}

/// Adds `sums` over all ranks, element by element, in f64.
///
/// # Errors
/// A peer failed.
pub fn reduce_sums(sums: &[f64], collective: &dyn Collective) -> Result<Vec<f64>, TrainError> {
    if sums.is_empty() {
        return Ok(Vec::new());
    }
    let tensor = Tensor::from_slice(sums);
    collective.all_reduce_sum(&tensor)?;
    let mut reduced = vec![0.0; sums.len()];
    tensor.copy_data(&mut reduced, sums.len());
    Ok(reduced)
}
