//! Task `cell`: latent diffusion on counts of genes in single cells.

mod check;
mod keys;
pub mod respace;

pub use keys::{
    CellAutoencoder, CellClassifier, CellConfig, CellDiffusion, CellSample, CellUnet, CopyPolicy, DecoderActivation,
    LatentType, NoiseSchedule, ScheduleSampler,
};

use crate::config::{Config, Keys, Rates, SchedulerKind, Section, StageKind, StageSpec, TaskSpec, Verdict};

/// Losses: that of the autoencoder's genes and of the diffusion's noise.
const LOSSES: &[&str] = &["mse"];

/// The stages, in order.
pub const AUTOENCODER: &str = "autoencoder";
pub const LATENTS: &str = "latents";
pub const DIFFUSION: &str = "diffusion";
pub const CLASSIFIER: &str = "classifier";
pub const SAMPLE: &str = "sample";
/// Predictions for other cells: no stage of a run.
pub const PREDICT: &str = "predict";

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
        // The published programs' rates.
        let (rate, decay) = match config.stage.as_deref() {
            Some(DIFFUSION) => (1e-4, 1e-4),
            Some(CLASSIFIER) => (3e-4, 0.0),
            _ => (5e-4, 0.01),
        };
        (config.train.learning_rate, config.train.weight_decay) = (rate, decay);
        config.train.scheduler = SchedulerKind::None;
        if config.stage.as_deref() == Some(DIFFUSION) {
            config.train.ema_decay = Rates(vec![0.9999]);
            config.train.scheduler = SchedulerKind::Linear;
        }
        config.train.warmup_epochs = 0.0;
        config.train.early_stopping = false;
        config.train.gradient_clip_norm = 0.0;
    }

    fn stages(&self, config: &Config) -> Vec<StageSpec> {
        let stage = |name, kind| StageSpec { name, kind };
        let mut stages = vec![
            stage(AUTOENCODER, StageKind::Train),
            stage(LATENTS, StageKind::Pass),
            stage(DIFFUSION, StageKind::Train),
        ];
        // A classifier needs labels.
        if config.section::<CellConfig>().label.is_some() {
            stages.push(stage(CLASSIFIER, StageKind::Train));
        }
        stages.push(stage(SAMPLE, StageKind::Pass));
        stages
    }

    fn losses(&self) -> &'static [&'static str] {
        LOSSES
    }

    /// Every cell gets its prediction, with a label or without.
    fn predicts(&self, config: &mut Config) {
        config.stage = Some(PREDICT.into());
        config.with_section::<CellConfig>(|cell| (cell.min_genes, cell.min_cells, cell.label) = (0, 0, None));
    }

    /// Generated cells come in batches of the stage's.
    fn settle(&self, config: &mut Config) {
        if let Some(batch) = config.section::<CellConfig>().sample.batch_size
            && config.stage.as_deref() == Some(SAMPLE)
        {
            config.train.val_batch_size = Some(batch);
        }
    }

    fn check(&self, config: &Config, verdict: &mut Verdict) {
        check::check(&config.section::<CellConfig>(), verdict);
    }

    fn data_name(&self) -> &'static str {
        "Cells"
    }

    fn sample_layouts(&self) -> &'static [&'static str] {
        &["csr", "gzip", "dense"]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RawConfig;

    #[test]
    fn cells_are_generated_in_batches_of_their_own_key_where_it_is_set() {
        let batches = |sets: &[&str]| {
            let raw = RawConfig::parse("task: cell", "cell.yaml", crate::task::all()).unwrap();
            let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
            [SAMPLE, LATENTS].map(|stage| {
                let (config, _) = raw.resolve_stage("cpu", &sets, Some(stage)).unwrap();
                config.train.val_batch_size.unwrap_or(config.train.batch_size)
            })
        };
        assert_eq!(batches(&[]), [128, 128]);
        assert_eq!(batches(&["cell.sample.batch_size=7"]), [7, 128]);
        assert_eq!(batches(&["stages.sample.train.batch_size=9"]), [9, 128]);
    }
}
