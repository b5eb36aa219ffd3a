//! EMG recordings as a data set: which files, which windows, which numbers.
//!
//! ```text
//! files ─► scan (divided among ranks and threads, kept in an index) ─► split by files ─► windows as indices ─► Reader
//! ```
//!
//! Architecture invariant: memory is O(files + failure blocks), never O(windows); statistics come from training files only.

mod future;
mod grain;
mod index;
mod pages;
mod pieces;
pub mod scan;
mod share;
pub mod windows;

use crate::data::cache::Want;
use crate::data::loader::order_of;
use crate::data::source::chunks::LruChunks;
use crate::data::source::hdf5::gather::{Affine, Transform};
use crate::data::source::hdf5::{Reader, Target, without_locks};
use crate::data::source::{file_error, find_files};
use crate::data::{BatchAhead, DataError, Dataset, Dtype, FieldSpec, Pages as SamplePages, ReadRequest, Scratch, Wake};
use crate::task::{Datasets, Team};
use future::Future;
use grain::choose;
use launcher::config::{CachePolicy, DataConfig};
use pages::Pages;
use pieces::Pieces;
use scan::{FileFacts, Moments, ScanFacts};
use share::{Refused, scan_share, share};
use std::path::Path;
use std::sync::{Arc, Weak};
use windows::{Windows, permuted, split_files};

/// Rows of a page of a file without chunks.
const PAGE_ROWS: usize = 4096;
/// Seeds differ by use, so that the split says nothing about the control experiment's pairs.
const SHUFFLE_EMG_SEED: u64 = 0x5348_5546;

/// What opening yields beside the data sets.
pub struct EmgData {
    pub datasets: Datasets,
    /// Mean of each joint angle over the training files, radians: the baseline "always the mean pose".
    pub mean_pose: Vec<f64>,
    /// EMG statistics of the training files, after rectification when on.
    pub statistics: Moments,
    /// Shared by the three data sets; tells rows, bytes, chunks and cache hits so far.
    pub reader: Arc<Reader>,
}

/// Windows of one split: `emg` f32 `[T, 16]` and `joint_angles` f32 `[T, 20]` in radians.
pub struct EmgDataset {
    reader: Arc<Reader>,
    fields: [FieldSpec; 2],
    windows: Windows,
    window_rows: usize,
    emg: Transform,
    /// Control experiment: the EMG of another window.
    shuffle_emg: Option<u64>,
    /// The node's page cache, where there is one.
    cached: Option<Cached>,
}

struct Cached {
    pages: Arc<Pages>,
    /// Where the policy asks for it, and the order is known.
    future: Option<Future>,
    /// Entries are pieces of this data set's windows.
    by_window: bool,
}

impl Cached {
    fn pieces(&self) -> Option<&Pieces> {
        self.pages.pieces().filter(|_| self.by_window)
    }
}

impl EmgDataset {
    fn read_window(&self, index: usize, targets: &mut [Target], scratch: &mut Scratch) -> Result<(), DataError> {
        let read = self.read_rows_of(index, targets, scratch);
        scratch.count();
        read
    }

    fn read_rows_of(&self, index: usize, targets: &mut [Target], scratch: &mut Scratch) -> Result<(), DataError> {
        let (file, row) = self.locate(index)?;
        if let Some(cached) = &self.cached
            && let Some(pieces) = cached.pieces()
        {
            return cached.pages.read_pieces(pieces, (index, file, row, self.window_rows), targets, scratch);
        }
        match &self.cached {
            Some(cached) => cached.pages.read(file, row, self.window_rows, targets, scratch),
            None => self.reader.read(file, row, self.window_rows, targets, scratch),
        }
    }

    /// Entries that the windows `ids` lie in, each once, in rising order; ids out of range have none.
    fn keys(&self, pages: &Pages, ids: &[u64]) -> Vec<u64> {
        let mut keys = Vec::with_capacity(2 * ids.len());
        let mut add = |index: usize| {
            if let Some((file, row)) = self.windows.get(index) {
                keys.extend(pages.keys(file as usize, row, self.window_rows));
            }
        };
        for id in ids.iter().filter(|id| **id < self.windows.len() as u64) {
            add(*id as usize);
            if let Some(seed) = self.shuffle_emg {
                add(permuted(*id, self.windows.len() as u64, seed) as usize);
            }
        }
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    fn locate(&self, index: usize) -> Result<(usize, u64), DataError> {
        let found = self.windows.get(index).map(|(file, row)| (file as usize, row));
        found.ok_or_else(|| DataError::Other(format!("window {index} asked for, there are {}", self.windows.len())))
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
            return Err(DataError::Other(format!("{} fields asked for, there are 2", out.len())));
        };
        let emg = Target { member: 0, transform: &self.emg, out: emg };
        let angles = Target { member: 1, transform: &Transform::IDENTITY, out: angles };
        let Some(seed) = self.shuffle_emg else {
            return self.read_window(index, &mut [emg, angles], scratch);
        };
        let other = permuted(index as u64, self.windows.len() as u64, seed) as usize;
        self.read_window(other, &mut [emg], scratch)?;
        self.read_window(index, &mut [angles], scratch)
    }

