//! Opens the data sets of a run. Every rank calls it; each looks at its share of the images that the index does not know.

use super::facts::{LabelCounts, YoloFacts};
use super::form::{self, Division, Found};
use super::index::{Finding, Good};
use super::labels::MOST_CLASSES;
use super::letterbox;
use super::scan::scan;
use super::shared::Shared;
use super::store::{Content, Image, Store};
use super::train::{Recipe, TrainImages};
use super::val::ValImages;
use crate::data::entries::CachedEntries;
use crate::data::loader::order_of;
use crate::data::source::file_error;
use crate::data::source::video::image::ImageSize;
use crate::data::{DataError, Dataset};
use crate::task::pass::Opening;
use crate::task::{Datasets, Team};
use spec::config::{CachePolicy, Config};
use spec::contract::shown;
use spec::task::yolo::{DctScaling, ImageCache, YoloConfig};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

/// Key of the classes' names in what a run carries.
const NAMES: &str = "names";

/// An image in use with its boxes.
type Used = (Image, Vec<[f32; 5]>);

/// Images of the three splits, and what was said of others.
pub struct Images {
    pub names: Vec<String>,
    pub splits: [Vec<Used>; 3],
    pub skipped: Vec<String>,
    pub notes: Vec<String>,
}

/// Sizes of all images in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub images: u64,
    /// Bytes of their files.
    pub files: u64,
    /// Bytes of their pixels at the size of training.
    pub pixels: u64,
    /// Bytes of decoding the largest one: its file, and its pixels at full size.
    pub largest: u64,
}

impl Totals {
    fn of(images: &[Used], imgsz: usize) -> Self {
        let sum = |of: &dyn Fn(&Image) -> u64| images.iter().map(|(image, _)| of(image)).sum();
        Self {
            images: images.len() as u64,
            files: sum(&|image| image.bytes),
            pixels: sum(&|image| letterbox::fitted(image.header.size, imgsz).bytes() as u64),
            largest: images.iter().map(|(image, _)| image.decoding_bytes()).max().unwrap_or(0),
        }
    }
}

/// Data sets that are open.
pub struct Opened {
    pub datasets: Datasets,
    pub totals: Totals,
    /// The same as in `datasets`.
    #[cfg(test)]
    pub train: Arc<TrainImages>,
}

/// The data sets of a run, with [`YoloFacts`].
///
/// # Errors
/// No images, or labels that cannot be used when `data.skip_bad` is off. All ranks fail alike.
pub fn open(config: &Config, team: &Team, index_dir: &Path) -> Result<Datasets, DataError> {
    Ok(open_images(config, team, index_dir)?.datasets)
}

/// [`open`] with what else is known.
///
/// # Errors
/// As [`open`].
pub fn open_images(config: &Config, team: &Team, index_dir: &Path) -> Result<Opened, DataError> {
    let yolo: YoloConfig = config.section();
    let root = &config.data.dataset_path;
    let found = form::find(root, Division { shares: config.data.split_ratio, seed: config.seed, trains: true })?;
    let mut images = used(found, root, config, team, index_dir)?;
    let [train, val, _] = &mut images.splits;
    let wanted = ((train.len() as f64 * yolo.fraction).round() as usize).max(1);
    train.truncate(wanted);
    for (split, most) in [(train, config.data.max_train_windows), (val, config.data.max_val_windows)] {
        split.truncate(if most > 0 { most } else { usize::MAX });
    }
    assemble(images, config, team)
}

/// Images with labels that are not those of training, all in `val`.
///
/// # Errors
/// As [`open`].
pub fn evaluation(opening: &Opening) -> Result<Datasets, DataError> {
    let Opening { config, team, index_dir, carried } = *opening;
    let root = &config.data.dataset_path;
    let mut found = form::find(root, Division { shares: [0.0, 1.0, 0.0], seed: 0, trains: false })?;
    let trained = carried_names(carried);
    if let Some(trained) = trained.as_ref().filter(|_| !config.section::<YoloConfig>().single_cls) {
        take_names(&mut found, root, trained)?;
    }
    if found.splits[1].is_empty() {
        found.splits.swap(0, 1);
    }
    found.splits = [Vec::new(), std::mem::take(&mut found.splits[1]), Vec::new()];
    let mut images = used(found, root, config, team, index_dir)?;
    images.names = trained.unwrap_or(images.names);
    Ok(assemble(images, config, team)?.datasets)
}

/// Gives labels the classes of the training.
///
/// # Errors
/// They have others, or these in another order.
fn take_names(found: &mut Found, root: &Path, trained: &[String]) -> Result<(), DataError> {
    let own = found.names.get_or_insert_with(|| trained.to_vec());
    // Labels that name their classes need not have all of them.
    let fits = *own == trained || (found.names_of_labels && own.iter().all(|name| trained.contains(name)));
    if !fits {
        let problem = format!("its classes are {}, the run was trained on {}", own.join(", "), trained.join(", "));
        return Err(file_error(root, format!("{problem}: write the labels with the run's classes, in its order")));
    }
    *own = trained.to_vec();
    Ok(())
}

