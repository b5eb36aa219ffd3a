//! COCO's `annotations/instances_*.json`.

use super::super::labels;
use super::{Division, Found, Item, Label, note};
use crate::data::DataError;
use crate::data::source::file_error;
use serde::Deserialize;
use std::collections::HashMap;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Part by which an image's shape may differ from the stated one: sides are rounded when it is resized.
const SHAPE_SLACK: f64 = 0.02;
/// Beginnings of the names of splits.
const SPLITS: [&str; 3] = ["train", "val", "test"];

#[derive(Deserialize)]
struct Json {
    #[serde(default)]
    images: Vec<Image>,
    #[serde(default)]
    annotations: Vec<Annotation>,
    #[serde(default)]
    categories: Vec<Category>,
}

#[derive(Deserialize)]
struct Image {
    id: u64,
    file_name: String,
    #[serde(default)]
    width: f64,
    #[serde(default)]
    height: f64,
}

#[derive(Deserialize)]
struct Annotation {
    image_id: u64,
    category_id: i64,
    #[serde(default)]
    bbox: Vec<f64>,
    #[serde(default)]
    iscrowd: serde_json::Value,
}

#[derive(Deserialize)]
struct Category {
    id: i64,
    name: String,
}

/// A COCO file, read.
#[derive(Debug, Default)]
pub struct CocoFile {
    pub names: Vec<String>,
    /// Names of images, in the file's order.
    pub images: Vec<String>,
    /// Objects by the image's name, where it has any; crowds are left out.
    pub objects: HashMap<String, Objects>,
}

/// Objects of an image.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Objects {
    /// Height and width that the file states.
    pub size: [f64; 2],
    /// `class, cx, cy, w, h` as shares.
    pub boxes: Vec<[f32; 5]>,
}

impl Objects {
    /// The boxes for an image of `size` (height, width), which may have been resized since.
    ///
    /// # Errors
    /// The stated size has another shape, or a box does not lie on the image.
    pub fn on(&self, size: (usize, usize)) -> Result<Vec<[f32; 5]>, String> {
        let [height, width] = self.size;
        let along = (size.0 as f64 / height, size.1 as f64 / width);
        if (along.0 - along.1).abs() > SHAPE_SLACK * along.0.max(along.1) {
            return Err(format!(
                "the COCO file says {height}×{width} pixels, the upright image has {}×{}: its boxes are those of another picture \
                 (one that is turned by EXIF, or was cut): write them for this one",
                size.0, size.1
            ));
        }
        for row in &self.boxes {
            labels::inside(row).map_err(|problem| format!("a box of class {}: {problem}", row[0]))?;
        }
        Ok(self.boxes.clone())
    }
}

impl CocoFile {
    /// Reads the file at `path`. Categories become classes in the order of their numbers.
    ///
    /// # Errors
    /// It is no COCO file, or an annotation names what is not there.
    pub fn read(path: &Path) -> Result<Self, DataError> {
        let file = std::fs::File::open(path).map_err(|error| file_error(path, error.to_string()))?;
        let json: Json = serde_json::from_reader(BufReader::with_capacity(1 << 20, file))
            .map_err(|error| file_error(path, format!("no COCO annotations: {error}")))?;
        let mut categories = json.categories;
        categories.sort_by_key(|category| category.id);
        let class_of: HashMap<i64, usize> =
            categories.iter().enumerate().map(|(class, category)| (category.id, class)).collect();
        let by_id: HashMap<u64, &Image> = json.images.iter().map(|image| (image.id, image)).collect();
        let mut objects: HashMap<String, Objects> = HashMap::new();
        for (number, of) in json.annotations.iter().enumerate() {
            let bad = |problem: String| file_error(path, format!("annotations[{number}]: {problem}"));
            if is_crowd(&of.iscrowd) || of.bbox.is_empty() {
                continue;
            }
            let image = by_id
                .get(&of.image_id)
                .ok_or_else(|| bad(format!("image_id is {}, and no image has that id", of.image_id)))?;
            let class = *class_of
                .get(&of.category_id)
                .ok_or_else(|| bad(format!("category_id is {}, and no category has that id", of.category_id)))?;
            let [x, y, w, h] = of.bbox[..] else {
                return Err(bad(format!("bbox is {:?}: expected x, y, width, height", of.bbox)));
            };
            if image.width <= 0.0 || image.height <= 0.0 {
                return Err(bad(format!("the image {} has no width and height", image.file_name)));
            }
            // An empty box is no object.
            if w > 0.0 && h > 0.0 {
                let share = |at: f64, size: f64| (at / size) as f32;
                let own = objects.entry(image.file_name.clone()).or_default();
                own.size = [image.height, image.width];
                own.boxes.push([
                    class as f32,
                    share(x + w / 2.0, image.width),
                    share(y + h / 2.0, image.height),
                    share(w, image.width),
                    share(h, image.height),
                ]);
            }
        }
        let names = categories.into_iter().map(|category| category.name).collect();
        Ok(Self { names, images: json.images.into_iter().map(|image| image.file_name).collect(), objects })
    }
}

fn is_crowd(value: &serde_json::Value) -> bool {
    value.as_bool().unwrap_or(false) || value.as_i64().is_some_and(|flag| flag != 0)
}

/// Finds the images of a COCO folder; `None`: it is no COCO folder.
///
/// # Errors
/// Splits name different classes, or one that is needed has no images.
pub(super) fn find(root: &Path, division: Division) -> Result<Option<Found>, DataError> {
    let folder = root.join("annotations");
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "json") && !name_of(path).starts_with('.'))
        .collect();
    files.sort();
    let mut found = Found { notes: vec![note("COCO annotations", &folder)], ..Found::default() };
    for path in &files {
        let stem = name_of(path);
        let split_name = stem.strip_prefix("instances_").unwrap_or(&stem);
        let Some(split) = SPLITS.iter().position(|split| split_name.starts_with(split)) else { continue };
        if stem.starts_with("instances_") || files.iter().all(|other| !name_of(other).starts_with("instances_")) {
            take(root, (path, split_name), split, &mut found)?;
        }
    }
    if found.names.is_none() {
        return Ok(None);
    }
    if found.splits[1].is_empty() {
        found.splits[1] = found.splits[2].clone();
    }
    let lacks =
        if division.trains { found.splits[0].is_empty() || found.splits[1].is_empty() } else { found.is_empty() };
    if lacks {
        let problem = "expected instances_train*.json and instances_val*.json with images";
        return Err(file_error(&folder, problem));
    }
    Ok(Some(found))
}

fn name_of(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

fn take(root: &Path, (path, name): (&Path, &str), split: usize, found: &mut Found) -> Result<(), DataError> {
    let file = CocoFile::read(path)?;
    match &found.names {
        Some(names) if *names != file.names => {
            let problem = format!("{} categories that are not those of the other files", file.names.len());
            return Err(file_error(path, format!("{problem}: all splits must have the same")));
        }
        _ => found.names = Some(file.names),
    }
    let places = [root.join("images").join(name), root.join(name), root.join(SPLITS[split]), root.join("images")];
    let Some(folder) = places.iter().find(|folder| folder.is_dir()) else {
        let problem = format!("there is no folder {} for its images", spec::contract::shown(&places[1]));
        return Err(file_error(path, problem));
    };
    let shared = Arc::new(path.to_owned());
    let item = |name: String| Item { image: folder.join(&name), label: Label::Coco(Arc::clone(&shared), name) };
    found.splits[split].extend(file.images.into_iter().map(item));
    found.splits[split].sort_by(|a, b| a.image.cmp(&b.image));
    Ok(())
}
