//! The tasks: each declares its keys, their defaults and checks in a folder here, and trains in `src/task/<name>` of
//! the rank. A task is added by its folder, a `mod` line and an entry of [`TASKS`].

pub mod cell;
pub mod deblur;
pub mod emg;

#[cfg(test)]
mod tests;

use crate::config::{Config, ConfigError, Folders, RawConfig, Schema};
pub use crate::config::{StageKind, StageSpec, TaskSpec};

/// Every task. The first is trained where a config says nothing.
pub const TASKS: &[&dyn TaskSpec] = &[&emg::Emg, &deblur::Deblur, &cell::Cell];

/// The task called `name`.
pub fn find(name: &str) -> Option<&'static dyn TaskSpec> {
    TASKS.iter().find(|task| task.name() == name).copied()
}

/// Names of all tasks.
pub fn names() -> Vec<&'static str> {
    TASKS.iter().map(|task| task.name()).collect()
}

/// The name of a task's data set in lines for people.
pub fn data_name(task: &str) -> &str {
    find(task).map_or(task, |task| task.data_name())
}

/// A config of the task called `name`, all keys at their defaults.
pub fn config(name: &str) -> Config {
    find(name).map_or_else(|| Config { task: name.into(), ..Config::default() }, Config::of)
}

/// [`RawConfig::find`] with the keys of all tasks.
///
/// # Errors
/// As there.
pub fn find_config(name: &str, folders: &Folders) -> Result<RawConfig, ConfigError> {
    RawConfig::find(name, folders, TASKS)
}

/// [`RawConfig::parse`] with the keys of all tasks.
///
/// # Errors
/// As there.
pub fn parse_config(text: &str, file: &str) -> Result<RawConfig, ConfigError> {
    RawConfig::parse(text, file, TASKS)
}

/// All keys: general ones and those of all tasks.
pub fn schema() -> Schema {
    Schema::of(TASKS)
}
