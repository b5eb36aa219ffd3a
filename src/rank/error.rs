//! Every error of a rank, and the exit code it ends with.

use crate::comm::CommError;
use crate::data::{Cause, DataError};
use crate::report::ReportError;
use crate::report::records::RecordError;
use crate::torch::TorchError;
use crate::train::TrainError;
use crate::train::checkpoint::CheckpointError;
use cache::client::CacheError;
use spec::contract::exit;
use std::path::PathBuf;

/// The error that ends a rank. Texts name the cause as well, because they are sent to the launcher; `source` gives the cause as a value.
#[derive(Debug, thiserror::Error)]
pub enum RankError {
    #[error("{0}")]
    Usage(String),
    /// The environment does not say which rank this is.
    #[error("{0}")]
    Environment(#[source] CommError),
    /// A variable that `launch` sets holds nothing that can be used.
    #[error("{name}={value}: {problem}{way_out}")]
    Inherited { name: &'static str, value: String, problem: String, way_out: &'static str },
    /// The job that the launcher wrote cannot be read.
    #[error("{path}: {problem}; start the run again with launch", path = path.display())]
    Job { path: PathBuf, problem: String },
    /// The device of this rank cannot be used.
    #[error("{0}")]
    Device(#[source] TorchError),
    #[error(
        "rank {rank} is to train on CUDA device {index}, but libtorch finds {count}: look at the driver (nvidia-smi) and at \
         CUDA_VISIBLE_DEVICES, or train with --device cpu"
    )]
    NoDevice { rank: usize, index: usize, count: usize },
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Comm(#[from] CommError),
    #[error(transparent)]
    Train(#[from] TrainError),
    #[error(transparent)]
    Report(#[from] ReportError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("{what}: {source}")]
    System {
        what: String,
        #[source]
        source: Cause,
    },
    #[error("{0}")]
    Io(String),
    /// The plan does not fit this node.
    #[error("{0}")]
    NoRoom(String),
    #[error("internal error: {0}; please report this")]
    Panic(String),
}

impl From<CacheError> for RankError {
    fn from(error: CacheError) -> Self {
        RankError::Data(error.into())
    }
}

impl From<CheckpointError> for RankError {
    fn from(error: CheckpointError) -> Self {
        RankError::Train(TrainError::Checkpoint(error))
    }
}

impl RankError {
    pub(super) fn system(what: impl Into<String>, error: impl Into<Cause>) -> Self {
        RankError::System { what: what.into(), source: error.into() }
    }

    /// Exit code of rank `own`. All ranks learn of memory that ran out, and the one that met it is to be named. A loss that is not
    /// finite is every rank's own finding, in numbers that all share; its text names the rank.
    pub fn exit_code_of(&self, own: usize) -> u8 {
        match self {
            RankError::Train(error) => train_code_of(error, own),
            _ => self.exit_code(),
        }
    }

    /// The code of [`spec::contract::exit`] that says what kind of error this is.
    pub fn exit_code(&self) -> u8 {
        match self {
            RankError::Usage(_)
            | RankError::Environment(_)
            | RankError::Inherited { .. }
            | RankError::Job { .. }
            | RankError::Device(_)
            | RankError::NoDevice { .. } => exit::USAGE,
            RankError::Data(error) => data_code(error),
            RankError::Comm(error) => comm_code(error),
            RankError::Train(error) => train_code(error),
            RankError::NoRoom(_) => exit::PLAN,
            RankError::Report(_)
            | RankError::Record(_)
            | RankError::System { .. }
            | RankError::Io(_)
            | RankError::Panic(_) => exit::INTERNAL,
        }
    }
}

/// As [`RankError::exit_code_of`].
pub fn train_code_of(error: &TrainError, own: usize) -> u8 {
    match error {
        TrainError::OutOfMemory { rank, .. } if *rank != own => exit::PEER,
        _ => train_code(error),
    }
}

fn train_code(error: &TrainError) -> u8 {
    match error {
        TrainError::Config(_) => exit::USAGE,
        TrainError::Data(error) => data_code(error),
        TrainError::Comm(error) => comm_code(error),
        TrainError::Checkpoint(_) => exit::CHECKPOINT,
        TrainError::NonFinite { .. } => exit::NONFINITE,
        TrainError::OutOfMemory { .. }
        | TrainError::OutOfMemoryTogether { .. }
        | TrainError::PassOutOfMemory { .. } => exit::PLAN,
        TrainError::Torch(TorchError::User { .. }) => exit::USER,
        TrainError::Torch(_)
        | TrainError::Ddp(_)
        | TrainError::Groups(_)
        | TrainError::Share { .. }
        | TrainError::Divisor { .. } => exit::INTERNAL,
    }
}

fn data_code(error: &DataError) -> u8 {
    if error.is_of_user() { exit::USER } else { exit::DATA }
}

fn comm_code(error: &CommError) -> u8 {
    match error {
        CommError::PeerFailed { .. } => exit::PEER,
        // As the loader says it when it meets this first.
        CommError::Cache(_) => exit::DATA,
        _ => exit::COMM,
    }
}
