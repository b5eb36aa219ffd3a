//! The cells of all files, and the entries of the page cache that hold runs of them.

use super::entry::{self, Coding, Pen, Sink, Value};
use super::genes::NONE;
use super::scan::in_places;
use crate::data::entries::EntrySource;
use crate::data::source::file_error;
use crate::data::source::h5ad::{CellReader, Cells};
use crate::data::source::hdf5::array::Buffers;
use crate::data::{DataError, Scratch};
use std::ops::Range;
use std::sync::Arc;

/// Label of a cell that has none.
pub const UNLABELLED: u16 = u16::MAX;

/// Entries of one file.
pub struct FileEntries {
    /// Entries of the files before.
    pub base: u64,
    /// Cells of an entry.
    pub cells: u64,
    pub bytes: Vec<u32>,
}

/// Cells of all files. Rows are numbered through all files.
pub struct Store {
    pub reader: CellReader,
    /// Per file the places of its genes among those of the data set; `None`: the same.
    pub maps: Vec<Option<Arc<[u32]>>>,
    /// Columns of the genes of the data set, [`NONE`] for those left out; `None`: all, in the same order.
    pub columns: Option<Arc<[u32]>>,
    pub files: Vec<FileEntries>,
    /// First row of each file.
    pub rows: Vec<u64>,
    pub coding: Coding,
    /// Per row; empty where cells have no labels.
    pub labels: Vec<u16>,
    /// Genes of a batch are u16.
    pub short_ids: bool,
    /// Values of a batch are u16.
    pub short_values: bool,
}

/// Memory that a thread keeps between cells.
#[derive(Default)]
struct Own {
    cells: Cells,
    buffers: Buffers,
    ids: Vec<u32>,
    values: Vec<f64>,
    kept_ids: Vec<u32>,
    kept_values: Vec<f64>,
}

impl Own {
    fn bytes(&self) -> usize {
        let Self { cells, buffers, ids, values, kept_ids, kept_values } = self;
        cells.bytes()
            + buffers.bytes()
            + 4 * (ids.capacity() + kept_ids.capacity())
            + 8 * (values.capacity() + kept_values.capacity())
    }
}

/// A cell's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub file: usize,
    /// Row in the file.
    pub row: u64,
    /// Key of its entry, and its number in it.
    pub key: u64,
    pub number: usize,
}

/// Slices of a batch that a cell is written to: genes of `I` bytes, values of `V`; counts where these are 2, else f32.
struct Fields<'a, const I: usize, const V: usize> {
    ids: &'a mut [[u8; I]],
    values: &'a mut [[u8; V]],
    count: usize,
    overflown: bool,
    columns: Option<&'a [u32]>,
}

impl<const I: usize, const V: usize> Sink for Fields<'_, I, V> {
    #[inline(always)]
    fn take(&mut self, gene: u32, value: Value) {
        let column = match self.columns {
            None => gene,
            Some(columns) => match columns.get(gene as usize) {
                Some(column) if *column != NONE => *column,
                _ => return,
            },
        };
        let (Some(id), Some(cell)) = (self.ids.get_mut(self.count), self.values.get_mut(self.count)) else {
            self.overflown = true;
            return;
        };
        *id = low(column);
        match (V, value) {
            (2, Value::Count(count)) => *cell = low(count),
            (2, Value::Number(_)) => self.overflown = true,
            (_, Value::Count(count)) => *cell = low((count as f32).to_bits()),
            (_, Value::Number(number)) => *cell = low(number.to_bits()),
        }
        self.count += 1;
    }
}

/// The low bytes of a number, in this machine's order.
#[inline(always)]
fn low<const N: usize>(number: u32) -> [u8; N] {
    let bytes = number.to_le_bytes();
    let mut low = [0; N];
    low.copy_from_slice(&bytes[..N]);
    if cfg!(target_endian = "big") {
        low.reverse();
    }
    low
}

