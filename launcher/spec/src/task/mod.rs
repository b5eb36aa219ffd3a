//! The tasks: each declares its keys, their defaults and checks in a folder here, and trains in `src/task/<name>` of
//! the rank. A task is added by its folder and a line in `tasks!`.

#[cfg(test)]
mod tests;

use crate::config::{Config, ConfigError, Folders, RawConfig, Schema};
pub use crate::config::{StageKind, StageSpec, TaskSpec};
use std::sync::OnceLock;

/// Declares the module and the entry of each task.
macro_rules! tasks {
    ($($name:ident: $task:ident,)+) => {
        $(pub mod $name;)+

        /// Tasks of this package. The first is trained where a config says nothing.
        const TASKS: &[&dyn TaskSpec] = &[$(&$name::$task),+];
    };
}

tasks! {
    emg: Emg,
    deblur: Deblur,
    cell: Cell,
    yolo: Yolo,
    python: Python,
}

/// [`TASKS`] and those of the program.
static ALL: OnceLock<Vec<&'static dyn TaskSpec>> = OnceLock::new();

/// Every task. The first is trained where a config says nothing.
pub fn all() -> &'static [&'static dyn TaskSpec] {
    ALL.get_or_init(|| TASKS.to_vec())
}

/// Adds the tasks of a program that is built on these packages, before it reads a config.
///
/// # Errors
/// Tasks were added or asked for already.
pub fn add(own: &[&'static dyn TaskSpec]) -> Result<(), String> {
    let tasks = [TASKS, own].concat();
    ALL.set(tasks).map_err(|_| "tasks are added once, before any is asked for".into())
}

/// The task called `name`.
pub fn find(name: &str) -> Option<&'static dyn TaskSpec> {
    all().iter().find(|task| task.name() == name).copied()
}

/// Names of all tasks.
pub fn names() -> Vec<&'static str> {
    all().iter().map(|task| task.name()).collect()
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
    RawConfig::find(name, folders, all())
}

/// [`RawConfig::parse`] with the keys of all tasks.
///
/// # Errors
/// As there.
pub fn parse_config(text: &str, file: &str) -> Result<RawConfig, ConfigError> {
    RawConfig::parse(text, file, all())
}

/// All keys: general ones and those of all tasks.
pub fn schema() -> Schema {
    Schema::of(all())
}
