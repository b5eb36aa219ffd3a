//! A step whose numbers stay on the device.
//!
//! Loss, votes, gradient norm, clipping, skipping and the loss scale are tensors; the host issues work and reads the
//! result of step k while step k + 1 is under way. It waits for a step itself only where somebody asks for exact numbers:
//! at the steps that are logged, and at the end of an epoch.
//!
//! Two flags on the device keep the optimizer from changing anything, on every rank alike. `found` is of one step: its
//! gradient overflowed under a loss scale. `hold` stays until the host has learnt of it: a loss or a norm that is no
//! number, or memory that ran out on some rank. So the weights are the last good ones then, and the step can be repeated.

use super::TrainError;
use super::buffers::undo_where;
use super::ddp::{DISCARD, Ddp, VOTES};
use super::graph::StepGraph;
use super::input::{Input, Taken};
use super::scaler::{Scaler, ScalerState, tch_error};
use super::step::{Attempt, DIVISOR, HALVE, LOSS, OVERDUE, Parts, STOP, StepOutcome, StepRunner, Wishes, non_finite};
use crate::data::loader::BatchStream;
use crate::task::{Batch, Output};
use crate::torch::device::{Event, Stream, copy, pinned};
use crate::torch::{TorchError, catch_out_of_memory};
use spec::config::CudaGraph;
use std::collections::VecDeque;
use tch::{Device, Kind, Tensor};

/// Numbers that the host reads of a step: the votes, then these four.
const NUMBERS: usize = VOTES + 4;
const NORM: usize = VOTES;
const SKIPPED: usize = VOTES + 1;
const SCALE: usize = VOTES + 2;
/// This rank's part of the loss.
const OWN: usize = VOTES + 3;
/// Steps under way before the host waits for the oldest.
const AHEAD: usize = 1;
/// A loss scale below this helps nothing any more: what overflows is no number at any scale.
const LEAST_SCALE: f32 = 1.0;

/// Device options of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceOptions {
    /// Keep a step's numbers on the device on a CPU too, where that is of no use but for tests.
    pub always: bool,
    /// The step, from 0, whose gradient this rank makes infinite: a test of skipping.
    pub overflow_at: Option<u64>,
    /// The step, from 0, in which this rank's memory runs out, once: a test of repeating.
    pub short_at: Option<u64>,
}

/// A step whose numbers the host has not read yet.
struct Pending {
    place: usize,
    step: u64,
    lr: f64,
    lrs: Vec<f64>,
    ids: Vec<u64>,
}

/// Tensors that the step reads and writes besides model and optimizer, at fixed addresses. f32.
struct Cells {
    /// `[groups]`.
    lrs: Tensor,
    /// `[VOTES]`: this rank's votes.
    votes: Tensor,
    /// `[1]` each, see above.
    found: Tensor,
    hold: Tensor,
    /// Its place among the votes: this rank's part of the loss.
    loss: Tensor,
    /// Its place among the votes: this rank's part of the loss's divisor.
    divisor: Tensor,
    /// `[1]`, 1.
    one: Tensor,
    /// `[NUMBERS]`.
    numbers: Tensor,
}

/// Steps on one device.
pub struct DeviceStep {
    device: Device,
    options: DeviceOptions,
    pub(super) input: Input,
    scaler: Option<Scaler>,
    cells: Cells,
    /// Places for the numbers on the host, page-locked where there is a device.
    places: Vec<(Tensor, Option<Event>)>,
    pending: VecDeque<Pending>,
    latest: StepOutcome,
    /// Content of `cells.lrs`.
    rates: Vec<f64>,
    /// Wishes in `cells.votes`.
    voted: Wishes,
    /// Allocator's message when this rank's memory ran out, until the step is repeated.
    short: Option<String>,
    good_step: u64,
    steps_here: u64,
    graph: StepGraph,
    lines: Vec<String>,
}

