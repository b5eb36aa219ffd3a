//! Opens the data sets of a run. Every rank calls it; each scans its share of the cells that the index does not know.

use super::copies;
use super::dataset::{Cached, CellDataset, fields, pages, policy_of};
use super::entry::Coding;
use super::filter::{self, CellFacts, LeftOut, Rule};
use super::genes::{Joined, join};
use super::index::{self, Key};
use super::known::{Keys, Known};
use super::members::{Members, Part, Parts, bounds};
use super::scan::{self, Scan, Totals, Wanted as Scanned};
use super::store::{FileEntries, Store};
use crate::data::entries::CachedEntries;
use crate::data::loader::order_of;
use crate::data::source::chunks::LruChunks;
use crate::data::source::h5ad::{self, CellReader, Wanted};
use crate::data::source::hdf5::array::ArrayReader;
use crate::data::source::hdf5::probe::Probe;
use crate::data::source::{Listing, file_error, find_files, no_data_line};
use crate::data::split::{Print, Resolved, RowSplit, Unit, relative_name, resolve};
use crate::data::{DataError, Dataset};
use crate::task::{Datasets, Team};
use spec::config::{CachePolicy, Config};
use spec::contract::{CacheMode, USERS, shown};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

/// Result of opening besides the data sets.
pub struct CellData {
    pub datasets: Datasets,
    pub facts: Arc<CellFacts>,
    /// Shared by the data sets.
    pub store: Arc<Store>,
    pub totals: Totals,
    /// All cells in use, in the order of files and rows: the numbers by which latents are kept.
    pub all: Arc<CellDataset>,
    /// Training, validation, test.
    pub splits: [Arc<CellDataset>; 3],
}

/// The data sets of a run, with [`CellFacts`].
///
/// # Errors
/// No files, none usable, or a file that cannot be used when `data.skip_bad` is off. All ranks fail alike.
pub fn open(config: &Config, team: &Team, index_dir: &Path) -> Result<Datasets, DataError> {
    Ok(open_cells(config, team, index_dir)?.datasets)
}

/// The data sets of a run whose validation has all cells in use, in the order of files and rows.
///
/// # Errors
/// As [`open`].
pub fn open_whole(config: &Config, team: &Team, index_dir: &Path) -> Result<Datasets, DataError> {
    let data = opened(config, team, index_dir, true)?;
    Ok(Datasets { val: data.all, ..data.datasets })
}

/// [`open`] with what else is known.
///
/// # Errors
/// As [`open`].
pub fn open_cells(config: &Config, team: &Team, index_dir: &Path) -> Result<CellData, DataError> {
    opened(config, team, index_dir, false)
}

/// [`open_cells`] for whoever reads cells in the order of files and rows.
///
/// # Errors
/// As [`open`].
pub fn open_in_order(config: &Config, team: &Team, index_dir: &Path) -> Result<CellData, DataError> {
    opened(config, team, index_dir, true)
}

fn opened(config: &Config, team: &Team, index_dir: &Path, in_order: bool) -> Result<CellData, DataError> {
    let keys = Keys { data: config.data.clone(), cell: config.section(), seed: config.seed, in_order };
    let (paths, mut skipped, mut notes) = listed(&keys)?;
    let mut known = Vec::with_capacity(paths.len());
    let wanted = Wanted { matrix: keys.cell.matrix.clone(), label: keys.cell.label.clone() };
    let mut probe = Probe::new(wanted.clone());
    for path in &paths {
        match open_one(path, &wanted, &mut probe, index_dir) {
            Ok(file) => known.push(file),
            Err(error) => leave_out(error, &keys, paths.len(), &mut skipped)?,
        }
    }
    copies::transposed(&mut known, &keys, team, index_dir, &mut notes)?;
    let reference = match keys.cell.reference.as_deref() {
        Some(path) => Some((path, h5ad::genes_of(path)?)),
        None => None,
    };
    // A file that turns out to be bad leaves its genes as well.
    let (joined, reader, scans) = loop {
        if known.is_empty() {
            let first = skipped.first().map(|line| format!("; the first: {line}")).unwrap_or_default();
            return Err(no_files(&keys, &format!("none of {} files is usable{first}", paths.len())));
        }
        let files: Vec<(&Path, &[String])> =
            known.iter().map(|file| (file.h5ad.path.as_path(), file.h5ad.genes.as_slice())).collect();
        let joined = join(&files, reference.clone())?;
        let reader = reader(&known, &keys, team)?;
        match scanned((&known, &joined, &reader), &keys, team, index_dir) {
            Ok(scans) => break (joined, reader, scans),
            Err((bad, error)) => {
                leave_out(error, &keys, paths.len(), &mut skipped)?;
                known.remove(bad);
            }
        }
    };
    let copied = copies::repacked((&mut known, &reader, &scans), &keys, team, index_dir, &mut notes)?;
    let reader = if copied { self::reader(&known, &keys, team)? } else { reader };
    notes.extend(joined.note.clone());
    assemble(known, (joined, reader, scans), &keys, team, (skipped, notes))
}

