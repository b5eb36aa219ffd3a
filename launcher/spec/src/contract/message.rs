//! Control messages between the launcher and one rank: frames of a little-endian `u32` length and a JSON body.

use super::{Phase, RecordGap, Summary};
use serde::{Deserialize, Serialize};

/// Longest body of a frame, bytes.
pub const MAX_FRAME_BYTES: usize = 1 << 20;

/// From a rank to the launcher.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum FromRank {
    Hello {
        version: u32,
        rank: u32,
    },
    /// Where the run stands; sent by rank 0 after a step, at most some ten times per second.
    Progress(Progress),
    /// One line of text, printed above the progress bar with the rank's prefix.
    Line {
        text: String,
    },
    /// The rank is about to end with this error.
    Failed {
        code: u8,
        step: Option<u64>,
        error: String,
    },
    /// Result of a [`ToRank::Relieve`].
    Relieved(Relieved),
    /// A file of records could not be written for a time.
    Gap(RecordGap),
    /// The summary of the run, where the file could not be written.
    Summary(Box<Summary>),
    /// All work is done, everything is written.
    Done,
}

/// From the launcher to a rank.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum ToRank {
    /// Another rank failed: leave every collective now and exit with [`super::exit::PEER`].
    PeerFailed { rank: u32, error: String },
    /// Memory is short, or is no longer: do this and answer [`FromRank::Relieved`] with the same number.
    Relieve { order: u64, action: Relief },
}

/// One rung of the ladder that gives memory back. Ranks apply each between two steps; [`Relief::HalveMicroBatch`] and
/// [`Relief::Stop`] take effect at a step that all ranks agree on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Relief {
    /// No batch is begun ahead of the one that the step waits for.
    PausePrefetch,
    /// At most so many loader threads decode.
    Decoders { threads: usize },
    /// Host and device allocators give back what is free.
    TrimAllocators,
    /// Half the micro-batch, twice the accumulation: the same global batch in the same order.
    HalveMicroBatch,
    /// Write a checkpoint, then end cleanly. `reason` is shown to the user.
    Stop { reason: String },
    /// Pressure is over: prefetching and decoders as planned. The micro-batch stays.
    Resume,
}

/// Memory of the rank around one [`Relief`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Relieved {
    pub order: u64,
    pub step: u64,
    pub uss_before_bytes: u64,
    pub uss_after_bytes: u64,
    /// Description of the change, for the rank's log: `micro-batch 64 → 32, accumulation 1 → 2`.
    pub text: String,
    #[serde(default)]
    pub effect: Effect,
}

/// Effects of a [`Relief`] besides the bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    #[default]
    Done,
    /// Samples of a pass, and passes of a step: before and after.
    Halved { micro_batch: [u64; 2], accumulation: [u64; 2] },
    /// Micro-batches hold one sample already.
    Smallest,
    /// The run ended before.
    NotDone,
}

/// State shown by the progress bar.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    pub phase: Phase,
    pub epoch: u64,
    pub epochs: u64,
    pub step: u64,
    pub steps: u64,
    pub loss: f64,
    pub samples_per_s: f64,
    pub pss_bytes: u64,
    pub cache_hit_rate: Option<f64>,
}