impl DeviceStep {
    /// `scaler`: the loss scale to begin with, for fp16.
    ///
    /// # Errors
    /// No memory, or no CUDA.
    pub fn new(
        device: Device,
        scaler: Option<ScalerState>,
        (graph, groups): (CudaGraph, usize),
        options: DeviceOptions,
    ) -> Result<DeviceStep, TrainError> {
        let zeros = |shape: &[i64]| Tensor::f_zeros(shape, (Kind::Float, device)).map_err(tch_error);
        let place = |_| match device {
            Device::Cuda(_) => Ok((pinned(&[NUMBERS as i64], Kind::Float)?, Some(Event::new(false)?))),
            _ => Ok::<_, TrainError>((zeros(&[NUMBERS as i64])?, None)),
        };
        let votes = zeros(&[VOTES as i64])?;
        let cells = Cells {
            lrs: zeros(&[groups as i64])?,
            loss: self::place(&votes, LOSS)?,
            divisor: self::place(&votes, DIVISOR)?,
            votes,
            found: zeros(&[1])?,
            hold: zeros(&[1])?,
            one: Tensor::f_ones([1], (Kind::Float, device)).map_err(tch_error)?,
            numbers: zeros(&[NUMBERS as i64])?,
        };
        Ok(DeviceStep {
            device,
            options,
            input: Input::new(device)?,
            scaler: scaler.map(|state| Scaler::new(device, state)).transpose()?,
            cells,
            places: (0..=AHEAD).map(place).collect::<Result<_, _>>()?,
            pending: VecDeque::new(),
            latest: StepOutcome::default(),
            rates: Vec::new(),
            voted: Wishes::default(),
            short: None,
            good_step: 0,
            steps_here: 0,
            graph: StepGraph::new(device, graph),
            lines: Vec::new(),
        })
    }

    /// A new stream of batches begins, of at most `micro_batch` samples each. Whatever held the optimizer is over.
    ///
    /// # Errors
    /// The device refuses.
    pub fn begin(&mut self, micro_batch: usize) -> Result<(), TrainError> {
        if self.input.begin(micro_batch) {
            self.graph.forget();
            self.steps_here = 0;
        }
        self.short = None;
        self.pending.clear();
        let _ = self.cells.hold.f_zero_().map_err(tch_error)?;
        Ok(())
    }

    /// Runs the step. With `exact` the result is that of this step, otherwise that of the step before. After
    /// [`Attempt::OutOfMemory`] the step to repeat is [`DeviceStep::good_step`].
    ///
    /// # Errors
    /// A batch cannot be read, a peer failed, or a loss was not finite: then no parameter has changed in that step, nor
    /// since.
    pub fn run(
        &mut self,
        runner: &StepRunner,
        batches: &mut BatchStream,
        parts: &mut Parts,
        exact: bool,
    ) -> Result<Attempt, TrainError> {
        for (group, numbers) in runner.numbers.iter().enumerate() {
            if self.rates.get(group) == Some(&numbers.lr) {
                continue;
            }
            let mut cell = self.cells.lrs.f_narrow(0, group as i64, 1).map_err(tch_error)?;
            let _ = cell.f_fill_(numbers.lr).map_err(tch_error)?;
        }
        self.rates = runner.lrs();
        self.wish(runner.wishes)?;
        let micros = runner.planner.micro_batches(runner.epoch, runner.step_in_epoch);
        let injects =
            [self.options.overflow_at, self.options.short_at].into_iter().flatten().any(|at| at >= runner.step);
        // A graph has one shape of batch.
        let one_shape = self.short.is_none() && !batches.is_ragged();
        let ids = if one_shape && self.graph.serves(runner, self.steps_here, micros, injects) {
            self.graphed(runner, batches, parts)?
        } else {
            self.eager(runner, batches, parts, micros)?
        };
        self.hand_out(runner, parts)?;
        self.steps_here += 1;
        self.send(runner, ids)?;
        if self.short.is_none() {
            // The next batch travels while the device computes.
            self.input.prefetch(batches)?;
        }
        let keep = if exact || self.steps_here == 1 { 0 } else { AHEAD };
        self.settle(runner, keep)
    }

