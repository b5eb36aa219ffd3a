//! Facts about frames that opening finds from headers and sizes alone: which are usable, and their common size.

use super::super::{Identity, file_error, in_threads};
use super::image::{self, ImageSize};
use super::layout::{FramePaths, SequencePaths};
use super::npy;
use super::spikes::{Planes, SpikeEncoding, SpikeInput, tell_encoding, wrong_size};
use crate::data::DataError;
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A file as it was when the run began.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stamp {
    pub path: PathBuf,
    pub identity: Identity,
}

impl Stamp {
    pub fn bytes(&self) -> u64 {
        self.identity.bytes
    }
}

/// Files of a usable frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub stem: String,
    pub blur: Stamp,
    pub sharp: Stamp,
    pub spikes: Option<Stamp>,
}

/// Form of spikes in entries and batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpikeForm {
    /// u8 `[S, H, ceil(W/8)]`, a bit per spike.
    Planes(Planes),
    /// f32 `[K, H, W]`, precomputed; `counts`: none may be below 0.
    Voxels { bins: usize, height: usize, width: usize, counts: bool },
}

impl SpikeForm {
    /// Height and width of the spike camera.
    pub fn size(&self) -> ImageSize {
        match *self {
            SpikeForm::Planes(Planes { height, width, .. }) | SpikeForm::Voxels { height, width, .. } => {
                ImageSize { height, width }
            }
        }
    }

    /// Bytes of a frame.
    pub fn bytes(&self) -> usize {
        match *self {
            SpikeForm::Planes(planes) => planes.bytes(),
            SpikeForm::Voxels { bins, height, width, .. } => 4 * bins * height * width,
        }
    }
}

/// A sequence's usable frames.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    pub name: String,
    /// Frames in [`Scan::frames`] without a gap between them.
    pub runs: Vec<Range<usize>>,
}

/// All usable frames. They are alike: one size of images, one form of spikes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scan {
    pub frames: Vec<Frame>,
    /// By split, as they were given.
    pub splits: Vec<Vec<Sequence>>,
    pub image: ImageSize,
    pub spikes: Option<SpikeForm>,
    /// Frames left out, with the reason.
    pub skipped: Vec<String>,
}

/// A frame whose files are there and look right by themselves.
struct Seen {
    frame: Frame,
    sizes: [ImageSize; 2],
    /// Shape of a `.npy` file.
    voxels: Option<Vec<usize>>,
}

/// Looks at the files of all sequences. The form of most frames is required of all.
///
/// # Errors
/// No usable frame; spikes whose encoding cannot be recognised; unless `skip_bad`, any frame that is not usable, by its file
/// and clip.
pub fn scan(splits: &[Vec<SequencePaths>], spikes: &SpikeInput, skip_bad: bool) -> Result<Scan, DataError> {
    let all: Vec<(&SequencePaths, &FramePaths)> = splits
        .iter()
        .flatten()
        .flat_map(|sequence| sequence.frames.iter().map(move |frame| (sequence, frame)))
        .collect();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(8);
    let mut seen = in_threads(threads, &all, |(sequence, frame)| see(sequence, frame));
    let image = most(seen.iter().flatten().flat_map(|seen| seen.sizes));
    let Some(image) = image else {
        let first = seen.into_iter().find_map(Result::err);
        return Err(first.unwrap_or_else(|| DataError::NothingUsable("no frame in any sequence".into())));
    };
    let form = spike_form(&seen, spikes)?;
    for (seen, (sequence, _)) in seen.iter_mut().zip(&all) {
        if let Ok(found) = seen
            && let Err(error) = alike(found, image, &form, spikes, sequence)
        {
            *seen = Err(error);
        }
    }
    if !skip_bad
        && let Some(at) = seen.iter().position(Result::is_err)
        && let Err(error) = seen.swap_remove(at)
    {
        let (sequence, frame) = &all[at];
        let (sequence, frame, error) = (sequence.name.clone(), frame.stem.clone(), Box::new(error));
        return Err(DataError::Bad { what: "frames", error: DataError::Frame { sequence, frame, error }.into() });
    }
    Ok(assemble(splits, seen, image, form))
}

fn see(sequence: &SequencePaths, frame: &FramePaths) -> Result<Seen, DataError> {
    let image = |path: &Path| -> Result<(Stamp, ImageSize), DataError> {
        let (mut file, stamp) = opened(path)?;
        Ok((stamp, image::size_of(path, &mut file)?))
    };
    let ((blur, blur_size), (sharp, sharp_size)) = (image(&frame.blur)?, image(&frame.sharp)?);
    let (mut spikes, mut voxels) = (None, None);
    if let Some(path) = &frame.spikes {
        let (mut file, stamp) = opened(path)?;
        if path.extension().is_some_and(|extension| extension == "npy") {
            voxels = Some(npy::facts_of(path, &mut file)?.shape);
        }
        spikes = Some(stamp);
    }
    let sizes = [blur_size, sharp_size];
    if let Some(size) = sequence.size.filter(|size| sizes != [*size; 2]) {
        return Err(file_error(&frame.blur, format!("frames of {blur_size} and {sharp_size}: meta_info says {size}")));
    }
    Ok(Seen { frame: Frame { stem: frame.stem.clone(), blur, sharp, spikes }, sizes, voxels })
}

