//! Raw YAML, then the resolved [`Config`].

mod budget;
mod defaults;
mod model;

pub use model::*;