    /// Gives the model what all ranks shared; undone on the device where the step changes nothing.
    fn hand_out(&mut self, runner: &StepRunner, parts: &Parts) -> Result<(), TrainError> {
        if runner.model.share_width() == 0 {
            return Ok(());
        }
        let state = runner.model.state();
        let before = state.iter().map(|(_, tensor)| tensor.f_detach_copy()).collect::<Result<Vec<_>, _>>();
        let before = before.map_err(tch_error)?;
        runner.hand_out(parts.ddp)?;
        let _no_grad = tch::no_grad_guard();
        let mut all = state.into_iter().zip(&before);
        all.try_for_each(|((_, mut live), before)| undo_where(&self.cells.hold, &mut live, before))
    }

    /// Reads numbers until `keep` steps are under way.
    fn settle(&mut self, runner: &StepRunner, mut keep: usize) -> Result<Attempt, TrainError> {
        let (mut halve, mut stop) = (false, false);
        while self.pending.len() > keep {
            if !self.read(runner)? {
                self.pending.clear();
                return Ok(Attempt::OutOfMemory { message: self.short.take() });
            }
            (halve, stop) = (halve || self.latest.halve, stop || self.latest.stop);
            if halve {
                // The steps after it repeat the wish, which is done once.
                keep = 0;
            }
        }
        let data_wait_s = self.input.take_waited_s();
        Ok(Attempt::Done(StepOutcome { data_wait_s, halve, stop, ..self.latest.clone() }))
    }

    /// Brings this rank's votes to the device where they have changed.
    fn wish(&mut self, wishes: Wishes) -> Result<(), TrainError> {
        if wishes == self.voted {
            return Ok(());
        }
        for (place, wish) in [(STOP, wishes.stop), (HALVE, wishes.halve), (OVERDUE, wishes.overdue)] {
            self.vote(place, wish)?;
        }
        self.voted = wishes;
        Ok(())
    }

    fn vote(&mut self, place: usize, yes: bool) -> Result<(), TrainError> {
        let mut cell = self.cells.votes.f_narrow(0, place as i64, 1).map_err(tch_error)?;
        cell.f_fill_(f64::from(u8::from(yes))).map(|_| ()).map_err(tch_error)
    }

    /// The step as it is written. A rank whose memory runs out leaves its other micro-batches out, and those of the steps
    /// until the host learns of it; it takes part in every reduction all the same.
    fn eager(
        &mut self,
        runner: &StepRunner,
        batches: &mut BatchStream,
        parts: &mut Parts,
        micros: u64,
    ) -> Result<Vec<u64>, TrainError> {
        let mut ids = Vec::new();
        self.open(parts.ddp)?;
        for micro in 0..micros {
            if self.short.is_some() {
                break;
            }
            if micro > 0 {
                self.input.prefetch(batches)?;
            }
            let taken = self.input.take(batches);
            let passed = taken.and_then(|taken| {
                let taken = taken.ok_or_else(|| runner.ran_dry())?.map(|batch| runner.placed(batch));
                let done = ids.len();
                ids.extend_from_slice(&taken.batch.sample_ids);
                let passed = self.pass(runner, parts, &taken, (micro, micros), done);
                self.input.release(taken)?;
                passed
            });
            match passed {
                Err(TrainError::Torch(TorchError::OutOfMemory { message })) => {
                    self.short = Some(runner.may_repeat(message)?);
                }
                other => runner.check_peers().and(other)?,
            }
        }
        self.vote(DISCARD, self.short.is_some())?;
        self.close(runner, parts)?;
        Ok(ids)
    }

