//! `data.yaml`: names of classes, and where the images of each split are.

use super::super::labels::MOST_CLASSES;
use super::{Division, Found, Item, Label, extension, is_picture, items_of, label_path, note};
use crate::data::DataError;
use crate::data::source::picture::EXTENSIONS;
use crate::data::source::{file_error, find_files};
use serde_yaml::Value;
use std::path::{Path, PathBuf};

/// Keys of the three splits. `valid` is what some exports write.
const SPLITS: [&[&str]; 3] = [&["train"], &["val", "validation", "valid"], &["test"]];

/// Finds the images of the data set that `file` describes.
///
/// # Errors
/// Broken YAML; a key is missing or contradicts another; a folder or list is not there.
pub(super) fn find(file: &Path, division: Division) -> Result<Found, DataError> {
    let text = std::fs::read_to_string(file).map_err(|error| file_error(file, error.to_string()))?;
    let yaml: Value = serde_yaml::from_str(text.trim_start_matches('\u{feff}'))
        .map_err(|error| file_error(file, format!("not valid YAML: {error}")))?;
    if !yaml.is_mapping() {
        return Err(file_error(file, "no mapping: expected keys such as train, val and names"));
    }
    let root = root_of(file, &yaml)?;
    let mut found = Found { names: names(file, &yaml)?, notes: vec![note("data set", file)], ..Found::default() };
    for (split, keys) in SPLITS.iter().enumerate() {
        let value = keys.iter().find_map(|key| yaml.get(*key)).filter(|value| !value.is_null());
        if let Some(value) = value {
            found.splits[split] = images_of(file, &root, (keys[0], value), &mut found.unreadable)?;
        }
    }
    let wanted = |split: usize, name: &str| {
        if found.splits[split].is_empty() {
            let there: Vec<String> =
                yaml.as_mapping().into_iter().flatten().filter_map(|(key, _)| key.as_str().map(String::from)).collect();
            let problem = format!("{name} is missing or names no image (keys: {})", there.join(", "));
            return Err(file_error(file, format!("{problem}: set {name} to a folder of images, relative to path")));
        }
        Ok(())
    };
    if division.trains {
        wanted(0, "train")?;
    }
    if found.splits[1].is_empty() && found.splits[2].is_empty() && (division.trains || found.is_empty()) {
        wanted(1, "val")?;
    }
    if found.splits[1].is_empty() && !found.splits[2].is_empty() {
        found.notes.push("data.yaml has no val: the test images are those of validation".into());
        found.splits[1] = found.splits[2].clone();
    }
    Ok(found)
}

/// The folder that paths are relative to: `path`, itself relative to the file's folder; else the file's folder.
fn root_of(file: &Path, yaml: &Value) -> Result<PathBuf, DataError> {
    let folder = file.parent().unwrap_or(Path::new("."));
    match yaml.get("path") {
        None | Some(Value::Null) => Ok(folder.to_owned()),
        Some(Value::String(path)) => {
            let path = Path::new(path);
            // Relative to the file, else to where the program runs, as the package takes it.
            let beside = folder.join(path);
            Ok(if path.is_absolute() || beside.exists() || !path.exists() { beside } else { path.to_owned() })
        }
        Some(other) => Err(file_error(file, format!("path is {other:?}: expected a folder"))),
    }
}

/// `names` as a list or as a map from numbers, and `nc`.
fn names(file: &Path, yaml: &Value) -> Result<Option<Vec<String>>, DataError> {
    let bad = |problem: String| Err(file_error(file, problem));
    let text = |value: &Value| match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(flag) => Some(flag.to_string()),
        _ => None,
    };
    let count = match yaml.get("nc") {
        None | Some(Value::Null) => None,
        Some(value) => match value.as_u64().filter(|count| (1..=MOST_CLASSES as u64).contains(count)) {
            Some(count) => Some(count as usize),
            None => return bad(format!("nc is {value:?}: expected the number of classes, 1 to {MOST_CLASSES}")),
        },
    };
    let names: Option<Vec<String>> = match yaml.get("names") {
        None | Some(Value::Null) => None,
        Some(Value::Sequence(list)) => match list.iter().map(text).collect() {
            Some(names) => Some(names),
            None => return bad("names holds something that is no text: expected a name per class".into()),
        },
        Some(Value::Mapping(map)) => {
            let mut names = vec![None; map.len()];
            for (key, value) in map {
                let number = key.as_u64().or_else(|| key.as_str().and_then(|key| key.parse().ok()));
                let slot = number.and_then(|number| names.get_mut(number as usize));
                match (slot, text(value)) {
                    (Some(slot @ None), Some(name)) => *slot = Some(name),
                    _ => {
                        let last = map.len() - 1;
                        return bad(format!(
                            "names has the entry {key:?}: {value:?}; expected names of classes 0 to {last}"
                        ));
                    }
                }
            }
            names.into_iter().collect()
        }
        Some(other) => return bad(format!("names is {other:?}: expected a list, or a map from numbers")),
    };
    match (names, count) {
        (Some(names), Some(count)) if names.len() != count => {
            bad(format!("nc is {count} and names has {}: they must agree", names.len()))
        }
        (Some(names), _) if names.is_empty() => bad("names is empty: expected a name per class".into()),
        (Some(names), _) => Ok(Some(names)),
        (None, Some(count)) => Ok(Some((0..count).map(|class| class.to_string()).collect())),
        (None, None) => bad("neither names nor nc is there: write the names of the classes".into()),
    }
}

