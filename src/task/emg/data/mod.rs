//! EMG recordings as a data set: which files, which windows, which numbers.
//!
//! ```text
//! files ─► scan (divided among ranks and threads, kept in an index) ─► split by files ─► windows as indices ─► Reader
//! ```
//!
//! Architecture invariant: memory is O(files + failure blocks), never O(windows); statistics come from training files only.

mod index;
pub mod scan;
pub(super) mod share;

use crate::data::source::hdf5::gather::{Affine, Transform};
use crate::data::source::hdf5::{Reader, Target, without_locks};
use crate::data::source::{Listing, file_error, find_files, no_data_line};
use crate::data::split::{Print, Resolved, Unit, equal_content, relative_name, resolve};
use crate::data::windows::{Reading, WindowSet, WindowSets, Windows, permuted, split_files, windows_in};
use crate::data::{BatchAhead, DataError, Dataset, Dtype, FieldSpec, Pages, ReadRequest, Scratch, Wake};
use crate::task::emg::Carried;
use crate::task::pass::Opening;
use crate::task::{Datasets, Team};
use scan::{FileFacts, Moments, ScanFacts};
use share::{Refused, scan_share, share};
use spec::config::{Config, DataConfig};
use spec::contract::{USERS, shown};
use spec::task::emg::EmgConfig;
use std::path::Path;
use std::sync::{Arc, Weak};

/// Seeds differ by use, so that the split says nothing about the control experiment's pairs.
const SHUFFLE_EMG_SEED: u64 = 0x5348_5546;

/// Result of opening besides the data sets.
pub struct EmgData {
    pub datasets: Datasets,
    /// Mean of each joint angle over the training files, radians: the baseline "always the mean pose".
    pub mean_pose: Vec<f64>,
    /// EMG statistics of the training files, after rectification when on.
    pub statistics: Moments,
    /// Shared by the three data sets; counts rows, bytes, chunks and cache hits so far.
    pub reader: Arc<Reader>,
}

/// Windows of one split: `emg` f32 `[T, 16]` and `joint_angles` f32 `[T, 20]` in radians.
pub struct EmgDataset {
    windows: WindowSet,
    fields: [FieldSpec; 2],
    emg: Transform,
    /// Control experiment: the EMG of another window.
    shuffle_emg: Option<u64>,
}

impl EmgDataset {
    /// The window whose EMG stands in for that of window `index`.
    fn other(&self, index: u64, seed: u64) -> u64 {
        permuted(index, self.windows.len() as u64, seed)
    }

    /// Windows that a batch reads besides its own.
    fn others(&self, batch: BatchAhead) -> Vec<u64> {
        let inside = batch.ids.iter().filter(|id| **id < self.windows.len() as u64);
        self.shuffle_emg.map(|seed| inside.map(|id| self.other(*id, seed)).collect()).unwrap_or_default()
    }
}

impl Dataset for EmgDataset {
    fn len(&self) -> usize {
        self.windows.len()
    }

    fn fields(&self) -> &[FieldSpec] {
        &self.fields
    }

    fn read(&self, request: ReadRequest, out: &mut [&mut [u8]], scratch: &mut Scratch) -> Result<(), DataError> {
        let index = request.index;
        let [emg, angles] = out else {
            return Err(DataError::Fields { asked: out.len(), count: 2 });
        };
        let emg = Target { member: 0, transform: &self.emg, out: emg };
        let angles = Target { member: 1, transform: &Transform::IDENTITY, out: angles };
        let Some(seed) = self.shuffle_emg else {
            return self.windows.read(index, &mut [emg, angles], scratch);
        };
        self.windows.read(self.other(index as u64, seed) as usize, &mut [emg], scratch)?;
        self.windows.read(index, &mut [angles], scratch)
    }

    fn announce(&self, batch: BatchAhead) {
        self.windows.announce(batch, &self.others(batch));
    }

    fn retire(&self, batch: BatchAhead) {
        self.windows.retire(batch, &self.others(batch));
    }

    fn work_ahead(&self, scratch: &mut Scratch) -> bool {
        self.windows.work_ahead(scratch)
    }

    fn give_back(&self) {
        self.windows.give_back();
    }

    fn wake_by(&self, waker: Weak<dyn Wake>) {
        self.windows.wake_by(waker);
    }

    fn describe(&self, index: usize) -> String {
        self.windows.describe(index)
    }

    fn pages(&self) -> Option<Pages> {
        Some(self.windows.pages())
    }
}

/// Keys that the data set reads.
#[derive(Clone, Debug, Default)]
pub struct WindowKeys {
    pub data: DataConfig,
    pub emg: EmgConfig,
}

