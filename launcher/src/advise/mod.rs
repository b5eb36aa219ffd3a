#![doc = include_str!("README.md")]
//!
//! Architecture invariant: reads records and the machine's facts; starts nothing and changes nothing.

mod analyze;
mod doctor;
mod growth;
mod log;
mod recommend;

pub use analyze::{Analysis, Check, Range, Verdict, analyze};
pub use doctor::{Finding, doctor};
pub use growth::Growth;
pub use log::{LogError, MonitorSample, Run, each_record, forwards, json, language, locate, starts};
pub use recommend::{DEVICE_PROFILES, DeviceProfile, Recommendation, recommend};
