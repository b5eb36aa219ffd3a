//! A task as a config sees it.

use super::keys::Section;
use super::model::Config;
use super::verdict::Verdict;

/// Facts on a task that both programs need: its keys, their checks, and its names. The rank's half is
/// `headroom::task::Task`.
pub trait TaskSpec: Sync {
    /// The task's name: the value of `task`, and the section that holds its keys.
    fn name(&self) -> &'static str {
        self.section().name()
    }

    /// The declaration of the task's keys.
    fn section(&self) -> &'static Section;

    /// Sets the general keys whose defaults differ for this task.
    fn defaults(&self, config: &mut Config);

    /// Values of `train.loss_type`.
    fn losses(&self) -> &'static [&'static str];

    /// Checks the task's values beyond the ranges of single keys.
    fn check(&self, config: &Config, verdict: &mut Verdict);

    /// Checks that a config without `task` means this task when it holds `key`, a key of this task.
    fn is_meant_by(&self, _key: &str) -> bool {
        true
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
