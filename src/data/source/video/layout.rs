//! Which files are frames of which sequence.
//!
//! `unified`: `<root>/<split>/<sequence>/{blur,sharp}/NNNNNN.png`, `spike/NNNNNN.dat`, `spike_vox/NNNNNN.npy`.
//! `kair`, as KAIR and VRT have it: `<root>/<split>_GT_blurred/<sequence>/NNNNNN.png`, `<split>_GT`, `<split>_spike`,
//! `<split>_spike_vox`, and `meta_info_<split>.txt` with lines "clip frames shape start" that says which frames count.
//!
//! Frames are in natural order: by the numbers in their names ([`super::names`]). A frame's files belong together when their
//! names without the ending differ in letter case at most. What is unusual and does no harm is a [`Remark`].

use super::super::file_error;
use super::files::{Listed, Remark, list};
use super::image::ImageSize;
use super::names::{gaps, natural, numbers};
use super::spikes::SpikeInput;
use crate::data::DataError;
use spec::contract::files::is_no_data;
use std::collections::{BTreeMap, HashMap};
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
    /// Frames are missing before this one: no clip crosses the gap.
    pub after_gap: bool,
}

/// Frames of one sequence, in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SequencePaths {
    /// `train/GOPR0372_07_00`.
    pub name: String,
    pub frames: Vec<FramePaths>,
    /// Frame size by `meta_info`.
    pub size: Option<ImageSize>,
    pub remarks: Vec<(Remark, String)>,
}

/// Sequences of a split.
#[derive(Debug, Default)]
pub struct SplitPaths {
    /// Each is there, or says what is wrong with it.
    pub sequences: Vec<Result<SequencePaths, DataError>>,
    /// On the split's own folder.
    pub remarks: Vec<(Remark, String)>,
}

/// Folders of one sequence: blur, sharp, spikes.
struct Folders {
    name: String,
    blur: PathBuf,
    sharp: PathBuf,
    spikes: Option<PathBuf>,
}

/// Sequences of a split (`train`, `val`, `test`) in the order of their names. `None`: there is no folder of this
/// split.
///
/// # Errors
/// The split's folder or its `meta_info` cannot be read.
pub fn find_sequences(spec: &VideoSpec, split: &str) -> Result<Option<SplitPaths>, DataError> {
    let layout = spec.layout();
    let parent = match layout {
        Layout::Unified => spec.root.join(split),
        Layout::Kair => spec.root.join(format!("{split}_GT")),
    };
    if !parent.is_dir() {
        return Ok(None);
    }
    let failed = |e: std::io::Error| file_error(&parent, e.to_string());
    let mut found = SplitPaths::default();
    let mut names: Vec<String> = Vec::new();
    for entry in std::fs::read_dir(&parent).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let (name, path) = (entry.file_name(), entry.path());
        match name.to_str() {
            _ if !path.is_dir() => {}
            _ if is_no_data(&name) => found.remarks.push((Remark::NoData, path.display().to_string())),
            Some(name) => names.push(name.to_owned()),
            None => found.sequences.push(Err(file_error(&path, "its name is not UTF-8: rename it"))),
        }
    }
    names.sort();
    let meta = if layout == Layout::Kair { meta_info(spec, split)? } else { None };
    if let Some(meta) = &meta {
        names = meta.keys().cloned().collect();
        found.sequences.clear();
    }
    let one = |name: &String| {
        let clip = meta.as_ref().and_then(|meta| meta.get(name));
        sequence(spec, folders(spec, layout, split, name), clip)
    };
    found.sequences.extend(names.iter().map(one));
    Ok(Some(found))
}

