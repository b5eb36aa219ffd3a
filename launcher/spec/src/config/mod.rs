//! Raw YAML, then the resolved [`Config`].
//!
//! ```text
//! text ──► tree (lines) ──► layer (keys, types) ──► RawConfig ──resolve(profile, sets)──► check ──► Config
//! ```
//!
//! Two stages: [`RawConfig`] holds the text as written; [`RawConfig::resolve`] puts defaults, file, device profile and
//! overrides on top of each other, in this order.
//!
//! Every key is declared once: general keys in `sections.rs`, a task's in its folder (see [`TaskSpec`]). Reading, checks,
//! [`mod@reference`] and [`mod@json_schema`] come from the declarations.
//!
//! Architecture invariant: no environment, clock, /proc or GPU here; the same text and arguments give the same config.

mod budget;
mod check;
mod error;
mod json_schema;
mod keys;
mod kind;
mod layer;
mod literal;
mod model;
mod range;
mod rates;
mod raw;
pub mod reference;
mod schema;
mod sections;
mod spelling;
mod stages;
mod task;
mod tree;
mod values;
mod verdict;

pub use crate::{choices, keys};
pub use check::is_folder_name;
pub use error::{ConfigError, Place, Problem};
pub use json_schema::json_schema;
pub use keys::{Inert, Key, Keys, Section, defaults_of, normal_of};
pub use kind::{Kind, Typed, record};
pub use model::{Config, TaskSections};
pub use range::Range;
pub use rates::Rates;
pub use raw::{Folders, RawConfig};
pub use schema::{PROFILES, Schema};
pub use sections::*;
pub use task::{Interpreter, StageKind, StageSpec, TaskSpec};
pub use tree::Mark;
pub use values::Values;
pub use verdict::Verdict;
