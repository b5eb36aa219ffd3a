//! The whole step as a CUDA graph: recorded once, given to the device as one piece ever after.
//!
//! A small model's step is hundreds of kernels of a few microseconds, and giving each to the device costs more than the
//! kernel itself. A graph needs the same shapes and the same places in every step: one micro-batch of constant size.

use super::TrainError;
use super::scaler::tch_error;
use super::step::StepRunner;
use crate::comm::Collective;
use crate::task::{Batch, Metrics, Output};
use crate::torch::device::copy;
use crate::torch::graph::Graph;
use crate::torch::release_caches;
use spec::config::CudaGraph;
use tch::{Device, Tensor};

/// Steps as written before one is recorded: buckets are rebuilt after the first, libraries choose their algorithms.
const WARM_UP: u64 = 3;

/// A recorded step, or the reason why there is none.
#[derive(Default)]
pub struct StepGraph {
    wanted: bool,
    /// `train.cuda_graph: on`: not recording is an error.
    must: bool,
    recorded: Option<Recorded>,
}

struct Recorded {
    graph: Graph,
    /// Where the graph reads its batch.
    batch: Batch,
    /// Where it leaves loss and prediction.
    output: Output,
}

impl StepGraph {
    pub fn new(device: Device, wish: CudaGraph) -> StepGraph {
        let wanted = device.is_cuda() && wish != CudaGraph::Off;
        StepGraph { wanted, must: wish == CudaGraph::On, recorded: None }
    }

    /// True if this step can be recorded or replayed: warmed up, in one micro-batch, of full size on all ranks (a recording
    /// holds a rank's share of the step as a number), and without injected failures later on.
    pub fn serves(&mut self, runner: &StepRunner, steps_here: u64, micros: u64, injects: bool) -> bool {
        self.wanted
            && !runner.model.reads_step()
            && !runner.warming
            && !runner.trial
            && !injects
            && steps_here >= WARM_UP
            && micros == 1
            && runner.planner.is_full(runner.epoch, runner.step_in_epoch)
    }

    pub fn is_recorded(&self) -> bool {
        self.recorded.is_some()
    }

    /// Forgets what was recorded: batches have another size.
    pub fn forget(&mut self) {
        self.recorded = None;
    }

    /// Records `work` on a batch like this one; all ranks call it together, and either all have a graph or none has.
    /// Returns a line: that it is recorded, or the reason why not.
    ///
    /// # Errors
    /// A peer failed, or the config insists on a graph.
    pub fn record(
        &mut self,
        like: &Batch,
        collective: &dyn Collective,
        work: impl FnOnce(&Batch) -> Result<Output, TrainError>,
    ) -> Result<String, TrainError> {
        let fields = like.fields.iter().map(Tensor::f_detach_copy).collect::<Result<Vec<_>, _>>().map_err(tch_error)?;
        let batch = Batch::new(fields, like.sample_ids.clone()).at(like.step, like.seed).of_step(like.step_samples);
        // The recording takes a pool of its own: what the steps before it left free would be there twice. The device may
        // wait for other ranks here, so it is waited for with a limit first.
        collective.catch_up("the steps before the recording")?;
        release_caches();
        let made = Graph::record(|| work(&batch));
        let problem = made.as_ref().err().map(ToString::to_string).unwrap_or_default();
        let all = collective.all_gather(problem.as_bytes())?;
        let failed = all.iter().position(|text| !text.is_empty());
        if let Some(rank) = failed {
            self.wanted = false;
            // Memory of the failed recording is not needed again.
            release_caches();
            let reason = String::from_utf8_lossy(&all[rank]).into_owned();
            if self.must {
                return Err(TrainError::Config(format!(
                    "train.cuda_graph is on, but rank {rank} cannot record the step: {reason}; set it to auto or off"
                )));
            }
            return Ok(format!("cuda graph: none, since rank {rank} cannot record the step: {reason}"));
        }
        self.recorded = made.ok().map(|(graph, output)| Recorded { graph, batch, output });
        Ok("cuda graph: the step is recorded and replayed from here on".to_owned())
    }

    /// Copies the batch to its place and runs the graph. Returns false if no graph fits such a batch: run the step
    /// eagerly.
    ///
    /// # Errors
    /// CUDA refuses.
    pub fn replay(&self, batch: &Batch, metrics: Option<&mut dyn Metrics>) -> Result<bool, TrainError> {
        let Some(Recorded { graph, batch: place, output }) = &self.recorded else { return Ok(false) };
        let alike = |(to, from): (&Tensor, &Tensor)| to.size() == from.size();
        if place.len() != batch.len() || !place.fields.iter().zip(&batch.fields).all(alike) {
            return Ok(false);
        }
        for (to, from) in place.fields.iter().zip(&batch.fields) {
            copy(to, from)?;
        }
        graph.replay()?;
        if let Some(metrics) = metrics {
            metrics.update(place, output);
        }
        Ok(true)
    }
}
