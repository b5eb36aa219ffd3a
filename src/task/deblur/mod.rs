#![doc = include_str!("README.md")]
//!
//! # Parts
//!
//! A sample is a clip of T consecutive frames: `blur` and `sharp` u8 `[T, h, w, 3]` and the spike camera's planes of the
//! same part, packed bits. On the rank's device they become frames in 0..1 and voxels of K time bins ([`data::voxel`]).
//! The model is a video restoration transformer with a spike branch: see [`model`]; its loss is in [`loss`], what is
//! measured in [`metrics`].

mod constants;
pub mod data;
mod gallery;
pub mod loss;
pub mod lpips;
pub mod metrics;
pub mod model;
mod net;
pub mod outline;
mod predict;
pub mod quality;
pub mod sample;
#[cfg(test)]
mod tests;
mod tiles;
pub mod vgg;

pub use metrics::DeblurMetrics;
pub use net::{DeblurNet, shape};

use super::outline::Outline;
use super::pass::{Opening, Pass};
use super::{Datasets, Gallery, Metrics, Model, SampleRequest, Task, Team};
use crate::data::DataError;
use crate::data::source::video::{Layout, SpikeEncoding, SpikeInput, VideoSpec};
use data::ClipSpec;
use spec::config::Config;
use spec::task::deblur::{ClipLayout, DeblurConfig, SpikeEncoding as Encoding};
use std::path::Path;
use std::sync::Arc;
use tch::nn;

/// The task, as the registry knows it.
pub struct Deblur;

/// Facts on the files that model and metrics need.
#[derive(Clone, Copy, Debug)]
pub struct FrameFacts {
    /// Columns of a whole frame.
    pub image_width: usize,
}

impl Task for Deblur {
    fn name(&self) -> &'static str {
        "deblur"
    }

    fn open(&self, config: &Config, team: &Team, _index_dir: &Path) -> Result<Datasets, DataError> {
        let opened = data::open_clips(&clip_spec(config), config.seed, team, Some(&config.data))?;
        let facts = FrameFacts { image_width: opened.frames.image().width };
        Ok(Datasets { facts: Some(Arc::new(facts)), ..opened.datasets })
    }

    fn evaluation(&self, opening: &Opening) -> Result<Datasets, DataError> {
        predict::evaluation(opening)
    }

    fn predictor(&self, opening: &Opening) -> Result<Pass, DataError> {
        predict::predictor(opening)
    }

    fn outline(&self, config: &Config, _index_dir: &Path) -> Result<Outline, DataError> {
        outline::outline(config)
    }

    fn predict_outline(&self, config: &Config, _index_dir: &Path) -> Result<Outline, DataError> {
        outline::predict_outline(config)
    }

    fn shrunk(&self, config: &Config) -> Option<(Config, f64)> {
        outline::shrunk(config)
    }

    fn model(&self, config: &Config, datasets: &Datasets, vs: &nn::Path) -> Result<Box<dyn Model>, DataError> {
        let facts = datasets.facts.as_ref().and_then(|facts| facts.downcast_ref::<FrameFacts>());
        // Without a camera to compare with, spikes are taken to be as wide as frames.
        let image_width = facts.map_or_else(|| config.section::<DeblurConfig>().spike_w, |facts| facts.image_width);
        Ok(Box::new(DeblurNet::new(config, image_width, vs)?))
    }

    fn metrics(&self, config: &Config, _datasets: &Datasets) -> Result<Box<dyn Metrics>, DataError> {
        Ok(Box::new(DeblurMetrics::new(config.section::<DeblurConfig>().loss.lpips_file.as_deref())?))
    }

    /// Sizes alone: tiles and recomputation change no parameter.
    fn architecture(&self, config: &Config) -> String {
        let deblur: DeblurConfig = config.section();
        let mut keys = serde_json::to_value(&deblur.vrt).unwrap_or_default();
        if let Some(keys) = keys.as_object_mut() {
            for free in ["max_batch_tokens", "chunk_size", "checkpoint_attn", "checkpoint_ffn", "drop_path"] {
                keys.remove(free);
            }
        }
        format!("{keys} bins {}", deblur.voxel_bins)
    }

    fn gallery(&self, config: &Config, _datasets: &Datasets) -> Option<Box<dyn Gallery>> {
        (config.log.images > 0).then(|| -> Box<dyn Gallery> { Box::new(gallery::ClipGallery::new(config.log.images)) })
    }

    fn sample_data(&self, request: &SampleRequest) -> Result<(), DataError> {
        sample::sample_data(request)
    }
}

/// The section `deblur` as the data set wants it.
fn clip_spec(config: &Config) -> ClipSpec {
    let (data, clips) = (&config.data, config.section::<DeblurConfig>());
    let encoding = match clips.spike_encoding {
        Encoding::Auto => None,
        Encoding::Packed => Some(SpikeEncoding::Packed),
        Encoding::Bytes => Some(SpikeEncoding::Bytes),
    };
    let spikes = match (clips.vrt.use_spike, clips.use_precomputed_voxels) {
        (false, _) => SpikeInput::None,
        (true, true) => SpikeInput::Voxels { counts: clips.log1p },
        (true, false) => SpikeInput::Dat { encoding, height: clips.spike_h, width: clips.spike_w },
    };
    let video = VideoSpec {
        layout: match clips.layout {
            ClipLayout::Auto => None,
            ClipLayout::Gopro => Some(Layout::Unified),
            ClipLayout::Kair => Some(Layout::Kair),
        },
        spike_dir: clips.spike_dir.clone(),
        voxel_dir: clips.voxel_dir.clone(),
        image_exts: clips.image_exts.iter().map(|ext| ext.trim_start_matches('.').to_lowercase()).collect(),
        ..VideoSpec::new(&data.dataset_path, spikes)
    };
    let whole = |side: usize| (side > 0).then_some(side);
    ClipSpec {
        splits: [clips.train_split.clone(), clips.val_split.clone(), clips.test_split.clone()],
        clip_len: clips.clip_len,
        strides: [data.stride, data.stride],
        crops: [whole(clips.crop_size), whole(clips.val_crop_size)],
        skip_bad: data.skip_bad,
        limits: [data.max_train_windows, data.max_val_windows],
        ..ClipSpec::new(video, None)
    }
}