/// Sequences of blurred frames below `root`, which need no sharp ones: folders that hold a folder `blur`, at most two levels
/// down, or those of a folder `<split>_GT_blurred` of the layout `kair`. Sharp frames are the blurred ones here. Their names are
/// relative to `root`; where it is a sequence itself, its name.
///
/// # Errors
/// A folder cannot be read.
pub fn find_blurred(spec: &VideoSpec) -> Result<SplitPaths, DataError> {
    let mut found = SplitPaths::default();
    let mut sequences: BTreeMap<PathBuf, Folders> = BTreeMap::new();
    let mut folders = vec![(spec.root.clone(), 0)];
    while let Some((folder, depth)) = folders.pop() {
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let shown = folder.strip_prefix(&spec.root).ok().filter(|path| !path.as_os_str().is_empty());
        let shown = shown.map_or_else(|| name.clone(), |path| path.to_string_lossy().into_owned());
        let (blur, split) = (folder.join("blur"), name.strip_suffix("_GT_blurred"));
        if blur.is_dir() {
            let spikes = spike_dir(spec).map(|dir| folder.join(dir));
            sequences.insert(folder, Folders { name: shown, blur: blur.clone(), sharp: blur, spikes });
            continue;
        }
        let inner = inner_folders(&folder, &mut found)?;
        match split {
            Some(split) => {
                for (path, name) in inner {
                    let spikes = spike_dir(spec).map(|dir| folder.with_file_name(format!("{split}_{dir}")).join(&name));
                    let folders =
                        Folders { name: format!("{shown}/{name}"), blur: path.clone(), sharp: path.clone(), spikes };
                    sequences.insert(path, folders);
                }
            }
            None if depth < 2 => folders.extend(inner.into_iter().map(|(path, _)| (path, depth + 1))),
            None => {}
        }
    }
    found.sequences.extend(sequences.into_values().map(|folders| sequence(spec, folders, None)));
    Ok(found)
}

/// Folders in `folder` with their names; those that are no data, or have names that are not UTF-8, are remarked on.
fn inner_folders(folder: &Path, found: &mut SplitPaths) -> Result<Vec<(PathBuf, String)>, DataError> {
    let failed = |e: std::io::Error| file_error(folder, e.to_string());
    let mut inner = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let (name, path) = (entry.file_name(), entry.path());
        match name.to_str() {
            _ if !path.is_dir() => {}
            _ if is_no_data(&name) => found.remarks.push((Remark::NoData, path.display().to_string())),
            Some(name) => inner.push((path.clone(), name.to_owned())),
            None => found.sequences.push(Err(file_error(&path, "its name is not UTF-8: rename it"))),
        }
    }
    Ok(inner)
}

/// The folder of spikes, beside those of frames.
fn spike_dir(spec: &VideoSpec) -> Option<&String> {
    match spec.spikes {
        SpikeInput::None => None,
        SpikeInput::Dat { .. } => Some(&spec.spike_dir),
        SpikeInput::Voxels { .. } => Some(&spec.voxel_dir),
    }
}

fn folders(spec: &VideoSpec, layout: Layout, split: &str, name: &str) -> Folders {
    let spike_dir = spike_dir(spec);
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
    let images = |folder: &Path| list(folder, &extensions, "deblur.image_exts");
    let (mut blur, mut sharp) = (images(&folders.blur)?, images(&folders.sharp)?);
    if let Some(clip) = clip {
        keep_counted(&mut blur, clip);
        keep_counted(&mut sharp, clip);
        if sharp.files.len() != clip.frames {
            let problem = format!("{} frames from {}: meta_info says {}", sharp.files.len(), clip.start, clip.frames);
            return Err(file_error(&folders.sharp, problem));
        }
    }
    let lonely = |a: &Listed, b: &Listed| {
        a.files.iter().find(|(key, _)| !b.files.contains_key(*key)).map(|(_, file)| file.stem.clone())
    };
    if let Some(stem) = lonely(&blur, &sharp) {
        return Err(counts_differ(&folders, &blur, &sharp, &stem, "sharp"));
    }
    if let Some(stem) = lonely(&sharp, &blur) {
        return Err(counts_differ(&folders, &blur, &sharp, &stem, "blurred"));
    }
    let mut spikes = spike_files(spec, &folders)?;
    let mut remarks = std::mem::take(&mut blur.remarks);
    remarks.append(&mut sharp.remarks);
    remarks.append(&mut spikes.remarks);
    let spike_ending = if matches!(spec.spikes, SpikeInput::Voxels { .. }) { "npy" } else { "dat" };
    let frame = |(key, file): (String, super::files::Found)| {
        let of_frame = |folder: &PathBuf| match spikes.files.get(&key) {
            Some(found) => found.path.clone(),
            // Reading it says that it is missing.
            None => folder.join(format!("{}.{spike_ending}", file.stem)),
        };
        let spikes = folders.spikes.as_ref().map(of_frame);
        let sharp = sharp.files.get(&key).map(|found| found.path.clone()).unwrap_or_default();
        FramePaths { stem: file.stem, blur: file.path, sharp, spikes, after_gap: false }
    };
    let mut frames: Vec<FramePaths> = blur.files.into_iter().map(frame).collect();
    frames.sort_by(|a, b| natural(&a.stem, &b.stem));
    mark_gaps(&folders, &mut frames, &mut remarks)?;
    Ok(SequencePaths { name: folders.name, frames, size: clip.and_then(|clip| clip.size), remarks })
}

