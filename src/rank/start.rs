//! A rank's facts before anything is opened, and what training and passes report alike.

use super::RankError;
use super::observer::RankObserver;
use super::stop::Stop;
use crate::comm::rendezvous::Links;
use crate::comm::{Collective, RankEnv};
use crate::report::Reporter;
use crate::report::memory::MemorySampler;
use crate::report::records::RecordWriter;
use crate::train::Controls;
use cache::client::CacheClient;
use spec::contract::Phase;
use spec::job::Job;
use std::sync::Arc;
use std::time::Instant;
use tch::{Device, Tensor, nn};

/// Files left out that are named one by one.
const SKIPPED_SHOWN: usize = 20;

/// Facts known before anything is opened.
pub(super) struct Start {
    pub job: Job,
    pub env: RankEnv,
    pub device: Device,
    pub collective: Arc<dyn Collective>,
    /// Links to the node's other ranks, where our launcher did not start them.
    pub links: Option<Links>,
    pub reporter: Reporter,
    pub controls: Arc<Controls>,
    pub stop: Stop,
    pub began: Instant,
}

pub(super) fn observer(
    start: &Start,
    memory: MemorySampler,
    recorded_step: Option<u64>,
    cache: Option<Arc<CacheClient>>,
) -> Result<RankObserver, RankError> {
    let Start { job, env, reporter, .. } = start;
    let records = if env.rank == 0 { Some(open_records(start, "metrics.jsonl", recorded_step)?) } else { None };
    Ok(RankObserver {
        rank: env.rank,
        reporter: reporter.clone(),
        memory,
        records,
        memory_every: job.config.log.memory_every,
        run_dir: job.run_dir.clone(),
        first: true,
        phase: Phase::Start,
        cache,
        journal: None,
        on_device: start.device.is_cuda().then(|| Arc::clone(&start.collective)),
    })
}

/// Ends the records: the summary holds what they could not write.
pub(super) fn end_records(observer: RankObserver) {
    observer.memory.stop();
    drop(observer.records);
}

pub(super) fn open_records(start: &Start, name: &str, resumed_step: Option<u64>) -> Result<RecordWriter, RankError> {
    let reporter = start.reporter.clone();
    Ok(RecordWriter::open(&start.job.run_dir.join(name), resumed_step, move |news| reporter.news(news))?)
}

/// One warning per file that was left out; the rest of many is counted.
pub(super) fn tell_skipped(skipped: &[String], reporter: &Reporter) {
    for line in skipped.iter().take(SKIPPED_SHOWN) {
        reporter.line(format!("warning: left out: {line}"));
    }
    if let Some(more) = skipped.len().checked_sub(SKIPPED_SHOWN).filter(|more| *more > 0) {
        reporter.line(format!("warning: left out: {more} more files"));
    }
}

/// Tensors with their names.
pub(super) type Named = Vec<(String, Tensor)>;

/// Trainable parameters with their names, in the order in which the model registered them; and all other variables, which
/// are buffers, by name.
pub(super) fn named(vs: &nn::VarStore) -> (Named, Named) {
    let mut others: std::collections::BTreeMap<String, Tensor> = vs.variables().into_iter().collect();
    let names: std::collections::BTreeMap<usize, String> =
        others.iter().map(|(name, tensor)| (tensor.data_ptr() as usize, name.clone())).collect();
    let of = |tensor: Tensor| names.get(&(tensor.data_ptr() as usize)).map(|name| (name.clone(), tensor));
    // Frozen ones are still listed as trainable.
    let trained = vs.trainable_variables().into_iter().filter(Tensor::requires_grad);
    let params: Named = trained.filter_map(of).collect();
    params.iter().for_each(|(name, _)| drop(others.remove(name)));
    (params, others.into_iter().collect())
}
