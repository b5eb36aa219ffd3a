//! Returning of memory during training: orders from outside, and memory that ran out.

use super::Loop;
use crate::data::loader::BatchStream;
use crate::torch;
use crate::train::state::Reduced;
use crate::train::step::Wishes;
use crate::train::{Controls, Observer, TrainError};
use spec::contract::{Effect, Relief, Relieved};
use std::sync::Arc;

/// Steps that a rank waits for the others to be asked for smaller micro-batches too. Orders of one launcher arrive within
/// one or two; ranks of other nodes may never be asked.
const PATIENCE_STEPS: u64 = 20;

/// An order that takes effect together with the other ranks.
struct Pending {
    number: u64,
    since_step: u64,
    uss_before_bytes: u64,
}

/// Orders of this rank: those that wait, and the way to do the others.
pub(in crate::train) struct Orders {
    pub controls: Arc<Controls>,
    halvings: Vec<Pending>,
    stops: Vec<Pending>,
}

impl Orders {
    pub fn new(controls: Arc<Controls>) -> Self {
        Self { controls, halvings: Vec::new(), stops: Vec::new() }
    }

    /// Does what was ordered since the last call, or notes it for when all ranks agree.
    pub fn obey(&mut self, step: u64, batches: &BatchStream, observer: &mut dyn Observer) {
        while let Some(order) = self.controls.next() {
            let uss_before_bytes = observer.uss_bytes();
            let pending = Pending { number: order.number, since_step: step, uss_before_bytes };
            let throttle = self.controls.throttle();
            let text = match order.action {
                Relief::HalveMicroBatch => {
                    self.halvings.push(pending);
                    continue;
                }
                Relief::Stop { .. } => {
                    self.stops.push(pending);
                    continue;
                }
                Relief::PausePrefetch => {
                    throttle.pause(true);
                    batches.give_back();
                    "prefetching paused: a batch is begun when the step waits for it".to_owned()
                }
                Relief::Decoders { threads } => {
                    throttle.decoders(Some(threads));
                    format!("at most {} loader threads decode", threads.max(1))
                }
                Relief::TrimAllocators => {
                    batches.give_back();
                    torch::release_caches();
                    "allocators trimmed".to_owned()
                }
                Relief::Resume => {
                    throttle.pause(false);
                    throttle.decoders(None);
                    "prefetching and decoders as planned".to_owned()
                }
            };
            answer(pending, step, text, Effect::Done, observer);
        }
    }

    /// Vote of this rank in the next step.
    pub fn wishes(&self, step: u64) -> Wishes {
        let oldest = self.halvings.first().map(|pending| pending.since_step);
        Wishes {
            stop: self.controls.stops(),
            halve: oldest.is_some(),
            overdue: oldest.is_some_and(|since| step >= since + PATIENCE_STEPS),
        }
    }

    /// One order for smaller micro-batches is done: all ranks have agreed on it.
    pub fn halved(&mut self, step: u64, text: String, effect: Effect, observer: &mut dyn Observer) {
        if !self.halvings.is_empty() {
            answer(self.halvings.remove(0), step, text, effect, observer);
        }
    }

    /// Answers what is left: the run ends, `stopped` on request or not.
    pub fn close(&mut self, step: u64, stopped: bool, observer: &mut dyn Observer) {
        let text = if stopped { "stopped, with a checkpoint" } else { "the run has ended" };
        self.stops.drain(..).for_each(|pending| answer(pending, step, text.to_owned(), Effect::Done, observer));
        let text = "not done: the run has ended";
        self.halvings.drain(..).for_each(|pending| answer(pending, step, text.to_owned(), Effect::NotDone, observer));
    }
}

fn answer(pending: Pending, step: u64, text: String, effect: Effect, observer: &mut dyn Observer) {
    let Pending { number, uss_before_bytes, .. } = pending;
    let uss_after_bytes = observer.uss_bytes();
    observer.relieved(Relieved { order: number, step, uss_before_bytes, uss_after_bytes, text, effect });
}