/// Keeps the frames that a line of `meta_info` counts.
fn keep_counted(listed: &mut Listed, clip: &Clip) {
    let stems: Vec<&str> = listed.files.values().map(|file| file.stem.as_str()).collect();
    let numbers = numbers(&stems).unwrap_or_default();
    let frames: Vec<u128> = numbers.into_iter().map(|number| number.frame).collect();
    let (first, behind) = (u128::from(clip.start), u128::from(clip.start) + clip.frames as u128);
    let mut frames = frames.into_iter();
    listed.files.retain(|_, _| frames.next().is_some_and(|frame| (first..behind).contains(&frame)));
}

/// Spike files of the frames; none where the folder cannot be listed: reading each frame's file says why.
fn spike_files(spec: &VideoSpec, folders: &Folders) -> Result<Listed, DataError> {
    let (ending, key) = match spec.spikes {
        SpikeInput::Voxels { .. } => ("npy", "deblur.voxel_dir, deblur.use_precomputed_voxels"),
        _ => ("dat", "deblur.spike_dir, deblur.use_precomputed_voxels"),
    };
    match &folders.spikes {
        Some(folder) if folder.is_dir() => list(folder, &[ending], key),
        _ => Ok(Listed::default()),
    }
}

/// Marks where frames are missing, and remarks on it.
fn mark_gaps(
    folders: &Folders,
    frames: &mut [FramePaths],
    remarks: &mut Vec<(Remark, String)>,
) -> Result<(), DataError> {
    let stems: Vec<&str> = frames.iter().map(|frame| frame.stem.as_str()).collect();
    let Some(numbers) = numbers(&stems) else {
        if let [first, .., last] = stems[..] {
            remarks.push((Remark::NotAlike, format!("{} ({first} to {last})", folders.blur.display())));
        }
        return Ok(());
    };
    let mut places = HashMap::new();
    for (number, stem) in numbers.iter().zip(&stems) {
        if let Some(other) = places.insert(format!("{number:?}"), *stem) {
            let problem = format!("frames {other} and {stem} have the same number: expected one file for each frame");
            return Err(file_error(&folders.blur, problem));
        }
    }
    let gaps = gaps(&numbers);
    for at in (1..stems.len()).filter(|at| gaps[*at]) {
        remarks.push((Remark::Gap, format!("clip {} between {} and {}", folders.name, stems[at - 1], stems[at])));
    }
    frames.iter_mut().zip(gaps).for_each(|(frame, gap)| frame.after_gap = gap);
    Ok(())
}

fn counts_differ(folders: &Folders, blur: &Listed, sharp: &Listed, stem: &str, missing: &str) -> DataError {
    let problem = format!(
        "clip {}: {} blurred and {} sharp frames: expected the same; frame {stem} has no {missing} one",
        folders.name,
        blur.files.len(),
        sharp.files.len()
    );
    file_error(&folders.blur, problem)
}