/// Files of cells; those that cannot be read, a line each; a line on what is no data.
type Listed = (Vec<PathBuf>, Vec<String>, Vec<String>);

/// Files below `data.dataset_path`.
fn listed(keys: &Keys) -> Result<Listed, DataError> {
    let root = &keys.data.dataset_path;
    let is_zarr = ["zarr.json", ".zgroup", ".zattrs"].iter().any(|name| root.join(name).exists());
    if is_zarr {
        let problem = "is a zarr store: write it as .h5ad (anndata.read_zarr(PATH).write_h5ad(\"cells.h5ad\"))";
        return Err(file_error(root, problem));
    }
    let found = find_files(root, &["h5ad", "h5", "h5mu"])
        .map_err(|error| no_files(keys, &error.to_string().replace(&format!("{}: ", shown(root)), "")))?;
    let Listing { files, unreadable, no_data } = found;
    let no_data = no_data_line(root, &no_data);
    if files.is_empty() {
        let left_out = no_data.map(|line| format!(" ({line})")).unwrap_or_default();
        return Err(no_files(keys, &format!("no .h5ad or 10x .h5 file{left_out}")));
    }
    Ok((files, unreadable, no_data.into_iter().collect()))
}

fn no_files(keys: &Keys, problem: &str) -> DataError {
    let way_out = "set data.dataset_path to an .h5ad or a folder of them, or data.sample_if_missing: true, with which scripts/launch \
                   makes sample data in a folder that does not exist yet";
    file_error(&keys.data.dataset_path, format!("{problem}: {way_out}"))
}

/// Opens a file; one that no earlier start has opened, in a helper process first.
fn open_one(path: &Path, wanted: &Wanted, probe: &mut Probe, index_dir: &Path) -> Result<Known, DataError> {
    let mark = index::mark(index_dir, path, wanted);
    if !mark.exists() {
        probe.check(path)?;
    }
    let h5ad = h5ad::open(path, wanted)?;
    // Without the mark the next start opens the file twice again, that is all.
    let _ = std::fs::create_dir_all(index_dir).and_then(|()| std::fs::write(&mark, b""));
    Ok(Known { matrix: h5ad.matrix.clone(), h5ad })
}

/// Notes a bad file, where the others go on without it.
fn leave_out(error: DataError, keys: &Keys, files: usize, skipped: &mut Vec<String>) -> Result<(), DataError> {
    match error {
        DataError::Lack { .. } | DataError::Gather(_) | DataError::Gathered(_) => Err(error),
        error if files == 1 => Err(error),
        error if keys.data.skip_bad => {
            skipped.push(error.to_string());
            Ok(())
        }
        error => Err(DataError::Bad { what: "files", error: Box::new(error) }),
    }
}

fn reader(known: &[Known], keys: &Keys, team: &Team) -> Result<CellReader, DataError> {
    let shrunk = team.cache.as_ref().map(Arc::downgrade);
    let is_short = move || shrunk.as_ref().and_then(Weak::upgrade).is_some_and(|cache| cache.is_shrunk());
    let chunks = LruChunks::new(keys.data.chunk_cache_size).small_while(is_short);
    let identities = known.iter().flat_map(|file| file.h5ad.identities.iter().cloned()).collect();
    let matrices = known.iter().map(|file| (file.h5ad.path.clone(), file.matrix.clone())).collect();
    CellReader::new(matrices, |arrays| ArrayReader::new(arrays, identities, Arc::new(chunks)))
}

/// This rank's part of the node's cores.
fn threads(team: &Team) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    (cores / team.world_size.max(1)).clamp(1, 16)
}