    /// Forward and backward of one micro-batch. `done`: samples of those before it.
    fn pass(
        &mut self,
        runner: &StepRunner,
        parts: &mut Parts,
        taken: &Taken,
        (micro, micros): (u64, u64),
        done: usize,
    ) -> Result<(), TrainError> {
        if self.options.short_at == Some(runner.step) {
            self.options.short_at = None;
            return Err(TorchError::OutOfMemory { message: "as a test asked for".into() }.into());
        }
        tch::manual_seed(runner.seed(micro));
        catch_out_of_memory(|| {
            let output = self.forward_backward(runner, parts.ddp, &taken.batch, micro + 1 == micros, done)?;
            if runner.config.train.compute_metrics_online {
                parts.metrics.update(&taken.batch, &output);
            }
            Ok(())
        })?
    }

    /// Copies a batch to its place and replays the graph; records it first where there is no graph yet. Where recording
    /// fails on some rank the step runs eagerly on all.
    fn graphed(
        &mut self,
        runner: &StepRunner,
        batches: &mut BatchStream,
        parts: &mut Parts,
    ) -> Result<Vec<u64>, TrainError> {
        let taken = self.input.take(batches)?.ok_or_else(|| runner.ran_dry())?.map(|batch| runner.placed(batch));
        let ids = taken.batch.sample_ids.clone();
        tch::manual_seed(runner.seed(0));
        let mut graph = std::mem::take(&mut self.graph);
        if !graph.is_recorded() {
            let line = graph.record(&taken.batch, runner.collective, |batch| {
                self.open(parts.ddp)?;
                let output = self.forward_backward(runner, parts.ddp, batch, true, 0)?;
                self.close(runner, parts)?;
                Ok(output)
            })?;
            self.lines.push(line);
        }
        let online = runner.config.train.compute_metrics_online;
        let replayed = graph.replay(&taken.batch, if online { Some(&mut *parts.metrics) } else { None });
        self.graph = graph;
        if !replayed? {
            // Work begun for the recording is begun anew; its error has been reported.
            let _ = parts.ddp.zero_grad();
            self.open(parts.ddp)?;
            match self.pass(runner, parts, &taken, (0, 1), 0) {
                Err(TrainError::Torch(TorchError::OutOfMemory { message })) => {
                    self.short = Some(runner.may_repeat(message)?);
                }
                other => runner.check_peers().and(other)?,
            }
            self.vote(DISCARD, self.short.is_some())?;
            self.close(runner, parts)?;
        }
        self.input.release(taken)?;
        Ok(ids)
    }

    fn open(&mut self, ddp: &mut Ddp) -> Result<(), TrainError> {
        ddp.zero_grad()?;
        let _ = self.cells.loss.f_zero_().map_err(tch_error)?;
        let _ = self.cells.divisor.f_zero_().map_err(tch_error)?;
        Ok(())
    }

    fn forward_backward(
        &mut self,
        runner: &StepRunner,
        ddp: &mut Ddp,
        batch: &Batch,
        last: bool,
        done: usize,
    ) -> Result<Output, TrainError> {
        ddp.set_sync(last);
        let output = runner.forward(batch)?;
        runner.share(ddp, &output, batch, done)?;
        let share = runner.weight(batch, &output)?;
        if let Some(divisor) = &output.divisor {
            let part = divisor.f_view([1]).map_err(tch_error)?;
            let _ = self.cells.divisor.f_add_(&part).map_err(tch_error)?;
        }
        let mut loss = output.loss.f_mul_scalar(share).map_err(tch_error)?;
        let part = loss.f_detach().and_then(|part| part.f_view([1])).map_err(tch_error)?;
        let _ = self.cells.loss.f_add_(&part).map_err(tch_error)?;
        if let Some(scaler) = &self.scaler {
            loss = scaler.lift(&loss);
        }
        if last && self.options.overflow_at == Some(runner.step) {
            loss = loss.f_mul_scalar(f64::INFINITY).map_err(tch_error)?;
        }
        runner.model.backward(&loss)?;
        Ok(output)
    }

