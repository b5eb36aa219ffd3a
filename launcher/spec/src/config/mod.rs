//! Raw YAML, then the resolved [`Config`].
//!
//! ```text
//! text ──► tree (lines) ──► layer (keys, types) ──► RawConfig ──resolve(profile, sets)──► check ──► Config
//! ```
//!
//! Two stages: [`RawConfig`] holds what was written; [`RawConfig::resolve`] puts defaults, file, device profile and
//! overrides on top of each other, in this order.
//!
//! Architecture invariant: no environment, clock, /proc or GPU here; the same text and arguments give the same config.

mod budget;
mod check;
mod defaults;
mod error;
mod kind;
mod layer;
mod model;
mod raw;
mod schema;
mod tree;

#[cfg(test)]
mod tests;

pub use check::is_folder_name;
pub use error::{ConfigError, Place, Problem};
pub use model::*;
pub use raw::RawConfig;
pub use schema::{PROFILES, TASKS, data_name};
