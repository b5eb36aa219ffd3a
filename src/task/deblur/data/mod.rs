//! Clips of blurred and sharp frames with the spike camera's stream, as a data set.
//!
//! ```text
//! find_sequences ─► scan ─► Frames (entries) ─► page cache ─► crop: u8 frames, packed spike planes ─► batch
//!                                                                         on the device: voxel::Voxeliser
//! ```
//!
//! Architecture invariant: entries and batches hold what files hold; widening, voxels and resizing come after the crop.

mod clips;
mod crop;
mod dataset;
mod listing;
#[cfg(test)]
mod tests;
mod unreadable;
pub mod voxel;

pub use crop::{Corner, Crop};
pub use dataset::ClipDataset;

use crate::data::entries::{CachedEntries, EntrySource};
use crate::data::loader::{Order, Shuffle, order_of};
use crate::data::source::file_error;
use crate::data::source::video::image::ImageSize;
use crate::data::source::video::{Frame, Frames, Remark, Sequence, SpikeForm, VideoSpec, find_blurred, scan};
use crate::data::split::{Resolved, equal_content, resolve};
use crate::data::{DataError, Dataset, Scratch};
use crate::task::{Datasets, Team};
use clips::Clips;
use listing::{SplitFolders, find_splits, keep_good, remark_lines, units};
use spec::config::{CachePolicy, DataConfig};
use std::sync::Arc;
use unreadable::Unreadable;

/// Which clips to make of which frames.
#[derive(Clone, Debug, PartialEq)]
pub struct ClipSpec {
    pub video: VideoSpec,
    /// Folders of training, validation and test; where the validation's is missing, the test's serves.
    pub splits: [String; 3],
    /// Consecutive frames of a clip, `T`.
    pub clip_len: usize,
    /// Frames between the starts of neighbouring clips: training, then validation and test.
    pub strides: [usize; 2],
    /// Side of the square cut from clips, pixels, at random in training, from the middle in validation; `None`: whole frames.
    pub crops: [Option<usize>; 2],
    /// Leave out frames that cannot be read, and the clips with them: see [`unreadable`].
    pub skip_bad: bool,
    /// Most clips of training, and of validation and test; 0: all.
    pub limits: [usize; 2],
}

impl ClipSpec {
    /// Clips of five frames, cut to `crop` in training, whole in validation.
    pub fn new(video: VideoSpec, crop: Option<usize>) -> Self {
        Self {
            video,
            splits: ["train", "val", "test"].map(String::from),
            clip_len: 5,
            strides: [1, 1],
            crops: [crop, None],
            skip_bad: false,
            limits: [0, 0],
        }
    }
}

/// Result of opening.
pub struct ClipData {
    pub datasets: Datasets,
    /// Shared by the three data sets; counts files decoded and bytes read so far.
    pub frames: Arc<Frames>,
}

