//! Which files are frames of which sequence.
//!
//! `unified`: `<root>/<split>/<sequence>/{blur,sharp}/NNNNNN.png`, `spike/NNNNNN.dat`, `spike_vox/NNNNNN.npy`.
//! `kair`, as KAIR and VRT have it: `<root>/<split>_GT_blurred/<sequence>/NNNNNN.png`, `<split>_GT`, `<split>_spike`,
//! `<split>_spike_vox`, and `meta_info_<split>.txt` with lines "clip frames shape start" that says which frames count.

use super::super::file_error;
use super::image::ImageSize;
use super::spikes::SpikeInput;
use crate::data::DataError;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    Unified,
    Kair,
}

/// Where frames lie.
#[derive(Clone, Debug, PartialEq)]
pub struct VideoSpec {
    pub root: PathBuf,
    /// `None`: `kair` where there is a folder `train_GT`, else `unified`.
    pub layout: Option<Layout>,
    pub spikes: SpikeInput,
    /// Folders of `unified`, and after `<split>_` of `kair`.
    pub spike_dir: String,
    pub voxel_dir: String,
    /// `kair`: the file that lists the training clips; `None`: `meta_info_<split>.txt` where there is one.
    pub meta_info: Option<PathBuf>,
    /// Lower case, without a dot.
    pub image_exts: Vec<String>,
}

impl VideoSpec {
    /// Frames with their spikes as `.dat` files of unknown encoding under `root`.
    pub fn new(root: &Path, spikes: SpikeInput) -> Self {
        Self {
            root: root.to_owned(),
            layout: None,
            spikes,
            spike_dir: "spike".into(),
            voxel_dir: "spike_vox".into(),
            meta_info: None,
            image_exts: ["png", "jpg", "jpeg"].map(String::from).to_vec(),
        }
    }

    fn layout(&self) -> Layout {
        let kair = || self.root.join("train_GT").is_dir();
        self.layout.unwrap_or_else(|| if kair() { Layout::Kair } else { Layout::Unified })
    }
}

/// Files of one frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FramePaths {
    /// File name without its extension.
    pub stem: String,
    pub blur: PathBuf,
    pub sharp: PathBuf,
    pub spikes: Option<PathBuf>,
}

/// Frames of one sequence, in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SequencePaths {
    /// `train/GOPR0372_07_00`.
    pub name: String,
    pub frames: Vec<FramePaths>,
    /// What `meta_info` says of its frames.
    pub size: Option<ImageSize>,
}

/// Folders of one sequence: blur, sharp, spikes.
struct Folders {
    name: String,
    blur: PathBuf,
    sharp: PathBuf,
    spikes: Option<PathBuf>,
}

/// Sequences of a split (`train`, `val`, `test`) in the order of their names; each is there or says what is wrong with
/// it. `None`: there is no folder of this split.
///
/// # Errors
/// The split's folder or its `meta_info` cannot be read.
pub fn find_sequences(
    spec: &VideoSpec,
    split: &str,
) -> Result<Option<Vec<Result<SequencePaths, DataError>>>, DataError> {
    let layout = spec.layout();
    let parent = match layout {
        Layout::Unified => spec.root.join(split),
        Layout::Kair => spec.root.join(format!("{split}_GT")),
    };
    if !parent.is_dir() {
        return Ok(None);
    }
    let (mut names, mut refused): (Vec<String>, Vec<DataError>) = (Vec::new(), Vec::new());
    for entry in std::fs::read_dir(&parent).map_err(|e| file_error(&parent, e.to_string()))?.flatten() {
        if entry.path().is_dir() {
            match entry.file_name().into_string() {
                Ok(name) => names.push(name),
                Err(_) => refused.push(not_utf8(&entry.path())),
            }
        }
    }
    names.sort();
    let meta = if layout == Layout::Kair { meta_info(spec, split)? } else { None };
    if let Some(meta) = &meta {
        names = meta.keys().cloned().collect();
        refused.clear();
    }
    let one = |name: &String| {
        let clip = meta.as_ref().and_then(|meta| meta.get(name));
        sequence(spec, folders(spec, layout, split, name), clip)
    };
    Ok(Some(names.iter().map(one).chain(refused.into_iter().map(Err)).collect()))
}

fn folders(spec: &VideoSpec, layout: Layout, split: &str, name: &str) -> Folders {
    let spike_dir = match spec.spikes {
        SpikeInput::None => None,
        SpikeInput::Dat { .. } => Some(&spec.spike_dir),
        SpikeInput::Voxels => Some(&spec.voxel_dir),
    };
    let root = &spec.root;
    let (blur, sharp, spikes) = match layout {
        Layout::Unified => {
            let folder = root.join(split).join(name);
            (folder.join("blur"), folder.join("sharp"), spike_dir.map(|dir| folder.join(dir)))
        }
        Layout::Kair => {
            let of = |kind: &str| root.join(format!("{split}_{kind}")).join(name);
            (of("GT_blurred"), of("GT"), spike_dir.map(|dir| of(dir)))
        }
    };
    Folders { name: format!("{split}/{name}"), blur, sharp, spikes }
}