/// Images without labels, in `val`, for predictions; in the order of their paths.
///
/// # Errors
/// As [`open`].
pub fn unlabelled(opening: &Opening) -> Result<Datasets, DataError> {
    let Opening { config, team, index_dir, carried } = *opening;
    let root = &config.data.dataset_path;
    let found = Found { names: carried_names(carried), ..form::unlabelled(root)? };
    let mut in_turn = config.clone();
    in_turn.with_section(|yolo: &mut YoloConfig| yolo.rect = false);
    Ok(assemble(used(found, root, config, team, index_dir)?, &in_turn, team)?.datasets)
}

/// Names of the classes that a run was trained on.
fn carried_names(carried: Option<&serde_json::Value>) -> Option<Vec<String>> {
    let names = carried?.get(NAMES)?.as_array()?;
    names.iter().map(|name| name.as_str().map(String::from)).collect()
}

/// Looks at all images and takes those that can be used.
fn used(found: Found, root: &Path, config: &Config, team: &Team, index_dir: &Path) -> Result<Images, DataError> {
    let yolo: YoloConfig = config.section();
    let findings = scan(&found, root, team, index_dir)?;
    let Found { names, splits, unreadable, notes, .. } = found;
    let mut images = Images { names: Vec::new(), splits: Default::default(), skipped: unreadable, notes };
    let mut counts = [0; 3];
    for (split, (items, findings)) in splits.into_iter().zip(findings).enumerate() {
        counts[split] = items.len();
        for (item, finding) in items.into_iter().zip(findings) {
            match finding {
                Finding::Good(Good { header, bytes, modified, rows }) => {
                    let exact =
                        yolo.dct_scaling == DctScaling::Never || (split > 0 && yolo.dct_scaling == DctScaling::Train);
                    images.splits[split].push((Image { path: item.image, header, bytes, modified, exact }, rows));
                }
                Finding::Bad(line) if config.data.skip_bad => images.skipped.push(line),
                Finding::Bad(line) => {
                    return Err(DataError::Bad { what: "images", error: Box::new(DataError::NothingUsable(line)) });
                }
            }
        }
    }
    for (split, name) in [(0, "training"), (1, "validation")] {
        if counts[split] > 0 && images.splits[split].is_empty() {
            let first = images.skipped.first().map(|line| format!("; the first: {line}")).unwrap_or_default();
            return Err(file_error(root, format!("none of the {} images of {name} can be used{first}", counts[split])));
        }
    }
    images.names = names.unwrap_or_else(|| numbered(&images.splits));
    if images.names.len() > MOST_CLASSES {
        let problem = format!("{} classes: at most {MOST_CLASSES} are possible", images.names.len());
        return Err(file_error(root, problem));
    }
    if yolo.single_cls {
        images.names = vec![images.names.first().cloned().filter(|_| images.names.len() == 1).unwrap_or("item".into())];
        images.splits.iter_mut().flatten().flat_map(|(_, rows)| rows).for_each(|row| row[0] = 0.0);
    }
    Ok(images)
}

/// Classes that nothing names, as many as labels have.
fn numbered(splits: &[Vec<Used>; 3]) -> Vec<String> {
    let classes = splits.iter().flatten().flat_map(|(_, rows)| rows).map(|row| row[0] as usize + 1).max().unwrap_or(1);
    (0..classes).map(|class| class.to_string()).collect()
}

