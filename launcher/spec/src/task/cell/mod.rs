//! Task `cell`: latent diffusion on counts of genes in single cells.

mod check;
mod keys;

pub use keys::{
    CellAutoencoder, CellClassifier, CellConfig, CellDiffusion, CellSample, CellUnet, DecoderActivation, LatentType,
    NoiseSchedule, ScheduleSampler,
};

use crate::config::{Config, Keys, SchedulerKind, Section, TaskSpec, Verdict};

/// Losses: that of the autoencoder's genes and of the diffusion's noise.
const LOSSES: &[&str] = &["mse"];

/// The task, as the registry knows it.
pub struct Cell;

impl TaskSpec for Cell {
    fn section(&self) -> &'static Section {
        CellConfig::SECTION
    }

    fn defaults(&self, config: &mut Config) {
        config.data.dataset_path = "data/cells".into();
        config.data.split_ratio = [0.9, 0.05, 0.05];
        config.train.batch_size = 128;
        config.train.learning_rate = 1e-4;
        config.train.weight_decay = 1e-4;
        config.train.scheduler = SchedulerKind::None;
        config.train.warmup_epochs = 0.0;
        config.train.early_stopping = false;
        config.train.gradient_clip_norm = 0.0;
    }

    fn losses(&self) -> &'static [&'static str] {
        LOSSES
    }

    fn check(&self, config: &Config, verdict: &mut Verdict) {
        check::check(&config.section::<CellConfig>(), verdict);
    }

    fn data_name(&self) -> &'static str {
        "Cells"
    }

    fn sample_layouts(&self) -> &'static [&'static str] {
        &["csr", "gzip", "csc", "dense"]
    }
}