/// Describes the change. `None` means no change.
fn halved_text(effect: &Effect) -> Option<String> {
    match effect {
        Effect::Halved { micro_batch: [before, now], accumulation: [was, is] } => {
            Some(format!("micro-batch {before} → {now}, accumulation {was} → {is}"))
        }
        _ => None,
    }
}

impl Loop<'_, '_> {
    /// Samples of the largest forward pass: a rank's share of a step may be smaller than a micro-batch.
    fn largest_pass(&self) -> u64 {
        self.planner.micro_batch.min(self.planner.global_batch.div_ceil(self.planner.world_size))
    }

    /// Half the micro-batch, so twice the accumulation; what changed. Takes effect with the next loader. All ranks call it at
    /// the same step.
    fn halve(&mut self) -> Effect {
        let (before, share) = (self.largest_pass(), self.planner.global_batch.div_ceil(self.planner.world_size));
        if before <= 1 {
            return Effect::Smallest;
        }
        let now = before.div_ceil(2);
        self.planner.micro_batch = now;
        self.state.reduced = Some(Reduced { planned: self.fit.plan.batch.micro_batch as u64, now });
        Effect::Halved {
            micro_batch: [before, now],
            accumulation: [before, now].map(|samples| share.div_ceil(samples)),
        }
    }

    /// An order to halve, which all ranks agreed on in the step just done.
    pub(super) fn halve_as_ordered(&mut self) {
        let effect = self.halve();
        let text = halved_text(&effect)
            .unwrap_or_else(|| "micro-batches hold one sample already: nothing to halve".to_owned());
        let step = self.state.step;
        self.observer.line(format!("memory is short after step {step}: {text}"));
        self.orders.halved(step, text, effect, self.observer);
    }

    /// Memory ran out in the step that is to be repeated. `message`: what this rank's allocator said, if it was here.
    ///
    /// # Errors
    /// Micro-batches hold one sample already.
    pub(super) fn recover(&mut self, message: Option<String>) -> Result<(), TrainError> {
        let (rank, message) = self.first_message(message)?;
        torch::release_caches();
        let step = self.state.step + 1;
        match halved_text(&self.halve()) {
            Some(text) => {
                self.observer.line(format!("rank {rank}: out of memory at step {step} ({message}): {text}; once more"));
                Ok(())
            }
            None => {
                self.save_once()?;
                Err(TrainError::OutOfMemory { step, rank, message, good: self.state.step })
            }
        }
    }

    /// The same for an evaluation, whose batches are its own.
    ///
    /// # Errors
    /// They hold one sample already.
    pub(super) fn recover_evaluation(&mut self, message: Option<String>) -> Result<(), TrainError> {
        let (rank, message) = self.first_message(message)?;
        torch::release_caches();
        let (before, step) = (self.val_batch, self.state.step);
        if before <= 1 {
            return Err(TrainError::OutOfMemory { step, rank, message, good: step });
        }
        self.val_batch = before.div_ceil(2);
        let now = self.val_batch;
        self.observer
            .line(format!("rank {rank}: out of memory in evaluation ({message}): batches {before} → {now}; once more"));
        Ok(())
    }

    /// The lowest rank whose memory ran out, and what its allocator said. All ranks call it together.
    fn first_message(&self, own: Option<String>) -> Result<(usize, String), TrainError> {
        let all = self.fit.collective.all_gather(own.unwrap_or_default().as_bytes())?;
        let first = all.into_iter().enumerate().find(|(_, text)| !text.is_empty()).unwrap_or_default();
        Ok((first.0, String::from_utf8_lossy(&first.1).into_owned()))
    }

    /// `memory.cleanup_every`.
    pub(super) fn clean_up_if_due(&mut self, batches: &BatchStream) {
        let every = self.fit.config.memory.cleanup_every;
        if every > 0 && self.state.step.is_multiple_of(every) {
            batches.give_back();
            torch::release_caches();
            self.cleanups += 1;
            self.observer.line("Memory cleanup completed".to_owned());
        }
    }
}
