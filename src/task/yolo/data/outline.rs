//! Shapes and sizes of the images, for a plan.

use super::batch::{train_fields, val_fields};
use super::facts::YoloFacts;
use super::open::{self, Opened, Totals};
use super::sample::{CLASSES, SampleSpec};
use crate::data::DataError;
use crate::task::outline::{Outline, SCRATCH_BYTES};
use crate::task::{Datasets, Team};
use spec::config::Config;
use spec::contract::{CacheMode, DataSizes};
use spec::task::yolo::{ImageCache, YoloConfig};
use std::path::Path;
use std::sync::Arc;

/// Boxes that an image to predict for is planned with: it has none.
const NO_BOXES: usize = 1;

/// Classes that predictions are planned with, as the run's own are not known to a plan: COCO's number.
const PLANNED_CLASSES: usize = 80;

/// Shapes and sizes of the data set. Headers and labels are looked at for it, and kept by the index for the run.
///
/// # Errors
/// As [`super::open()`].
pub fn outline(config: &Config, index_dir: &Path) -> Result<Outline, DataError> {
    let path = &config.data.dataset_path;
    if config.data.sample_if_missing && !path.exists() {
        return Ok(of_sample(config));
    }
    let Opened { datasets: Datasets { train, val, facts, .. }, totals, .. } =
        open::open_images(config, &Team::alone(), index_dir)?;
    let known = facts.and_then(|facts| facts.downcast::<YoloFacts>().ok()).unwrap_or_default();
    let sizes = sizes(&config.section(), &totals);
    let mut outline = Outline::new(train.fields().to_vec(), val.fields().to_vec(), sizes);
    outline.datasets.facts = Some(known as _);
    Ok(outline)
}

/// Images to predict for, as samples of validation: of any shape up to the largest.
///
/// # Errors
/// None; as [`outline`] by its type.
pub fn predict_outline(config: &Config) -> Result<Outline, DataError> {
    let yolo: YoloConfig = config.section();
    let fields = val_fields(yolo.imgsz, NO_BOXES);
    let sizes = DataSizes { scratch_bytes: scratch_bytes(yolo.imgsz, 0), ..DataSizes::default() };
    let mut outline = Outline::new(train_fields(yolo.imgsz, NO_BOXES), fields, sizes);
    let names = (0..PLANNED_CLASSES).map(|class| class.to_string()).collect();
    outline.datasets.facts = Some(Arc::new(YoloFacts { names, most: NO_BOXES, ..YoloFacts::default() }));
    Ok(outline)
}

/// A file, its pixels at full size, and those of a mosaic's rows.
fn scratch_bytes(imgsz: usize, largest: u64) -> u64 {
    (largest + 4 * 3 * (imgsz * imgsz) as u64).max(SCRATCH_BYTES)
}

fn sizes(yolo: &YoloConfig, totals: &Totals) -> DataSizes {
    let Totals { images: count, files, pixels, largest } = *totals;
    let decoded = matches!(yolo.cache, ImageCache::Auto | ImageCache::Resized | ImageCache::Ram);
    let useful_bytes = match yolo.cache {
        ImageCache::Off => 0,
        _ if decoded => pixels,
        _ => files,
    };
    let entry = useful_bytes / count.max(1);
    let smallest = files.min(pixels) / count.max(1);
    DataSizes {
        entry_bytes: [entry.max(1), smallest.max(1)],
        scratch_bytes: scratch_bytes(yolo.imgsz, largest),
        chunk_bytes: Some((pixels / count.max(1)).max(1)),
        useful_bytes,
        useful: format!("{count} images {}", if decoded { "decoded at the size of training" } else { "as files" }),
        useful_is_exact: true,
        auto_policy: CacheMode::Pin,
        facts: vec![format!(
            "{count} images: files {:.2} GiB, decoded at {} pixels {:.2} GiB; every worker process of a loader that caches them \
             would hold the latter",
            files as f64 / f64::from(1 << 30),
            yolo.imgsz,
            pixels as f64 / f64::from(1 << 30)
        )],
    }
}

/// Shapes of the usual sample data, for a plan before it is made.
fn of_sample(config: &Config) -> Outline {
    let yolo: YoloConfig = config.section();
    let usual = SampleSpec::default();
    let most = usual.objects;
    let layers = if yolo.augment.mosaic > 0.0 { 4 } else { 1 } * if yolo.augment.mixup > 0.0 { 2 } else { 1 };
    let count = (usual.train + usual.val) as u64;
    let pixels = 3 * (yolo.imgsz * yolo.imgsz) as u64;
    let sizes = DataSizes {
        entry_bytes: [pixels; 2],
        scratch_bytes: scratch_bytes(yolo.imgsz, pixels),
        chunk_bytes: Some(pixels),
        useful_bytes: if yolo.cache == ImageCache::Off { 0 } else { count * pixels },
        useful: format!("{count} sample images"),
        auto_policy: CacheMode::Pin,
        ..DataSizes::default()
    };
    let mut outline = Outline::new(train_fields(yolo.imgsz, layers * most), val_fields(yolo.imgsz, most), sizes);
    let names = CLASSES.map(String::from).to_vec();
    outline.datasets.facts = Some(Arc::new(YoloFacts { names, most, ..YoloFacts::default() }));
    outline
}
