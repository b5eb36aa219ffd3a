//! An optimizer that a task brings.

use crate::torch::TorchError;
use tch::Tensor;

/// Changes the parameters in place of the trainer's optimizer. State and arithmetic are the task's; every rank has the same.
pub trait OwnOptimizer {
    /// Changes the parameters by the gradients that they have. `rate`: the schedule's learning rate in this step.
    ///
    /// # Errors
    /// Memory ran out, or it failed.
    fn step(&mut self, rate: f64) -> Result<(), TorchError>;
    /// State as tensors by name, for a checkpoint: views, to be copied before the next step.
    ///
    /// # Errors
    /// A part of the state is nothing that a checkpoint can hold.
    fn export(&self) -> Result<Vec<(String, Tensor)>, TorchError>;
    /// Takes over what [`OwnOptimizer::export`] gave, in any order.
    ///
    /// # Errors
    /// The reason why this is not the state of this optimizer.
    fn import(&mut self, tensors: &[(String, Tensor)]) -> Result<(), String>;
    /// Bytes of its tensors now.
    ///
    /// # Errors
    /// As [`OwnOptimizer::export`].
    fn bytes(&self) -> Result<u64, TorchError>;
}