    fn announce(&self, batch: BatchAhead) {
        let Some(cached @ Cached { pages, future, .. }) = &self.cached else { return };
        if let Some(pieces) = cached.pieces() {
            return pages.cache().announce_stored(&pieces.announce(batch, pages.reader()));
        }
        let after = future.as_ref().map(|future| (future, future.position(batch.epoch, batch.ids)));
        let want = |key| {
            let next_use = after
                .map_or(u64::MAX, |(future, after)| future.next_use(key, batch.epoch, after, pages, &self.windows));
            Want { key, bytes: pages.bytes(key), next_use }
        };
        let wants: Vec<Want> = self.keys(pages, batch.ids).into_iter().map(want).collect();
        pages.cache().announce(&wants);
    }

    fn retire(&self, batch: BatchAhead) {
        let Some(cached @ Cached { pages, .. }) = &self.cached else { return };
        if let Some(pieces) = cached.pieces() {
            pages.cache().retire(pieces.retire(batch, pages.reader()).into_iter());
        } else {
            pages.cache().retire(self.keys(pages, batch.ids).into_iter());
        }
    }

    fn work_ahead(&self, scratch: &mut Scratch) -> bool {
        let done = self.cached.as_ref().is_some_and(|cached| cached.pages.work_ahead(scratch));
        scratch.count();
        done
    }

    fn give_back(&self) {
        self.reader.give_back();
    }

    fn wake_by(&self, waker: Weak<dyn Wake>) {
        if let Some(cached) = &self.cached {
            cached.pages.cache().wake_by(waker);
        }
    }

    fn describe(&self, index: usize) -> String {
        match self.windows.get(index) {
            Some((file, row)) => {
                let path = &self.reader.tables()[file as usize].path;
                let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
                format!("{name} rows {row}..{}", row + self.window_rows as u64)
            }
            None => format!("window {index} of {}", self.windows.len()),
        }
    }

    fn pages(&self) -> Option<SamplePages> {
        Some(self.windows.pages(|file| page_rows(&self.reader, file)))
    }
}

/// Rows that one read serves: a chunk's, or a page's of a file without chunks.
fn page_rows(reader: &Reader, file: u32) -> u64 {
    reader.tables()[file as usize].chunk_rows().unwrap_or(PAGE_ROWS) as u64
}

/// Opens the data sets of a run. Every rank of `team` calls it; each scans its share of the files that `index_dir` does not
/// know yet, then all know all.
///
/// # Errors
/// No files, none usable, a bad file when `data.skip_bad` is off, or ranks that see different files. All ranks fail alike.
pub fn open_datasets(config: &DataConfig, seed: u64, team: &Team, index_dir: &Path) -> Result<EmgData, DataError> {
    let facts = scan_facts(config)?;
    let index_path = index::path(index_dir, &facts, &config.dataset_path);
    let mut skipped = Vec::new();
    let found = find_files(&config.dataset_path, &["hdf5", "h5"], &mut skipped);
    let own = scan_share(found.as_deref(), &facts, &index_path, team);
    let (results, scanned) = share(own, team)?;
    let files = found?;
    if files.is_empty() {
        return Err(no_files(config, "no .hdf5 or .h5 file"));
    }
    let known = keep_good(results, config, &mut skipped)?;
    if team.rank == 0
        && scanned > 0
        && let Err(error) = index::save(&index_path, &facts, known.iter())
    {
        tracing::warn!("{error}: the next start scans the files again");
    }
    let usable = keep_long(known, config, &mut skipped);
    if usable.is_empty() {
        let first = skipped.first().map(|line| format!("; the first: {line}")).unwrap_or_default();
        return Err(no_files(config, &format!("none of {} files is usable{first}", files.len())));
    }
    if team.rank == 0 {
        skipped.iter().for_each(|line| tracing::warn!("left out: {line}"));
    }
    assemble(usable, config, seed, skipped, team)
}