impl WindowKeys {
    pub fn of(config: &Config) -> Self {
        Self { data: config.data.clone(), emg: config.section() }
    }
}

/// Opens the data sets of a run. Every rank of `team` calls it; each scans its share of the files that `index_dir` does not
/// know yet, then all know all.
///
/// # Errors
/// No files, none usable, a bad file when `data.skip_bad` is off, or ranks that see different files. All ranks fail alike.
pub fn open_datasets(config: &WindowKeys, seed: u64, team: &Team, index_dir: &Path) -> Result<EmgData, DataError> {
    let Usable { files, skipped, no_data } = usable_files(config, team, index_dir)?;
    let mut data = assemble(files, config, seed, skipped, team)?;
    data.datasets.notes.extend(no_data);
    Ok(data)
}

/// Files with windows, those left out, and a line on names that are no data.
struct Usable {
    files: Vec<FileFacts>,
    skipped: Vec<String>,
    no_data: Option<String>,
}

fn usable_files(config: &WindowKeys, team: &Team, index_dir: &Path) -> Result<Usable, DataError> {
    let facts = scan_facts(config)?;
    let index_path = index::path(index_dir, &facts, &config.data.dataset_path);
    let found = find_files(&config.data.dataset_path, &["hdf5", "h5"]);
    let own = scan_share(found.as_ref().map(|found| found.files.as_slice()), &facts, &index_path, team);
    let (results, scanned) = share(own, team)?;
    let Listing { files, unreadable: mut skipped, no_data } = found?;
    let no_data = no_data_line(&config.data.dataset_path, &no_data);
    if files.is_empty() {
        let left_out = no_data.map(|line| format!(" ({line})")).unwrap_or_default();
        return Err(no_files(config, &format!("no .hdf5 or .h5 file{left_out}")));
    }
    let known = keep_good(results, config, &mut skipped)?;
    if team.rank == 0
        && scanned > 0
        && let Err(error) = index::save(&index_path, &facts, known.iter())
    {
        tracing::warn!(target: USERS, "{error}: the next start scans the files again");
    }
    let usable = keep_long(known, config, &mut skipped);
    if usable.is_empty() {
        let first = skipped.first().map(|line| format!("; the first: {line}")).unwrap_or_default();
        return Err(no_files(config, &format!("none of {} files is usable{first}", files.len())));
    }
    if team.rank == 0 {
        // The opener of the data sets informs users.
        skipped.iter().for_each(|line| tracing::debug!("left out: {line}"));
    }
    Ok(Usable { files: usable, skipped, no_data })
}

/// Opens data that are not those of training for an evaluation: all windows of all files, normalised by the training files.
///
/// # Errors
/// As [`open_datasets`]; the run kept no statistics.
pub(super) fn open_for_evaluation(config: &WindowKeys, opening: &Opening) -> Result<Datasets, DataError> {
    let carried = Carried::read(opening.carried);
    // Without normalisation a run of an earlier version has all that is needed, but for the baseline.
    let carried = if config.emg.normalize { Some(carried?) } else { carried.ok() };
    let mut config = config.clone();
    (config.data.shuffle, config.data.max_val_windows) = (false, 0);
    let usable = usable_files(&config, opening.team, opening.index_dir)?;
    let Usable { files, skipped, no_data } = usable;
    let all: Vec<usize> = (0..files.len()).collect();
    let windows = list_windows(&all, 0, &files, &config);
    let mut notes = vec![format!("{} windows of {} files", windows.len(), files.len())];
    notes.extend(no_data);
    let normalise = carried
        .as_ref()
        .filter(|_| config.emg.normalize)
        .map(|Carried { mean, inverse_std, .. }| Affine { mean: mean.clone(), inverse_std: inverse_std.clone() });
    let emg = Transform { rectify: config.emg.rectify, normalise };
    let (tables, identities) = files.into_iter().map(|file| (file.table, file.identity)).unzip();
    let none = || Windows::new(config.data.stride as u64);
    let seed = opening.config.seed;
    let reading = Reading {
        config: &config.data,
        identities,
        rows: config.emg.window_size,
        seed,
        world_size: opening.team.world_size,
        cache: opening.team.cache.clone(),
        alone: !config.emg.shuffle_emg,
    };
    let WindowSets { sets, .. } = WindowSets::open(tables, [none(), windows, none()], reading)?;
    let [train, val, test] = sets.map(|windows| dataset(windows, &config, &emg, seed));
    let baseline = carried.map(|carried| carried.mean_pose);
    Ok(Datasets { skipped, notes, baseline, ..Datasets::new(train, val, test) })
}

