//! One streaming pass over the cells of a file, in bounded memory: which genes are expressed in how many cells, which cells
//! express how many genes, and how large the entries of a page cache will be. Every value is checked.
//!
//! One pass is enough for genes first and cells then: of a gene that few cells express, those cells are kept, and when it is
//! left out they lose it.

use super::entry;
use super::genes::NONE;
use crate::data::DataError;
use crate::data::source::h5ad::{CellReader, Cells, Form};
use crate::data::source::hdf5::array::Buffers;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Bytes of an entry of the page cache, about: read in one go, and small enough to be shared by few.
const ENTRY_BYTES: u64 = 96 << 10;
/// Most entries of a data set, about: each costs the directory and every rank a few hundred bytes.
const MOST_ENTRIES: u64 = 1 << 18;
/// Entries that a thread scans at a time.
const TASK_ENTRIES: u64 = 8;

/// Findings about a file, or about a run of its entries.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scan {
    /// Cells of an entry.
    pub entry_cells: u64,
    /// Genes that each cell expresses; 65,535 stands for that many or more.
    pub expressed: Vec<u16>,
    /// Bytes of each entry, by both codings.
    pub entries: [Vec<u32>; 2],
    /// Cells that express each gene.
    pub counts: Vec<u32>,
    /// Gene and cell, in rising order, for genes that too few cells express.
    pub rare: Vec<(u32, u32)>,
    pub totals: Totals,
}

/// Facts on the values of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Totals {
    /// Values of genes in use that are not 0.
    pub values: u64,
    /// Most values of a cell.
    pub most: u32,
    pub max: f64,
    /// A value that is no whole number: cell, gene and value.
    pub fraction: Option<(u64, u32, f64)>,
    pub negative: Option<(u64, u32, f64)>,
}

impl Totals {
    pub fn merge(&mut self, other: &Totals) {
        self.values += other.values;
        self.most = self.most.max(other.most);
        self.max = self.max.max(other.max);
        let first = |a: Option<(u64, u32, f64)>, b: Option<(u64, u32, f64)>| match (a, b) {
            (Some(a), Some(b)) => Some(if (b.0, b.1) < (a.0, a.1) { b } else { a }),
            (a, b) => a.or(b),
        };
        self.fraction = first(self.fraction, other.fraction);
        self.negative = first(self.negative, other.negative);
    }
}

/// Purpose of a scan.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// Places of the file's genes among those of the data set; `None`: the same.
    pub map: Option<&'a [u32]>,
    /// Genes of the data set.
    pub genes: usize,
    pub min_cells: usize,
}

/// Cells of an entry of `file`: as many as make entries of the usual size.
pub fn entry_cells(reader: &CellReader, file: usize) -> u64 {
    let bytes = |file: usize| {
        let source = &reader.sources()[file];
        // Three bytes a value; dense rows are mostly zeros.
        let share = if source.form == Form::Dense { 4 } else { 1 };
        reader.stored(file, 0..source.cells) * 3 / share
    };
    let Some(source) = reader.sources().get(file) else { return 1 };
    let all: u64 = (0..reader.sources().len()).map(bytes).sum();
    let entry = ENTRY_BYTES.max(all / MOST_ENTRIES);
    (entry / (bytes(file) / source.cells.max(1)).max(16)).clamp(1, 1024)
}

/// Scans the entries `entries` of `file` in threads.
///
/// # Errors
/// The file cannot be read, or a value is not what a count can be.
pub fn scan(
    reader: &CellReader,
    file: usize,
    entries: Range<u64>,
    wanted: Wanted,
    threads: usize,
) -> Result<Scan, DataError> {
    let per_entry = entry_cells(reader, file);
    let cells = reader.sources().get(file).map_or(0, |source| source.cells);
    let tasks: Vec<Range<u64>> = entries
        .clone()
        .step_by(TASK_ENTRIES as usize)
        .map(|first| first..(first + TASK_ENTRIES).min(entries.end))
        .collect();
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let results: Mutex<Vec<(usize, Result<Pages, DataError>)>> = Mutex::default();
    let tallies: Mutex<Vec<Tally>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..threads.clamp(1, tasks.len().max(1)) {
            scope.spawn(|| {
                let (mut read, mut buffers) = (Cells::default(), Buffers::default());
                let mut tally = Tally::new(wanted.genes);
                while !failed.load(Ordering::Relaxed) {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    let Some(task) = tasks.get(n) else { break };
                    let mut pages = Pages::default();
                    let result = task.clone().try_for_each(|entry| {
                        let range = entry * per_entry..((entry + 1) * per_entry).min(cells);
                        reader.read(file, range.clone(), &mut read, &mut buffers)?;
                        tally.add(range.start, &mut read, wanted, &mut pages);
                        Ok(())
                    });
                    failed.fetch_or(result.is_err(), Ordering::Relaxed);
                    results.lock().unwrap_or_else(PoisonError::into_inner).push((n, result.map(|()| pages)));
                }
                tallies.lock().unwrap_or_else(PoisonError::into_inner).push(tally);
            });
        }
    });
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.sort_by_key(|(n, _)| *n);
    let mut whole = Scan { entry_cells: per_entry, counts: vec![0; wanted.genes], ..Scan::default() };
    for (_, result) in results {
        let Pages { expressed, entries } = result?;
        whole.expressed.extend(expressed);
        whole.entries.iter_mut().zip(entries).for_each(|(all, own)| all.extend(own));
    }
    let tallies = tallies.into_inner().unwrap_or_else(PoisonError::into_inner);
    for tally in &tallies {
        whole.counts.iter_mut().zip(&tally.counts).for_each(|(all, own)| *all += own);
        whole.totals.merge(&tally.totals);
    }
    let few = |gene: u32| (whole.counts[gene as usize] as usize) < wanted.min_cells;
    let rare = tallies.into_iter().flat_map(|tally| tally.rare.into_iter().zip(0u32..));
    let pairs =
        rare.filter(|(_, gene)| few(*gene)).flat_map(|(cells, gene)| cells.into_iter().map(move |cell| (gene, cell)));
    whole.rare = pairs.collect();
    whole.rare.sort_unstable();
    Ok(whole)
}

