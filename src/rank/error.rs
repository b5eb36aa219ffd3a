//! Every error of a rank, and the exit code it ends with.

use crate::comm::CommError;
use crate::data::DataError;
use crate::report::ReportError;
use crate::train::TrainError;
use crate::train::checkpoint::CheckpointError;
use launcher::contract::exit;

/// What ends a rank.
#[derive(Debug, thiserror::Error)]
pub enum RankError {
    #[error("{0}")]
    Usage(String),
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Comm(#[from] CommError),
    #[error(transparent)]
    Train(#[from] TrainError),
    #[error(transparent)]
    Report(#[from] ReportError),
    #[error("{0}")]
    Io(String),
    #[error("internal error: {0}; please report this")]
    Panic(String),
}

impl From<CheckpointError> for RankError {
    fn from(error: CheckpointError) -> Self {
        RankError::Train(TrainError::Checkpoint(error))
    }
}

impl RankError {
    /// What rank `own` ends with: all ranks learn of a loss that is not finite, or of memory that ran out; the one that met
    /// it is to be named.
    pub fn exit_code_of(&self, own: usize) -> u8 {
        match self {
            RankError::Train(TrainError::NonFinite { rank, .. } | TrainError::OutOfMemory { rank, .. })
                if *rank != own =>
            {
                exit::PEER
            }
            _ => self.exit_code(),
        }
    }

    /// The code of [`launcher::contract::exit`] that says what kind of error this is.
    pub fn exit_code(&self) -> u8 {
        match self {
            RankError::Usage(_) | RankError::Train(TrainError::Config(_)) => exit::USAGE,
            RankError::Data(_) | RankError::Train(TrainError::Data(_)) => exit::DATA,
            RankError::Comm(error) | RankError::Train(TrainError::Comm(error)) => match error {
                CommError::PeerFailed { .. } => exit::PEER,
                _ => exit::COMM,
            },
            RankError::Train(TrainError::Checkpoint(_)) => exit::CHECKPOINT,
            RankError::Train(TrainError::NonFinite { .. }) => exit::NONFINITE,
            RankError::Train(TrainError::OutOfMemory { .. }) => exit::PLAN,
            RankError::Train(TrainError::Torch(_) | TrainError::Ddp(_))
            | RankError::Report(_)
            | RankError::Io(_)
            | RankError::Panic(_) => exit::INTERNAL,
        }
    }
}
