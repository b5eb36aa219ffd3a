//! A matrix that is stored by genes, written once more by cells, into a file that later starts find.
//!
//! Cells are taken in ranges whose values fit the memory given; each range is one pass over the file. Genes come in rising
//! order, so those of a cell do as well.

use super::cells::name_of;
use super::matrix::{Form, Matrix, Starts};
use crate::data::DataError;
use crate::data::source::chunks::LruChunks;
use crate::data::source::file_error;
use crate::data::source::hdf5::array::{Array, ArrayReader, Buffers, Number, Place};
use crate::data::source::hdf5::open::stamp;
use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const MAGIC: [u8; 8] = *b"hr-cells";
/// Magic, cells, genes, values, bytes of a value, checksum of the lengths.
const HEAD_BYTES: u64 = 64;
/// Values read at a time.
const BLOCK: u64 = 1 << 18;

/// Where the copy of a matrix is kept.
pub fn path(folder: &Path, print: u64, place: &str) -> PathBuf {
    let place = place.replace('/', "-");
    folder.join(format!("cell-{print:016x}-{place}.csr"))
}

/// The copy at `copy` of `matrix`, where it is there and whole.
pub fn find(copy: &Path, matrix: &Matrix) -> Option<Matrix> {
    let mut head = [0; HEAD_BYTES as usize];
    let mut file = File::open(copy).ok()?;
    file.read_exact(&mut head).ok()?;
    let number = |n: usize| head.get(8 * n..8 * n + 8).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes);
    let (values, width) = (matrix.values(), matrix.data.number.bytes() as u64);
    let alike = head[..8] == MAGIC
        && [matrix.cells, matrix.genes, values, width].into_iter().zip(1..).all(|(n, at)| number(at) == Some(n));
    let total = HEAD_BYTES + 4 * matrix.cells + values * (4 + width);
    if !alike || file.metadata().ok()?.len() != total {
        return None;
    }
    let mut lengths = vec![0; 4 * matrix.cells as usize];
    file.read_exact(&mut lengths).ok()?;
    if number(5) != Some(u64::from(libdeflater::crc32(&lengths))) {
        return None;
    }
    let lengths = lengths.as_chunks::<4>().0.iter().map(|cell| u32::from_le_bytes(*cell)).collect();
    of_file(copy, matrix, lengths).ok().filter(|copy| copy.values() == values)
}

/// Writes the copy of `matrix`, a matrix by genes of the file at `source`, with about `memory` bytes, and describes it.
///
/// # Errors
/// The file cannot be read or names cells that it does not have; there is no room for the copy.
pub fn write(source: &Path, matrix: &Matrix, copy: &Path, memory: u64) -> Result<Matrix, DataError> {
    let beside = copy.with_extension(format!("partial-{}", std::process::id()));
    let written = write_beside(source, matrix, &beside, memory).and_then(|lengths| {
        std::fs::rename(&beside, copy).map_err(|error| no_room(copy, error))?;
        of_file(copy, matrix, lengths)
    });
    if written.is_err() {
        let _ = std::fs::remove_file(&beside);
    }
    written
}

fn no_room(copy: &Path, error: std::io::Error) -> DataError {
    file_error(
        copy,
        format!("the copy by cells cannot be written: {error}: make room, or write the matrix as csr_matrix"),
    )
}

fn of_file(copy: &Path, matrix: &Matrix, lengths: Vec<u32>) -> Result<Matrix, DataError> {
    let starts = Starts::new(lengths);
    let (file_bytes, modified_ns) = stamp(copy)?;
    let array = |dataset: &str, number: Number, addr: u64| Array {
        path: copy.to_owned(),
        dataset: format!("{}/{dataset}", matrix.place),
        rows: starts.values(),
        columns: 1,
        is_flat: true,
        number,
        place: Place::Contiguous { addr },
        file_bytes,
        modified_ns,
    };
    let first = HEAD_BYTES + 4 * matrix.cells;
    let (data, indices) =
        (array("data", matrix.data.number, first + 4 * starts.values()), array("indices", Number::U32, first));
    let Matrix { cells, genes, place, .. } = matrix;
    Ok(Matrix {
        form: Form::Csr,
        cells: *cells,
        genes: *genes,
        place: place.clone(),
        data,
        indices: Some(indices),
        starts,
    })
}

fn write_beside(source: &Path, matrix: &Matrix, beside: &Path, memory: u64) -> Result<Vec<u32>, DataError> {
    let failed = |error| no_room(beside, error);
    let indices = matrix.indices.clone().ok_or_else(|| file_error(source, "a dense matrix is not transposed"))?;
    let kind = indices.number;
    let reader = ArrayReader::new(vec![indices, matrix.data.clone()], Vec::new(), Arc::new(LruChunks::new(16 << 20)));
    let mut pass =
        Pass { source, matrix, kind, reader, buffers: Buffers::default(), bytes: Vec::new(), ids: Vec::new() };
    let lengths = pass.lengths()?;
    if let Some(folder) = beside.parent() {
        std::fs::create_dir_all(folder).map_err(failed)?;
    }
    let file = File::create(beside).map_err(failed)?;
    let width = matrix.data.number.bytes() as u64;
    let starts = Starts::new(lengths.clone());
    let genes_at = HEAD_BYTES + 4 * matrix.cells;
    let data_at = genes_at + 4 * starts.values();
    let mut out = BufWriter::new(&file);
    let plain: Vec<u8> = lengths.iter().flat_map(|length| length.to_le_bytes()).collect();
    let sum = u64::from(libdeflater::crc32(&plain));
    let mut head = MAGIC.to_vec();
    [matrix.cells, matrix.genes, starts.values(), width, sum].iter().for_each(|n| head.extend(n.to_le_bytes()));
    head.resize(HEAD_BYTES as usize, 0);
    out.write_all(&head).and_then(|()| out.write_all(&plain)).and_then(|()| out.flush()).map_err(failed)?;
    drop(out);
    for cells in ranges(&starts, (memory / (4 + width)).max(1)) {
        let (genes, data) = pass.range(&starts, cells.clone(), width as usize)?;
        use std::os::unix::fs::FileExt;
        let first = starts.at(cells.start);
        file.write_all_at(&genes, genes_at + 4 * first).map_err(failed)?;
        file.write_all_at(&data, data_at + width * first).map_err(failed)?;
    }
    file.sync_data().map_err(failed)?;
    Ok(lengths)
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
            block.clear();
            self.reader.read(1, start..start + self.ids.len() as u64, &mut block, &mut self.buffers)?;
            for (n, (id, value)) in (start..).zip(self.ids.iter().zip(block.chunks_exact(width))) {
                while n >= gene_end {
                    gene += 1;
                    gene_end += u64::from(self.matrix.starts.lengths()[gene as usize]);
                }
                let Some(place) = (*id as u64).checked_sub(cells.start).and_then(|n| next.get_mut(n as usize)) else {
                    continue;
                };
                genes[4 * *place..4 * *place + 4].copy_from_slice(&u32::to_le_bytes(gene));
                data[width * *place..width * (*place + 1)].copy_from_slice(value);
                *place += 1;
            }
        }
        Ok((genes, data))
    }

    fn read_ids(&mut self, start: u64) -> Result<(), DataError> {
        self.bytes.clear();
        self.ids.clear();
        let end = (start + BLOCK).min(self.matrix.values());
        self.reader.read(0, start..end, &mut self.bytes, &mut self.buffers)?;
        self.kind.whole(&self.bytes, &mut self.ids);
        Ok(())
    }
}
