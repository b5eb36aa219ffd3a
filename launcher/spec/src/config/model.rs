//! The resolved configuration: what every room of Headroom reads. Nothing here depends on the machine.

use super::keys::Keys;
use super::sections::*;
use super::task::TaskSpec;
use super::{ConfigError, Kind};
use crate::keys;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

keys! {
    /// A complete run, as resolved from a YAML file, its device profile and `--set` overrides.
    #[serde(default)]
    pub struct Config in "" {
        /// Name of the config; names the run's folder. Left out, it is the name of the file.
        name: String = "default".into();
        /// The task that is trained. Left out, it is the task whose section is written, else the first.
        task: String = String::new(), kind = Kind::Word;
        /// The stage of the task that this config is of, where the task has stages; `launch` sets it for each stage in turn,
        /// `--stage` chooses one. Null: all stages, one after the other.
        stage: Option<String> = None;
        /// Seed of everything random: split, order of samples, initial weights, dropout.
        seed: u64 = 42, aliases = &["train.seed"];
    }
    sections {
        data: DataConfig;
        train: TrainConfig;
        memory: MemoryConfig;
        watch: WatchConfig;
        smart: SmartConfig;
        ddp: DdpConfig;
        log: LogConfig;
    }
    also {
        /// Sections of tasks, read by [`Config::section`]: that of the task alone, once resolved.
        #[serde(flatten)]
        tasks: TaskSections;
    }
    inert {
        "dataloader.total_workers" => "loader threads are planned per rank, train.num_workers";
        "dataloader.val_workers" => "validation reads with train.num_workers threads";
        "dataloader.val_prefetch_factor" => "validation has a slot per thread and two more";
        "test.batch_size" => TESTING;
        "test.num_workers" => TESTING;
    }
}

const TESTING: &str = "the test split is read as the validation split is";

/// Sections of tasks by name, as JSON: their structs are the tasks' own.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TaskSections(BTreeMap<String, Value>);

impl Config {
    /// Defaults of a task for keys that are left out.
    pub fn of(task: &dyn TaskSpec) -> Self {
        Self::of_stage(task, None)
    }

    /// Defaults of one stage of a task.
    pub fn of_stage(task: &dyn TaskSpec, stage: Option<&str>) -> Self {
        let mut config = Self { task: task.name().into(), stage: stage.map(str::to_owned), ..Self::default() };
        config.tasks.0.insert(task.name().into(), (task.section().defaults)());
        task.defaults(&mut config);
        config
    }

    /// A task's section; its defaults where it is not the task of this config.
    pub fn section<T: Keys>(&self) -> T {
        let value = self.tasks.0.get(T::SECTION.name());
        value.and_then(|value| T::deserialize(value).ok()).unwrap_or_default()
    }

    /// The section of this config's task as JSON; null where it has none.
    pub fn task_section(&self) -> &Value {
        self.tasks.0.get(&self.task).unwrap_or(&Value::Null)
    }

    /// Replaces a task's section.
    pub fn set_section<T: Keys>(&mut self, section: &T) {
        self.tasks.0.insert(T::SECTION.name().into(), serde_json::to_value(section).unwrap_or_default());
    }

    /// Changes a task's section.
    pub fn with_section<T: Keys>(&mut self, change: impl FnOnce(&mut T)) {
        let mut section = self.section();
        change(&mut section);
        self.set_section(&section);
    }

    /// Checks that the sections of `tasks` are what their structs hold: [`Config::section`] relies on it.
    ///
    /// # Errors
    /// The section and what is wrong in it.
    pub fn check_sections(&self, tasks: &[&dyn TaskSpec]) -> Result<(), String> {
        for (name, value) in &self.tasks.0 {
            let Some(task) = tasks.iter().find(|task| task.name() == name) else {
                return Err(format!("unknown section {name}"));
            };
            (task.section().normal)(value).map_err(|problem| format!("section {name}: {problem}"))?;
        }
        Ok(())
    }

    /// The resolved config as YAML, which loads again to an equal one.
    ///
    /// # Errors
    /// A path that is not UTF-8.
    pub fn to_yaml(&self) -> Result<String, ConfigError> {
        serde_yaml::to_string(self).map_err(ConfigError::Write)
    }
}
