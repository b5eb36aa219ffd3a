//! Task `emg`: surface EMG of the forearm to the joint angles of the hand.
//!
//! A sample is a window of `emg` `[T, 16]` (volts, or normalised) and `joint_angles` `[T, 20]` (radians) at 2 kHz.
//! The model is a TDS encoder with a decoder that feeds its pose back: see [`model`], [`tds`], [`decoder`].

pub mod decoder;
mod init;
pub mod joints;
pub mod loss;
pub mod metrics;
pub mod model;
pub mod resample;
pub mod tds;
#[cfg(test)]
mod tests;

pub use metrics::EmgMetrics;
pub use model::EmgNet;