fn scan_facts(config: &DataConfig) -> Result<ScanFacts, DataError> {
    for (key, value) in [
        ("window_size", config.window_size),
        ("stride", config.stride),
        ("emg_channels", config.emg_channels),
        ("joint_angles_channels", config.joint_angles_channels),
    ] {
        if value == 0 {
            return Err(DataError::Other(format!("data.{key} is 0: expected at least 1")));
        }
    }
    Ok(ScanFacts {
        group: config.hdf5_group.clone(),
        table: config.table_name.clone(),
        emg_channels: config.emg_channels,
        angle_channels: config.joint_angles_channels,
        rectify: config.rectify,
        max_samples: config.max_samples_for_normalize,
    })
}

fn no_files(config: &DataConfig, problem: &str) -> DataError {
    let way_out = "set data.dataset_path to a folder of recordings, or data.sample_if_missing: true, with which \
                   scripts/launch makes sample data in a folder that does not exist yet";
    file_error(&config.dataset_path, format!("{problem}: {way_out}"))
}

fn keep_good(
    results: Vec<share::Found>,
    config: &DataConfig,
    skipped: &mut Vec<String>,
) -> Result<Vec<FileFacts>, DataError> {
    let mut good = Vec::with_capacity(results.len());
    for result in results {
        match result {
            Ok(file) => good.push(file),
            Err(Refused { problem, lack: true }) => return Err(DataError::Other(problem)),
            Err(Refused { problem, .. }) if config.skip_bad => skipped.push(problem),
            Err(Refused { problem, .. }) => {
                return Err(DataError::Other(format!("{problem} (data.skip_bad: true leaves such files out)")));
            }
        }
    }
    Ok(good)
}

/// Leaves out files without a single window.
fn keep_long(files: Vec<FileFacts>, config: &DataConfig, skipped: &mut Vec<String>) -> Vec<FileFacts> {
    let (window, stride) = (config.window_size as u64, config.stride as u64);
    let mut long = Vec::with_capacity(files.len());
    for file in files {
        let some = blocks(&file, config).iter().any(|block| windows::windows_in(*block, window, stride).1 > 0);
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
            "{}: too short for one window: {} rows{failures}, data.window_size is {window}",
            file.table.path.display(),
            file.table.rows
        ));
    }
    long
}

/// Runs of rows that windows may lie in.
fn blocks(file: &FileFacts, config: &DataConfig) -> Vec<[u64; 2]> {
    if config.skip_ik_failures { file.valid.clone() } else { file.table.written() }
}

/// Splits files, adds up statistics of the training files, and lists windows.
fn assemble(
    files: Vec<FileFacts>,
    config: &DataConfig,
    seed: u64,
    skipped: Vec<String>,
    team: &Team,
) -> Result<EmgData, DataError> {
    let splits = split_files(files.len(), config.split_ratio, seed);
    let mut statistics = Moments::new(config.emg_channels);
    let mut mean_pose = vec![0.0; config.joint_angles_channels];
    let mut rows = 0;
    for file in splits[0].iter().map(|n| &files[*n]) {
        statistics.merge(&file.emg);
        mean_pose.iter_mut().zip(&file.angle_sum).for_each(|(sum, x)| *sum += x);
        // Failed rows are zero: they add nothing to the sum, and count only when they are trained on.
        rows += if config.skip_ik_failures { file.valid_rows() } else { file.table.written_rows() };
    }
    mean_pose.iter_mut().for_each(|sum| *sum /= rows.max(1) as f64);
    let listed = [(0, config.max_train_windows), (1, config.max_val_windows), (2, config.max_val_windows)]
        .map(|(split, limit)| list_windows(&splits[split], limit, &files, config));
    let mut notes = notes(&files, &splits, &listed, config, &skipped);
    let tables = files.into_iter().map(|file| file.table).collect();
    let shrunk = team.cache.as_ref().map(Arc::downgrade);
    let chunks = LruChunks::new(config.chunk_cache_size)
        .small_while(move || shrunk.as_ref().and_then(Weak::upgrade).is_some_and(|cache| cache.is_shrunk()));
    let reader = Arc::new(Reader::new(tables, Arc::new(chunks)));
    let emg = Transform { rectify: config.rectify, normalise: config.normalize.then(|| affine(&statistics)) };
    let cache = team.cache.clone().filter(|_| config.cache != CachePolicy::Off);
    // Validation and test are read in the order of their files, now and then: nothing is known of their next use.
    let sees = matches!(config.cache, CachePolicy::Auto | CachePolicy::NextUse) && !config.shuffle_emg;
    let windows = &listed[0];
    let page_rows = |file: u32| page_rows(&reader, file);
    let order = order_of(windows.len() as u64, config, seed, || Some(windows.pages(page_rows)))?;
    let choice = cache.as_ref().and_then(|cache| choose(config, windows, &reader, cache.capacity_bytes(), sees));
    notes.extend(choice.as_ref().map(|choice| choice.line.clone()));
    let pages = cache.map(|cache| {
        let pages = Pages::new(Arc::clone(&reader), cache);
        let kept = choice.and_then(|choice| choice.kept);
        let pieces = kept.and_then(|kept| {
            let team = (team.world_size, pages.total(), kept);
            Pieces::new(windows.clone(), config.window_size, order.clone(), team, &reader)
        });
        Arc::new(pages.with_pieces(pieces))
    });
    let by_window = pages.as_ref().is_some_and(|pages| pages.pieces().is_some());
    let mut futures = [sees.then(|| Future::new(order, config.window_size)), None, None].into_iter();
    let mut by_window = [by_window, false, false].into_iter();
    let [train, val, test] = listed.map(|windows| {
        let (future, by_window) = (futures.next().flatten(), by_window.next().unwrap_or(false));
        let cached = pages.as_ref().map(|pages| Cached { pages: Arc::clone(pages), future, by_window });
        dataset(windows, config, &emg, seed, &reader, cached)
    });
    Ok(EmgData {
        datasets: Datasets { train, val, test, baseline: None, skipped, notes, facts: None },
        mean_pose,
        statistics,
        reader,
    })
}

