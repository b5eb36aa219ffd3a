//! A matrix that is stored by genes, written once more by cells, into a file that later starts find.
//!
//! Cells are taken in ranges whose values fit the memory given; each range is one pass over the file. Genes come in rising
//! order, so those of a cell do as well.

use super::cells::name_of;
use super::kept::{Draft, Kinds};
use super::matrix::{Matrix, Starts};
use crate::data::DataError;
use crate::data::source::chunks::LruChunks;
use crate::data::source::file_error;
use crate::data::source::hdf5::array::{ArrayReader, Buffers, Number};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Extension of these copies.
pub const WHY: &str = "csr";
/// Values read at a time.
const BLOCK: u64 = 1 << 18;

/// Types of a copy of `matrix`.
pub fn kinds(matrix: &Matrix) -> Kinds {
    Kinds { gene: Number::U32, value: matrix.data.number }
}

/// Writes the copy of `matrix`, a matrix by genes of the file at `source`, with about `memory` bytes, and describes it.
///
/// # Errors
/// The file cannot be read or names cells that it does not have; there is no room for the copy.
pub fn write(source: &Path, matrix: &Matrix, copy: &Path, memory: u64) -> Result<Matrix, DataError> {
    let indices = matrix.indices.clone().ok_or_else(|| file_error(source, "a dense matrix is not transposed"))?;
    let kind = indices.number;
    let reader = ArrayReader::new(vec![indices, matrix.data.clone()], Vec::new(), Arc::new(LruChunks::new(16 << 20)));
    let mut pass =
        Pass { source, matrix, kind, reader, buffers: Buffers::default(), bytes: Vec::new(), ids: Vec::new() };
    let draft = Draft::create(matrix, copy, pass.lengths()?, kinds(matrix))?;
    let width = matrix.data.number.bytes();
    let starts = draft.starts();
    for cells in ranges(starts, (memory / (4 + width as u64)).max(1)) {
        let (genes, data) = pass.range(starts, cells.clone(), width)?;
        draft.put(starts.at(cells.start), &genes, &data)?;
    }
    draft.finish()
}

/// Ranges of cells of at most `values` values each, a single cell aside.
fn ranges(starts: &Starts, values: u64) -> Vec<Range<u64>> {
    let (mut ranges, mut from, mut held) = (Vec::new(), 0, 0);
    for (cell, length) in (0u64..).zip(starts.lengths()) {
        if held > 0 && held + u64::from(*length) > values {
            ranges.push(from..cell);
            (from, held) = (cell, 0);
        }
        held += u64::from(*length);
    }
    ranges.push(from..starts.rows());
    ranges
}

/// Passes over a matrix by genes.
struct Pass<'a> {
    source: &'a Path,
    matrix: &'a Matrix,
    kind: Number,
    reader: ArrayReader,
    buffers: Buffers,
    bytes: Vec<u8>,
    ids: Vec<i64>,
}

impl Pass<'_> {
    /// Values of each cell. Checks every cell's number.
    fn lengths(&mut self) -> Result<Vec<u32>, DataError> {
        let mut lengths = vec![0u32; self.matrix.cells as usize];
        for start in (0..self.matrix.values()).step_by(BLOCK as usize) {
            self.read_ids(start)?;
            for (n, id) in (start..).zip(&self.ids) {
                let length = usize::try_from(*id).ok().and_then(|id| lengths.get_mut(id));
                let Some(length) = length else {
                    let Matrix { place, cells, .. } = self.matrix;
                    let name = name_of(self.source);
                    let problem = format!(
                        "{place}/indices: value {n} of {name} is in cell {id}, there are {cells}: it is damaged"
                    );
                    return Err(DataError::Content { path: self.source.to_owned(), problem });
                };
                *length += 1;
            }
        }
        Ok(lengths)
    }

    /// Genes and values of the cells `cells`, as bytes.
    fn range(&mut self, starts: &Starts, cells: Range<u64>, width: usize) -> Result<(Vec<u8>, Vec<u8>), DataError> {
        let first = starts.at(cells.start);
        let values = (starts.at(cells.end) - first) as usize;
        let (mut genes, mut data) = (vec![0; 4 * values], vec![0; width * values]);
        let mut next: Vec<usize> = cells.clone().map(|cell| (starts.at(cell) - first) as usize).collect();
        let mut block = Vec::new();
        let (mut gene, mut gene_end) = (0, self.matrix.starts.at(1));
        for start in (0..self.matrix.values()).step_by(BLOCK as usize) {
            self.read_ids(start)?;
            self.reader.read(1, start..start + self.ids.len() as u64, &mut block, &mut self.buffers)?;
            for (n, (id, value)) in (start..).zip(self.ids.iter().zip(block.chunks_exact(width))) {
                while n >= gene_end {
                    gene += 1;
                    gene_end += u64::from(self.matrix.starts.lengths()[gene as usize]);
                }
                let Some(place) = (*id as u64).checked_sub(cells.start).and_then(|n| next.get_mut(n as usize)) else {
                    continue;
                };
                genes[4 * *place..4 * *place + 4].copy_from_slice(&u32::to_ne_bytes(gene));
                data[width * *place..width * (*place + 1)].copy_from_slice(value);
                *place += 1;
            }
        }
        Ok((genes, data))
    }

    fn read_ids(&mut self, start: u64) -> Result<(), DataError> {
        self.ids.clear();
        let end = (start + BLOCK).min(self.matrix.values());
        self.reader.read(0, start..end, &mut self.bytes, &mut self.buffers)?;
        self.kind.whole(&self.bytes, &mut self.ids);
        Ok(())
    }
}
