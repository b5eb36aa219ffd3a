//! Measurement of detections: matching, records, curves.

pub mod curves;
pub mod matching;
pub mod records;
