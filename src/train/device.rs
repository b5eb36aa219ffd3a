//! A step whose numbers stay on the device.
//!
//! Loss, votes, gradient norm, clipping, skipping and the loss scale are tensors; the host gives out work and reads what
//! came of step k while step k + 1 is under way. It waits for a step itself only where somebody asks for exact numbers:
//! at the steps that are logged, and at the end of an epoch.
//!
//! A step whose loss or gradient is no number changes nothing, on every rank alike: the optimizer reads a flag on the
//! device. Without a loss scale the flag stays set, so that the weights are the last good ones when the host learns of it.

use super::ddp::Ddp;
use super::graph::StepGraph;
use super::input::{Input, Taken};
use super::optimizer::Optimizer;
use super::scaler::{Scaler, ScalerState, tch_error};
use super::step::{StepOutcome, StepRunner};
use super::{TrainError, amp};
use crate::comm::Collective;
use crate::data::loader::BatchStream;
use crate::task::{Batch, Metrics, Output};
use crate::torch::device::{Event, Stream, copy, pinned};
use crate::torch::total_norm;
use launcher::config::CudaGraph;
use std::collections::VecDeque;
use tch::{Device, Kind, Tensor};

/// Places among the votes behind the gradients.
const STOP: i64 = 0;
const LOSS: i64 = 2;
/// Numbers that the host reads of a step: loss, gradient norm, stop votes, skipped, scale, this rank's part of the loss.
const NUMBERS: i64 = 6;
/// Steps under way before the host waits for the oldest.
const AHEAD: usize = 1;
/// A loss scale below this helps nothing any more: what overflows is no number at any scale.
const LEAST_SCALE: f64 = 1.0;

/// What a run wants of its device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceOptions {
    /// Keep a step's numbers on the device on a CPU too, where that is of no use but for tests.
    pub always: bool,
    /// The step, from 0, whose gradient this rank makes infinite: a test of skipping.
    pub overflow_at: Option<u64>,
}

/// A step whose numbers the host has not read yet.
struct Pending {
    place: usize,
    step: u64,
    lr: f64,
    ids: Vec<u64>,
}

/// Tensors and streams that steps on the device need besides model and optimizer.
pub struct DeviceStep {
    device: Device,
    options: DeviceOptions,
    pub(super) input: Input,
    scaler: Option<Scaler>,
    /// f32 scalar.
    lr: Tensor,
    /// f32 `[1]` each: this rank was asked to stop; the step is to be skipped; this rank's part of the loss.
    stop: Tensor,
    found: Tensor,
    loss: Tensor,
    /// f32 `[NUMBERS]` on the device, and two places for it on the host.
    numbers: Tensor,
    places: Vec<(Tensor, Option<Event>)>,
    pending: VecDeque<Pending>,
    latest: StepOutcome,
    steps_here: u64,
    pub(super) graph: StepGraph,
    lines: Vec<String>,
}

impl DeviceStep {
    /// `scaler`: the loss scale to begin with, for fp16.
    ///
    /// # Errors
    /// No memory, or no CUDA.
    pub fn new(
        device: Device,
        micro_batch: usize,
        scaler: Option<ScalerState>,
        graph: CudaGraph,
        options: DeviceOptions,
    ) -> Result<DeviceStep, TrainError> {
        let zeros = |shape: &[i64]| Tensor::f_zeros(shape, (Kind::Float, device)).map_err(tch_error);
        let place = |_| match device {
            Device::Cuda(_) => Ok((pinned(&[NUMBERS], Kind::Float)?, Some(Event::new(false)?))),
            _ => Ok::<_, TrainError>((zeros(&[NUMBERS])?, None)),
        };
        Ok(DeviceStep {
            device,
            options,
            input: Input::new(device, micro_batch)?,
            scaler: scaler.map(|state| Scaler::new(device, state)).transpose()?,
            lr: zeros(&[])?,
            stop: zeros(&[1])?,
            found: zeros(&[1])?,
            loss: zeros(&[1])?,
            numbers: zeros(&[NUMBERS])?,
            places: (0..=AHEAD).map(place).collect::<Result<_, _>>()?,
            pending: VecDeque::new(),
            latest: StepOutcome::default(),
            steps_here: 0,
            graph: StepGraph::new(device, graph),
            lines: Vec::new(),
        })
    }