/// One line of `meta_info`.
struct Clip {
    frames: usize,
    size: Option<ImageSize>,
    start: u64,
}

fn meta_info(spec: &VideoSpec, split: &str) -> Result<Option<BTreeMap<String, Clip>>, DataError> {
    let beside = spec.root.join(format!("meta_info_{split}.txt"));
    let path = match &spec.meta_info {
        Some(path) if split == "train" => path.clone(),
        _ if beside.is_file() => beside,
        _ => return Ok(None),
    };
    let text = std::fs::read_to_string(&path).map_err(|e| file_error(&path, e.to_string()))?;
    let mut clips = BTreeMap::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let clip = parse_clip(line).ok_or_else(|| {
            let form = "expected \"clip frames (height,width,3) start\", as in 000 100 (720,1280,3) 000000";
            file_error(&path, format!("line {}: {line:?}: {form}", number + 1))
        })?;
        clips.insert(clip.0, clip.1);
    }
    Ok(Some(clips))
}

fn parse_clip(line: &str) -> Option<(String, Clip)> {
    // The shape may have been written with blanks.
    let (head, rest) = line.split_once('(')?;
    let (shape, start) = rest.split_once(')')?;
    let (name, frames) = head.trim().rsplit_once(char::is_whitespace)?;
    let mut sizes = shape.split(',').map(|size| size.trim().parse::<usize>());
    let size = match (sizes.next(), sizes.next()) {
        (Some(Ok(height)), Some(Ok(width))) => Some(ImageSize { height, width }),
        _ => return None,
    };
    let start = if start.trim().is_empty() { 0 } else { start.trim().parse().ok()? };
    Some((name.trim().to_owned(), Clip { frames: frames.parse().ok()?, size, start }))
}

fn sequence(spec: &VideoSpec, folders: Folders, clip: Option<&Clip>) -> Result<SequencePaths, DataError> {
    let extensions: Vec<&str> = spec.image_exts.iter().map(String::as_str).collect();
    let mut blur = files(&folders.blur, &extensions)?;
    let mut sharp = files(&folders.sharp, &extensions)?;
    if let Some(clip) = clip {
        let counts =
            |stem: &String| number(stem).is_some_and(|n| n >= clip.start && n - clip.start < clip.frames as u64);
        blur.retain(|stem, _| counts(stem));
        sharp.retain(|stem, _| counts(stem));
        if sharp.len() != clip.frames {
            let problem = format!("{} frames from {}: meta_info says {}", sharp.len(), clip.start, clip.frames);
            return Err(file_error(&folders.sharp, problem));
        }
    }
    if let Some((lonely, _)) = blur.iter().find(|(stem, _)| !sharp.contains_key(*stem)) {
        return Err(counts_differ(&folders, &blur, &sharp, lonely, "sharp"));
    }
    if let Some((lonely, _)) = sharp.iter().find(|(stem, _)| !blur.contains_key(*stem)) {
        return Err(counts_differ(&folders, &blur, &sharp, lonely, "blurred"));
    }
    let spike_extension = if spec.spikes == SpikeInput::Voxels { "npy" } else { "dat" };
    let mut frames: Vec<FramePaths> = blur
        .into_iter()
        .zip(sharp.into_values())
        .map(|((stem, blur), sharp)| {
            let spikes = folders.spikes.as_ref().map(|folder| folder.join(format!("{stem}.{spike_extension}")));
            FramePaths { stem, blur, sharp, spikes }
        })
        .collect();
    frames.sort_by_cached_key(|frame| (number(&frame.stem), frame.stem.clone()));
    Ok(SequencePaths { name: folders.name, frames, size: clip.and_then(|clip| clip.size) })
}

fn counts_differ(
    folders: &Folders,
    blur: &BTreeMap<String, PathBuf>,
    sharp: &BTreeMap<String, PathBuf>,
    stem: &str,
    missing: &str,
) -> DataError {
    let problem = format!(
        "clip {}: {} blurred and {} sharp frames: expected the same; frame {stem} has no {missing} one",
        folders.name,
        blur.len(),
        sharp.len()
    );
    file_error(&folders.blur, problem)
}

/// Number of a frame by its name; `None`: no digits alone.
pub(super) fn number(stem: &str) -> Option<u64> {
    stem.parse().ok()
}

fn not_utf8(path: &Path) -> DataError {
    file_error(path, "its name is not UTF-8: rename it")
}

/// Files of `folder` by stem.
fn files(folder: &Path, extensions: &[&str]) -> Result<BTreeMap<String, PathBuf>, DataError> {
    let entries = std::fs::read_dir(folder).map_err(|e| file_error(folder, e.to_string()))?;
    let mut found = BTreeMap::new();
    for path in entries.flatten().map(|entry| entry.path()) {
        if super::super::has_extension(&path, extensions)
            && let Some(stem) = path.file_stem()
        {
            let stem = stem.to_str().ok_or_else(|| not_utf8(&path))?.to_owned();
            found.insert(stem, path);
        }
    }
    Ok(found)
}
