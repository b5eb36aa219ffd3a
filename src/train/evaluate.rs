//! Evaluation: every rank runs its share of a split, sums are added over ranks.
//!
//! Ranks meet once, at the end, where they also learn whether one of them was asked to stop or ran out of memory: then
//! the evaluation counts for nothing on any of them.

use super::{TrainError, amp, to_tensors};
use crate::comm::Collective;
use crate::data::loader::{BatchPlanner, BatchStream, Loader, LoaderSpec, Order, Shuffle, Throttle};
use crate::data::{DataError, Dataset, FieldSpec, Rows};
use crate::ledger::{self, Part};
use crate::task::{Batch, Gallery, Metrics, Model};
use crate::torch::{self, TorchError};
use std::collections::BTreeMap;
use std::sync::Arc;
use tch::{Device, Kind, Tensor, no_grad};

/// How a split is read for evaluation.
pub struct EvalSpec {
    /// Samples of a forward pass.
    pub batch: usize,
    pub threads: usize,
    pub device: Device,
    /// Element type of autocast. `None` means no autocast.
    pub narrow: Option<Kind>,
    pub throttle: Arc<Throttle>,
    /// The config's.
    pub seed: u64,
}

/// Who sees the outputs. Metrics are reset before and after, so that they may be those that training uses between epochs.
pub struct Watch<'a> {
    pub metrics: &'a mut dyn Metrics,
    pub gallery: Option<&'a mut (dyn Gallery + 'static)>,
}

/// Result of an evaluation; identical on every rank.
pub enum Evaluated {
    Values(BTreeMap<String, f64>),
    /// A rank was asked to stop before its share was done.
    Interrupted,
    /// On some rank. `message`: what this rank's allocator said, where it was this one.
    OutOfMemory {
        message: Option<String>,
    },
}

/// How this rank's share ended.
enum Share {
    /// So many samples could not be used.
    Done(u64),
    Interrupted,
    OutOfMemory(String),
}

/// Runs `model` over all of `dataset`, in order, but for samples that the data set leaves out ([`Dataset::is_left_out`]):
/// their number is a value then, `left_out`. `prefix` names the split (`val.`). Before each batch `stops` is asked whether
/// to break off.
///
/// # Errors
/// A sample cannot be read, none can be used, or a peer failed.
pub fn evaluate(
    model: &dyn Model,
    watch: &mut Watch,
    dataset: &Arc<dyn Dataset>,
    spec: &EvalSpec,
    collective: &dyn Collective,
    prefix: &str,
    stops: &mut dyn FnMut(&BatchStream) -> bool,
) -> Result<Evaluated, TrainError> {
    watch.metrics.reset();
    let share =
        if dataset.is_empty() { Share::Done(0) } else { run_share(model, watch, dataset, spec, collective, stops)? };
    let mut sums = watch.metrics.sums();
    let records = watch.metrics.records();
    watch.metrics.reset();
    let votes = [matches!(share, Share::Interrupted), matches!(share, Share::OutOfMemory(_))];
    sums.extend(votes.map(|vote| f64::from(u8::from(vote))));
    sums.push(if let Share::Done(left_out) = share { left_out as f64 } else { 0.0 });
    let mut sums = reduce_sums(&sums, collective)?;
    let mut pop = || sums.pop().unwrap_or(0.0);
    let (left_out, out_of_memory, interrupted) = (pop(), pop(), pop());
    if interrupted > 0.0 {
        return Ok(Evaluated::Interrupted);
    }
    if out_of_memory > 0.0 {
        let message = if let Share::OutOfMemory(message) = share { Some(message) } else { None };
        return Ok(Evaluated::OutOfMemory { message });
    }
    if !dataset.is_empty() && left_out >= dataset.len() as f64 {
        let (split, len) = (prefix.trim_end_matches('.'), dataset.len());
        let first = dataset.take_left_out().and_then(|lines| lines.into_iter().next());
        let first = first.map(|line| format!(" (the first: {line})")).unwrap_or_default();
        return Err(DataError::AllUnreadable(format!("none of the {len} samples of {split}{first}")).into());
    }
    if let Some(own) = records {
        watch.metrics.gather(&collective.all_gather(&own)?);
    }
    let mut values = watch.metrics.values(&sums);
    if left_out > 0.0 {
        values.push(("left_out".into(), left_out));
    }
    Ok(Evaluated::Values(values.into_iter().map(|(name, value)| (format!("{prefix}{name}"), value)).collect()))
}