/// Findings about every file: kept ones, or a scan that all ranks share.
///
/// # Errors
/// The place of the first bad file, and what is wrong with it; the same on every rank.
fn scanned(
    (known, joined, reader): (&[Known], &Joined, &CellReader),
    keys: &Keys,
    team: &Team,
    index_dir: &Path,
) -> Result<Vec<Scan>, (usize, DataError)> {
    let mut scans = Vec::with_capacity(known.len());
    for (file, (of, map)) in known.iter().zip(&joined.maps).enumerate() {
        let (genes, min_cells) = (joined.names.len(), keys.cell.min_cells);
        let key = Key { matrix: &of.matrix.place, min_cells, files: &of.h5ad.identities, map: map.as_deref(), genes };
        let path = index::path(index_dir, &key);
        let per_entry = scan::entry_cells(reader, file);
        let kept = index::load(&path).filter(|scan| scan.fits(of.matrix.cells, genes, per_entry));
        let fail = |error| (file, error);
        let all_have = (team.gather)(&[u8::from(kept.is_some())]).map_err(fail)?.iter().all(|have| have == &[1]);
        if let Some(kept) = kept.filter(|_| all_have) {
            scans.push(kept);
            continue;
        }
        let wanted = Scanned { map: map.as_deref(), genes, min_cells };
        let whole = scan_together((reader, file), of.matrix.cells.div_ceil(per_entry), wanted, team).map_err(fail)?;
        if team.rank == 0
            && let Err(error) = index::save(&path, &whole)
        {
            tracing::warn!(target: USERS, "{error}: the next start scans the file again");
        }
        scans.push(whole);
    }
    Ok(scans)
}

/// Findings about the entries of `file`, of which each rank scans a run.
fn scan_together(
    (reader, file): (&CellReader, usize),
    entries: u64,
    wanted: Scanned,
    team: &Team,
) -> Result<Scan, DataError> {
    let world = team.world_size.max(1) as u64;
    let share = |rank: u64| entries * rank / world..entries * (rank + 1) / world;
    let own = scan::scan(reader, file, share(team.rank as u64), wanted, threads(team));
    if world == 1 {
        return own;
    }
    // A byte says what follows: findings, or an error that is, or is not, the file's.
    let message = match &own {
        Ok(scan) => [vec![0], index::encode(scan)].concat(),
        Err(error @ DataError::Lack { .. }) => [vec![2], error.to_string().into_bytes()].concat(),
        Err(error) => [vec![1], error.to_string().into_bytes()].concat(),
    };
    let path = &reader.sources()[file].path;
    let mut whole = Scan::default();
    for (rank, message) in (team.gather)(&message)?.iter().enumerate() {
        let rest = message.get(1..).unwrap_or_default();
        let words = || String::from_utf8_lossy(rest).into_owned();
        match message.first() {
            Some(0) => {
                let scan = index::decode(rest).filter(|scan| scan.counts.len() == wanted.genes);
                let scan = scan.ok_or_else(|| {
                    DataError::RanksDiffer(format!("findings of rank {rank} about {} are damaged", shown(path)))
                })?;
                whole.append(scan, wanted.min_cells);
            }
            Some(2) => return Err(DataError::Lack { path: path.clone(), problem: words() }),
            _ if rank == team.rank => return Err(own.err().unwrap_or_else(|| DataError::RanksDiffer(words()))),
            _ => return Err(DataError::NothingUsable(words())),
        }
    }
    Ok(whole)
}

type Findings = (Joined, CellReader, Vec<Scan>);

