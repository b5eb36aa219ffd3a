//! Measurement of detections: matching, records, curves.

pub mod curves;
pub mod matching;
pub mod records;
pub mod truth;

use curves::Curves;

/// Results of an evaluation.
pub struct Evaluated {
    pub curves: Curves,
    /// `[(C + 1) × (C + 1)]`: see [`matching::confuse`].
    pub confusion: Vec<f64>,
    pub images: u64,
}
