//! Sequences on disk: which folders each split uses, what is remarkable about them, and how they are recognised later.

use super::ClipSpec;
use crate::data::DataError;
use crate::data::source::file_error;
use crate::data::source::video::{Frame, Remark, Sequence, SequencePaths, SplitPaths, find_sequences};
use crate::data::split::{Print, Unit};
use std::collections::BTreeMap;

/// Sequences of each folder that is there.
#[derive(Default)]
pub(super) struct SplitFolders {
    pub found: Vec<Vec<SequencePaths>>,
    /// The folder that each split uses: training, validation, test.
    pub places: [usize; 3],
    /// Sequences left out, with the reason.
    pub skipped: Vec<String>,
    pub remarks: Vec<(Remark, String)>,
}

/// # Errors
/// No folder of training sequences, or none of validation and test; a sequence that cannot be used, without `skip_bad`.
pub(super) fn find_splits(spec: &ClipSpec) -> Result<SplitFolders, DataError> {
    let mut folders = SplitFolders::default();
    let mut names: Vec<&str> = Vec::new();
    let mut places = [None; 3];
    for (n, split) in spec.splits.iter().enumerate() {
        if let Some(at) = names.iter().position(|name| name == split) {
            places[n] = Some(at);
        } else if let Some(paths) = find_sequences(&spec.video, split)? {
            places[n] = Some(names.len());
            names.push(split);
            let kept = keep_good(paths, spec.skip_bad, &mut folders)?;
            folders.found.push(kept);
        }
    }
    let [train, val, test] = places;
    let train = train.ok_or_else(|| missing(spec, &spec.splits[0]))?;
    let held_out = || missing(spec, &format!("{} or {}", spec.splits[1], spec.splits[2]));
    let val = val.or(test).ok_or_else(held_out)?;
    folders.places = [train, val, test.unwrap_or(val)];
    Ok(folders)
}

fn missing(spec: &ClipSpec, split: &str) -> DataError {
    let root = &spec.video.root;
    let entries = std::fs::read_dir(root).into_iter().flatten().flatten();
    let mut there: Vec<String> = entries
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    there.sort();
    there.truncate(5);
    let there = if there.is_empty() { String::new() } else { format!(" (it holds {})", there.join(", ")) };
    let way_out = "set data.dataset_path, or data.sample_if_missing: true, with which scripts/launch makes sample data in \
                   a folder that does not exist yet";
    file_error(root, format!("no folder of {split} sequences{there}: {way_out}"))
}

pub(super) fn keep_good(
    paths: SplitPaths,
    skip_bad: bool,
    folders: &mut SplitFolders,
) -> Result<Vec<SequencePaths>, DataError> {
    folders.remarks.extend(paths.remarks);
    let mut good = Vec::with_capacity(paths.sequences.len());
    for sequence in paths.sequences {
        match sequence {
            Ok(mut sequence) => {
                folders.remarks.append(&mut sequence.remarks);
                good.push(sequence);
            }
            Err(error) if skip_bad => folders.skipped.push(error.to_string()),
            Err(error) => {
                return Err(DataError::Bad { what: "sequences", error: error.into() });
            }
        }
    }
    Ok(good)
}

/// A line for each kind of remark.
pub(super) fn remark_lines(remarks: &[(Remark, String)]) -> Vec<String> {
    let mut kinds: BTreeMap<Remark, (usize, &str)> = BTreeMap::new();
    for (remark, text) in remarks {
        kinds.entry(*remark).or_insert((0, text)).0 += 1;
    }
    kinds.into_iter().map(|(remark, (count, first))| remark.line(count, first)).collect()
}

/// Sequences of all folders, as a checkpoint recognises them: by their sharp frames.
pub(super) fn units(folders: &[Vec<Sequence>], places: &[usize; 3], frames: &[Frame]) -> Vec<Unit> {
    let unit = |at: usize, sequence: &Sequence| {
        let frames = sequence.runs.iter().flat_map(|run| &frames[run.clone()]);
        let prints = frames.map(|frame| Print(frame.sharp.identity.print)).collect();
        Unit { name: sequence.name.clone(), prints, splits: places.map(|place| place == at), rows: None }
    };
    let of_folder = |(at, sequences): (usize, &Vec<Sequence>)| -> Vec<Unit> {
        sequences.iter().map(|sequence| unit(at, sequence)).collect()
    };
    folders.iter().enumerate().flat_map(of_folder).collect()
}