/// Where a cell is read from.
enum Origin<'a> {
    /// The bytes of its entry.
    Entry(&'a [u8]),
    /// A cell as it was read.
    File(&'a mut Own),
}

impl Store {
    /// Where row `row` of all files lies.
    pub fn place(&self, row: u64) -> Option<Place> {
        let file = self.rows.partition_point(|first| *first <= row).checked_sub(1)?;
        let row = row - self.rows[file];
        let entries = &self.files[file];
        let inside = row < self.reader.sources()[file].cells;
        let (entry, number) = (row / entries.cells, (row % entries.cells) as usize);
        inside.then_some(Place { file, row, key: entries.base + entry, number })
    }

    /// File and entry in it.
    fn locate(&self, key: u64) -> Option<(usize, u64)> {
        let file = self.files.partition_point(|file| file.base <= key).checked_sub(1)?;
        let entry = key - self.files[file].base;
        ((entry as usize) < self.files[file].bytes.len()).then_some((file, entry))
    }

    /// Rows of entry `entry` of `file`, in the file.
    fn entry_rows(&self, file: usize, entry: u64) -> Range<u64> {
        let cells = self.files[file].cells;
        entry * cells..((entry + 1) * cells).min(self.reader.sources()[file].cells)
    }

    /// Rows of the entry of `key`, through all files; none of a key that is not there.
    pub fn entry_rows_of(&self, key: u64) -> Range<u64> {
        self.locate(key).map_or(0..0, |(file, entry)| {
            let (rows, first) = (self.entry_rows(file, entry), self.rows[file]);
            first + rows.start..first + rows.end
        })
    }

    /// Cells of the entry of `key`.
    pub fn entry_cells(&self, key: u64) -> usize {
        let rows = self.entry_rows_of(key);
        (rows.end - rows.start) as usize
    }

    /// First rows of all entries, through all files.
    pub fn entry_starts(&self) -> impl Iterator<Item = u64> {
        self.files
            .iter()
            .zip(&self.rows)
            .flat_map(|(file, first)| (0..file.bytes.len() as u64).map(move |n| first + n * file.cells))
    }

    /// Reads a cell out of the bytes of its entry, into `ids` and `values`; the bytes written to each.
    ///
    /// # Errors
    /// The entry is damaged, or not of this data set.
    pub fn from_entry(
        &self,
        place: Place,
        bytes: &[u8],
        (ids, values): (&mut [u8], &mut [u8]),
    ) -> Result<(usize, usize), DataError> {
        if self.short_ids && self.short_values {
            let (ids, values) = (ids.as_chunks_mut::<2>().0, values.as_chunks_mut::<2>().0);
            if let Some(count) = entry::copy(bytes, self.entry_cells(place.key), place.number, ids, values) {
                return Ok((2 * count, 2 * count));
            }
        }
        self.write(place, Origin::Entry(bytes), ids, values)
    }

    /// Reads a cell out of its file, into `ids` and `values`; the bytes written to each.
    ///
    /// # Errors
    /// The file cannot be read, or is not the one that was scanned.
    pub fn from_file(
        &self,
        place: Place,
        scratch: &mut Scratch,
        (ids, values): (&mut [u8], &mut [u8]),
    ) -> Result<(usize, usize), DataError> {
        let own = own(&mut scratch.extra);
        if self.short_ids && self.short_values && self.maps.get(place.file).is_some_and(Option::is_none) {
            let narrow = (ids.as_chunks_mut::<2>().0, values.as_chunks_mut::<2>().0);
            let (cell, columns) = ((place.file, place.row), self.columns.as_deref());
            if let Some(count) = self.reader.read_narrow(cell, &mut own.cells, &mut own.buffers, columns, narrow)? {
                return Ok((2 * count, 2 * count));
            }
        } else {
            self.reader.read(place.file, place.row..place.row + 1, &mut own.cells, &mut own.buffers)?;
        }
        self.write(place, Origin::File(own), ids, values)
    }

    fn write(
        &self,
        place: Place,
        from: Origin,
        ids: &mut [u8],
        values: &mut [u8],
    ) -> Result<(usize, usize), DataError> {
        match (self.short_ids, self.short_values) {
            (true, true) => self.write_as::<2, 2>(place, from, ids, values),
            (true, false) => self.write_as::<2, 4>(place, from, ids, values),
            (false, true) => self.write_as::<4, 2>(place, from, ids, values),
            (false, false) => self.write_as::<4, 4>(place, from, ids, values),
        }
    }

    fn write_as<const I: usize, const V: usize>(
        &self,
        place: Place,
        from: Origin,
        ids: &mut [u8],
        values: &mut [u8],
    ) -> Result<(usize, usize), DataError> {
        let (ids, values) = (ids.as_chunks_mut::<I>().0, values.as_chunks_mut::<V>().0);
        let mut fields = Fields { ids, values, count: 0, overflown: false, columns: None };
        match from {
            Origin::Entry(bytes) => {
                let whole = entry::read(bytes, self.entry_cells(place.key), place.number, &mut fields);
                if !whole || fields.overflown {
                    let path = &self.reader.sources()[place.file].path;
                    let problem = format!("cell {}: its entry of the page cache is damaged: start again", place.row);
                    return Err(file_error(path, problem));
                }
            }
            Origin::File(own) => {
                fields.columns = self.columns.as_deref();
                let (ids, values) = self.cell(place.file, 0, &own.cells, &mut own.ids, &mut own.values);
                for (id, value) in ids.iter().zip(values) {
                    let is_count = entry::is_count(*value);
                    fields.take(
                        *id,
                        if is_count { Value::Count(*value as i64 as u32) } else { Value::Number(*value as f32) },
                    );
                }
                if fields.overflown {
                    return Err(self.changed(place.file, place.row));
                }
            }
        }
        Ok((fields.count * I, fields.count * V))
    }

    fn changed(&self, file: usize, row: u64) -> DataError {
        let path = &self.reader.sources()[file].path;
        file_error(path, format!("cell {row} is not as it was when the file was scanned: start again"))
    }

    /// Cell `n` of those read, in the genes of the data set.
    fn cell<'a>(
        &self,
        file: usize,
        n: usize,
        cells: &'a Cells,
        ids: &'a mut Vec<u32>,
        values: &'a mut Vec<f64>,
    ) -> (&'a [u32], &'a [f64]) {
        let (own_ids, own_values) = cells.cell(n);
        match self.maps.get(file).and_then(Option::as_deref) {
            None => (own_ids, own_values),
            Some(map) => {
                in_places(own_ids, own_values, map, ids, values);
                (ids, values)
            }
        }
    }

    /// Reports a thread's memory to the ledger.
    pub fn count(&self, scratch: &mut Scratch) {
        let bytes = own(&mut scratch.extra).bytes();
        scratch.count_with(bytes);
    }
}

