//! `launch predict`: restored frames as PNG, a folder per sequence, files with the names of the inputs; and the clips of other
//! data for `launch evaluate --data`.
//!
//! Clips start every `deblur.predict_stride` frames, the last one of a run ends with it. A frame that several clips have is
//! taken from the clip in whose middle it is. Frames are whole, whatever the crops of the training.

use super::data::{BlurredClips, ClipDataset, open_blurred, open_clips};
use super::{FrameFacts, clip_spec};
use crate::data::source::video::Frames;
use crate::data::source::video::image::{ImageSize, png_bytes};
use crate::data::{DataError, Dataset};
use crate::task::pass::{Opening, Pass, PassOutput, PassRange, Predictor};
use crate::task::{Batch, Datasets};
use spec::config::Config;
use spec::task::deblur::DeblurConfig;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// Most bytes of frames in a range.
const RANGE_BYTES: u64 = 64 << 20;
const RANGE_CLIPS: u64 = 64;

/// Clips of one split at `data.dataset_path`: its test split, else validation, else training; or, where the folder holds
/// sequences itself, all of them.
pub(super) fn evaluation(opening: &Opening) -> Result<Datasets, DataError> {
    let mut config = opening.config.clone();
    let root = config.data.dataset_path.clone();
    let deblur: DeblurConfig = config.section();
    let splits = [deblur.test_split, deblur.val_split, deblur.train_split];
    let is_there = |split: &&String| root.join(split).is_dir() || root.join(format!("{split}_GT")).is_dir();
    let split = splits.iter().find(is_there).cloned();
    let split = match (split, root.parent(), root.file_name().and_then(|name| name.to_str())) {
        (Some(split), ..) => split,
        (None, Some(parent), Some(name)) => {
            config.data.dataset_path = parent.to_owned();
            name.to_owned()
        }
        _ => splits[0].clone(),
    };
    let mut spec = clip_spec(&config);
    spec.splits = [split.clone(), split.clone(), split.clone()];
    (spec.crops[0], spec.limits) = (spec.crops[1], [0, 0]);
    let opened = open_clips(&spec, config.seed, opening.team, None)?;
    let facts = FrameFacts { image_width: opened.frames.image().width };
    let mut datasets = Datasets { facts: Some(Arc::new(facts)), split: None, ..opened.datasets };
    datasets.notes = vec![format!("{} clips of the split {split}", datasets.val.len())];
    Ok(datasets)
}

/// Opens sequences of blurred frames.
pub(super) fn predictor(opening: &Opening) -> Result<Pass, DataError> {
    let config: &Config = opening.config;
    let deblur: DeblurConfig = config.section();
    let mut spec = clip_spec(config);
    spec.strides[1] = deblur.predict_stride.unwrap_or(spec.clip_len).clamp(1, spec.clip_len.max(1));
    let BlurredClips { dataset, frames, sequences, skipped, notes, identity } = open_blurred(&spec, opening.team)?;
    let of_sequence = |n: usize| dataset.clips().of_sequence(n);
    let all = sequences.iter().enumerate().map(|(n, name)| PassOutput { name: name.into(), samples: of_sequence(n) });
    let outputs: Vec<PassOutput> = all.filter(|output| !output.samples.is_empty()).collect();
    let facts = FrameFacts { image_width: frames.image().width };
    let data = || -> Arc<dyn Dataset> { Arc::clone(&dataset) as Arc<dyn Dataset> };
    let datasets = Datasets { skipped, notes, facts: Some(Arc::new(facts)), ..Datasets::new(data(), data(), data()) };
    let predictor = Restored { dataset, frames, outputs, identity, part: PathBuf::new() };
    Ok(Pass { datasets, weights: Vec::new(), predictor: Box::new(predictor) })
}

/// A folder of PNG files per sequence.
struct Restored {
    dataset: Arc<ClipDataset>,
    frames: Arc<Frames>,
    outputs: Vec<PassOutput>,
    identity: String,
    /// Folder of the running range.
    part: PathBuf,
}

impl Predictor for Restored {
    fn outputs(&self) -> &[PassOutput] {
        &self.outputs
    }

    fn range_samples(&self) -> u64 {
        let each = self.frames.image().bytes() * self.dataset.clips().clip_len();
        (RANGE_BYTES / (each as u64).max(1)).clamp(1, RANGE_CLIPS)
    }

    fn parts_are_outputs(&self) -> bool {
        true
    }

    fn identity(&self) -> String {
        self.identity.clone()
    }

    fn begin(&mut self, _: &PassRange, part: &Path) -> Result<(), DataError> {
        std::fs::create_dir(part).map_err(|e| DataError::output(part, e))?;
        self.part = part.to_owned();
        Ok(())
    }

    /// `prediction`: `[B, T, 3, h, w]` in 0..1.
    fn take(&mut self, batch: &Batch, prediction: &Tensor) -> Result<(), DataError> {
        let clips = self.dataset.clips();
        for (n, clip) in batch.sample_ids.iter().enumerate() {
            for (t, frame) in clips.frames(*clip).unwrap_or_default().enumerate() {
                if clips.owner(frame) != Some(*clip) {
                    continue;
                }
                let path = self.part.join(format!("{}.png", self.frames.stem(frame)));
                let png = encoded(&prediction.select(0, n as i64).select(0, t as i64))?;
                std::fs::write(&path, png).map_err(|e| DataError::output(&path, e))?;
            }
        }
        Ok(())
    }

    fn end(&mut self) -> Result<(), DataError> {
        Ok(())
    }

    /// Links where the file system has them, so that frames are not written twice.
    fn join(&mut self, _: &PassOutput, parts: &[PathBuf], into: &Path) -> Result<(), DataError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |e| DataError::output(&path, e)
        };
        std::fs::create_dir(into).map_err(failed(into))?;
        for part in parts {
            for entry in std::fs::read_dir(part).map_err(failed(part))? {
                let from = entry.map_err(failed(part))?.path();
                let to = into.join(from.file_name().unwrap_or_default());
                if std::fs::hard_link(&from, &to).is_err() {
                    std::fs::copy(&from, &to).map_err(failed(&to))?;
                }
            }
        }
        Ok(())
    }
}

/// A frame `[3, h, w]` as a PNG.
fn encoded(frame: &Tensor) -> Result<Vec<u8>, DataError> {
    let finite = frame.isfinite().all().int64_value(&[]) == 1;
    if !finite {
        return Err(DataError::NothingUsable("a restored frame is NaN or infinite: look at the weights".into()));
    }
    let (_, height, width) = frame.size3().map_err(|e| DataError::Encode(e.into()))?;
    let pixels = (frame.to_kind(Kind::Float).clamp(0.0, 1.0) * 255.0).round().permute([1, 2, 0]).to_kind(Kind::Uint8);
    let pixels = pixels.contiguous().to_device(Device::Cpu).flatten(0, -1);
    let bytes = Vec::<u8>::try_from(pixels).map_err(|e| DataError::Encode(e.into()))?;
    png_bytes(&bytes, ImageSize { height: height as usize, width: width as usize })
}
