//! Lines that the model and its batches decide: weights, passes, batch slots, copies for a checkpoint.

use super::constants::*;
use super::passes::{Taken, slot_bytes};
use super::sizes::{OVERFLOW, once, per_rank, product, sum, times};
use super::table::{bytes_text, count, grouped};
use super::{BudgetLine, Plan, PlanError};
use crate::config::{Config, CudaGraph, EmaBuffers, OptimizerKind};
use crate::contract::{LineId, ModelSizes, Passes};

/// Memory of a model, and the config's additions to each of its parameters.
pub(super) struct ModelLines<'a> {
    model: &'a ModelSizes,
    /// Optimizer moments per parameter.
    moments: u64,
    /// Averages of the weights.
    ema: u64,
    /// Ranks that divide the moments among themselves.
    shards: u64,
    /// Nothing is trained.
    infers: bool,
    /// Those that average the buffers too.
    averaged_buffers: u64,
}

impl<'a> ModelLines<'a> {
    pub fn new(config: &Config, model: &'a ModelSizes, world_size: usize, infers: bool) -> Self {
        let moments = match config.train.optimizer {
            _ if model.optimizer.is_some() => 0,
            OptimizerKind::Adam | OptimizerKind::Adamw | OptimizerKind::Musgd | OptimizerKind::Auto => 2,
            OptimizerKind::Sgd => u64::from(config.train.momentum > 0.0),
        };
        let ema = config.train.ema_decay.0.len() as u64;
        let averaged_buffers = if config.train.ema_buffers == EmaBuffers::Average { ema } else { 0 };
        let shards = if config.ddp.shard_optimizer { (world_size as u64).max(1) } else { 1 };
        Self { model, moments, ema, shards, averaged_buffers, infers }
    }

    /// Weights, gradients, moments and moving averages, all f32; buffers, as they are and as they were before the step.
    pub fn state(&self, ranks: u64) -> Result<BudgetLine, PlanError> {
        if self.infers {
            let bytes = product(&[self.model.parameters, F32_BYTES])?;
            let formula = format!("{} parameters × 4 B", grouped(self.model.parameters));
            return per_rank(LineId::ModelState, bytes, ranks, formula);
        }
        let (copies, divided) = match self.shards {
            1 => (2 + self.moments + self.ema, 0),
            _ => (2 + self.ema, self.moments),
        };
        let buffers = product(&[self.model.buffer_bytes, 2 + 2 * self.averaged_buffers])?;
        let moments = product(&[self.model.parameters, F32_BYTES, divided])?.div_ceil(self.shards);
        let own = self.own_state();
        let bytes = sum(&[product(&[self.model.parameters, F32_BYTES, copies])?, moments, buffers, own])?;
        let ema = match self.ema {
            0 => String::new(),
            1 => " + EMA".into(),
            several => format!(" + {several} EMA"),
        };
        let parameters = grouped(self.model.parameters);
        let mut formula = match self.shards {
            1 if self.model.optimizer.is_some() => format!(
                "{parameters} parameters × 4 B × {copies} (weights + gradients{ema}) + {} of the task's own optimizer",
                bytes_text(own)
            ),
            1 => format!(
                "{parameters} parameters × 4 B × {copies} (weights + gradients + {} moments{ema})",
                self.moments
            ),
            shards => format!(
                "{parameters} parameters × 4 B × ({copies} (weights + gradients{ema}) + {} moments / {shards} ranks)",
                self.moments
            ),
        };
        if buffers > 0 {
            formula += &format!(" + {} of buffers", bytes_text(buffers));
        }
        per_rank(LineId::ModelState, bytes, ranks, formula)
    }

    /// Bytes of the state of the task's own optimizer.
    fn own_state(&self) -> u64 {
        self.model.optimizer.map_or(0, |own| own.state_bytes)
    }

    /// Tensors of a training step: those of its passes, or those of the task's own optimizer after them.
    fn tensors(&self, held: &Taken, is_training: bool) -> u64 {
        let own = self.model.optimizer.filter(|_| is_training).map_or(0, |own| own.step_bytes);
        held.tensors.max(own)
    }

    /// A step of training, where there is one, and a batch of evaluation.
    fn passes(&self, draft: &Plan) -> Result<[Taken; 2], PlanError> {
        let of = |passes: &Passes, samples| Taken::of(self.model, passes, samples);
        if self.infers {
            let none = Taken { samples: 0, each: 0, tensors: 0, total: 0 };
            return Ok([none, of(&self.model.val, draft.batch.val_batch)?]);
        }
        Ok([of(&self.model.train, draft.batch.micro_batch)?, of(&self.model.val, draft.batch.val_batch)?])
    }

    /// The words on the larger one of training and evaluation.
    fn formula(&self, larger: &Taken, is_training: bool) -> String {
        let one = if is_training { "sample" } else { "validation sample" };
        let mut text = format!("{} × {}", count(larger.samples as usize, one), bytes_text(larger.each));
        let fixed = larger.fixed();
        if fixed > 0 {
            text += &format!(" + {} whatever the batch", bytes_text(fixed));
        }
        let passes = if is_training { &self.model.train } else { &self.model.val };
        match passes.seen.last() {
            None => text + ", assumed: not measured",
            Some(_) if self.model.enlarged > 1.0 => {
                text + &format!(", measured with samples of 1/{:.1} the size", self.model.enlarged)
            }
            Some(_) => text,
        }
    }