/// Genes in use as columns of the data set, and their values.
fn in_columns<'a>(
    columns: &[u32],
    (ids, values): (&[u32], &[f64]),
    (kept_ids, kept_values): (&'a mut Vec<u32>, &'a mut Vec<f64>),
) -> (&'a [u32], &'a [f64]) {
    kept_ids.clear();
    kept_values.clear();
    for (id, value) in ids.iter().zip(values) {
        if let Some(column) = columns.get(*id as usize).filter(|column| **column != NONE) {
            kept_ids.push(*column);
            kept_values.push(*value);
        }
    }
    (kept_ids, kept_values)
}

fn own(extra: &mut Option<Box<dyn std::any::Any + Send>>) -> &mut Own {
    if !extra.as_ref().is_some_and(|kept| kept.is::<Own>()) {
        *extra = None;
    }
    let kept = extra.get_or_insert_with(|| Box::new(Own::default()));
    match kept.downcast_mut() {
        Some(own) => own,
        None => unreachable!("only an Own is kept here"),
    }
}

impl EntrySource for Store {
    fn entry_bytes(&self, key: u64) -> u64 {
        self.locate(key).map_or(0, |(file, entry)| u64::from(self.files[file].bytes[entry as usize]))
    }

    fn fill_entry(&self, key: u64, out: &mut [u8], scratch: &mut Scratch) -> Result<(), DataError> {
        let count = self.files.last().map_or(0, |file| file.base + file.bytes.len() as u64);
        let missing = DataError::OutOfRange { what: "entry", index: key, place: "the data set", count };
        let (file, entry) = self.locate(key).ok_or(missing)?;
        let rows = self.entry_rows(file, entry);
        let own = own(&mut scratch.extra);
        self.reader.read(file, rows.clone(), &mut own.cells, &mut own.buffers)?;
        let Own { cells, ids, values, kept_ids, kept_values, .. } = own;
        let (count, bytes) = (cells.len(), out.len());
        let mut pen = Pen::new(out, count, self.coding).ok_or_else(|| self.changed(file, rows.start))?;
        // Bytes as they were scanned, with the genes out of use.
        let mut scanned = entry::entry_bytes(count, 0);
        for n in 0..count {
            let cell = self.cell(file, n, cells, ids, values);
            let (kept, out_of_use) = match &self.columns {
                None => (cell, None),
                Some(columns) => {
                    let bytes = entry::cell_bytes(cell.0, cell.1, self.coding);
                    (in_columns(columns, cell, (kept_ids, kept_values)), Some(bytes))
                }
            };
            let written = pen.cell(kept.0, kept.1).ok_or_else(|| self.changed(file, rows.start + n as u64))?;
            scanned += out_of_use.unwrap_or(written);
        }
        if pen.end() && scanned == bytes { Ok(()) } else { Err(self.changed(file, rows.start)) }
    }
}
