//! Which images there are, in which split, and where their labels lie.
//!
//! ```text
//! data.yaml            ─► yaml    ─┐
//! annotations/*.json   ─► coco    ─┼─► Found: names of classes, items of training, validation and test
//! image and .json pairs ─► labelme ─┤
//! images/ and labels/  ─► yaml    ─┘
//! ```

mod coco;
mod labelme;
mod yaml;

pub use coco::CocoFile;
pub use labelme::boxes_of as labelme_boxes;

use crate::data::DataError;
use crate::data::source::picture::EXTENSIONS;
use crate::data::source::{Listing, file_error, find_files};
use spec::contract::shown;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// An image, and where its labels lie.
#[derive(Clone, Debug, PartialEq)]
pub struct Item {
    pub image: PathBuf,
    pub label: Label,
}

/// Where the labels of an image lie.
#[derive(Clone, Debug, PartialEq)]
pub enum Label {
    /// Lines `class cx cy w h`; an image whose file is missing has no objects.
    Text(PathBuf),
    /// A labelme file.
    Labelme(PathBuf),
    /// A COCO file, by the image's name in it.
    Coco(Arc<PathBuf>, String),
    /// Nobody asks for labels.
    Unknown,
}

impl Label {
    /// The file that holds the labels.
    pub fn file(&self) -> Option<&Path> {
        match self {
            Label::Text(path) | Label::Labelme(path) => Some(path),
            Label::Coco(path, _) => Some(path),
            Label::Unknown => None,
        }
    }
}

/// Images of a data set.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Found {
    /// Names of classes. `None`: nothing names them; they are numbered by the largest that labels have.
    pub names: Option<Vec<String>>,
    /// Training, validation, test; the last may be empty.
    pub splits: [Vec<Item>; 3],
    /// Lines on entries that cannot be read.
    pub unreadable: Vec<String>,
    pub notes: Vec<String>,
    /// `names` are those that the labels have, and not a list that numbers classes.
    pub names_of_labels: bool,
}

impl Found {
    /// No split has an image.
    fn is_empty(&self) -> bool {
        self.splits.iter().all(Vec::is_empty)
    }
}

/// How a data set is divided where nothing else says so.
#[derive(Clone, Copy, Debug)]
pub struct Division {
    pub shares: [f64; 3],
    pub seed: u64,
    /// Images of training and validation are needed; otherwise of any split.
    pub trains: bool,
}

/// Finds the images of the data set at `root`: a `data.yaml`, or a folder.
///
/// # Errors
/// No form of a data set is recognised, or its files contradict each other.
pub fn find(root: &Path, division: Division) -> Result<Found, DataError> {
    if root.is_file() {
        return match extension(root).as_deref() {
            Some("yaml" | "yml") => yaml::find(root, division),
            _ => Err(missing(root, "is neither a folder nor a .yaml file")),
        };
    }
    if !root.is_dir() {
        return Err(missing(root, "does not exist"));
    }
    for name in ["data.yaml", "data.yml", "dataset.yaml"] {
        if root.join(name).is_file() {
            return yaml::find(&root.join(name), division);
        }
    }
    if let Some(found) = coco::find(root, division)? {
        return Ok(found);
    }
    if let Some(found) = yaml::find_folders(root, division)? {
        return Ok(found);
    }
    labelme::find(root, division)?.ok_or_else(|| missing(root, "holds no data set that is recognised"))
}

/// Images at `path`, a folder or one file, without labels; in the order of their paths.
///
/// # Errors
/// There is no image.
pub fn unlabelled(path: &Path) -> Result<Found, DataError> {
    let Listing { files, unreadable, .. } = find_files(path, EXTENSIONS)?;
    if files.is_empty() {
        return Err(file_error(path, format!("no image: expected files that end with {}", EXTENSIONS.join(", "))));
    }
    let items = files.into_iter().map(|image| Item { image, label: Label::Unknown }).collect();
    Ok(Found { splits: [Vec::new(), items, Vec::new()], unreadable, ..Found::default() })
}

fn missing(root: &Path, problem: &str) -> DataError {
    let forms = "expected a data.yaml, a folder with one, with annotations/instances_*.json (COCO), with images/ and labels/, or \
                 with .json files of labelme beside the images; or set data.sample_if_missing: true, with which scripts/launch makes \
                 sample data in a folder that does not exist yet";
    file_error(root, format!("{problem}: {forms}"))
}

fn extension(path: &Path) -> Option<String> {
    path.extension().and_then(|ending| ending.to_str()).map(str::to_lowercase)
}

fn is_picture(path: &Path) -> bool {
    extension(path).is_some_and(|ending| EXTENSIONS.contains(&ending.as_str()))
}

/// The label file of an image: the last folder `images` becomes `labels`, and the ending `.txt`.
///
/// By the path's parts: names need not be UTF-8, and a relative path may begin with `images`.
pub fn label_path(image: &Path) -> PathBuf {
    let parts: Vec<&OsStr> = image.iter().collect();
    let folders = parts.len().saturating_sub(1);
    let last = parts[..folders].iter().rposition(|part| *part == "images");
    let moved = |(at, part): (usize, &OsStr)| if Some(at) == last { OsString::from("labels") } else { part.to_owned() };
    let path: PathBuf = parts.into_iter().enumerate().map(moved).collect();
    path.with_extension("txt")
}

fn items_of(listing: &mut Listing) -> Vec<Item> {
    let files = std::mem::take(&mut listing.files);
    files.into_iter().map(|image| Item { label: Label::Text(label_path(&image)), image }).collect()
}

/// A line for the user on what `root` is.
fn note(kind: &str, root: &Path) -> String {
    format!("{kind} at {}", shown(root))
}

#[cfg(test)]
mod tests;
