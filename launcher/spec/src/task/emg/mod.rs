//! Task `emg`: surface EMG of the forearm to the joint angles of the hand.

mod check;
mod keys;

pub use keys::{DecoderType, EmgConfig, EmgLoss, EmgModel, TdsStage};

use crate::config::{Config, Keys, Section, TaskSpec, Verdict};

/// The task, as the registry knows it.
pub struct Emg;

impl TaskSpec for Emg {
    fn section(&self) -> &'static Section {
        EmgConfig::SECTION
    }

    fn defaults(&self, config: &mut Config) {
        config.data.dataset_path = "data/emg".into();
        config.train.loss_type = EmgLoss::MseMae.word().into();
    }

    fn losses(&self) -> &'static [&'static str] {
        EmgLoss::WORDS
    }

    fn check(&self, config: &Config, verdict: &mut Verdict) {
        check::check(&config.section::<EmgConfig>(), verdict);
    }

    fn sample_layouts(&self) -> &'static [&'static str] {
        &["gzip", "contiguous"]
    }
}
