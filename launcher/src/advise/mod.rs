#![doc = include_str!("README.md")]
//!
//! Architecture invariant: reads records and the machine's facts; starts nothing and changes nothing.

mod analyze;
mod doctor;
mod growth;
mod log;
mod overview;
mod recommend;

pub use analyze::{Analysis, Check, Range, Verdict, analyze};
pub use doctor::{Finding, doctor};
pub use growth::Growth;
pub use log::{LogError, MonitorSample, Run, each_record, forwards, json, language, locate, starts};
pub use overview::{Overview, Standing, date, differing, duration, flat_config, number, side_by_side};
pub use recommend::{DEVICE_PROFILES, DeviceProfile, Recommendation, recommend};
