//! The interpreter that this process is, as the task asks it.

use crate::data::DataError;
use crate::torch::{TorchError, is_out_of_memory};
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use tch::{Device, Tensor};

/// The user's code failed.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{text}")]
pub struct UserError {
    /// One line that ends with the user's file, line and text.
    pub text: String,
    /// Memory ran out: less may do.
    pub memory: bool,
}

impl From<UserError> for DataError {
    fn from(error: UserError) -> Self {
        DataError::User(error.text)
    }
}

impl From<UserError> for TorchError {
    fn from(error: UserError) -> Self {
        let UserError { text: message, memory } = error;
        match memory || is_out_of_memory(&message) {
            true => TorchError::OutOfMemory { message },
            false => TorchError::User { message },
        }
    }
}

/// Facts on the user's data sets and metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Deserialize)]
pub struct Facts {
    /// Names and lengths of the data sets.
    pub splits: Vec<(String, u64)>,
    pub metrics: Vec<String>,
    /// Samples pass a transform at every use.
    pub transforms: bool,
}

/// A parameter or a buffer of the user's model: the tensor that the module holds.
pub struct Named {
    /// Name in the module's `state_dict`.
    pub name: String,
    pub tensor: Tensor,
    pub trained: bool,
}

/// Result of a forward pass.
pub struct Passed {
    pub loss: Tensor,
    pub prediction: Tensor,
    /// Sum and count of each metric, where they were asked for.
    pub sums: Option<Vec<f64>>,
}

/// State of the user's optimizer: its structure as JSON, and its tensors by name.
pub type OptimizerState = (String, Vec<(String, Tensor)>);

/// A decode worker, as it was started.
pub struct WorkerEnds {
    pub socket: UnixStream,
    pub scratch: File,
    pub process: i32,
    /// How the worker ended in whose place it was started.
    pub end: String,
}

/// Services of the user's interpreter for the trainer. Any thread may ask.
pub trait Host: Send + Sync {
    /// # Errors
    /// The user's code failed, here and below.
    fn facts(&self) -> Result<Facts, UserError>;
    /// Starts a decode worker, in the place of process `old` where one is named.
    ///
    /// # Errors
    /// It cannot be started.
    fn worker(&self, old: Option<i32>) -> Result<WorkerEnds, UserError>;
    /// The nesting of samples, by which batches are given to the model: JSON, as decode workers describe it.
    ///
    /// # Errors
    /// As [`Host::facts`].
    fn use_structure(&self, structure: &str) -> Result<(), UserError>;
    /// Makes the model once, seeded, on `device`; gives its parameters, then its buffers.
    ///
    /// # Errors
    /// As [`Host::facts`].
    fn model(&self, seed: u64, device: Device) -> Result<Vec<Named>, UserError>;
    /// Forward pass and loss.
    ///
    /// # Errors
    /// As [`Host::facts`].
    fn forward(&self, fields: &[Tensor], train: bool, measure: bool) -> Result<Passed, UserError>;
    /// Backward pass from a loss. Python's lock is not held while gradients are computed.
    ///
    /// # Errors
    /// As [`Host::facts`].
    fn backward(&self, loss: &Tensor) -> Result<(), UserError>;
    /// Makes the user's optimizer for the model, which is there; with `train.learning_rate` and `train.weight_decay`.
    ///
    /// # Errors
    /// As [`Host::facts`]; it is none that can be used here.
    fn make_optimizer(&self, rate: f64, weight_decay: f64) -> Result<(), UserError>;
    /// A step of that optimizer; `rate` is the schedule's.
    ///
    /// # Errors
    /// As [`Host::facts`].
    fn step(&self, rate: f64) -> Result<(), UserError>;
    /// The state of that optimizer. Its tensors are those that it goes on with.
    ///
    /// # Errors
    /// As [`Host::facts`]; it holds what a checkpoint cannot hold.
    fn optimizer_state(&self) -> Result<OptimizerState, UserError>;
    /// Takes over what [`Host::optimizer_state`] gave.
    ///
    /// # Errors
    /// It is the state of another optimizer.
    fn load_optimizer(&self, structure: &str, tensors: &[(String, Tensor)]) -> Result<(), UserError>;
    /// Prediction alone.
    ///
    /// # Errors
    /// As [`Host::facts`].
    fn predict(&self, fields: &[Tensor]) -> Result<Tensor, UserError>;
}

static HOST: OnceLock<&'static dyn Host> = OnceLock::new();

/// This process is the user's interpreter; once.
pub fn be_hosted_by(host: &'static dyn Host) {
    let _ = HOST.set(host);
}

/// # Errors
/// The rank was started as a program.
pub(super) fn of_this_process() -> Result<&'static dyn Host, DataError> {
    HOST.get().copied().ok_or_else(|| {
        DataError::setting("task", "task python runs in the user's interpreter: start it with `launch --config …`")
    })
}
