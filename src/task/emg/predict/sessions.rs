//! Sessions to predict for: recordings that need no angles, and their windows.

use crate::data::DataError;
use crate::data::source::hdf5::open::{self, Attribute};
use crate::data::source::hdf5::probe::Probe;
use crate::data::source::hdf5::{Table, Wanted};
use crate::data::source::{Identity, Listing, file_error, find_files, in_threads, no_data_line};
use crate::task::Team;
use crate::task::emg::data::share::{ROUND_FILES, Refused, gather, threads};
use serde::{Deserialize, Serialize};
use spec::config::Config;
use spec::contract::shown;
use spec::task::emg::EmgConfig;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A recording as it was opened.
#[derive(Serialize, Deserialize)]
pub(super) struct Recording {
    pub table: Table,
    pub identity: Identity,
}

/// Recordings in the order of their paths, those left out, and lines for the user.
pub(super) struct Recordings {
    pub found: Vec<Recording>,
    pub skipped: Vec<String>,
    pub notes: Vec<String>,
}

/// Opens all recordings at `data.dataset_path`; each rank opens its share of them.
///
/// # Errors
/// None is there or usable; a bad one without `data.skip_bad`; ranks that see different files.
pub(super) fn open_all(config: &Config, emg: &EmgConfig, team: &Team) -> Result<Recordings, DataError> {
    let root = &config.data.dataset_path;
    let Listing { files, unreadable: mut skipped, no_data } = find_files(root, &["hdf5", "h5"])?;
    let counts: Vec<usize> = gather(&files.len(), team)?;
    if let Some(rank) = counts.iter().position(|count| *count != files.len()) {
        let (theirs, own) = (counts[rank], files.len());
        return Err(DataError::RanksDiffer(format!(
            "rank {rank} finds {theirs} files, rank {} finds {own}: {} must hold the same files for all",
            team.rank,
            shown(root)
        )));
    }
    let wanted = Wanted {
        group: emg.hdf5_group.clone(),
        dataset: emg.table_name.clone(),
        fields: vec![("emg".into(), emg.emg_channels)],
    };
    let mut found = Vec::with_capacity(files.len());
    for round in files.chunks(ROUND_FILES * team.world_size.max(1)) {
        let own: Vec<&PathBuf> = round.iter().skip(team.rank).step_by(team.world_size.max(1)).collect();
        let opened: Vec<Result<Recording, Refused>> =
            in_threads(threads(team), &own, |path| open_one(path, &wanted).map_err(Refused::from));
        let mut all: Vec<_> = gather::<Vec<_>>(&opened, team)?.into_iter().map(Vec::into_iter).collect();
        for n in 0..round.len() {
            let next = all.get_mut(n % team.world_size.max(1)).and_then(Iterator::next);
            let next = next.ok_or_else(|| DataError::RanksDiffer("a rank opened fewer files than it has".into()))?;
            match next {
                Ok(recording)
                    if recording.table.written().iter().any(|run| run[1] - run[0] >= emg.window_size as u64) =>
                {
                    found.push(recording);
                }
                Ok(recording) => skipped.push(format!(
                    "{}: too short for one window: {} rows, emg.window_size is {}",
                    shown(&recording.table.path),
                    recording.table.rows,
                    emg.window_size
                )),
                Err(Refused { problem, lack: true }) => return Err(DataError::NothingUsable(problem)),
                Err(Refused { problem, .. }) if config.data.skip_bad => skipped.push(problem),
                Err(Refused { problem, .. }) => return Err(DataError::Bad { what: "files", error: problem.into() }),
            }
        }
    }
    if found.is_empty() {
        let first = skipped.first().map(|line| format!("; the first: {line}")).unwrap_or_default();
        let problem = format!("none of {} .hdf5 and .h5 files is usable{first}: --data names recordings", files.len());
        return Err(file_error(root, problem));
    }
    Ok(Recordings { found, skipped, notes: no_data_line(root, &no_data).into_iter().collect() })
}

fn open_one(path: &Path, wanted: &Wanted) -> Result<Recording, DataError> {
    Probe::new(wanted.clone()).check(path)?;
    let table = open::open(path, wanted)?.table;
    if table.written_rows() == 0 {
        return Err(file_error(path, format!("none of its {} rows was ever written: leave it out", table.rows)));
    }
    Ok(Recording { table, identity: Identity::now(path)? })
}