fn affine(statistics: &Moments) -> Affine {
    Affine {
        mean: statistics.mean.iter().map(|mean| *mean as f32).collect(),
        inverse_std: statistics.std().iter().map(|std| (1.0 / std) as f32).collect(),
    }
}

fn list_windows(split: &[usize], limit: usize, files: &[FileFacts], config: &DataConfig) -> Windows {
    let mut windows = Windows::new(config.stride as u64);
    for n in split {
        for block in blocks(&files[*n], config) {
            windows.add(*n as u32, block, config.window_size as u64);
        }
    }
    windows.limit(limit);
    windows
}

fn dataset(
    windows: Windows,
    config: &DataConfig,
    emg: &Transform,
    seed: u64,
    reader: &Arc<Reader>,
    cached: Option<Cached>,
) -> Arc<dyn Dataset> {
    let field = |name, channels| FieldSpec { name, shape: vec![config.window_size, channels], dtype: Dtype::F32 };
    Arc::new(EmgDataset {
        reader: reader.clone(),
        fields: [field("emg", config.emg_channels), field("joint_angles", config.joint_angles_channels)],
        windows,
        window_rows: config.window_size,
        emg: emg.clone(),
        shuffle_emg: config.shuffle_emg.then_some(seed ^ SHUFFLE_EMG_SEED),
        cached,
    })
}

fn notes(
    files: &[FileFacts],
    splits: &[Vec<usize>; 3],
    listed: &[Windows; 3],
    config: &DataConfig,
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
    notes.push(format!("windows of {} samples, stride {}", config.window_size, config.stride));
    notes.extend(without_locks().map(String::from));
    let unwritten: Vec<_> = files.iter().filter(|file| !file.table.unwritten.is_empty()).collect();
    if let Some(first) = unwritten.first() {
        let rows: u64 = unwritten.iter().map(|file| file.table.rows - file.table.written_rows()).sum();
        let path = first.table.path.display();
        notes.push(format!(
            "{rows} rows of {} files were never written: left out; the first file: {path}",
            unwritten.len()
        ));
    }
    let failed: u64 = files.iter().map(FileFacts::failed_rows).sum();
    if failed > 0 {
        let done = if config.skip_ik_failures { "windows there are left out" } else { "kept" };
        notes.push(format!("{failed} samples where inverse kinematics failed: {done} (data.skip_ik_failures)"));
    }
    match files.len() {
        1 => notes.push("one file: train, val and test are the same, metrics say nothing about new sessions".into()),
        2 => notes.push("two files: val and test are the same file".into()),
        _ => {}
    }
    if !skipped.is_empty() {
        notes.push(format!("{} files left out", skipped.len()));
    }
    if config.shuffle_emg {
        notes.push("control experiment: every window has another window's EMG (data.shuffle_emg)".into());
    }
    notes
}

#[cfg(test)]
mod tests;