    /// Runs the step. With `exact` the outcome is this step's, else that of the step before.
    ///
    /// # Errors
    /// A batch cannot be read, a peer failed, or a loss was not finite: then no parameter has changed in that step, nor
    /// since.
    pub fn run(
        &mut self,
        runner: &StepRunner,
        batches: &mut BatchStream,
        ddp: &mut Ddp,
        optimizer: &mut Optimizer,
        metrics: &mut dyn Metrics,
        (lr, exact): (f64, bool),
    ) -> Result<StepOutcome, TrainError> {
        let _ = self.lr.f_fill_(lr).map_err(tch_error)?;
        if runner.stop {
            let _ = self.stop.f_fill_(1.0).map_err(tch_error)?;
        }
        let micros = runner.planner.micro_batches(runner.step_in_epoch);
        let overflows = self.options.overflow_at.is_some_and(|at| at >= runner.step);
        let ids = if self.graph.serves(runner, self.steps_here, micros, overflows) {
            self.graphed(runner, batches, ddp, optimizer, metrics)?
        } else {
            self.eager(runner, batches, ddp, optimizer, metrics, micros)?
        };
        self.steps_here += 1;
        self.send(runner.step, lr, ids)?;
        // The next batch travels while the device computes.
        self.input.prefetch(batches)?;
        let keep = if exact || self.steps_here == 1 { 0 } else { AHEAD };
        while self.pending.len() > keep {
            self.read(runner.collective)?;
        }
        let data_wait_s = self.input.take_waited_s();
        Ok(StepOutcome { data_wait_s, ..self.latest.clone() })
    }

    fn eager(
        &mut self,
        runner: &StepRunner,
        batches: &mut BatchStream,
        ddp: &mut Ddp,
        optimizer: &mut Optimizer,
        metrics: &mut dyn Metrics,
        micros: u64,
    ) -> Result<Vec<u64>, TrainError> {
        let mut ids = Vec::new();
        self.open(ddp)?;
        for micro in 0..micros {
            if micro > 0 {
                self.input.prefetch(batches)?;
            }
            let taken = self.input.take(batches)?.ok_or_else(|| ran_dry(runner.step))?;
            self.micro(runner, ddp, &taken, metrics, micro, micros)?;
            ids.extend_from_slice(&taken.batch.sample_ids);
            self.input.release(taken)?;
        }
        self.close(runner, ddp, optimizer)?;
        Ok(ids)
    }

    fn micro(
        &mut self,
        runner: &StepRunner,
        ddp: &mut Ddp,
        taken: &Taken,
        metrics: &mut dyn Metrics,
        micro: u64,
        micros: u64,
    ) -> Result<(), TrainError> {
        tch::manual_seed(runner.seed(micro));
        let output = self.forward_backward(runner, ddp, &taken.batch, micro + 1 == micros)?;
        if runner.config.train.compute_metrics_online {
            metrics.update(&taken.batch, &output);
        }
        Ok(())
    }

    /// Takes a batch to its place and replays the graph; records it first where there is none yet. Where recording fails
    /// on some rank the step runs as it is written, on all.
    fn graphed(
        &mut self,
        runner: &StepRunner,
        batches: &mut BatchStream,
        ddp: &mut Ddp,
        optimizer: &mut Optimizer,
        metrics: &mut dyn Metrics,
    ) -> Result<Vec<u64>, TrainError> {
        let taken = self.input.take(batches)?.ok_or_else(|| ran_dry(runner.step))?;
        let ids = taken.batch.sample_ids.clone();
        tch::manual_seed(runner.seed(0));
        let mut graph = std::mem::take(&mut self.graph);
        if !graph.is_recorded() {
            let line = graph.record(&taken.batch, runner.collective, |batch| {
                self.open(ddp)?;
                let output = self.forward_backward(runner, ddp, batch, true)?;
                self.close(runner, ddp, optimizer)?;
                Ok(output)
            });
            match line {
                Ok(line) => self.lines.push(line),
                Err(error) => {
                    self.graph = graph;
                    return Err(error);
                }
            }
        }
        let online = runner.config.train.compute_metrics_online;
        let replayed = graph.replay(&taken.batch, if online { Some(&mut *metrics) } else { None });
        self.graph = graph;
        if !replayed? {
            // What was begun for the recording is begun anew; what went wrong in it has been told.
            let _ = ddp.zero_grad();
            self.open(ddp)?;
            self.micro(runner, ddp, &taken, metrics, 0, 1)?;
            self.close(runner, ddp, optimizer)?;
        }
        self.input.release(taken)?;
        Ok(ids)
    }

