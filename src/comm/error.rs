//! Errors between ranks.

use super::nccl::NcclError;
use host::nodes::MeetError;
use std::error::Error;
use std::io;
use std::sync::Arc;

/// Failures of a collective, or of the ranks' meeting. Texts name the cause as well, because ranks send them to each other;
/// `source` gives the cause as a value. An error is kept and given to every waiting call, so causes are shared.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CommError {
    /// Another rank ended; the launcher says why.
    #[error("rank {rank} failed: {error}")]
    PeerFailed { rank: u32, error: String },
    /// This rank failed, so its collectives end.
    #[error("given up, since this rank failed: {error}")]
    GivenUp { error: String },
    #[error(
        "{collective} waited {waited_s:.1} s for rank {missing}: it never arrived (train.step_timeout is {timeout_s} s)"
    )]
    Timeout { collective: String, waited_s: f64, missing: String, timeout_s: f64 },
    /// The node's page cache was lost, without which no rank of it can continue.
    #[error("{0}")]
    Cache(String),
    /// A variable of the environment that says which rank this is.
    #[error("{name} is {value:?}, expected {expected}")]
    Variable { name: String, value: String, expected: &'static str },
    #[error("{beside} is set but {name} is not: set both, or neither for a single rank")]
    MissingVariable { name: String, beside: String },
    /// The processes that were started do not make one job: numbers out of range, given twice, or of two jobs.
    #[error("{0}")]
    Membership(String),
    #[error(
        "rank {rank} called {call} of {bytes} bytes while rank {own_rank} called {own_call} of {own_bytes} bytes: all ranks \
         must make the same calls"
    )]
    Mismatch { rank: usize, call: String, bytes: u64, own_rank: usize, own_call: String, own_bytes: u64 },
    #[error("broadcast from rank {root} of {world}")]
    NoRoot { root: usize, world: usize },
    /// A tensor that this collective does not move or add.
    #[error("{0}")]
    Tensor(String),
    #[error(
        "no room for {mib:.1} MiB in the node's shared memory ({source}): use fewer ranks, a smaller model, or a larger memory limit"
    )]
    NoRoom {
        mib: f64,
        #[source]
        source: Arc<io::Error>,
    },
    /// The process's limit of file sizes (`ulimit -f`) binds the shared memory too.
    #[error(
        "the node's shared memory may not grow by {bytes} bytes (ulimit -f is {}): raise that limit (ulimit -f unlimited, or \
         LimitFSIZE= of the unit)",
        limit_text(*.limit)
    )]
    FileLimit { bytes: usize, limit: Option<u64> },
    /// A call to the system failed.
    #[error("{what}: {source}")]
    System {
        what: String,
        #[source]
        source: Arc<io::Error>,
    },
    /// A call to libtorch failed.
    #[error("{what}: {source}")]
    Torch {
        what: String,
        #[source]
        source: Arc<dyn Error + Send + Sync>,
    },
    #[error(transparent)]
    Nccl(#[from] NcclError),
    #[error("{call}: {source}")]
    NcclCall {
        call: String,
        #[source]
        source: NcclError,
    },
    /// Ranks did not come together over NCCL.
    #[error("NCCL {version}: {error}; {hints}")]
    NcclStart {
        version: String,
        hints: &'static str,
        #[source]
        error: Box<CommError>,
    },
    /// The nodes did not come together.
    #[error("{0}")]
    Meet(#[source] Arc<MeetError>),
    /// A connection between nodes leads to somebody else.
    #[error(
        "whoever answers as node {node} does not know the join secret: another program came between the nodes while they \
         connected; start them again, on a network that others do not reach"
    )]
    Stranger { node: usize },
    #[error("the trial all-reduce gave {sum}, expected {right}")]
    Trial { sum: f64, right: f64 },
    #[error("rank 0 sent {bytes} bytes as NCCL's id: all nodes need the same program")]
    NcclId { bytes: usize },
    #[error("{0}")]
    Other(String),
}

fn limit_text(limit: Option<u64>) -> String {
    limit.map_or_else(|| "not known".into(), |bytes| format!("{bytes} bytes"))
}

impl CommError {
    pub(crate) fn torch(what: impl Into<String>, error: impl Error + Send + Sync + 'static) -> Self {
        CommError::Torch { what: what.into(), source: Arc::new(error) }
    }

    pub(crate) fn system(what: impl Into<String>, error: impl Into<io::Error>) -> Self {
        CommError::System { what: what.into(), source: Arc::new(error.into()) }
    }
}