/// Findings in the order of cells.
#[derive(Default)]
struct Pages {
    expressed: Vec<u16>,
    entries: [Vec<u32>; 2],
}

/// Sums of one thread.
struct Tally {
    counts: Vec<u32>,
    /// Cells of each gene, while they are few.
    rare: Vec<Vec<u32>>,
    totals: Totals,
    ids: Vec<u32>,
    values: Vec<f64>,
}

impl Tally {
    fn new(genes: usize) -> Self {
        let rare = vec![Vec::new(); genes];
        Self { counts: vec![0; genes], rare, totals: Totals::default(), ids: Vec::new(), values: Vec::new() }
    }

    /// Takes in an entry, whose first cell is `first`.
    fn add(&mut self, first: u64, read: &mut Cells, wanted: Wanted, pages: &mut Pages) {
        let wide = wanted.genes > 1 << 16;
        let mut bytes = [0, 0];
        for n in 0..read.len() {
            let (own_ids, own_values) = read.cell(n);
            let mapped = wanted.map.map(|map| in_places(own_ids, own_values, map, &mut self.ids, &mut self.values));
            let (ids, values) = match mapped {
                Some(()) => (self.ids.as_slice(), self.values.as_slice()),
                None => (own_ids, own_values),
            };
            let cell = first + n as u64;
            let mut expressed = 0usize;
            for (gene, value) in ids.iter().zip(values) {
                if *value > 0.0 {
                    expressed += 1;
                    let count = &mut self.counts[*gene as usize];
                    *count += 1;
                    let rare = &mut self.rare[*gene as usize];
                    if (*count as usize) < wanted.min_cells {
                        rare.push(cell as u32);
                    } else if !rare.is_empty() {
                        *rare = Vec::new();
                    }
                }
                see(&mut self.totals, cell, *gene, *value);
            }
            self.totals.values += ids.len() as u64;
            self.totals.most = self.totals.most.max(ids.len() as u32);
            pages.expressed.push(expressed.min(usize::from(u16::MAX)) as u16);
            let own = entry::both_bytes(ids, values, wide);
            bytes.iter_mut().zip(own).for_each(|(sum, own)| *sum += own);
        }
        for (list, bytes) in pages.entries.iter_mut().zip(bytes) {
            list.push(entry::entry_bytes(read.len(), bytes).min(u32::MAX as usize) as u32);
        }
    }
}

#[inline]
fn see(totals: &mut Totals, cell: u64, gene: u32, value: f64) {
    totals.max = totals.max.max(value);
    if value < 0.0 && totals.negative.is_none_or(|(of, ..)| cell < of) {
        totals.negative = Some((cell, gene, value));
    }
    if value.fract() != 0.0 && totals.fraction.is_none_or(|(of, ..)| cell < of) {
        totals.fraction = Some((cell, gene, value));
    }
}

/// A file's genes by their places in the data set, in rising order; those without a place are left out.
pub fn in_places(ids: &[u32], values: &[f64], map: &[u32], into: &mut Vec<u32>, into_values: &mut Vec<f64>) {
    into.clear();
    into_values.clear();
    let mut rises = true;
    for (id, value) in ids.iter().zip(values) {
        let place = map.get(*id as usize).copied().unwrap_or(NONE);
        if place != NONE {
            rises &= into.last().is_none_or(|last| *last < place);
            into.push(place);
            into_values.push(*value);
        }
    }
    if !rises {
        let mut order: Vec<u32> = (0..into.len() as u32).collect();
        order.sort_unstable_by_key(|n| into[*n as usize]);
        *into_values = order.iter().map(|n| into_values[*n as usize]).collect();
        into.sort_unstable();
    }
}

impl Scan {
    /// Appends the findings about the entries that follow.
    pub fn append(&mut self, next: Scan, min_cells: usize) {
        self.entry_cells = next.entry_cells;
        self.expressed.extend(next.expressed);
        self.entries.iter_mut().zip(next.entries).for_each(|(all, own)| all.extend(own));
        self.counts.resize(next.counts.len().max(self.counts.len()), 0);
        self.counts.iter_mut().zip(&next.counts).for_each(|(all, own)| *all += own);
        self.totals.merge(&next.totals);
        self.rare.extend(next.rare);
        let counts = &self.counts;
        self.rare.retain(|(gene, _)| (counts[*gene as usize] as usize) < min_cells);
        self.rare.sort_unstable();
    }

    /// Checks findings that were kept or came from another rank.
    pub fn fits(&self, cells: u64, genes: usize, per_entry: u64) -> bool {
        let entries = cells.div_ceil(per_entry.max(1));
        self.entry_cells == per_entry
            && self.expressed.len() as u64 == cells
            && self.counts.len() == genes
            && self.entries.iter().all(|list| list.len() as u64 == entries)
            && self.rare.iter().all(|(gene, cell)| (*gene as usize) < genes && u64::from(*cell) < cells)
    }
}