/// Opens the data sets. Every rank of `team` calls it and looks at all headers. `order`: the configuration by which the
/// training clips are shuffled, where the page cache is to know when an entry is needed next.
///
/// # Errors
/// No sequences, no clip in training, an unusable frame without `skip_bad`, a crop that does not fit the frames, or
/// ranks that see different files.
pub fn open_clips(spec: &ClipSpec, seed: u64, team: &Team, order: Option<&DataConfig>) -> Result<ClipData, DataError> {
    if spec.clip_len == 0 || spec.strides.contains(&0) {
        let problem = "a clip has at least 1 frame, and clips start at least 1 frame apart";
        return Err(DataError::setting("deblur", problem));
    }
    let SplitFolders { found, places, mut skipped, remarks } = find_splits(spec)?;
    if let Some(first) = skipped.first()
        && found.iter().flatten().all(|sequence| sequence.frames.is_empty())
    {
        return Err(DataError::NothingUsable(format!("no frame in any sequence; the first left out: {first}")));
    }
    let mut scan = scan(&found, &spec.video.spikes, spec.skip_bad)?;
    skipped.append(&mut scan.skipped);
    let splits = std::mem::take(&mut scan.splits);
    let units = units(&splits, &places, &scan.frames);
    let digest = digest(&splits, &scan.frames, scan.image, scan.spikes);
    let frames = Arc::new(Frames::new(scan));
    agree(digest, team)?;
    let [train, val] = spec.crops.map(|crop| Crop::new(frames.image(), frames.spikes().map(|form| form.size()), crop));
    let (train, val) = (train?, val?);
    let entries = Arc::new(Entries { frames: Arc::clone(&frames), unreadable: Unreadable::default() });
    let cached = team.cache.clone().map(|cache| Arc::new(CachedEntries::new(Arc::clone(&entries), cache)));
    let Resolved { order: used, splits: parts, list, lines } = resolve(&units, team.kept)?;
    let sequences: Vec<&Sequence> = splits.iter().flatten().collect();
    let clips = [0, 1, 2].map(|n| {
        let (clip_len, kind) = (spec.clip_len, n.min(1));
        let of_split: Vec<Sequence> = parts[n].iter().map(|place| sequences[used[*place]].clone()).collect();
        Clips::new(&of_split, clip_len, spec.strides[kind], spec.limits[kind])
    });
    if clips[0].len() == 0 {
        let gap = remarks.iter().find(|(remark, _)| *remark == Remark::Gap);
        let gap = gap.map(|(_, place)| format!("; clips cross no gap: {place}")).unwrap_or_default();
        let first = skipped.first().map(|line| format!("; the first left out: {line}")).unwrap_or_default() + &gap;
        let problem = format!("no clip of {} frames in {} training sequences", spec.clip_len, parts[0].len());
        return Err(file_error(&spec.video.root, format!("{problem}{first}")));
    }
    let mut notes = vec![note(&frames, &clips, &skipped)];
    notes.extend(remark_lines(&remarks));
    notes.extend(lines.into_iter().chain(equal_content(&list.units)));
    let train_order = train_order(&clips[0], seed, order)?;
    // Evaluation reads clips one after the other.
    let in_turn = |clips: &Clips| Order { len: clips.len() as u64, seed: 0, shuffle: Shuffle::Off };
    let source = Source { entries, cached, skip_bad: spec.skip_bad };
    let [train_clips, val_clips, test_clips] = clips;
    let evaluation = |clips: Clips| -> Arc<dyn Dataset> {
        let order = train_order.as_ref().map(|_| in_turn(&clips));
        Arc::new(ClipDataset::new(source.clone(), clips, val, None, order))
    };
    let (val, test) = (evaluation(val_clips), evaluation(test_clips));
    let train: Arc<dyn Dataset> = Arc::new(ClipDataset::new(source, train_clips, train, Some(seed), train_order));
    Ok(ClipData { datasets: Datasets { skipped, notes, split: Some(list), ..Datasets::new(train, val, test) }, frames })
}

/// Sequences to predict for.
pub struct BlurredClips {
    pub dataset: Arc<ClipDataset>,
    pub frames: Arc<Frames>,
    /// Names of sequences, in order.
    pub sequences: Vec<String>,
    pub skipped: Vec<String>,
    pub notes: Vec<String>,
    /// Text that differs where frames do.
    pub identity: String,
}

/// Opens blurred frames, whole and without sharp ones, as clips that cover every frame; see [`find_blurred`].
///
/// # Errors
/// No clip is there; an unusable frame without `skip_bad`; ranks that see different files.
pub fn open_blurred(spec: &ClipSpec, team: &Team) -> Result<BlurredClips, DataError> {
    let mut folders = SplitFolders::default();
    let kept = keep_good(find_blurred(&spec.video)?, spec.skip_bad, &mut folders)?;
    let SplitFolders { mut skipped, remarks, .. } = folders;
    let found = vec![kept];
    if found[0].is_empty() {
        let first = skipped.first().map(|line| format!("; the first left out: {line}")).unwrap_or_default();
        let problem = "no sequence: expected folders that hold a folder blur with frames, or PATH/<split>_GT_blurred";
        return Err(file_error(&spec.video.root, format!("{problem}{first}")));
    }
    let mut scan = scan(&found, &spec.video.spikes, spec.skip_bad)?;
    skipped.append(&mut scan.skipped);
    let sequences = std::mem::take(&mut scan.splits).pop().unwrap_or_default();
    let digest = digest(std::slice::from_ref(&sequences), &scan.frames, scan.image, scan.spikes);
    let clips = Clips::covering(&sequences, spec.clip_len, spec.strides[1]);
    let short = sequences.iter().flat_map(|of| &of.runs).filter(|run| run.len() < spec.clip_len).map(|run| run.len());
    let short: usize = short.sum();
    let frames = Arc::new(Frames::new(scan));
    agree(digest, team)?;
    if clips.len() == 0 {
        let first = skipped.first().map(|line| format!("; the first left out: {line}")).unwrap_or_default();
        let problem = format!("no clip of {} frames in {} sequences", spec.clip_len, sequences.len());
        return Err(file_error(&spec.video.root, format!("{problem}{first}")));
    }
    let crop = Crop::new(frames.image(), frames.spikes().map(|form| form.size()), None)?;
    let mut notes = vec![format!(
        "{} frames of {} in {} sequences: {} clips of {}",
        frames.len(),
        frames.image(),
        sequences.len(),
        clips.len(),
        spec.clip_len
    )];
    if short > 0 {
        notes.push(format!("{short} frames stand in runs shorter than a clip: they have no prediction"));
    }
    notes.extend(remark_lines(&remarks));
    let entries = Arc::new(Entries { frames: Arc::clone(&frames), unreadable: Unreadable::default() });
    let source = Source { entries, cached: None, skip_bad: spec.skip_bad };
    let names = sequences.into_iter().map(|sequence| sequence.name).collect();
    let dataset = Arc::new(ClipDataset::blurred(source, clips, crop));
    let identity = format!("{digest:08x} {} {}", spec.clip_len, spec.strides[1]);
    Ok(BlurredClips { dataset, frames, sequences: names, skipped, notes, identity })
}