    /// Tensors that a pass holds at once on a CPU: the larger of training and evaluation, which keeps nothing for the
    /// backward pass. The second line is the heap beside them: fragments, and what libraries keep after the first step.
    pub fn activations(&self, draft: &Plan, ranks: u64) -> Result<[BudgetLine; 2], PlanError> {
        let [training, validation] = self.passes(draft)?;
        let is_training = !self.infers && training.tensors >= validation.tensors;
        let held = if is_training { training } else { validation };
        let activations =
            per_rank(LineId::Activations, self.tensors(&held, is_training), ranks, self.formula(&held, is_training))?;
        let further = (draft.topology.threads_per_rank as u64).saturating_sub(self.model.threads.max(1));
        let total = times(training.total, TRAIN_HEAP)?.max(times(validation.total, VAL_HEAP)?);
        let beside = total.saturating_sub(held.tensors);
        let heap = sum(&[beside, STEP_CPU_BYTES, product(&[further, STEP_CPU_PER_THREAD_BYTES])?])?;
        // How tensors of one step after the other fall into place differs from run to run.
        let formula = "pieces between tensors, and what libraries keep; a bound".to_owned();
        Ok([activations, per_rank(LineId::Heap, heap, ranks, formula)?.bounded()])
    }

    /// The same on a device, with the pieces that its allocator keeps.
    pub fn device_activations(&self, draft: &Plan, ranks: u64) -> Result<BudgetLine, PlanError> {
        let [training, validation] = self.passes(draft)?;
        let is_training = !self.infers && training.total >= validation.total;
        let held = if is_training { training } else { validation };
        let formula = self.formula(&held, is_training);
        if self.model.gpu.is_some() {
            let kept = held.total.saturating_sub(held.tensors);
            let formula = format!("{formula} + {} that the allocator keeps", bytes_text(kept));
            let bytes = held.total.max(self.tensors(&held, is_training));
            return per_rank(LineId::Activations, bytes, ranks, formula);
        }
        let (numerator, denominator) = DEVICE_FACTOR;
        let factor = numerator as f64 / denominator as f64;
        let formula = format!("{formula}, × {factor} assumed, since measured without this device");
        per_rank(LineId::Activations, times(held.tensors, DEVICE_FACTOR)?, ranks, formula)
    }

    /// The pool of a recorded step, which keeps its activations for good beside those of steps that are not replayed:
    /// evaluation, and batches of another size.
    pub fn recorded_step(&self, config: &Config, draft: &Plan, ranks: u64) -> Result<Option<BudgetLine>, PlanError> {
        if self.infers || config.train.cuda_graph == CudaGraph::Off || draft.batch.micro_steps != 1 {
            return Ok(None);
        }
        let [training, validation] = self.passes(draft)?;
        // The larger of the two is counted as the activations already.
        let bytes = if self.model.gpu.is_some() {
            training.total.min(validation.total)
        } else {
            times(training.tensors.min(validation.tensors), DEVICE_FACTOR)?
        };
        let formula =
            "activations of the recorded step beside those of evaluation (train.cuda_graph); a bound".to_owned();
        Ok(Some(per_rank(LineId::RecordedStep, bytes, ranks, formula)?.bounded()))
    }

    /// Slots of the training and the validation loader; the latter keeps none ahead but one per thread.
    pub fn staging(&self, config: &Config, draft: &Plan, ranks: u64) -> Result<Vec<BudgetLine>, PlanError> {
        let (batch, loader) = (&draft.batch, &draft.loader);
        let val_slots = (loader.threads as u64).checked_add(EXTRA_SLOTS).ok_or(OVERFLOW)?;
        let val_batch = match config.data.max_val_windows {
            0 => batch.val_batch,
            most => batch.val_batch.min(most),
        };
        let line = |name: LineId, slots: u64, samples: usize, passes: &Passes| {
            let bytes = product(&[slots, slot_bytes(&passes.fields, samples as u64)?])?;
            let sample = grouped(sum(&passes.fields)?);
            per_rank(name, bytes, ranks, format!("{slots} slots × {} × {sample} B", count(samples, "sample")))
        };
        let validation = line(LineId::ValidationSlots, val_slots, val_batch, &self.model.val)?;
        if self.infers {
            return Ok(vec![validation]);
        }
        Ok(vec![line(LineId::StagingSlots, loader.slots as u64, batch.micro_batch, &self.model.train)?, validation])
    }

    /// Rank 0 copies what it saves, so that training continues while a thread writes. Gradients are not saved.
    pub fn checkpoint(&self) -> Result<BudgetLine, PlanError> {
        if self.infers {
            let bytes = product(&[self.model.parameters, F32_BYTES, 2])?;
            let formula = format!("{} parameters × 4 B × 2, while they are read", grouped(self.model.parameters));
            return Ok(once(LineId::CheckpointStaging, bytes, formula));
        }
        let copies = 1 + self.moments + self.ema;
        // Each file of weights holds the buffers.
        let buffers = product(&[self.model.buffer_bytes, 1 + self.ema])?;
        let own = self.own_state();
        let bytes = sum(&[product(&[self.model.parameters, F32_BYTES, copies])?, buffers, own])?;
        // Names and places of all tensors: a few KiB, and more where there are many small ones.
        let names = (bytes / 24).saturating_add(STAGING_NAMES_BYTES);
        let mut more = if buffers > 0 { format!(" + {} of buffers", bytes_text(buffers)) } else { String::new() };
        if own > 0 {
            more += &format!(" + {} of the task's own optimizer", bytes_text(own));
        }
        let mut formula =
            format!("rank 0: {} parameters × 4 B × {copies}{more}, and their names", grouped(self.model.parameters));
        // Ranks that divide the moments bring them together on each.
        let together =
            if self.shards > 1 { product(&[self.model.parameters, F32_BYTES, self.moments, self.shards])? } else { 0 };
        if together > 0 {
            formula += &format!("; all ranks: {} of moments, brought together", bytes_text(together));
        }
        Ok(once(LineId::CheckpointStaging, sum(&[bytes, names, together])?, formula))
    }
}
