//! Passes of a model on made-up batches, as a step and an evaluation run them: for measuring what they take.

use super::ddp::{Ddp, DdpOptions};
use super::scaler::tch_error;
use super::{TrainError, amp};
use crate::comm::Solo;
use crate::task::{Batch, Metrics, Model};
use crate::torch::graph::Graph;
use crate::torch::{self, TorchError};
use spec::config::{Config, CudaGraph};
use std::sync::Arc;
use tch::{Device, Kind, Tensor, no_grad};

/// A model with its gradients' buckets, without an optimizer.
pub struct Rehearsal<'a> {
    model: &'a dyn Model,
    metrics: Box<dyn Metrics>,
    /// True if training counts its metrics.
    online: bool,
    /// `None`: nothing is trained.
    ddp: Option<Ddp>,
    /// Element type of autocast; `None`: off.
    narrow: Option<Kind>,
    /// Steps are recorded as a CUDA graph where that is possible.
    records: bool,
}

impl<'a> Rehearsal<'a> {
    /// Takes the trainable `params` over, as training does.
    ///
    /// # Errors
    /// As [`Ddp::new`].
    pub fn new(
        config: &Config,
        model: &'a dyn Model,
        params: Vec<(String, Tensor)>,
        metrics: Box<dyn Metrics>,
        device: Device,
    ) -> Result<Self, TrainError> {
        let options = DdpOptions { bucket_mb: config.ddp.bucket_mb, ..DdpOptions::default() };
        let ddp = Ddp::new(params, Arc::new(Solo::new(device)), options)?;
        let (narrow, _) = amp::narrow_kind(config.train.amp, device.is_cuda());
        let records = device.is_cuda() && config.train.cuda_graph != CudaGraph::Off;
        Ok(Self { model, metrics, online: config.train.compute_metrics_online, ddp: Some(ddp), narrow, records })
    }

    /// A model that is not trained.
    pub fn of_passes(config: &Config, model: &'a dyn Model, metrics: Box<dyn Metrics>, device: Device) -> Self {
        let (narrow, _) = amp::narrow_kind(config.train.amp, device.is_cuda());
        Self { model, metrics, online: false, ddp: None, narrow, records: false }
    }

    /// Forward and backward pass of one micro-batch, and the reduction of its gradients.
    ///
    /// # Errors
    /// [`TorchError::OutOfMemory`] where memory runs out.
    pub fn train(&mut self, batch: &Batch) -> Result<(), TrainError> {
        let Some(ddp) = &mut self.ddp else { return Ok(()) };
        ddp.zero_grad()?;
        ddp.set_sync(true);
        caught(|| {
            let output = amp::forward(self.model, batch, true, (self.narrow, None))?;
            let _value = output.loss.double_value(&[]);
            if self.online {
                self.metrics.update(batch, &output);
            }
            self.model.backward(&(output.loss * 1.0))
        })?;
        Ok(ddp.finish()?)
    }

    /// The pass of [`Rehearsal::train`] as a CUDA graph, whose pool of memory is apart from the allocator's; `None` where
    /// steps are not recorded.
    pub fn record(&mut self, batch: &Batch) -> Option<Graph> {
        let (records, ddp) = (self.records, self.ddp.as_mut()?);
        let work = || -> Result<(), TrainError> {
            ddp.zero_grad()?;
            ddp.set_sync(true);
            caught(|| {
                let output = amp::forward(self.model, batch, true, (self.narrow, None))?;
                self.model.backward(&output.loss)
            })?;
            Ok(ddp.finish_on_device()?)
        };
        let made = records.then(|| Graph::record(work))?;
        // Memory of a failed recording is not needed again.
        made.inspect_err(|_| torch::release_caches()).ok().map(|(graph, ())| graph)
    }

    /// Forward pass of one batch of an evaluation, with its metrics.
    ///
    /// # Errors
    /// As [`Rehearsal::train`].
    pub fn evaluate(&mut self, batch: &Batch) -> Result<(), TrainError> {
        caught(|| {
            let output = no_grad(|| amp::forward(self.model, batch, false, (self.narrow, None)))?;
            self.metrics.update(batch, &output);
            Ok(())
        })
    }

    /// Prediction for one batch.
    ///
    /// # Errors
    /// As [`Rehearsal::train`].
    pub fn predict(&mut self, batch: &Batch) -> Result<(), TrainError> {
        caught(|| no_grad(|| amp::predict(self.model, batch, self.narrow)).map(drop))
    }

    /// A batch from `make`, which fails as an allocator does where memory runs out.
    ///
    /// # Errors
    /// As [`Rehearsal::train`].
    pub fn batch(make: impl FnOnce() -> Result<Batch, tch::TchError>) -> Result<Batch, TrainError> {
        make().map_err(tch_error)
    }
}

fn caught(pass: impl FnOnce() -> Result<(), TorchError>) -> Result<(), TrainError> {
    Ok(torch::catch_out_of_memory(pass).and_then(|inner| inner)?)
}