fn assemble(images: Images, config: &Config, team: &Team) -> Result<Opened, DataError> {
    let yolo: YoloConfig = config.section();
    let Images { names, splits, skipped, mut notes } = images;
    let objects: [usize; 3] = splits.each_ref().map(|split| split.iter().map(|(_, rows)| rows.len()).sum());
    let most = splits.iter().flatten().map(|(_, rows)| rows.len()).max().unwrap_or(0);
    let backgrounds = splits[0].iter().filter(|(_, rows)| rows.is_empty()).count();
    let labels = Arc::new(LabelCounts::of(splits[0].iter().flat_map(|(_, rows)| rows), names.len()));
    let [train, val, test] = splits.each_ref().map(Vec::len);
    notes.push(format!(
        "{train} + {val} + {test} images for training, validation and test with {} + {} + {} objects of {} classes; {backgrounds} \
         of training have none",
        objects[0],
        objects[1],
        objects[2],
        names.len()
    ));
    notes.extend(no_objects(&splits[0]));
    let cache = team.cache.clone().filter(|_| yolo.cache != ImageCache::Off && config.data.cache != CachePolicy::Off);
    let sizes = splits.each_ref().map(|split| split.iter().map(|(image, _)| image.header.size).collect::<Vec<_>>());
    let paths = splits.each_ref().map(|split| split.iter().map(|(image, _)| image.path.clone()).collect::<Vec<_>>());
    let all: Vec<Used> = splits.into_iter().flatten().collect();
    let capacity = cache.as_ref().map_or(0, |cache| cache.capacity_bytes());
    let totals = Totals::of(&all, yolo.imgsz);
    let content = content(&totals, &yolo, capacity);
    if cache.is_some() {
        notes.push(content_line(&totals, content, capacity));
    }
    let shrunk = team.cache.as_ref().map(Arc::downgrade);
    let is_short = move || shrunk.as_ref().and_then(Weak::upgrade).is_some_and(|cache| cache.is_shrunk());
    let store = Arc::new(Store::new(all, yolo.imgsz, content, (config.data.chunk_cache_size, is_short)));
    let cached = cache.map(|cache| CachedEntries::new(Arc::clone(&store), cache));
    let shared = Arc::new(Shared::new(store, cached, config.data.skip_bad));
    let order = order_of(train as u64, &config.data, config.seed, || None)?;
    let recipe = Recipe {
        augment: yolo.augment.clone(),
        seed: config.seed,
        closes_at: closes_at(config, &yolo),
        window: yolo.mosaic_window as u64,
    };
    let numbers = |from: usize, count: usize| (from as u32..(from + count) as u32).collect::<Vec<u32>>();
    let training = Arc::new(TrainImages::new(Arc::clone(&shared), numbers(0, train), order, recipe));
    let mut lists: [Arc<Vec<PathBuf>>; 3] = [Arc::new(paths[0].clone()), Arc::default(), Arc::default()];
    let mut held_out = |split: usize, from: usize| -> Arc<dyn Dataset> {
        let (order, shapes) = rectangles(&sizes[split], &yolo, config.train.batch_size);
        lists[split] = Arc::new(order.iter().map(|n| paths[split][*n].clone()).collect());
        let images = order.iter().map(|n| (from + n) as u32).collect();
        Arc::new(ValImages::new(Arc::clone(&shared), images, shapes))
    };
    let (val, test) = (held_out(1, train), held_out(2, train + val));
    let (whole, shapes) = rectangles(&sizes[0], &yolo, config.train.batch_size);
    let whole = whole.into_iter().map(|n| n as u32).collect();
    let train_whole: Option<Arc<dyn Dataset>> = Some(Arc::new(ValImages::new(Arc::clone(&shared), whole, shapes)));
    let carried = Some(serde_json::json!({ NAMES: names }));
    let facts = YoloFacts { names, images: lists, most, backgrounds, labels };
    let datasets = Datasets::new(Arc::clone(&training) as _, val, test);
    let datasets = Datasets { train_whole, skipped, notes, facts: Some(Arc::new(facts)), carried, ..datasets };
    Ok(Opened {
        datasets,
        totals,
        #[cfg(test)]
        train: training,
    })
}

/// A warning where training would see backgrounds alone, as it does with labels in the wrong place.
fn no_objects(training: &[Used]) -> Option<String> {
    let (first, _) = training.first().filter(|_| training.iter().all(|(_, rows)| rows.is_empty()))?;
    let place = form::label_path(&first.path);
    Some(format!(
        "warning: none of the {} training images has an object: nothing can be learned; labels of {} are looked for in {} (or in \
         the COCO or labelme file)",
        training.len(),
        shown(&first.path),
        shown(&place)
    ))
}

/// Order and shapes of validation images.
fn rectangles(sizes: &[ImageSize], yolo: &YoloConfig, batch: usize) -> (Vec<usize>, Vec<super::batch::Shape>) {
    if !yolo.rect {
        return letterbox::squares(sizes, yolo.imgsz);
    }
    letterbox::rectangles(sizes, yolo.imgsz, yolo.rect_batch.unwrap_or(2 * batch))
}

/// First epoch without mosaic and mixup.
fn closes_at(config: &Config, yolo: &YoloConfig) -> u64 {
    match yolo.close_mosaic {
        0 => u64::MAX,
        last => config.train.num_epochs.saturating_sub(last) as u64,
    }
}

/// Files where the config says so, or the page cache cannot hold the pixels of all images.
fn content(totals: &Totals, yolo: &YoloConfig, capacity: u64) -> Content {
    match yolo.cache {
        ImageCache::Encoded | ImageCache::Disk | ImageCache::Off => Content::Encoded,
        ImageCache::Resized | ImageCache::Ram => Content::Resized,
        ImageCache::Auto if totals.pixels <= capacity => Content::Resized,
        ImageCache::Auto => Content::Encoded,
    }
}

fn content_line(totals: &Totals, content: Content, capacity: u64) -> String {
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    let what = match content {
        Content::Encoded => "image files as they are",
        Content::Resized => "decoded images at the size of training",
    };
    format!(
        "the page cache keeps {what}, once for the node: files {:.2} GiB, decoded {:.2} GiB, room {:.2} GiB (yolo.cache)",
        gib(totals.files),
        gib(totals.pixels),
        gib(capacity)
    )
}