/// Attributes of a recording's group, for its predictions.
pub(super) fn attributes(path: &Path, emg: &EmgConfig) -> Result<BTreeMap<String, Attribute>, DataError> {
    let fields = vec![("emg".into(), emg.emg_channels)];
    let wanted = Wanted { group: emg.hdf5_group.clone(), dataset: emg.table_name.clone(), fields };
    Ok(open::open(path, &wanted)?.attributes)
}

/// A run of rows with its windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    file: usize,
    rows: [u64; 2],
    /// Windows before it, over all runs.
    before: u64,
}

/// Windows of all sessions: they start every `stride` rows of a run, and the last one ends with the run.
pub(super) struct Windows {
    runs: Vec<Run>,
    window: u64,
    stride: u64,
    total: u64,
}

impl Windows {
    pub fn new<'a>(tables: impl Iterator<Item = &'a Table>, window: u64, stride: u64) -> Self {
        let mut windows = Self { runs: Vec::new(), window, stride: stride.max(1), total: 0 };
        for (file, table) in tables.enumerate() {
            for rows in table.written().into_iter().filter(|rows| rows[1] - rows[0] >= window) {
                windows.runs.push(Run { file, rows, before: windows.total });
                windows.total += (rows[1] - rows[0] - window).div_ceil(windows.stride) + 1;
            }
        }
        windows
    }

    pub fn len(&self) -> u64 {
        self.total
    }

    /// File and first row of a window.
    pub fn place(&self, index: u64) -> Option<(usize, u64)> {
        let after = self.runs.partition_point(|run| run.before <= index);
        let run = self.runs.get(after.checked_sub(1)?).filter(|_| index < self.total)?;
        let last = run.rows[1] - self.window;
        Some((run.file, (run.rows[0] + (index - run.before) * self.stride).min(last)))
    }

    /// Windows of a file.
    pub fn of_file(&self, file: usize) -> std::ops::Range<u64> {
        let first = |file: usize| {
            let at = self.runs.partition_point(|run| run.file < file);
            self.runs.get(at).map_or(self.total, |run| run.before)
        };
        first(file)..first(file + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::source::hdf5::Layout;
    use proptest::prelude::*;

    fn table(rows: u64, unwritten: Vec<[u64; 2]>) -> Table {
        Table {
            path: "s.hdf5".into(),
            dataset: String::new(),
            rows,
            row_bytes: 4,
            element_bytes: 4,
            plain: false,
            members: Vec::new(),
            layout: Layout::Contiguous { addr: 0 },
            unwritten,
            others: Vec::new(),
            file_bytes: 0,
            modified_ns: 0,
        }
    }

    proptest! {
        #[test]
        fn windows_cover_every_row_of_a_run_that_holds_one(
            lengths in proptest::collection::vec(0u64..60, 1..5), window in 1u64..20, stride in 1u64..25,
        ) {
            let stride = stride.min(window);
            let tables: Vec<Table> = lengths.iter().map(|rows| table(*rows, vec![])).collect();
            let windows = Windows::new(tables.iter(), window, stride);
            let mut at = 0;
            for (file, rows) in lengths.iter().enumerate() {
                let of = windows.of_file(file);
                prop_assert_eq!(of.start, at);
                at = of.end;
                let mut covered = vec![false; *rows as usize];
                let mut before = None;
                for index in of {
                    let (found, row) = windows.place(index).unwrap();
                    prop_assert!(found == file && row + window <= *rows && before < Some(row));
                    before = Some(row);
                    (row..row + window).for_each(|row| covered[row as usize] = true);
                }
                prop_assert!(*rows < window || covered.iter().all(|covered| *covered));
                prop_assert!(*rows >= window || before.is_none());
            }
            prop_assert_eq!((windows.len(), windows.place(at)), (at, None));
        }
    }

    #[test]
    fn no_window_touches_rows_that_were_never_written() {
        let tables = [table(100, vec![[30, 50], [60, 62]])];
        let windows = Windows::new(tables.iter(), 20, 10);
        let rows: Vec<u64> = (0..windows.len()).map(|index| windows.place(index).unwrap().1).collect();
        assert_eq!(rows, [0, 10, 62, 72, 80]);
    }
}