    fn open(&mut self, ddp: &mut Ddp) -> Result<(), TrainError> {
        ddp.zero_grad()?;
        let _ = self.loss.f_zero_().map_err(tch_error)?;
        Ok(())
    }

    fn forward_backward(
        &mut self,
        runner: &StepRunner,
        ddp: &mut Ddp,
        batch: &Batch,
        last: bool,
    ) -> Result<Output, TrainError> {
        let output = amp::forward(runner.model, batch, true, runner.narrow)?;
        let share = batch.len() as f64 / runner.planner.global_batch as f64;
        let mut loss = output.loss.f_mul_scalar(share).map_err(tch_error)?;
        let part = loss.f_detach().and_then(|part| part.f_view([1])).map_err(tch_error)?;
        let _ = self.loss.f_add_(&part).map_err(tch_error)?;
        ddp.set_sync(last);
        if let Some(scaler) = &self.scaler {
            loss = scaler.lift(&loss);
        }
        if last && self.options.overflow_at == Some(runner.step) {
            loss = loss.f_mul_scalar(f64::INFINITY).map_err(tch_error)?;
        }
        loss.f_backward().map_err(tch_error)?;
        Ok(output)
    }

    /// Everything after backward: reduce, unscale, norm, clip, update.
    fn close(&mut self, runner: &StepRunner, ddp: &mut Ddp, optimizer: &mut Optimizer) -> Result<(), TrainError> {
        let _no_grad = tch::no_grad_guard();
        let place = |votes: &Tensor, at: i64| votes.f_narrow(0, at, 1).map_err(tch_error);
        let votes = ddp.device_votes()?;
        place(&votes, STOP)?.f_copy_(&self.stop).map_err(tch_error)?;
        place(&votes, LOSS)?.f_copy_(&self.loss).map_err(tch_error)?;
        ddp.finish_on_device()?;
        let (mut grads, votes) = (ddp.grads()?, ddp.device_votes()?);
        if let Some(scaler) = &self.scaler {
            let _ = self.found.f_zero_().map_err(tch_error)?;
            scaler.set_down(&grads, &self.found)?;
        }
        let norm = total_norm(&[grads.shallow_clone()])?.f_view([1]).map_err(tch_error)?;
        if self.scaler.is_none() {
            self.mark_bad(&norm, &place(&votes, LOSS)?).map_err(tch_error)?;
        }
        let max_norm = runner.config.train.gradient_clip_norm;
        if max_norm > 0.0 {
            let factor = norm.f_add_scalar(1e-6).and_then(|n| n.f_reciprocal()).and_then(|n| n.f_mul_scalar(max_norm));
            let factor = factor.and_then(|n| n.f_clamp_max(1.0)).map_err(tch_error)?;
            let _ = grads.f_mul_(&factor).map_err(tch_error)?;
        }
        optimizer.step_unless(ddp, &self.lr, &self.found)?;
        let one = || Tensor::f_ones([1], (Kind::Float, self.device)).map_err(tch_error);
        // Before the scale moves: the record of a step holds the scale that it ran with.
        let scale = self.scaler.as_ref().map_or_else(one, |scaler| Ok(scaler.scale().shallow_clone()))?;
        let parts = [place(&votes, LOSS)?, norm, place(&votes, STOP)?, self.found.shallow_clone(), scale];
        let parts: Vec<Tensor> = parts.into_iter().chain([self.loss.shallow_clone()]).collect();
        let all = Tensor::f_cat(&parts, 0).map_err(tch_error)?;
        self.numbers.f_copy_(&all).map_err(tch_error)?;
        if let Some(scaler) = &self.scaler {
            scaler.update(&self.found)?;
        }
        Ok(())
    }