fn opened(path: &Path) -> Result<(File, Stamp), DataError> {
    let failed = |e: std::io::Error| file_error(path, e.to_string());
    let file = File::open(path).map_err(failed)?;
    let identity = Identity::of(path, &file)?;
    Ok((file, Stamp { path: path.to_owned(), identity }))
}

/// The most frequent value; of equally frequent ones the largest.
fn most<T: Ord + Clone>(values: impl Iterator<Item = T>) -> Option<T> {
    let mut counts = BTreeMap::new();
    values.for_each(|value| *counts.entry(value).or_insert(0) += 1);
    counts.into_iter().max_by_key(|(_, count)| *count).map(|(value, _)| value)
}

/// The form that most frames' spikes have.
fn spike_form(seen: &[Result<Seen, DataError>], input: &SpikeInput) -> Result<Option<SpikeForm>, DataError> {
    let good = || seen.iter().flatten();
    match *input {
        SpikeInput::None => Ok(None),
        SpikeInput::Voxels { counts } => {
            let shapes = good().filter_map(|seen| seen.voxels.clone()).filter(|shape| shape.len() == 3);
            let shape =
                most(shapes).ok_or_else(|| DataError::NothingUsable("no .npy file of three dimensions".into()))?;
            Ok(Some(SpikeForm::Voxels { bins: shape[0], height: shape[1], width: shape[2], counts }))
        }
        SpikeInput::Dat { encoding, height, width } => {
            let stamps = || good().filter_map(|seen| seen.frame.spikes.as_ref());
            let encoding = match encoding {
                Some(encoding) => encoding,
                None => {
                    let files: Vec<_> = stamps().map(|stamp| (stamp.path.clone(), stamp.bytes())).collect();
                    tell_encoding(&files, height, width)?
                }
            };
            let planes = most(stamps().filter_map(|stamp| encoding.planes(stamp.bytes(), height, width)));
            let planes = planes.ok_or_else(|| no_planes(stamps().next(), encoding, height, width))?;
            Ok(Some(SpikeForm::Planes(Planes { encoding, planes, height, width })))
        }
    }
}

fn no_planes(first: Option<&Stamp>, encoding: SpikeEncoding, height: usize, width: usize) -> DataError {
    match first {
        Some(stamp) => file_error(&stamp.path, wrong_size(stamp.bytes(), Some(encoding), height, width)),
        None => DataError::NothingUsable("no spike file is there".into()),
    }
}

/// True if a frame is like the others.
fn alike(
    seen: &Seen,
    image: ImageSize,
    form: &Option<SpikeForm>,
    input: &SpikeInput,
    sequence: &SequencePaths,
) -> Result<(), DataError> {
    for (size, stamp) in seen.sizes.iter().zip([&seen.frame.blur, &seen.frame.sharp]) {
        if *size != image {
            let problem = format!("an image of {size} in clip {}: expected {image}, as most have", sequence.name);
            return Err(file_error(&stamp.path, problem));
        }
    }
    let (Some(stamp), Some(form)) = (&seen.frame.spikes, form) else { return Ok(()) };
    match *form {
        SpikeForm::Planes(Planes { encoding, planes, height, width }) => {
            let found = encoding.planes(stamp.bytes(), height, width);
            if found == Some(planes) {
                return Ok(());
            }
            let wrong = found.map_or_else(
                || wrong_size(stamp.bytes(), Some(encoding), height, width),
                |found| format!("{} bytes, {found} spike planes: expected {planes}, as most have", stamp.bytes()),
            );
            Err(file_error(&stamp.path, wrong))
        }
        SpikeForm::Voxels { bins, height, width, .. } if matches!(input, SpikeInput::Voxels { .. }) => {
            let expected = [bins, height, width];
            match &seen.voxels {
                Some(shape) if *shape != expected => {
                    Err(file_error(&stamp.path, format!("an array of {shape:?}: expected {expected:?}, as most have")))
                }
                _ => Ok(()),
            }
        }
        SpikeForm::Voxels { .. } => Ok(()),
    }
}

fn assemble(
    splits: &[Vec<SequencePaths>],
    seen: Vec<Result<Seen, DataError>>,
    image: ImageSize,
    spikes: Option<SpikeForm>,
) -> Scan {
    let mut scan =
        Scan { frames: Vec::with_capacity(seen.len()), splits: Vec::new(), image, spikes, skipped: Vec::new() };
    let mut seen = seen.into_iter();
    for split in splits {
        let mut sequences = Vec::with_capacity(split.len());
        for paths in split {
            let mut runs: Vec<Range<usize>> = Vec::new();
            let mut before = false;
            for (paths_of, found) in paths.frames.iter().zip(seen.by_ref()) {
                match found {
                    Ok(found) => {
                        let at = scan.frames.len();
                        scan.frames.push(found.frame);
                        match runs.last_mut() {
                            Some(run) if before && !paths_of.after_gap => run.end = at + 1,
                            _ => runs.push(at..at + 1),
                        }
                        before = true;
                    }
                    Err(error) => {
                        scan.skipped.push(format!("clip {} frame {}: {error}", paths.name, paths_of.stem));
                        before = false;
                    }
                }
            }
            sequences.push(Sequence { name: paths.name.clone(), runs });
        }
        scan.splits.push(sequences);
    }
    scan
}
