//! Files of one folder of frames, one for each frame.

use super::super::file_error;
use crate::data::DataError;
use spec::contract::files::is_no_data;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Endings of pictures: one that is not searched is remarked on where others are found.
const PICTURES: [&str; 10] = ["bmp", "exr", "gif", "jpeg", "jpg", "png", "ppm", "tif", "tiff", "webp"];

/// Something about a sequence's files that the user should know, and that stops nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Remark {
    /// A hidden or leftover file or folder, which is no data.
    NoData,
    /// A frame has several files.
    Doubled,
    /// A picture whose ending is not searched.
    OtherEnding,
    /// Names of frames differ in more than numbers.
    NotAlike,
    /// Frames are missing between two others.
    Gap,
}

impl Remark {
    /// One line for `count` remarks of this kind, of which `first` is one.
    pub fn line(self, count: usize, first: &str) -> String {
        let s = if count == 1 { "" } else { "s" };
        let rest = match self {
            Remark::NoData => format!("hidden or leftover name{s} left out, no data; rename what is data"),
            Remark::Doubled => {
                format!("frame{s} with several files: the ending that comes first in deblur.image_exts is read")
            }
            Remark::OtherEnding => format!("picture{s} left out, whose ending is not in deblur.image_exts"),
            Remark::NotAlike => {
                format!(
                    "folder{s} whose frames are not numbered alike: in natural order, missing frames cannot be seen"
                )
            }
            Remark::Gap => format!("gap{s} in the numbers of frames: clips do not cross them"),
        };
        format!("{count} {rest}; the first: {first}")
    }
}

/// File of a frame.
#[derive(Clone, Debug)]
pub(super) struct Found {
    /// File name without its ending.
    pub stem: String,
    pub path: PathBuf,
}

/// Files of a folder.
#[derive(Debug, Default)]
pub(super) struct Listed {
    /// By their names without ending, in lower case: names that differ in letter case alone are of one frame.
    pub files: BTreeMap<String, Found>,
    pub remarks: Vec<(Remark, String)>,
}

/// A file that may be a frame's: place of its ending among those searched, name, stem, path.
type Candidate = (usize, bool, String, Found);

/// Files in `folder` with one of `extensions` (lower case, no dot), in any letter case. Of several files of a frame the one
/// whose ending comes first in `extensions` counts, and among those an ending in lower case; this is remarked on.
///
/// # Errors
/// The folder cannot be read; two frames whose names differ in letter case alone; a name that is not UTF-8; no file with
/// these endings, but some with others: names `key`, the config's key, and the endings seen.
pub(super) fn list(folder: &Path, extensions: &[&str], key: &str) -> Result<Listed, DataError> {
    let failed = |e: std::io::Error| file_error(folder, e.to_string());
    let mut listed = Listed::default();
    let mut candidates: BTreeMap<String, Vec<Candidate>> = BTreeMap::new();
    let mut others: BTreeMap<String, usize> = BTreeMap::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let ending = path.extension().unwrap_or_default().to_string_lossy().into_owned();
        let lower = ending.to_ascii_lowercase();
        let searched = extensions.iter().position(|extension| *extension == lower);
        if path.file_name().is_some_and(is_no_data) {
            listed.remarks.extend(searched.map(|_| (Remark::NoData, path.display().to_string())));
        } else if let Some(place) = searched {
            let name = path.file_name().and_then(|name| name.to_str());
            let (Some(name), Some(stem)) = (name, path.file_stem().and_then(|stem| stem.to_str())) else {
                return Err(file_error(&path, "its name is not UTF-8: rename it"));
            };
            let found = Found { stem: stem.to_owned(), path: path.clone() };
            candidates.entry(stem.to_lowercase()).or_default().push((place, ending != lower, name.to_owned(), found));
        } else if !path.is_dir() {
            *others.entry(lower).or_default() += 1;
        }
    }
    for (frame, mut of_frame) in candidates {
        of_frame.sort_by(|a, b| (a.0, a.1, &a.2).cmp(&(b.0, b.1, &b.2)));
        listed.remarks.extend(several(folder, &of_frame)?);
        listed.files.extend(of_frame.into_iter().next().map(|(.., found)| (frame, found)));
    }
    if listed.files.is_empty() && !others.is_empty() {
        return Err(file_error(folder, none_found(extensions, key, &others)));
    }
    let pictures = others.iter().filter(|(ending, _)| PICTURES.contains(&ending.as_str()) && is_image(extensions));
    for (ending, count) in pictures {
        let remark = (Remark::OtherEnding, format!("{} (.{ending})", folder.display()));
        listed.remarks.extend(std::iter::repeat_n(remark, *count));
    }
    Ok(listed)
}

fn is_image(extensions: &[&str]) -> bool {
    extensions.iter().any(|extension| PICTURES.contains(extension))
}

/// The remark on a frame with several files, of which the first is read.
fn several(folder: &Path, of_frame: &[Candidate]) -> Result<Option<(Remark, String)>, DataError> {
    let [(_, _, first, found), rest @ ..] = of_frame else { return Ok(None) };
    if let Some((_, _, other, _)) = rest.iter().find(|(.., other)| other.stem != found.stem) {
        let problem = format!("{first} and {other} differ in letter case alone: expected one file for each frame");
        return Err(file_error(folder, problem));
    }
    let Some((_, _, other, _)) = rest.first() else { return Ok(None) };
    Ok(Some((Remark::Doubled, format!("{}: {first} is read, {other} is not", folder.display()))))
}

fn none_found(extensions: &[&str], key: &str, others: &BTreeMap<String, usize>) -> String {
    let searched: Vec<String> = extensions.iter().map(|extension| format!(".{extension}")).collect();
    let seen = |(ending, count): (&String, &usize)| match ending.as_str() {
        "" => format!("{count} without an ending"),
        ending => format!("{count} .{ending}"),
    };
    let seen: Vec<String> = others.iter().map(seen).collect();
    format!("no file ending in {} ({key}): the folder holds {}", searched.join(" or "), seen.join(", "))
}