fn scan_facts(config: &WindowKeys) -> Result<ScanFacts, DataError> {
    for (key, value) in [
        ("emg.window_size", config.emg.window_size),
        ("data.stride", config.data.stride),
        ("emg.emg_channels", config.emg.emg_channels),
        ("emg.joint_angles_channels", config.emg.joint_angles_channels),
    ] {
        if value == 0 {
            return Err(DataError::setting(key, format!("{key} is 0: expected at least 1")));
        }
    }
    Ok(ScanFacts {
        group: config.emg.hdf5_group.clone(),
        table: config.emg.table_name.clone(),
        emg_channels: config.emg.emg_channels,
        angle_channels: config.emg.joint_angles_channels,
        rectify: config.emg.rectify,
        max_samples: config.emg.max_samples_for_normalize,
    })
}

fn no_files(config: &WindowKeys, problem: &str) -> DataError {
    let way_out = "set data.dataset_path to a folder of recordings, or data.sample_if_missing: true, with which \
                   scripts/launch makes sample data in a folder that does not exist yet";
    file_error(&config.data.dataset_path, format!("{problem}: {way_out}"))
}

fn keep_good(
    results: Vec<share::Found>,
    config: &WindowKeys,
    skipped: &mut Vec<String>,
) -> Result<Vec<FileFacts>, DataError> {
    let mut good = Vec::with_capacity(results.len());
    for result in results {
        match result {
            Ok(file) => good.push(file),
            Err(Refused { problem, lack: true }) => return Err(DataError::Other(problem)),
            Err(Refused { problem, .. }) if config.data.skip_bad => skipped.push(problem),
            Err(Refused { problem, .. }) => {
                return Err(DataError::Bad { what: "files", error: problem.into() });
            }
        }
    }
    Ok(good)
}

/// Leaves out files without a single window.
fn keep_long(files: Vec<FileFacts>, config: &WindowKeys, skipped: &mut Vec<String>) -> Vec<FileFacts> {
    let (window, stride) = (config.emg.window_size as u64, config.data.stride as u64);
    let mut long = Vec::with_capacity(files.len());
    for file in files {
        let some = blocks(&file, config).iter().any(|block| windows_in(*block, window, stride).1 > 0);
        if some {
            long.push(file);
            continue;
        }
        let (failed, unwritten) = (file.failed_rows(), file.table.rows - file.table.written_rows());
        let mut failures = if failed > 0 { format!(", {failed} of them IK failures") } else { String::new() };
        if unwritten > 0 {
            failures += &format!(", {unwritten} of them never written");
        }
        skipped.push(format!(
            "{}: too short for one window: {} rows{failures}, emg.window_size is {window}",
            shown(&file.table.path),
            file.table.rows
        ));
    }
    long
}

/// Runs of rows that windows may lie in.
fn blocks(file: &FileFacts, config: &WindowKeys) -> Vec<[u64; 2]> {
    if config.emg.skip_ik_failures { file.valid.clone() } else { file.table.written() }
}

/// Splits files, adds up statistics of the training files, and lists windows.
fn assemble(
    files: Vec<FileFacts>,
    config: &WindowKeys,
    seed: u64,
    skipped: Vec<String>,
    team: &Team,
) -> Result<EmgData, DataError> {
    let units = units(&files, &config.data, seed);
    let Resolved { order, splits, list, lines } = resolve(&units, team.kept)?;
    let equal = equal_content(&list.units);
    let files = in_order(files, &order);
    let mut statistics = Moments::new(config.emg.emg_channels);
    let mut mean_pose = vec![0.0; config.emg.joint_angles_channels];
    let mut rows = 0;
    for file in splits[0].iter().map(|n| &files[*n]) {
        statistics.merge(&file.emg);
        mean_pose.iter_mut().zip(&file.angle_sum).for_each(|(sum, x)| *sum += x);
        // Failed rows are zero: they add nothing to the sum, and count only when they are trained on.
        rows += if config.emg.skip_ik_failures { file.valid_rows() } else { file.table.written_rows() };
    }
    mean_pose.iter_mut().for_each(|sum| *sum /= rows.max(1) as f64);
    let listed =
        [(0, config.data.max_train_windows), (1, config.data.max_val_windows), (2, config.data.max_val_windows)]
            .map(|(split, limit)| list_windows(&splits[split], limit, &files, config));
    let mut notes = notes(&files, &splits, &listed, config, &skipped);
    notes.extend(lines.into_iter().chain(equal));
    let (tables, identities) = files.into_iter().map(|file| (file.table, file.identity)).unzip();
    let reading = Reading {
        config: &config.data,
        identities,
        rows: config.emg.window_size,
        seed,
        world_size: team.world_size,
        cache: team.cache.clone(),
        alone: !config.emg.shuffle_emg,
    };
    let WindowSets { reader, sets, note } = WindowSets::open(tables, listed, reading)?;
    notes.extend(note);
    let emg = Transform { rectify: config.emg.rectify, normalise: config.emg.normalize.then(|| affine(&statistics)) };
    let [train, val, test] = sets.map(|windows| dataset(windows, config, &emg, seed));
    Ok(EmgData {
        datasets: Datasets { skipped, notes, split: Some(list), ..Datasets::new(train, val, test) },
        mean_pose,
        statistics,
        reader,
    })
}

