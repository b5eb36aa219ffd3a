//! Task `python`: a PyTorch model and data sets as they are. Ranks run in the user's interpreter.

mod check;
mod keys;

pub use keys::{PythonConfig, PythonStart};

use crate::config::{Config, Interpreter, Keys, Section, TaskSpec, Verdict};

/// The value of `train.loss_type`: the user's model or function knows its loss.
const LOSS: &str = "own";

/// The task, as the registry knows it.
pub struct Python;

impl TaskSpec for Python {
    fn section(&self) -> &'static Section {
        PythonConfig::SECTION
    }

    fn defaults(&self, config: &mut Config) {
        config.train.loss_type = LOSS.into();
    }

    fn losses(&self) -> &'static [&'static str] {
        &[LOSS]
    }

    fn check(&self, config: &Config, verdict: &mut Verdict) {
        check::check(&config.section(), config, verdict);
    }

    fn interpreter(&self, config: &Config) -> Option<Interpreter> {
        let python: PythonConfig = config.section();
        let forks = python.start == PythonStart::Fork;
        Some(Interpreter { program: python.interpreter, path: python.path, forks })
    }
}
