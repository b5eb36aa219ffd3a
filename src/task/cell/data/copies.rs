//! Copies of matrices by cells beside the index: of those stored by genes, and of compressed ones that are read at random.
//! Rank 0 makes a copy, the others find it.

use super::known::{Keys, Known};
use super::scan::Scan;
use crate::data::DataError;
use crate::data::source::Identity;
use crate::data::source::h5ad::kept::{self, Kinds};
use crate::data::source::h5ad::{CellReader, Form, Matrix, repack, transpose};
use crate::task::Team;
use host::disk::DiskRoom;
use spec::config::{CachePolicy, ShuffleMode};
use spec::contract::shown;
use spec::task::cell::CopyPolicy;
use std::path::Path;

/// Brings matrices by genes into copies by cells.
///
/// # Errors
/// A copy cannot be made. All ranks fail alike.
pub fn transposed(
    known: &mut [Known],
    keys: &Keys,
    team: &Team,
    index_dir: &Path,
    notes: &mut Vec<String>,
) -> Result<(), DataError> {
    for file in known.iter_mut().filter(|file| file.matrix.form == Form::Csc) {
        let copy = kept::path(index_dir, file.h5ad.print, &file.matrix.place, transpose::WHY);
        let memory = keys.data.chunk_cache_size.max(16 << 20);
        let kinds = transpose::kinds(&file.matrix);
        let make = || transpose::write(&file.h5ad.path, &file.matrix, &copy, memory);
        let matrix = by_first(team, || kept::find(&copy, &file.matrix, kinds), make)??;
        let (name, place) = (super::name(&file.h5ad.path), &file.matrix.place);
        notes.push(format!("{name}: {place} is stored by genes (CSC); read from a copy by cells, {}", shown(&copy)));
        file.matrix = matrix;
        file.h5ad.identities.push((copy.clone(), Identity::now(&copy)?));
    }
    Ok(())
}

/// Brings matrices into plain copies of few bytes where the page cache does not hold all cells: compressed ones whose cells are read
/// at random, or all, as `cell.copy` says. True: a matrix is another one than before. Without room on the disk, or permission, the
/// file itself is read, and a note says so.
///
/// # Errors
/// Ranks cannot hear of each other.
pub fn repacked(
    (known, reader, scans): (&mut [Known], &CellReader, &[Scan]),
    keys: &Keys,
    team: &Team,
    index_dir: &Path,
    notes: &mut Vec<String>,
) -> Result<bool, DataError> {
    let at_random = keys.data.shuffle && keys.data.shuffle_mode == ShuffleMode::Global;
    let wanted = |file: &usize| match keys.cell.copy {
        CopyPolicy::Off => false,
        CopyPolicy::Auto => at_random && !reader.is_plain(*file),
        // What was transposed is a copy already.
        CopyPolicy::Always => known[*file].matrix.data.path == known[*file].h5ad.path,
    };
    let files: Vec<usize> =
        (0..known.len()).filter(|file| known[*file].matrix.form == Form::Csr).filter(wanted).collect();
    if keys.in_order || files.is_empty() {
        return Ok(false);
    }
    let cache = team.cache.as_ref().filter(|_| keys.data.cache != CachePolicy::Off);
    let capacity_bytes = cache.map_or(0, |cache| cache.capacity_bytes());
    let entries_bytes: u64 = scans.iter().flat_map(|scan| &scan.entries[1]).map(|bytes| u64::from(*bytes)).sum();
    let is_small = [u8::from(entries_bytes > capacity_bytes)];
    // Nodes have caches of different sizes.
    if !(team.gather)(&is_small)?.iter().any(|small| small == &[1]) {
        return Ok(false);
    }
    let mut changed = false;
    for file in files {
        let (of, totals, is_plain) = (&known[file], &scans[file].totals, reader.is_plain(file));
        let counts = totals.fraction.is_none() && totals.negative.is_none() && totals.max <= f64::from(u16::MAX);
        let (kinds, name) = (repack::kinds(&of.matrix, counts), super::name(&of.h5ad.path));
        let bytes_of = |kinds| kept::file_bytes(of.matrix.cells, of.matrix.values(), kinds);
        let bytes = bytes_of(kinds);
        if is_plain && Kinds::of(&of.matrix).is_none_or(|own| bytes_of(own) <= bytes) {
            continue;
        }
        let copy = kept::path(index_dir, of.h5ad.print, &of.matrix.place, repack::WHY);
        let make = || {
            room_for(&of.matrix, kinds, index_dir).and_then(|()| repack::write(&of.h5ad.path, &of.matrix, &copy, kinds))
        };
        let (large, otherwise, instead) = match is_plain {
            true => ("more than the page cache holds", "reads the file itself", "the file itself is read"),
            false => (
                "compressed and more than the page cache holds",
                "decodes chunks each time",
                "every cell read at random decodes two chunks; data.shuffle_mode: block reads them in order",
            ),
        };
        match by_first(team, || kept::find(&copy, &of.matrix, kinds), make)? {
            Ok(matrix) => {
                notes.push(format!(
                    "{name} is {large}: cells are read from a copy of {} MiB, {} (cell.copy: off {otherwise})",
                    bytes >> 20,
                    shown(&copy)
                ));
                let identity = (copy.clone(), Identity::now(&copy)?);
                known[file].h5ad.identities.push(identity);
                known[file].matrix = matrix;
                changed = true;
            }
            Err(error) => {
                notes.push(format!("warning: {name} is {large}, and no copy was made ({error}): {instead}"));
            }
        }
    }
    Ok(changed)
}

/// A copy takes at most half of the free space.
fn room_for(matrix: &Matrix, kinds: Kinds, folder: &Path) -> Result<(), DataError> {
    let bytes = kept::file_bytes(matrix.cells, matrix.values(), kinds);
    let fails = |problem: String| DataError::File { path: folder.to_owned(), problem };
    std::fs::create_dir_all(folder).map_err(|error| fails(error.to_string()))?;
    let free = DiskRoom::of(folder).map_err(|error| fails(error.to_string()))?.free_bytes;
    if bytes <= free / 2 {
        return Ok(());
    }
    Err(fails(format!("{} MiB for a copy are more than half of the {} MiB that are free", bytes >> 20, free >> 20)))
}

/// The copy that `find` finds, or that rank 0 makes. The inner error is that of rank 0, on every rank.
fn by_first(
    team: &Team,
    find: impl Fn() -> Option<Matrix>,
    make: impl Fn() -> Result<Matrix, DataError>,
) -> Result<Result<Matrix, DataError>, DataError> {
    let found = find();
    let made = if found.is_none() && team.rank == 0 { make().map(Some) } else { Ok(None) };
    let problem = made.as_ref().err().map(ToString::to_string).unwrap_or_default();
    let all = (team.gather)(problem.as_bytes())?;
    if let Some(problem) = all.first().filter(|problem| !problem.is_empty()) {
        let problem = String::from_utf8_lossy(problem).into_owned();
        return Ok(Err(made.err().unwrap_or(DataError::NothingUsable(problem))));
    }
    // Another node has a folder of its own.
    Ok(found.or(made?).or_else(find).map_or_else(make, Ok))
}