    /// Everything after backward: reduce, norm, then unscale, clip and update in one.
    ///
    /// Memory that runs out in here ends the rank: votes are cast by then and others have updated their weights, so there
    /// is no step to repeat. It does not come to that: moments are there from the start, all works in place, and the few
    /// numbers beside it take less than what the backward pass has just given back to the allocator.
    fn close(&mut self, runner: &StepRunner, parts: &mut Parts) -> Result<(), TrainError> {
        let ddp = &mut *parts.ddp;
        let _no_grad = tch::no_grad_guard();
        let mut votes = ddp.device_votes()?;
        votes.f_copy_(&self.cells.votes).map_err(tch_error)?;
        ddp.finish_on_device()?;
        let (mut grads, votes) = (ddp.grads()?, ddp.device_votes()?);
        if runner.model.divides() {
            divide(&mut grads, &votes, runner.samples()).map_err(tch_error)?;
        }
        // Of gradients as they are, lifted: the optimizer sets them down and clips them in its one pass over them.
        let lifted = grads.f_norm().and_then(|norm| norm.f_view([1])).map_err(tch_error)?;
        let scale = self.scaler.as_ref().map(|scaler| scaler.scale().shallow_clone());
        let norm = match &scale {
            Some(scale) => lifted.f_div(scale).map_err(tch_error)?,
            None => lifted.shallow_clone(),
        };
        let skip = self.flags(&lifted, &votes)?;
        let divisor = divisor(&norm, scale.as_ref(), runner.config.train.gradient_clip_norm).map_err(tch_error)?;
        let numbers = (runner.lr, runner.numbers);
        parts.optimizer.step_unless(ddp, &self.cells.lrs, numbers, (&skip, divisor.as_ref()))?;
        parts.buffers.keep_unless(&self.cells.hold)?;
        // Before the scale moves: the record of a step holds the scale that it ran with.
        let scale = scale.as_ref().unwrap_or(&self.cells.one);
        let parts = [&votes, &norm, &skip, scale, &self.cells.loss];
        let _ = Tensor::f_cat_out(&self.cells.numbers, &parts, 0).map_err(tch_error)?;
        if let Some(scaler) = &self.scaler {
            scaler.update(&self.cells.found)?;
        }
        Ok(())
    }

    /// Sets `hold` for good where there is cause; whether this step is to change nothing, f32 `[1]`. `lifted`: norm of the
    /// gradients as they are.
    fn flags(&mut self, lifted: &Tensor, votes: &Tensor) -> Result<Tensor, TrainError> {
        let Cells { found, hold, .. } = &mut self.cells;
        let (discard, loss) = (place(votes, DISCARD)?, place(votes, LOSS)?);
        // 0 · x is NaN where x is NaN or infinite.
        let bad = |x: &Tensor| x.f_mul_scalar(0.0)?.f_ne(0.0)?.f_to_kind(Kind::Float);
        let flags = || {
            let discard = discard.f_clamp_max(1.0)?;
            if self.scaler.is_none() {
                let cause = discard.f_maximum(&bad(&lifted.f_add(&loss)?)?)?;
                return hold.f_maximum_out(hold, &cause);
            }
            let _ = hold.f_maximum_out(hold, &discard)?;
            // Under a loss scale, what overflows while the optimizer is held says nothing about the scale.
            let _ = bad(lifted)?.f_mul_out(found, &hold.f_rsub_scalar(1.0)?)?;
            found.f_maximum(hold)
        };
        flags().map_err(tch_error)
    }

    /// Begins to bring the step's numbers to the host.
    fn send(&mut self, runner: &StepRunner, ids: Vec<u64>) -> Result<(), TrainError> {
        let place = (self.steps_here % self.places.len() as u64) as usize;
        let (host, event) = &mut self.places[place];
        copy(host, &self.cells.numbers)?;
        if let (Some(event), Device::Cuda(index)) = (event, self.device) {
            event.record(Stream::current(index)?)?;
        }
        self.pending.push_back(Pending { place, step: runner.step, lr: runner.lr, lrs: runner.lrs(), ids });
        Ok(())
    }

