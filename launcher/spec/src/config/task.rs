//! A task as a config sees it.

use super::keys::Section;
use super::model::Config;
use super::verdict::Verdict;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A part of a task's work: stages run one after the other, each in a folder of the run that has its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageSpec {
    /// Names its folder, and its section of `stages`.
    pub name: &'static str,
    pub kind: StageKind,
}

/// Work of a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StageKind {
    /// Trains a model.
    Train,
    /// Runs models over data and writes what they say.
    Pass,
}

/// The user's interpreter, in which the ranks of a task run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interpreter {
    /// `None`: the first `python3` or `python` of PATH.
    pub program: Option<PathBuf>,
    /// Folders of the user's modules.
    pub path: Vec<PathBuf>,
    /// All ranks are forked from one process that has read the user's module.
    pub forks: bool,
}

/// Facts on a task that both programs need: its keys, their checks, and its names. The rank's half is
/// `headroom::task::Task`.
pub trait TaskSpec: Sync {
    /// The task's name: the value of `task`, and the section that holds its keys.
    fn name(&self) -> &'static str {
        self.section().name()
    }

    /// The declaration of the task's keys.
    fn section(&self) -> &'static Section;

    /// The stages of a run, in order. Empty: the task trains one model, in the folder of the run itself. `config` is that of
    /// the run, without what its section `stages` sets.
    fn stages(&self, _config: &Config) -> Vec<StageSpec> {
        Vec::new()
    }

    /// Sets the general keys whose defaults differ for this task, and for its stage `config.stage`.
    fn defaults(&self, config: &mut Config);

    /// Values of `train.loss_type`.
    fn losses(&self) -> &'static [&'static str];

    /// Sets keys of a training that follow from the number of its ranks, `ranks` over all nodes, before it is planned.
    fn for_ranks(&self, _config: &mut Config, _ranks: usize) {}

    /// Changes a run's config into that of its predictions: samples may have other sizes there.
    fn predicts(&self, _config: &mut Config) {}

    /// Sets the general keys that follow from the task's own ones, once all are known.
    fn settle(&self, _config: &mut Config) {}

    /// Checks the task's values beyond the ranges of single keys.
    fn check(&self, config: &Config, verdict: &mut Verdict);

    /// Checks that a config without `task` means this task when it holds `key`, a key of this task.
    fn is_meant_by(&self, _key: &str) -> bool {
        true
    }

    /// The interpreter in which the task's ranks run. `None`: they are the rank program.
    fn interpreter(&self, _config: &Config) -> Option<Interpreter> {
        None
    }

    /// The name of the task's data set in lines for people.
    fn data_name(&self) -> &'static str {
        self.name()
    }

    /// Layouts of sample data, for `launch sample-data --layout`; the first is the default.
    fn sample_layouts(&self) -> &'static [&'static str] {
        &[]
    }
}
