//! labelme: a `.json` file beside each image.

use super::{Division, Found, Item, Label, is_picture, note};
use crate::data::DataError;
use crate::data::loader::mix;
use crate::data::source::{Listing, file_error, find_files, in_threads};
use serde::Deserialize;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Side of the box that a point stands for, pixels.
const POINT_SIDE: f64 = 5.0;

#[derive(Deserialize)]
struct Json {
    shapes: Vec<Shape>,
    #[serde(rename = "imagePath", default)]
    image_path: String,
    #[serde(rename = "imageHeight", default)]
    height: Option<f64>,
    #[serde(rename = "imageWidth", default)]
    width: Option<f64>,
}

#[derive(Deserialize)]
struct Shape {
    label: String,
    points: Vec<[f64; 2]>,
    #[serde(default)]
    shape_type: Option<String>,
}

fn read(path: &Path) -> Result<Json, DataError> {
    let bytes = std::fs::read(path).map_err(|error| file_error(path, error.to_string()))?;
    serde_json::from_slice(&bytes).map_err(|error| file_error(path, format!("no labelme file: {error}")))
}

/// Boxes of a labelme file as shares of an image of `size` (height, width), its classes by `names`. A point becomes a box of
/// 5 × 5 pixels; any other shape the box around its points.
///
/// # Errors
/// It is no labelme file, has another size than the image, or a label that `names` lacks.
pub fn boxes_of(path: &Path, size: (usize, usize), names: &[String]) -> Result<Vec<[f32; 5]>, DataError> {
    let json = read(path)?;
    let (height, width) = (size.0 as f64, size.1 as f64);
    for (key, written, found) in [("imageHeight", json.height, height), ("imageWidth", json.width, width)] {
        if let Some(written) = written.filter(|written| *written != found) {
            return Err(file_error(path, format!("{key} is {written}, and the image has {found} pixels")));
        }
    }
    let mut boxes = Vec::with_capacity(json.shapes.len());
    for (number, shape) in json.shapes.iter().enumerate() {
        let bad = |problem: String| file_error(path, format!("shapes[{number}]: {problem}"));
        let class = names.iter().position(|name| *name == shape.label).ok_or_else(|| {
            bad(format!("label is {:?}, which is none of the classes {}", shape.label, names.join(", ")))
        })?;
        if shape.points.iter().flatten().any(|at| !at.is_finite()) || shape.points.is_empty() {
            return Err(bad("points are missing or no numbers".into()));
        }
        let ends = |axis: usize| {
            let along = shape.points.iter().map(|point| point[axis]);
            (along.clone().fold(f64::INFINITY, f64::min), along.fold(f64::NEG_INFINITY, f64::max))
        };
        let kind = shape.shape_type.as_deref().unwrap_or("polygon");
        let ((mut left, mut right), (mut top, mut bottom)) = (ends(0), ends(1));
        match (kind, shape.points.as_slice()) {
            ("point", _) | (_, [_]) => {
                (left, right) = (left - POINT_SIDE / 2.0, left + POINT_SIDE / 2.0);
                (top, bottom) = (top - POINT_SIDE / 2.0, top + POINT_SIDE / 2.0);
            }
            // The centre, and a point of the border.
            ("circle", [centre, edge]) => {
                let radius = (centre[0] - edge[0]).hypot(centre[1] - edge[1]);
                (left, right) = (centre[0] - radius, centre[0] + radius);
                (top, bottom) = (centre[1] - radius, centre[1] + radius);
            }
            _ => {}
        }
        let (left, right) = (left.clamp(0.0, width), right.clamp(0.0, width));
        let (top, bottom) = (top.clamp(0.0, height), bottom.clamp(0.0, height));
        if right > left && bottom > top {
            let numbers = [(left + right) / 2.0 / width, (top + bottom) / 2.0 / height, (right - left) / width];
            let [x, y, w] = numbers.map(|share| share as f32);
            boxes.push([class as f32, x, y, w, ((bottom - top) / height) as f32]);
        }
    }
    Ok(boxes)
}

/// Finds images with labelme files below `root`; `None`: there are none. Folders `train`, `val` and `test` are the splits;
/// without them each file is drawn into one.
///
/// # Errors
/// A `.json` file is not of labelme, or its image is missing.
pub(super) fn find(root: &Path, division: Division) -> Result<Option<Found>, DataError> {
    let Listing { files, unreadable, .. } = find_files(root, &["json"])?;
    if files.is_empty() {
        return Ok(None);
    }
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(8);
    let read_all = in_threads(threads, &files, |path| read(path).map(|json| (image_of(path, &json), labels(json))));
    let mut found = Found { notes: vec![note("labelme files", root)], unreadable, ..Found::default() };
    let mut names = BTreeSet::new();
    for (path, read) in files.iter().zip(read_all) {
        let (image, labels) = read?;
        let image =
            image.ok_or_else(|| file_error(path, "its image is not beside it: expected one of the same name"))?;
        names.extend(labels);
        let split = split_of(root, path).unwrap_or_else(|| drawn(root, path, division));
        found.splits[split].push(Item { image, label: Label::Labelme(path.clone()) });
    }
    (found.names, found.names_of_labels) = (Some(names.into_iter().collect()), true);
    for split in [0, 1] {
        if found.splits[split].is_empty() && division.trains {
            let name = ["training", "validation"][split];
            let problem = format!("{} labelled images leave none for {name}", files.len());
            return Err(file_error(root, format!("{problem}: add images, or change data.split_ratio")));
        }
    }
    Ok(Some(found))
}

fn labels(json: Json) -> Vec<String> {
    json.shapes.into_iter().map(|shape| shape.label).collect()
}

/// The image that `imagePath` names, by its last part; else one with the file's name.
fn image_of(path: &Path, json: &Json) -> Option<PathBuf> {
    let folder = path.parent()?;
    let named =
        json.image_path.rsplit(['/', '\\']).next().filter(|name| !name.is_empty()).map(|name| folder.join(name));
    let named = named.filter(|image| image.is_file() && is_picture(image));
    let beside = || {
        let mut images: Vec<PathBuf> = crate::data::source::picture::EXTENSIONS
            .iter()
            .map(|ending| path.with_extension(ending))
            .filter(|image| image.is_file())
            .collect();
        images.sort();
        images.into_iter().next()
    };
    named.or_else(beside)
}

fn split_of(root: &Path, path: &Path) -> Option<usize> {
    let inside = path.strip_prefix(root).ok()?;
    let folders = inside.parent()?.components();
    folders.into_iter().find_map(|folder| match folder.as_os_str().to_str()? {
        "train" => Some(0),
        "val" | "valid" => Some(1),
        "test" => Some(2),
        _ => None,
    })
}

/// By the file's name alone: files that are added later move no other.
fn drawn(root: &Path, path: &Path, division: Division) -> usize {
    let name = path.strip_prefix(root).unwrap_or(path).to_string_lossy().into_owned();
    let hash = name.bytes().fold(division.seed, |hash, byte| mix(hash ^ u64::from(byte)));
    let at = (mix(hash) >> 11) as f64 / (1u64 << 53) as f64;
    let [train, val, _] = division.shares;
    if at < train {
        0
    } else if at < train + val {
        1
    } else {
        2
    }
}
