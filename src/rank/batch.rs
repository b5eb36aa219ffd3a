//! `rank batch`: the tensors that a rank would train on at one step, for inspection.

use super::{RankError, read_job};
use crate::data::loader::{Loader, LoaderSpec};
use crate::data::{DataError, FieldSpec};
use crate::task::{self, Team};
use crate::train::{planner, to_tensors};
use std::path::PathBuf;
use std::sync::Arc;
use tch::{Device, Tensor};

/// Ending of the name of a ragged field's offsets.
const OFFSETS: &str = ".offsets";

/// Which batch, and where to.
#[derive(clap::Args)]
pub struct Request {
    /// The job that `launch` wrote.
    #[arg(long)]
    job: PathBuf,
    /// Optimizer steps done before this one, counted from the start of training.
    #[arg(long)]
    step: u64,
    #[arg(long)]
    rank: usize,
    #[arg(long)]
    world: usize,
    /// The safetensors file to write.
    #[arg(long)]
    out: PathBuf,
}

/// Names of a field's tensors.
fn tensor_names(field: &FieldSpec) -> impl Iterator<Item = String> {
    std::iter::once(field.name.to_string()).chain(field.has_offsets().then(|| format!("{}{OFFSETS}", field.name)))
}

/// One tensor of those of the micro-batches; offsets count on.
fn joined((name, parts): (String, Vec<Tensor>)) -> (String, Tensor) {
    if !name.ends_with(OFFSETS) {
        return (name, Tensor::cat(&parts, 0));
    }
    let mut whole = vec![Tensor::from_slice(&[0i64])];
    let mut before = 0;
    for part in parts {
        let count = part.size1().unwrap_or(1) - 1;
        let ends = part.narrow(0, 1, count) + before;
        before = if count > 0 { ends.int64_value(&[count - 1]) } else { before };
        whole.push(ends);
    }
    (name, Tensor::cat(&whole, 0))
}

/// Writes one tensor `[B, ...]` per field, micro-batches one after the other, and `sample_ids` `[B]`. A ragged field has its
/// elements `[N, ...]` and its offsets `[B + 1]`.
///
/// # Errors
/// A rank outside the world, no data, or a file that cannot be written.
pub fn write(request: &Request) -> Result<(), RankError> {
    let job = read_job(Some(request.job.clone()))?;
    if request.rank >= request.world {
        let (rank, world) = (request.rank, request.world);
        return Err(RankError::Usage(format!("--rank {rank} is outside --world {world}: ranks count from 0")));
    }
    let gather = |bytes: &[u8]| Ok::<_, DataError>(vec![bytes.to_vec()]);
    let team = Team { rank: 0, world_size: 1, gather: &gather, cache: None, kept: None, stages: Default::default() };
    let index = job.runs_dir().join(".index");
    let datasets = task::find(&job.config.task).map_err(RankError::Usage)?.open(&job.config, &team, &index)?;
    let place = (request.rank as u64, request.world as u64);
    let planner = planner(&job.config, &job.plan, datasets.train.as_ref(), place)?;
    let (epoch, step) = planner.locate(request.step);
    let requests: Vec<_> =
        (0..planner.micro_batches(epoch, step)).map(|micro| planner.request(epoch, step, micro)).collect();
    let spec = LoaderSpec { threads: 0, slots: 2, micro_batch: job.plan.batch.micro_batch, ..LoaderSpec::default() };
    let mut loader = Loader::new(Arc::clone(&datasets.train), spec)?;
    let names: Vec<String> = datasets.train.fields().iter().flat_map(tensor_names).collect();
    let mut parts: Vec<Vec<Tensor>> = names.iter().map(|_| Vec::new()).collect();
    let mut ids = Vec::new();
    for host in loader.run(requests.into_iter())? {
        let batch = to_tensors(&host?, Device::Cpu);
        ids.extend(batch.sample_ids.iter().map(|&id| id as i64));
        parts.iter_mut().zip(batch.fields).for_each(|(part, tensor)| part.push(tensor));
    }
    let left_out = datasets.train.take_left_out().unwrap_or_default();
    left_out.iter().for_each(|line| println!("left out: {line}"));
    let mut tensors: Vec<(String, Tensor)> = names.into_iter().zip(parts).map(joined).collect();
    tensors.push(("sample_ids".into(), Tensor::from_slice(&ids)));
    Tensor::write_safetensors(&tensors, &request.out)
        .map_err(|e| RankError::system(request.out.display().to_string(), e))?;
    println!(
        "step {} of epoch {}: {} samples of rank {} of {} in {}",
        step,
        epoch + 1,
        ids.len(),
        request.rank,
        request.world,
        request.out.display()
    );
    Ok(())
}