    /// Waits for the oldest step's numbers and takes them over. False: memory ran out on some rank.
    fn read(&mut self, runner: &StepRunner) -> Result<bool, TrainError> {
        let Some(Pending { place, step, lr, lrs, ids }) = self.pending.pop_front() else { return Ok(true) };
        let (host, event) = &self.places[place];
        if let Some(event) = event {
            runner.collective.wait(event, "the step")?;
        }
        let mut numbers = [0.0_f32; NUMBERS];
        host.f_copy_data(&mut numbers, NUMBERS).map_err(tch_error)?;
        self.good_step = step;
        if numbers[DISCARD] > 0.0 {
            return Ok(false);
        }
        let (skipped, scale) = (numbers[SKIPPED] > 0.0, numbers[SCALE]);
        if skipped && (self.scaler.is_none() || scale < LEAST_SCALE) {
            self.pending.clear();
            let own = f64::from(numbers[OWN]);
            return Err(non_finite(runner.collective, step, (!own.is_finite()).then_some((own, ids)))?);
        }
        if skipped {
            self.lines.push(format!(
                "step {}: the gradient overflowed at loss scale {scale}: skipped on all ranks, the scale is halved",
                step + 1
            ));
        }
        let world = runner.collective.world_size() as f32;
        self.latest = StepOutcome {
            loss: f64::from(numbers[LOSS]),
            lr,
            lrs,
            // A skipped step has no norm, and JSON no infinity.
            grad_norm: if numbers[NORM].is_finite() { f64::from(numbers[NORM]) } else { 0.0 },
            scale: f64::from(scale),
            stop: numbers[STOP] > 0.0,
            halve: numbers[HALVE] >= world || numbers[OVERDUE] > 0.0,
            ..StepOutcome::default()
        };
        Ok(true)
    }

    /// Steps done, from the first start, of which the latest is the last to have changed anything.
    pub fn good_step(&self) -> u64 {
        self.good_step
    }

    /// Lets go of the recorded step: steps are given to the device one kernel at a time from here on.
    pub fn forget_recording(&mut self) {
        self.graph.forget();
    }

    /// Lines since the last call.
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

/// Makes gradient and loss those of the step's quotient: see [`crate::task::Model::divides`].
fn divide(grads: &mut Tensor, votes: &Tensor, samples: u64) -> Result<(), tch::TchError> {
    let one = |at: usize| votes.f_narrow(0, at as i64, 1);
    let factor = one(DIVISOR)?.f_clamp_min(1.0)?.f_reciprocal()?;
    let _ = one(LOSS)?.f_mul_(&factor)?;
    let _ = grads.f_mul_(&factor.f_mul_scalar(samples as f64)?)?;
    Ok(())
}

/// Divides lifted gradients so that their global two-norm is at most `max_norm`, as [`super::optimizer::clip_grad_norm`]
/// does: the scale · max(1, (norm + 1e-6) / max_norm). `None`: nothing is to be divided.
fn divisor(norm: &Tensor, scale: Option<&Tensor>, max_norm: f64) -> Result<Option<Tensor>, tch::TchError> {
    if max_norm <= 0.0 {
        return Ok(scale.map(Tensor::shallow_clone));
    }
    let over = norm.f_add_scalar(1e-6)?.f_mul_scalar(1.0 / max_norm)?.f_clamp_min(1.0)?;
    Ok(Some(match scale {
        Some(scale) => over.f_mul(scale)?,
        None => over,
    }))
}

fn place(votes: &Tensor, at: usize) -> Result<Tensor, TrainError> {
    votes.f_narrow(0, at as i64, 1).map_err(tch_error)
}
