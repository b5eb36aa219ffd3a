//! Vocabulary that the launcher and the ranks share. No I/O, no libtorch.
//!
//! ```text
//! contract ◄── config ◄── task ◄── plan ◄── job
//! ```
//!
//! | room | owns | may use |
//! |---|---|---|
//! | [`contract`] | all that crosses processes: environment names, messages, exit codes, records, facts on a machine | nothing |
//! | [`config`] | one declaration per key, reading, checks; asks neither environment, clock, `/proc` nor GPU | `contract` |
//! | [`task`] | each task's keys, their defaults and checks | `contract`, `config` |
//! | [`plan`] | the pure function from config and machine to every byte of the budget | `contract`, `config`, `task` |
//! | [`job`] | the resolved job that a launcher hands to its ranks | `contract`, `config`, `plan` |
//!
//! Architecture invariant: pure. Nothing here opens a file, reads the environment or starts a process, except
//! [`config::RawConfig::find`], which reads the one YAML file that it is given.

pub mod config;
pub mod contract;
pub mod job;
pub mod plan;
pub mod task;
