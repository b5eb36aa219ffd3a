//! The update of parameters: by the trainer's optimizer, or by one that the task brings.

use super::ddp::{Ddp, DdpError};
use super::optimizer::{Numbers, Optimizer, Rule};
use super::scaler::tch_error;
use super::{TrainError, ema::Named};
use crate::ledger::{self, Holding, Part};
use crate::task::{Model, OwnOptimizer};
use tch::{Device, Tensor};

/// Optimizer of a run.
pub enum Update {
    Flat(Optimizer),
    Own(Own),
}

/// A task's optimizer.
pub struct Own {
    optimizer: Box<dyn OwnOptimizer>,
    /// Its state, in host memory. Most optimizers make theirs in the first step.
    held: Holding,
    on_host: bool,
    /// The state is counted.
    counted: bool,
}

impl Update {
    /// The model's own optimizer, or the trainer's with `rules`, one for each group of `ddp`.
    ///
    /// # Errors
    /// No memory; the model's optimizer cannot be made.
    pub fn new(model: &dyn Model, rules: &[Rule], ddp: &Ddp) -> Result<Self, TrainError> {
        Ok(match model.own_optimizer()? {
            None => Update::Flat(Optimizer::with_groups(rules.to_vec(), ddp)?),
            Some(_) if ddp.is_sharded() => {
                let problem = "ddp.shard_optimizer divides the state of Headroom's optimizers alone: leave it out";
                return Err(TrainError::Config(problem.into()));
            }
            Some(optimizer) => {
                let on_host = ddp.params().device() == Device::Cpu;
                Update::Own(Own { optimizer, held: ledger::hold(Part::Model, 0), on_host, counted: false })
            }
        })
    }

    /// [`Optimizer::step`]; `rate` is the schedule's, for parameters in no particular group.
    ///
    /// # Errors
    /// As there; the task's optimizer failed.
    pub fn step(&mut self, ddp: &Ddp, rate: f64, numbers: &[Numbers]) -> Result<(), TrainError> {
        match self {
            Update::Flat(optimizer) => Ok(optimizer.step(ddp, numbers)?),
            Update::Own(own) => own.step(rate),
        }
    }

    /// [`Optimizer::step_unless`]. A task's optimizer knows no flags of the device: the host waits for them.
    ///
    /// # Errors
    /// As there; the task's optimizer failed.
    pub fn step_unless(
        &mut self,
        ddp: &Ddp,
        lrs: &Tensor,
        (rate, numbers): (f64, &[Numbers]),
        (found, divisor): (&Tensor, Option<&Tensor>),
    ) -> Result<(), TrainError> {
        let own = match self {
            Update::Flat(optimizer) => return Ok(optimizer.step_unless(ddp, lrs, numbers, (found, divisor))?),
            Update::Own(own) => own,
        };
        if found.f_double_value(&[0]).map_err(tch_error)? > 0.0 {
            return Ok(());
        }
        if let Some(divisor) = divisor {
            let _no_grad = tch::no_grad_guard();
            let _ = ddp.grads()?.f_div_(divisor).map_err(tch_error)?;
        }
        own.step(rate)
    }

    /// Bytes of state that are there before the first step.
    pub fn kept_bytes(&self, ddp: &Ddp) -> u64 {
        match self {
            Update::Flat(optimizer) => optimizer.kept_bytes(ddp),
            Update::Own(_) => 0,
        }
    }

    /// [`Optimizer::export`], or the state of the task's optimizer.
    ///
    /// # Errors
    /// As there.
    pub fn export(&mut self, ddp: &Ddp) -> Result<Named, TrainError> {
        match self {
            Update::Flat(optimizer) => Ok(optimizer.export(ddp)?),
            Update::Own(own) => Ok(own.optimizer.export()?),
        }
    }

    /// Takes over what [`Update::export`] gave.
    ///
    /// # Errors
    /// It is the state of another model or optimizer.
    pub fn import(&mut self, ddp: &Ddp, tensors: &[(String, Tensor)]) -> Result<(), DdpError> {
        match self {
            Update::Flat(optimizer) => optimizer.import(ddp, tensors),
            Update::Own(own) => {
                let imported = own.optimizer.import(tensors);
                imported.map_err(|problem| DdpError::Parameter { name: "state".into(), problem })?;
                Ok(own.count()?)
            }
        }
    }
}

impl Own {
    fn step(&mut self, rate: f64) -> Result<(), TrainError> {
        self.optimizer.step(rate)?;
        if !self.counted {
            self.count()?;
        }
        Ok(())
    }

    fn count(&mut self) -> Result<(), crate::torch::TorchError> {
        let bytes = self.optimizer.bytes()?;
        self.counted = true;
        if self.on_host {
            self.held.set(bytes);
        }
        Ok(())
    }
}