fn assemble(
    known: Vec<Known>,
    (joined, reader, scans): Findings,
    keys: &Keys,
    team: &Team,
    (skipped, mut notes): (Vec<String>, Vec<String>),
) -> Result<CellData, DataError> {
    let cell = &keys.cell;
    let rule = Rule {
        min_cells: cell.min_cells,
        min_genes: cell.min_genes,
        keeps_genes: cell.reference.is_some(),
        label: cell.label.as_deref(),
        matrix: &cell.matrix,
    };
    let mut totals = Totals::default();
    for (file, scan) in known.iter().zip(&scans) {
        let path = &file.h5ad.path;
        if scan.totals.values == 0 {
            return Err(DataError::Content {
                path: path.clone(),
                problem: format!("{}: all values are 0: there is nothing to train on", file.matrix.place),
            });
        }
        notes.extend(filter::check_values(path, &scan.totals, &file.matrix.place, cell.log1p, file.h5ad.is_log1p)?);
        totals.merge(&scan.totals);
    }
    let genes = filter::genes(&scans, joined.names.len(), &rule)?;
    let Resolved { order, splits: _, list, lines } = resolve(&units(&known, keys), team.kept)?;
    let rows_of = |file: usize| order.iter().position(|n| *n == file).and_then(|at| list_unit(&list.units, at, &order));
    let (mut parts, mut left_out, mut rows, mut row) = (Vec::new(), LeftOut::default(), Vec::new(), 0u64);
    for (n, (file, scan)) in known.iter().zip(&scans).enumerate() {
        rows.push(row);
        row += file.matrix.cells;
        let before = parts.len();
        match rows_of(n) {
            Some(split) => {
                let own = filter::cells(scan, &genes, &rule, file.h5ad.labels.as_ref(), &split, &mut parts);
                (left_out.poor, left_out.unlabelled) = (left_out.poor + own.poor, left_out.unlabelled + own.unlabelled);
            }
            // New since the checkpoint: in no split.
            None => parts.resize(before + file.matrix.cells as usize, Part::Out as u8),
        }
    }
    if row > u64::from(u32::MAX) {
        return Err(DataError::NothingUsable(format!(
            "{row} cells are more than can be numbered: train on a part of the files"
        )));
    }
    let parts: Parts = parts.into();
    let labels: Vec<_> = known.iter().map(|file| file.h5ad.labels.clone()).collect();
    let (classes, labels) = filter::classes(&labels, &parts)?;
    let members = |wanted: &[Part]| Members::new(Arc::clone(&parts), wanted);
    let all = members(&[Part::Train, Part::Val, Part::Test]);
    if all.is_empty() {
        return Err(nothing_left(row, left_out, &rule));
    }
    let sets = [
        members(&[Part::Train]).limited(keys.data.max_train_windows),
        members(&[Part::Val]).limited(keys.data.max_val_windows),
        members(&[Part::Test]).limited(keys.data.max_val_windows),
    ];
    let most = totals.most as usize;
    let facts = Arc::new(CellFacts {
        genes: genes.kept.iter().map(|gene| joined.names[*gene as usize].clone()).collect(),
        classes,
        label: cell.label.clone(),
        cells: all.len(),
        most,
    });
    let cache = team.cache.clone().filter(|cache| {
        let sizes = (scans.as_slice(), cache.capacity_bytes());
        keys.data.cache != CachePolicy::Off && !is_better_read(&reader, sizes, keys, &mut notes)
    });
    let coding = coding(&scans, joined.names.len(), cache.as_ref().map(|cache| cache.capacity_bytes()));
    let mut base = 0;
    let files = scans.into_iter().map(|scan| {
        let [plain, gaps] = scan.entries;
        let entries =
            FileEntries { base, cells: scan.entry_cells, bytes: if coding == Coding::Gaps { gaps } else { plain } };
        base += entries.bytes.len() as u64;
        entries
    });
    let store = Arc::new(Store {
        files: files.collect(),
        reader,
        maps: joined.maps,
        columns: genes.columns,
        rows,
        coding,
        labels,
        short_ids: facts.genes.len() <= 1 << 16,
        short_values: totals.fraction.is_none() && totals.negative.is_none() && totals.max <= f64::from(u16::MAX),
    });
    notes.extend(self::notes(&facts, &joined.names, (row, known.len()), left_out, &totals, &sets));
    notes.extend(lines);
    let sees = keys.data.cache == CachePolicy::NextUse;
    let order = order_of(sets[0].len(), &keys.data, keys.seed, || Some(pages(&store, &sets[0])))?;
    let stay = match keys.data.cache {
        CachePolicy::Pin => true,
        CachePolicy::Auto => policy_of(&keys.data) == CacheMode::Pin,
        _ => false,
    };
    let cached = cache.map(|cache| Arc::new(Cached::new(CachedEntries::new(Arc::clone(&store), cache), stay)));
    let specs = fields(&store, most);
    let dataset = |members: Members, order| {
        Arc::new(CellDataset::new(Arc::clone(&store), cached.clone(), (members, all.clone()), specs.clone(), order))
    };
    let [train, val, test] = sets;
    let splits = [dataset(train, sees.then_some(order)), dataset(val, None), dataset(test, None)];
    let all = dataset(all.clone(), None);
    let [train, val, test] = splits.clone().map(|split| split as Arc<dyn Dataset>);
    let datasets =
        Datasets { skipped, notes, facts: Some(facts.clone()), split: Some(list), ..Datasets::new(train, val, test) };
    Ok(CellData { datasets, facts, store, totals, all, splits })
}