/// The order in which training reads clips, where the policy looks ahead.
fn train_order(clips: &Clips, seed: u64, order: Option<&DataConfig>) -> Result<Option<Order>, DataError> {
    let Some(config) = order.filter(|config| matches!(config.cache, CachePolicy::Auto | CachePolicy::NextUse)) else {
        return Ok(None);
    };
    order_of(clips.len() as u64, config, seed, || Some(clips.pages())).map(Some)
}

/// Where the clips of all splits come from.
#[derive(Clone)]
struct Source {
    entries: Arc<Entries>,
    cached: Option<Arc<CachedEntries<Entries>>>,
    skip_bad: bool,
}

/// Frames as the page cache's entries.
struct Entries {
    frames: Arc<Frames>,
    unreadable: Unreadable,
}

impl EntrySource for Entries {
    fn entry_bytes(&self, key: u64) -> u64 {
        self.frames.entry_bytes(key)
    }

    /// A file that could not be decoded once is not tried again.
    fn fill_entry(&self, key: u64, out: &mut [u8], scratch: &mut Scratch) -> Result<(), DataError> {
        if let Some((path, problem)) = self.unreadable.problem(key) {
            return Err(DataError::Content { path, problem });
        }
        let filled = self.frames.fill_entry(key, out, scratch);
        if let Err(DataError::Content { path, problem }) = &filled {
            self.unreadable.add(key, path, problem);
        }
        filled
    }
}

/// Checksum of what decides keys and bytes of entries.
fn digest(splits: &[Vec<Sequence>], frames: &[Frame], image: ImageSize, spikes: Option<SpikeForm>) -> u32 {
    let mut text = format!("{image} {spikes:?} {splits:?}");
    for frame in frames {
        let [blur, sharp] = [&frame.blur, &frame.sharp].map(|stamp| (stamp.bytes(), stamp.identity.print));
        text += &format!("\n{} {blur:?} {sharp:?}", frame.stem);
    }
    libdeflater::crc32(text.as_bytes())
}

/// # Errors
/// Ranks found different frames: their keys would not mean the same.
fn agree(digest: u32, team: &Team) -> Result<(), DataError> {
    let own = digest.to_le_bytes();
    let all = (team.gather)(&own)?;
    match all.iter().position(|theirs| *theirs != own) {
        None => Ok(()),
        Some(rank) => Err(DataError::RanksDiffer(format!(
            "rank {rank} finds other frames than rank {}: data.dataset_path must hold the same files for every rank, and \
             nobody may write there",
            team.rank
        ))),
    }
}

fn note(frames: &Frames, clips: &[Clips; 3], skipped: &[String]) -> String {
    let spikes = match frames.spikes() {
        None => "no spikes".to_string(),
        Some(SpikeForm::Planes(form)) => {
            let encoding = form.encoding.name();
            format!(
                "{} spike planes of {} ({encoding})",
                form.planes,
                ImageSize { height: form.height, width: form.width }
            )
        }
        Some(SpikeForm::Voxels { bins, height, width, .. }) => {
            format!("voxels of {bins} bins of {}", ImageSize { height, width })
        }
    };
    let left_out = if skipped.is_empty() { String::new() } else { format!(", {} left out", skipped.len()) };
    let [train, val, test] = clips.each_ref().map(Clips::len);
    format!(
        "{} frames of {}, {spikes}: {:.2} MB each as entries; {train} clips to train on, {val} to validate, {test} to test{left_out}",
        frames.len(),
        frames.image(),
        frames.frame_bytes() as f64 / 1e6,
    )
}
