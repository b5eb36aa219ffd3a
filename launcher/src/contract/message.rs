//! Control messages between the launcher and one rank: frames of a little-endian `u32` length and a JSON body.

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
    /// One line for people, to be printed above the progress bar with the rank's prefix.
    Line {
        text: String,
    },
    /// The rank is about to end with this error.
    Failed {
        code: u8,
        step: Option<u64>,
        error: String,
    },
    /// All work is done, everything is written.
    Done,
}

/// From the launcher to a rank.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum ToRank {
    /// Another rank failed: leave every collective now and exit with [`super::exit::PEER`].
    PeerFailed { rank: u32, error: String },
}

/// What the progress bar shows.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// `train`, `val`, `checkpoint`.
    pub phase: String,
    pub epoch: u64,
    pub epochs: u64,
    pub step: u64,
    pub steps: u64,
    pub loss: f64,
    pub samples_per_s: f64,
    pub pss_bytes: u64,
    pub cache_hit_rate: Option<f64>,
}