/// The split of the file that stands at `at` of `order`, as the checkpoint or this run has it.
fn list_unit(units: &[Unit], at: usize, order: &[usize]) -> Option<RowSplit> {
    // Units of the list that are there now come in this order.
    let present = if units.len() == order.len() { units.get(at) } else { None };
    present.and_then(|unit| unit.rows.clone())
}

/// The files with the split of a new run.
fn units(known: &[Known], keys: &Keys) -> Vec<Unit> {
    let (train_below, val_below) = bounds(keys.data.split_ratio);
    let unit = |file: &Known| {
        let print = file.h5ad.print;
        Unit {
            name: relative_name(&keys.data.dataset_path, &file.h5ad.path),
            prints: vec![Print(print)],
            splits: [true; 3],
            rows: Some(RowSplit { key: print, seed: keys.seed, train_below, val_below }),
        }
    };
    known.iter().map(unit).collect()
}

/// True if cells are better read where they lie: in blocks, which a page cache that holds less than all of them would fill anew in
/// every epoch, out of files that are stored as they are read. Measured: twice as fast.
fn is_better_read(
    reader: &CellReader,
    (scans, capacity): (&[Scan], u64),
    keys: &Keys,
    notes: &mut Vec<String>,
) -> bool {
    let in_blocks = keys.data.shuffle && policy_of(&keys.data) == CacheMode::Lru;
    let is_plain = (0..scans.len()).all(|file| reader.is_plain(file));
    let bytes: u64 = scans.iter().flat_map(|scan| &scan.entries[0]).map(|bytes| u64::from(*bytes)).sum();
    let better = in_blocks && is_plain && bytes > capacity;
    if better {
        notes.push("cells are read from their uncompressed files, which is faster in blocks than a page cache that holds a part".into());
    }
    better
}

/// How genes are written: in gaps where the cache holds more of the data set for it.
fn coding(scans: &[Scan], genes: usize, capacity_bytes: Option<u64>) -> Coding {
    let bytes = |coding: usize| scans.iter().flat_map(|scan| &scan.entries[coding]).map(|n| u64::from(*n)).sum::<u64>();
    let (plain, gaps) = (bytes(0), bytes(1));
    if capacity_bytes.is_some_and(|capacity| plain > capacity && gaps < plain) {
        return Coding::Gaps;
    }
    Coding::Plain { wide: genes > 1 << 16 }
}

fn nothing_left(rows: u64, left_out: LeftOut, rule: &Rule) -> DataError {
    let LeftOut { poor, unlabelled } = left_out;
    let mut why = Vec::new();
    if poor > 0 {
        why.push(format!("{poor} express fewer than {} of the genes in use (cell.min_genes)", rule.min_genes));
    }
    if unlabelled > 0 {
        why.push(format!("{unlabelled} have no label in obs/{} (cell.label)", rule.label.unwrap_or("")));
    }
    DataError::NothingUsable(format!("none of {rows} cells is left: {}", why.join(", ")))
}

fn notes(
    facts: &CellFacts,
    genes: &[String],
    (rows, files): (u64, usize),
    left_out: LeftOut,
    totals: &Totals,
    sets: &[Members; 3],
) -> Vec<String> {
    let s = if files == 1 { "" } else { "s" };
    let share = totals.values as f64 / (rows.max(1) as f64 * genes.len().max(1) as f64) * 100.0;
    let mut notes = vec![format!(
        "cells: {} of {rows} in {files} file{s}; genes: {} of {}; {share:.1} % of the values are not 0, the greatest is {}",
        facts.cells,
        facts.genes.len(),
        genes.len(),
        totals.max
    )];
    if left_out.poor > 0 {
        notes.push(format!("{} cells that express few genes are left out (cell.min_genes)", left_out.poor));
    }
    if left_out.unlabelled > 0 {
        let label = facts.label.as_deref().unwrap_or_default();
        notes.push(format!(
            "warning: {} cells have no label in obs/{label}: left out; cell.label: null trains on them too, without labels",
            left_out.unlabelled
        ));
    }
    if let Some(label) = &facts.label {
        notes.push(format!("labels: {} classes in obs/{label}", facts.classes.len()));
    }
    let [train, val, test] = sets.each_ref().map(Members::len);
    notes.push(format!("split by cells: {train} train, {val} val, {test} test"));
    notes
}