/// Images of one split: a folder, a text file of paths, an image, or a list of such.
fn images_of(
    file: &Path,
    root: &Path,
    (key, value): (&str, &Value),
    unreadable: &mut Vec<String>,
) -> Result<Vec<Item>, DataError> {
    let entries: Vec<&str> = match value {
        Value::String(path) => vec![path],
        Value::Sequence(list) if list.iter().all(Value::is_string) => list.iter().filter_map(Value::as_str).collect(),
        other => {
            let problem = format!("{key} is {other:?}: expected a folder, a text file of images, or a list of them");
            return Err(file_error(file, problem));
        }
    };
    let mut items = Vec::new();
    for entry in entries {
        let path = resolve(root, entry);
        if path.is_dir() {
            let mut listing = find_files(&path, EXTENSIONS)?;
            unreadable.append(&mut listing.unreadable);
            items.append(&mut items_of(&mut listing));
        } else if path.is_file() && extension(&path).as_deref() == Some("txt") {
            items.append(&mut listed(&path)?);
        } else if path.is_file() && is_picture(&path) {
            items.push(Item { label: Label::Text(label_path(&path)), image: path });
        } else {
            let problem = format!("{key} names {}, which is not there", spec::contract::shown(&path));
            return Err(file_error(file, format!("{problem}: correct {key} or path")));
        }
    }
    items.sort_by(|a, b| a.image.cmp(&b.image));
    items.dedup_by(|a, b| a.image == b.image);
    Ok(items)
}

/// `../images` at the beginning is what exports write for a folder beside the file: the package drops the dots where the
/// path is not there otherwise.
fn resolve(root: &Path, entry: &str) -> PathBuf {
    let path = root.join(entry);
    match entry.strip_prefix("../") {
        Some(inside) if !path.exists() && root.join(inside).exists() => root.join(inside),
        _ => path,
    }
}

/// A text file with an image per line; `./` is relative to the file.
fn listed(file: &Path) -> Result<Vec<Item>, DataError> {
    let text = std::fs::read_to_string(file).map_err(|error| file_error(file, error.to_string()))?;
    let folder = file.parent().unwrap_or(Path::new("."));
    let lines = text.trim_start_matches('\u{feff}').lines().map(str::trim).filter(|line| !line.is_empty());
    let items = lines.map(|line| {
        let image = match line.strip_prefix("./") {
            Some(inside) => folder.join(inside),
            None if Path::new(line).is_absolute() || Path::new(line).exists() => PathBuf::from(line),
            None => folder.join(line),
        };
        Item { label: Label::Text(label_path(&image)), image }
    });
    // Lines that name no picture, such as comments, are no images.
    Ok(items.filter(|item| is_picture(&item.image)).collect())
}

/// A folder with `images` and `labels`, or with `train/images`, that no file describes.
///
/// # Errors
/// A folder cannot be listed.
pub(super) fn find_folders(root: &Path, division: Division) -> Result<Option<Found>, DataError> {
    let mut found = Found { notes: vec![note("folders of images and labels", root)], ..Found::default() };
    for (split, names) in SPLITS.iter().enumerate() {
        let folders = names.iter().flat_map(|name| [root.join("images").join(name), root.join(name).join("images")]);
        if let Some(folder) = folders.into_iter().find(|folder| folder.is_dir()) {
            let mut listing = find_files(&folder, EXTENSIONS)?;
            found.unreadable.append(&mut listing.unreadable);
            found.splits[split] = items_of(&mut listing);
        }
    }
    if found.is_empty() || (division.trains && found.splits[0].is_empty()) {
        return Ok(None);
    }
    if found.splits[1].is_empty() {
        found.splits[1] = found.splits[2].clone();
    }
    if found.splits[1].is_empty() && division.trains {
        return Err(file_error(root, "images has train, and neither val nor test: add images of validation"));
    }
    let classes = root.join("classes.txt");
    if let Ok(text) = std::fs::read_to_string(classes) {
        // A line's number is that of its class: blank ones count, but for those at the end.
        let lines = text.trim_start_matches('\u{feff}').trim_end().lines();
        found.names = Some(lines.map(|line| line.trim().to_owned()).collect());
    }
    Ok(Some(found))
}
