//! The training loop: step, ddp, optimizer, ema, schedule, checkpoints, evaluation.
//!
//! Architecture invariant: this room decides what is trained and when; it reads neither environment nor clock for its
//! results, and paths only pass through it. Progress leaves by [`Observer`].

mod amp;
mod buffers;
pub mod checkpoint;
mod controls;
pub mod ddp;
mod device;
pub mod ema;
mod evaluate;
mod fit;
mod graph;
mod groups;
mod input;
pub mod optimizer;
mod pace;
mod pass;
mod peers;
mod rehearse;
mod scaler;
pub mod schedule;
mod state;
mod step;
mod trial;
mod update;

pub use amp::narrow_kind;
pub use controls::{Controls, Order};
pub use device::DeviceOptions;
pub use evaluate::{EvalSpec, Evaluated, Watch, evaluate};
pub use fit::{Finished, Fit, Resume, Status, planner};
pub use input::to_tensors;
pub use pass::{PassRun, Passed};
pub use rehearse::Rehearsal;
pub use scaler::ScalerState;
pub use state::LoopState;

use crate::comm::CommError;
use crate::data::DataError;
use crate::torch::TorchError;
use checkpoint::CheckpointError;
use ddp::DdpError;
use spec::contract::{MetricsRecord, Phase, Progress, Relieved};

/// Reasons why training ends early.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Comm(#[from] CommError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Torch(#[from] TorchError),
    #[error(transparent)]
    Ddp(DdpError),
    #[error("{0}")]
    Config(String),
    #[error(
        "the loss became {value} at step {step} on rank {rank} (samples {samples}): lower train.learning_rate, set \
         train.gradient_clip_norm, or look at these samples; the last good state is in checkpoints/step-{good}"
    )]
    NonFinite { step: u64, rank: usize, value: String, samples: String, good: u64 },
    /// With micro-batches of one sample: there is nothing left to halve.
    #[error(
        "out of memory at step {step} on rank {rank} with micro-batches of 1 sample ({message}): make the model or its samples \
         (windows, clips, crops) smaller, set train.amp: bf16, or use a device with more memory; the last good state is in \
         checkpoints/step-{good}"
    )]
    OutOfMemory { step: u64, rank: usize, message: String, good: u64 },
    #[error(
        "out of memory on rank {rank} with batches of 1 sample ({message}): make the model's samples smaller, set train.amp: \
         bf16, or use a device with more memory"
    )]
    PassOutOfMemory { rank: usize, message: String },
    /// Other ranks wait in the middle of a pass.
    #[error(
        "out of memory at step {step} on rank {rank} ({message}): under train.sync_batchnorm a step is not repeated with \
         smaller micro-batches: lower train.microbatch or train.batch_size, or set train.sync_batchnorm: false; the last \
         checkpoint is whole"
    )]
    OutOfMemoryTogether { step: u64, rank: usize, message: String },
    /// A task's groups of parameters make no sense.
    #[error("parameter groups of the task: {0}")]
    Groups(String),
    /// A forward pass did not give what its model announces.
    #[error("the model says divides = {announced}, but its forward pass gave a divisor: {found}")]
    Divisor { announced: bool, found: bool },
    /// A forward pass did not give what its model announces.
    #[error("the model shares numbers of its samples, f32 {expected:?}, but its forward pass gave {found}")]
    Share { expected: [usize; 2], found: String },
}

/// Receiver of the loop's reports. Called on the step's thread: implementations must not block.
pub trait Observer {
    /// A new phase begins: `train`, `val`, `checkpoint`, `test`.
    fn phase(&mut self, phase: Phase, step: u64);
    /// An optimizer step is done.
    fn step(&mut self, progress: &Progress);
    /// A line for metrics.jsonl, values reduced over ranks; rank 0 only.
    fn record(&mut self, record: &MetricsRecord);
    /// The validation split was read after `step`: its values, reduced over ranks, and rank 0's picture of it.
    fn validated(
        &mut self,
        _step: u64,
        _values: &std::collections::BTreeMap<String, f64>,
        _picture: Option<Result<Vec<u8>, String>>,
    ) {
    }
    /// Files about an evaluation, by their names in the run's folder: [`crate::task::Metrics::files`]; rank 0 only.
    fn files(&mut self, _files: Vec<(String, Vec<u8>)>) {}
    /// Prints one line; rank 0 only.
    fn line(&mut self, text: String);
    /// Bytes of this process alone, now; 0 where that is unknown. Called on relief only: it may take milliseconds.
    fn uss_bytes(&mut self) -> u64;
    /// Reports the error that ends training, while everything is still held: giving it back may wait for the device,
    /// which may wait for other ranks. Where that can be, the implementation ends the collective.
    fn failing(&mut self, _error: &TrainError) {}
    /// Reports a panic in the same way; the panic continues once this returns.
    fn panicking(&mut self) {}
    /// An order was done.
    fn relieved(&mut self, answer: Relieved);
}

impl From<DdpError> for TrainError {
    fn from(error: DdpError) -> Self {
        match error {
            DdpError::Comm(error) => TrainError::Comm(error),
            DdpError::Torch(error) => TrainError::Torch(error),
            other => TrainError::Ddp(other),
        }
    }
}
