//! Task `yolo`: objects in images, with the model, loss and labels of YOLOv8.

mod check;
mod keys;
mod size;
#[cfg(test)]
mod tests;

pub use keys::{DctScaling, ImageCache, YoloAugment, YoloConfig, YoloLoss, YoloNms};
pub use size::ModelSize;

use crate::config::{
    Config, EmaBuffers, Keys, MonitorMode, OptimizerKind, Rates, ScheduleBy, SchedulerKind, Section, TaskSpec, Verdict,
    WarmupMode,
};

/// The loss: boxes by CIoU and distribution, classes by cross-entropy.
const LOSSES: &[&str] = &["v8"];

/// Targets of `launch --smart`: the guide's. Its target for boxes is out of reach with the usual gain, so that the number of
/// epochs or the lack of progress ends such a run; `smart.targets` sets others.
const TARGETS: &str = "train.box_loss<=0.05, train.cls_loss<=1, train.dfl_loss<=0.8, val.map50>=0.7";

/// The task, as the registry knows it.
pub struct Yolo;

impl TaskSpec for Yolo {
    fn section(&self) -> &'static Section {
        YoloConfig::SECTION
    }

    /// The published recipe.
    fn defaults(&self, config: &mut Config) {
        config.data.dataset_path = "data/coco.yaml".into();
        // Decoded images that partners of a mosaic are drawn from.
        config.data.chunk_cache_size = 256 << 20;
        let train = &mut config.train;
        (train.batch_size, train.drop_last) = (16, false);
        train.num_epochs = 100;
        train.loss_type = LOSSES[0].into();
        (train.optimizer, train.learning_rate, train.weight_decay) = (OptimizerKind::Sgd, 0.01, 5e-4);
        (train.momentum, train.nesterov) = (0.937, true);
        (train.scheduler, train.lrf, train.schedule_by) = (SchedulerKind::Linear, 0.01, ScheduleBy::Epoch);
        (train.warmup_epochs, train.warmup_mode) = (3.0, WarmupMode::Within);
        train.warmup_momentum = Some(0.8);
        train.gradient_clip_norm = 10.0;
        (train.ema_decay, train.ema_ramp) = (Rates(vec![0.9999]), 2000.0);
        train.ema_buffers = EmaBuffers::Average;
        (train.patience, train.min_delta) = (100, 0.0);
        (train.monitor_metric, train.monitor_mode) = ("val.map50_95".into(), MonitorMode::Max);
        config.smart.targets = Some(TARGETS.into());
    }

    /// Accumulates batches of all ranks up to `yolo.nbs` images, unless the config sets an accumulation; keeps checkpoints as
    /// `yolo.save_period` says.
    fn for_ranks(&self, config: &mut Config, ranks: usize) {
        let yolo: YoloConfig = config.section();
        let nominal = yolo.nbs;
        if yolo.save_period >= 1.0 {
            config.log.keep_every = yolo.save_period as u64;
        }
        let train = &mut config.train;
        let batch = train.batch_size.saturating_mul(ranks);
        if nominal == 0 || batch == 0 || train.gradient_accumulation_steps != 1 {
            return;
        }
        let batches = (nominal as f64 / batch as f64).round_ties_even().max(1.0) as usize;
        (train.gradient_accumulation_steps, train.warmup_accumulation) = (batches, batches > 1);
    }

    fn losses(&self) -> &'static [&'static str] {
        LOSSES
    }

    fn check(&self, config: &Config, verdict: &mut Verdict) {
        check::check(config, verdict);
    }

    fn data_name(&self) -> &'static str {
        "Images"
    }

    fn sample_layouts(&self) -> &'static [&'static str] {
        &["yolo", "coco", "labelme"]
    }
}
