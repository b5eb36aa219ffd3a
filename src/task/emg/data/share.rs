//! The scan of a data set's files, divided among ranks, and the exchange of results.
//!
//! Facts travel in rounds of a few files per rank, so that what is on the way stays small with tens of thousands of files.

use super::index;
use super::scan::{FileFacts, ScanFacts, scan_file};
use crate::data::DataError;
use crate::data::source::hdf5::probe::Probe;
use crate::data::source::in_threads;
use crate::task::Team;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Files of each rank whose facts go out at a time.
pub(in crate::task::emg) const ROUND_FILES: usize = 32;

/// Facts about a file, or the reason why they could not be found.
pub type Found = Result<FileFacts, Refused>;

/// Why there are no facts about a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    pub problem: String,
    /// [`DataError::Lack`]: the file is not to blame, so it is not left out.
    pub lack: bool,
}

impl From<DataError> for Refused {
    fn from(error: DataError) -> Self {
        Self { problem: error.to_string(), lack: matches!(error, DataError::Lack { .. }) }
    }
}

/// First message of a rank.
#[derive(Default, Serialize, Deserialize)]
pub struct Head {
    /// Files this rank sees, as a count and a checksum of their paths.
    files: usize,
    paths_crc32: u32,
    /// Why it sees none.
    error: Option<String>,
    /// How many of its files the index did not know.
    scanned: usize,
}

/// Findings of a rank: about file `rank`, `rank + world_size`, and so on.
#[derive(Default)]
pub struct Share {
    head: Head,
    results: Vec<Found>,
}

/// Facts about this rank's files: every `world_size`-th, from the index or by a scan in threads.
pub fn scan_share(found: Result<&[PathBuf], &DataError>, facts: &ScanFacts, index_path: &Path, team: &Team) -> Share {
    let files = match found {
        Ok(files) => files,
        Err(error) => {
            return Share { head: Head { error: Some(error.to_string()), ..Head::default() }, ..Share::default() };
        }
    };
    let mut crc32 = libdeflater::Crc::new();
    for path in files {
        crc32.update(path.as_os_str().as_bytes());
        crc32.update(b"\n");
    }
    let own: Vec<&PathBuf> = files.iter().skip(team.rank).step_by(team.world_size.max(1)).collect();
    let of_own: HashSet<&Path> = own.iter().map(|path| path.as_path()).collect();
    let mut known = index::load(index_path, facts, |path| of_own.contains(path));
    drop(of_own);
    let known: Vec<Option<FileFacts>> = own.iter().map(|path| known.remove(*path)).collect();
    let current = in_threads(threads(team), &known, |file| file.as_ref().is_some_and(index::current));
    let mut results: Vec<Option<Found>> =
        known.into_iter().zip(current).map(|(file, current)| file.filter(|_| current).map(Ok)).collect();
    let unknown: Vec<(usize, &Path)> =
        own.iter().enumerate().filter(|(n, _)| results[*n].is_none()).map(|(n, path)| (n, path.as_path())).collect();
    for (n, result) in scan_all(&unknown, facts, team) {
        results[n] = Some(result);
    }
    let head = Head { files: files.len(), paths_crc32: crc32.sum(), error: None, scanned: unknown.len() };
    Share { head, results: results.into_iter().flatten().collect() }
}

/// This rank's part of the node's cores.
pub(in crate::task::emg) fn threads(team: &Team) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    (cores / team.world_size.max(1)).clamp(1, 8)
}

fn scan_all(files: &[(usize, &Path)], facts: &ScanFacts, team: &Team) -> Vec<(usize, Found)> {
    let threads = threads(team).min(files.len());
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::with_capacity(files.len()));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut probe = Probe::new(facts.wanted());
                while let Some((n, path)) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let result = probe.check(path).and_then(|()| scan_file(path, facts));
                    let result = result.map_err(Refused::from);
                    results.lock().unwrap_or_else(PoisonError::into_inner).push((*n, result));
                }
            });
        }
    });
    results.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Every rank's results, in the order of files, and how many of them were scanned.
///
/// # Errors
/// A rank sees no files, or other ones; the ranks cannot be asked. All fail alike.
pub fn share(own: Share, team: &Team) -> Result<(Vec<Found>, usize), DataError> {
    let Share { head, results } = own;
    let mut scanned = 0;
    for (rank, theirs) in gather::<Head>(&head, team)?.into_iter().enumerate() {
        if let Some(error) = theirs.error {
            return Err(DataError::RanksDiffer(format!(
                "{error} (rank {rank}): set data.dataset_path, or data.sample_if_missing: true"
            )));
        }
        if (theirs.files, theirs.paths_crc32) != (head.files, head.paths_crc32) {
            return Err(DataError::RanksDiffer(format!(
                "rank {rank} finds {} files, rank {} finds {}, or other ones: data.dataset_path must hold the same files on \
                 every node",
                theirs.files, team.rank, head.files
            )));
        }
        scanned += theirs.scanned;
    }
    let mut all = Vec::with_capacity(head.files);
    let mut own = results.into_iter();
    while all.len() < head.files {
        let round: Vec<Found> = own.by_ref().take(ROUND_FILES).collect();
        let mut rounds: Vec<_> = gather::<Vec<Found>>(&round, team)?.into_iter().map(Vec::into_iter).collect();
        let before = all.len();
        // One of each rank in turn is the order of files.
        while let Some(found) = rounds.get_mut((all.len() - before) % team.world_size.max(1)).and_then(Iterator::next) {
            all.push(found);
        }
        if all.len() == before || rounds.iter().any(|left| left.len() > 0) {
            return Err(DataError::RanksDiffer(format!("{} of {} files were looked at", all.len(), head.files)));
        }
    }
    Ok((all, scanned))
}

/// Gathers one value per rank, in rank order.
pub(in crate::task::emg) fn gather<T: Serialize + DeserializeOwned>(own: &T, team: &Team) -> Result<Vec<T>, DataError> {
    let bytes = serde_json::to_vec(own).map_err(DataError::Gathered)?;
    let gathered = (team.gather)(&bytes)?;
    gathered.iter().map(|bytes| serde_json::from_slice(bytes).map_err(DataError::Gathered)).collect()
}