    /// Sets the flag, for good, where the norm or the loss is no finite number.
    fn mark_bad(&mut self, norm: &Tensor, loss: &Tensor) -> Result<(), tch::TchError> {
        let good = norm.f_isfinite()?.f_logical_and(&loss.f_isfinite()?)?;
        let bad = good.f_logical_not()?.f_to_kind(Kind::Float)?;
        let worse = self.found.f_maximum(&bad)?;
        self.found.f_copy_(&worse)
    }

    /// Begins to bring the step's numbers to the host.
    fn send(&mut self, step: u64, lr: f64, ids: Vec<u64>) -> Result<(), TrainError> {
        let place = (self.steps_here % self.places.len() as u64) as usize;
        let (host, event) = &mut self.places[place];
        copy(host, &self.numbers)?;
        if let (Some(event), Device::Cuda(index)) = (event, self.device) {
            event.record(Stream::current(index)?)?;
        }
        self.pending.push_back(Pending { place, step, lr, ids });
        Ok(())
    }

    /// Waits for the oldest step's numbers and takes them over.
    fn read(&mut self, collective: &dyn Collective) -> Result<(), TrainError> {
        let Some(Pending { place, step, lr, ids }) = self.pending.pop_front() else { return Ok(()) };
        let (host, event) = &self.places[place];
        if let Some(event) = event {
            collective.wait(event, "the step")?;
        }
        let numbers = Vec::<f32>::try_from(host).map_err(tch_error)?;
        let [loss, norm, stop, skipped, scale, own] = numbers[..] else { return Ok(()) };
        if skipped > 0.0 && (self.scaler.is_none() || f64::from(scale) < LEAST_SCALE) {
            self.pending.clear();
            return Err(non_finite(step, own, &ids, collective)?);
        }
        if skipped > 0.0 {
            self.lines.push(format!(
                "step {}: the gradient overflowed at loss scale {scale}: skipped on all ranks, the scale is halved",
                step + 1
            ));
        }
        // A skipped step has no norm, and JSON no infinity.
        let grad_norm = if norm.is_finite() { f64::from(norm) } else { 0.0 };
        let (loss, scale) = (f64::from(loss), f64::from(scale));
        self.latest = StepOutcome { loss, lr, grad_norm, scale, stop: stop > 0.0, ..StepOutcome::default() };
        Ok(())
    }

    /// Lines for people since the last call.
    pub fn take_lines(&mut self) -> Vec<String> {
        std::mem::take(&mut self.lines)
    }

    /// The loss scale for a checkpoint; `None` without one. Waits for the device.
    ///
    /// # Errors
    /// Work on the device failed.
    pub fn scaler_state(&self) -> Result<Option<ScalerState>, TrainError> {
        self.scaler.as_ref().map(Scaler::state).transpose()
    }
}

fn ran_dry(step: u64) -> TrainError {
    TrainError::Config(format!("step {step}: the loader ended before its epoch did; please report this"))
}

/// Finds out whose loss was no number, and of which samples. All ranks call it together: they read the same flag.
fn non_finite(step: u64, own: f32, ids: &[u64], collective: &dyn Collective) -> Result<TrainError, TrainError> {
    let mine = if own.is_finite() { String::new() } else { format!("{own}|{ids:?}") };
    let all = collective.all_gather(mine.as_bytes())?;
    let first = all.iter().enumerate().find(|(_, text)| !text.is_empty());
    let text = first.map(|(_, text)| String::from_utf8_lossy(text).into_owned()).unwrap_or_default();
    let (value, samples) = text.split_once('|').unwrap_or(("not finite", "of any rank: the gradient's norm"));
    Ok(TrainError::NonFinite {
        step: step + 1,
        rank: first.map_or(0, |(rank, _)| rank),
        value: value.to_owned(),
        samples: samples.to_owned(),
        good: step,
    })
}