/// The files with the split of a new run.
fn units(files: &[FileFacts], config: &DataConfig, seed: u64) -> Vec<Unit> {
    let unit = |file: &FileFacts| Unit {
        name: relative_name(&config.dataset_path, &file.table.path),
        prints: vec![Print(file.identity.print)],
        splits: [false; 3],
        rows: None,
    };
    let mut units: Vec<Unit> = files.iter().map(unit).collect();
    for (split, numbers) in split_files(files.len(), config.split_ratio, seed).iter().enumerate() {
        numbers.iter().for_each(|n| units[*n].splits[split] = true);
    }
    units
}

/// Those files that `order` lists.
fn in_order(files: Vec<FileFacts>, order: &[usize]) -> Vec<FileFacts> {
    let mut files: Vec<Option<FileFacts>> = files.into_iter().map(Some).collect();
    order.iter().filter_map(|n| files[*n].take()).collect()
}

pub(super) fn affine(statistics: &Moments) -> Affine {
    Affine {
        mean: statistics.mean.iter().map(|mean| *mean as f32).collect(),
        inverse_std: statistics.std().iter().map(|std| (1.0 / std) as f32).collect(),
    }
}

fn list_windows(split: &[usize], limit: usize, files: &[FileFacts], config: &WindowKeys) -> Windows {
    let mut windows = Windows::new(config.data.stride as u64);
    for n in split {
        for block in blocks(&files[*n], config) {
            windows.add(*n as u32, block, config.emg.window_size as u64);
        }
    }
    windows.limit(limit);
    windows
}

/// A window's EMG `[T, 16]` and joint angles `[T, 20]`.
pub(super) fn fields(config: &EmgConfig) -> [FieldSpec; 2] {
    let field = |name, channels| FieldSpec::new(name, &[config.window_size, channels], Dtype::F32);
    [field("emg", config.emg_channels), field("joint_angles", config.joint_angles_channels)]
}

fn dataset(windows: WindowSet, config: &WindowKeys, emg: &Transform, seed: u64) -> Arc<dyn Dataset> {
    Arc::new(EmgDataset {
        windows,
        fields: fields(&config.emg),
        emg: emg.clone(),
        shuffle_emg: config.emg.shuffle_emg.then_some(seed ^ SHUFFLE_EMG_SEED),
    })
}

fn notes(
    files: &[FileFacts],
    splits: &[Vec<usize>; 3],
    listed: &[Windows; 3],
    config: &WindowKeys,
    skipped: &[String],
) -> Vec<String> {
    let mut notes = Vec::new();
    for ((name, split), windows) in ["train", "val", "test"].iter().zip(splits).zip(listed) {
        let part = if (windows.len() as u64) < windows.total() {
            format!(" (evenly out of {})", windows.total())
        } else {
            String::new()
        };
        notes.push(format!("{name}: {} windows{part} of {} files", windows.len(), split.len()));
    }
    notes.push(format!("windows of {} samples, stride {}", config.emg.window_size, config.data.stride));
    notes.extend(without_locks().map(String::from));
    let unwritten: Vec<_> = files.iter().filter(|file| !file.table.unwritten.is_empty()).collect();
    if let Some(first) = unwritten.first() {
        let rows: u64 = unwritten.iter().map(|file| file.table.rows - file.table.written_rows()).sum();
        let path = shown(&first.table.path);
        notes.push(format!(
            "{rows} rows of {} files were never written: left out; the first file: {path}",
            unwritten.len()
        ));
    }
    let failed: u64 = files.iter().map(FileFacts::failed_rows).sum();
    if failed > 0 {
        let done = if config.emg.skip_ik_failures { "windows there are left out" } else { "kept" };
        notes.push(format!("{failed} samples where inverse kinematics failed: {done} (emg.skip_ik_failures)"));
    }
    match files.len() {
        1 => notes.push("one file: train, val and test are the same, metrics say nothing about new sessions".into()),
        2 => notes.push("two files: val and test are the same file".into()),
        _ => {}
    }
    if !skipped.is_empty() {
        notes.push(format!("{} files left out", skipped.len()));
    }
    if config.emg.shuffle_emg {
        notes.push("control experiment: every window has another window's EMG (emg.shuffle_emg)".into());
    }
    notes
}

#[cfg(test)]
mod tests;
