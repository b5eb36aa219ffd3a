//! Evaluation: every rank runs its share of a split, sums are added over ranks.

use super::{TrainError, amp, to_tensors};
use crate::comm::Collective;
use crate::data::Dataset;
use crate::data::loader::{BatchPlanner, Loader, LoaderSpec, Order, Shuffle};
use crate::task::{Gallery, Metrics, Model};
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

/// Who sees the outputs. Metrics are reset before and after, so that they may be those that training uses between epochs.
pub struct Watch<'a> {
    pub metrics: &'a mut dyn Metrics,
    pub gallery: Option<&'a mut (dyn Gallery + 'static)>,
}

/// Runs `model` over all of `dataset`, in order, nothing left out; `prefix` names the split (`val.`).
///
/// # Errors
/// A sample cannot be read, or a peer failed.
pub fn evaluate(
    model: &dyn Model,
    watch: &mut Watch,
    dataset: &Arc<dyn Dataset>,
    spec: &EvalSpec,
    collective: &dyn Collective,
    prefix: &str,
) -> Result<BTreeMap<String, f64>, TrainError> {
    watch.metrics.reset();
    if !dataset.is_empty() {
        run_share(model, watch, dataset, spec, collective)?;
    }
    let sums = reduce_sums(&watch.metrics.sums(), collective)?;
    let values = watch.metrics.values(&sums);
    watch.metrics.reset();
    Ok(values.into_iter().map(|(name, value)| (format!("{prefix}{name}"), value)).collect())
}

fn run_share(
    model: &dyn Model,
    watch: &mut Watch,
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
        watch.metrics.update(&batch, &output);
        if let Some(gallery) = &mut watch.gallery {
            gallery.look(&batch, &output);
        }
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
