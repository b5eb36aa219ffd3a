//! Task `deblur`: blurred frames and a spike camera's stream to sharp frames.

mod check;
mod keys;

pub use keys::{ClipLayout, DeblurConfig, DeblurLoss, FlowKind, LossConfig, SpikeEncoding, VrtModel};

use crate::config::{Config, Keys, MonitorMode, Section, TaskSpec, Verdict};

/// The task, as the registry knows it.
pub struct Deblur;

impl TaskSpec for Deblur {
    fn section(&self) -> &'static Section {
        DeblurConfig::SECTION
    }

    fn defaults(&self, config: &mut Config) {
        config.data.dataset_path = "data/gopro_spike".into();
        config.train.batch_size = 1;
        config.train.loss_type = DeblurLoss::Charbonnier.word().into();
        config.train.monitor_metric = "val.psnr_rgb".into();
        config.train.monitor_mode = MonitorMode::Max;
    }

    fn losses(&self) -> &'static [&'static str] {
        DeblurLoss::WORDS
    }

    fn check(&self, config: &Config, verdict: &mut Verdict) {
        check::check(&config.section::<DeblurConfig>(), verdict);
    }

    /// Whole frames are restored.
    fn predicts(&self, config: &mut Config) {
        config.with_section(|deblur: &mut DeblurConfig| deblur.val_crop_size = 0);
    }

    /// Keys of the loss stood in `train`, beside those of other tasks.
    fn is_meant_by(&self, key: &str) -> bool {
        !key.starts_with(LossConfig::SECTION.prefix)
    }

    fn data_name(&self) -> &'static str {
        "GoProSpike"
    }

    fn sample_layouts(&self) -> &'static [&'static str] {
        &["packed", "bytes", "kair"]
    }
}