fn run_share(
    model: &dyn Model,
    watch: &mut Watch,
    dataset: &Arc<dyn Dataset>,
    spec: &EvalSpec,
    collective: &dyn Collective,
    stops: &mut dyn FnMut(&BatchStream) -> bool,
) -> Result<Share, TrainError> {
    let planner = BatchPlanner {
        order: Order { len: dataset.len() as u64, seed: 0, shuffle: Shuffle::Off },
        global_batch: (spec.batch * collective.world_size()) as u64,
        micro_batch: spec.batch as u64,
        rank: collective.rank() as u64,
        world_size: collective.world_size() as u64,
        drop_last: false,
        cut: Default::default(),
    }
    .checked()?;
    let loader = LoaderSpec {
        threads: spec.threads,
        slots: spec.threads + 2,
        micro_batch: spec.batch.min(dataset.len()),
        persistent: false,
        throttle: Arc::clone(&spec.throttle),
        gives_back: spec.device == Device::Cpu,
        ..LoaderSpec::default()
    };
    let mut loader = Loader::new(Arc::clone(dataset), loader)?;
    let _slots = ledger::hold(Part::ValSlots, loader.pool_bytes() as u64);
    let mut batches = loader.run(planner.requests(0, 0))?;
    let mut left_out = 0;
    loop {
        if stops(&batches) {
            return Ok(Share::Interrupted);
        }
        let Some(host) = batches.next().transpose()? else { return Ok(Share::Done(left_out)) };
        let usable: Vec<usize> = (0..host.len()).filter(|n| !dataset.is_left_out(host.sample_ids()[*n])).collect();
        left_out += (host.len() - usable.len()) as u64;
        if usable.is_empty() {
            continue;
        }
        let passed = torch::catch_out_of_memory(|| {
            let batch = chosen(to_tensors(&host, spec.device).at(0, spec.seed), host.fields(), &usable);
            let output = no_grad(|| amp::forward(model, &batch, false, (spec.narrow, None)))?;
            watch.metrics.update(&batch, &output);
            if let Some(gallery) = &mut watch.gallery {
                gallery.look(&batch, &output);
            }
            Ok(())
        });
        match passed.and_then(|inner| inner) {
            Err(TorchError::OutOfMemory { message }) => return Ok(Share::OutOfMemory(message)),
            other => other?,
        }
    }
}

/// The samples of `batch` at these places, which rise.
pub(super) fn chosen(batch: Batch, fields: &[FieldSpec], places: &[usize]) -> Batch {
    if places.len() == batch.len() {
        return batch;
    }
    let index: Vec<i64> = places.iter().map(|place| *place as i64).collect();
    let select =
        |field: &Tensor, index: &[i64]| field.index_select(0, &Tensor::from_slice(index).to_device(field.device()));
    let (mut tensors, mut picked) = (batch.fields.iter(), Vec::with_capacity(batch.fields.len()));
    let mut elements: Vec<Vec<i64>> = Vec::new();
    for field in fields {
        let mut rows = None;
        let Some(values) = tensors.next() else { break };
        match field.rows {
            Rows::One => picked.push(select(values, &index)),
            Rows::As { field, .. } => picked.push(select(values, elements.get(field).map_or(&[], Vec::as_slice))),
            Rows::Ragged { .. } => {
                let Some(offsets) = tensors.next() else { break };
                let ends: Vec<i64> = Vec::try_from(offsets).unwrap_or_default();
                let of: Vec<i64> = places.iter().flat_map(|place| ends[*place]..ends[place + 1]).collect();
                let lengths = places.iter().scan(0, |at, place| {
                    *at += ends[place + 1] - ends[*place];
                    Some(*at)
                });
                let offset: Vec<i64> = std::iter::once(0).chain(lengths).collect();
                picked.push(select(values, &of));
                picked.push(Tensor::from_slice(&offset).to_device(offsets.device()));
                rows = Some(of);
            }
        }
        elements.push(rows.unwrap_or_default());
    }
    let sample_ids = places.iter().map(|place| batch.sample_ids[*place]).collect();
    Batch::new(picked, sample_ids).at(batch.step, batch.seed).of_step(batch.step_samples)
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
