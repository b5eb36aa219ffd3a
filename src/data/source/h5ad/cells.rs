//! Cells of many files: sorted genes and values, whatever the form of the matrix.
//!
//! Matrices mean what they mean to scipy and scanpy: values of the same gene add up, a stored zero is nothing, the order
//! within a cell is free.

use super::matrix::{Form, Matrix, Starts};
use super::narrow::{Raw, narrow};
use crate::data::DataError;
use crate::data::source::hdf5::array::{Array, ArrayReader, Buffers, Number};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The matrix of one file, in a reader.
#[derive(Clone, Debug)]
pub struct Source {
    pub path: PathBuf,
    pub form: Form,
    pub cells: u64,
    pub genes: u64,
    pub place: String,
    number: Number,
    /// Places in the reader's arrays.
    data: usize,
    indices: usize,
    starts: Starts,
}

/// Reads cells. Shared by all threads of a rank.
pub struct CellReader {
    sources: Vec<Source>,
    reader: ArrayReader,
}

/// Some cells: genes of each in rising order, each once, none with 0.
#[derive(Debug, Default)]
pub struct Cells {
    /// First value of each cell, and the number of values.
    pub starts: Vec<usize>,
    pub ids: Vec<u32>,
    pub values: Vec<f64>,
    bytes: Vec<u8>,
    id_bytes: Vec<u8>,
    raw_ids: Vec<i64>,
    raw_values: Vec<f64>,
    order: Vec<u32>,
}

impl Cells {
    /// Number of cells.
    pub fn len(&self) -> usize {
        self.starts.len().saturating_sub(1)
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Genes and values of cell `n`.
    pub fn cell(&self, n: usize) -> (&[u32], &[f64]) {
        let range = self.starts[n]..self.starts[n + 1];
        (&self.ids[range.clone()], &self.values[range])
    }

    /// Bytes of memory held.
    pub fn bytes(&self) -> usize {
        let Self { starts, ids, values, bytes, id_bytes, raw_ids, raw_values, order } = self;
        8 * (starts.capacity() + values.capacity() + raw_ids.capacity() + raw_values.capacity())
            + 4 * (ids.capacity() + order.capacity())
            + bytes.capacity()
            + id_bytes.capacity()
    }

    fn clear(&mut self) {
        self.starts.clear();
        self.starts.push(0);
        self.ids.clear();
        self.values.clear();
    }
}

impl CellReader {
    /// Matrices that are stored by cells, and a reader of their arrays made by `reader`.
    ///
    /// # Errors
    /// A matrix is stored by genes.
    pub fn new(
        matrices: Vec<(PathBuf, Matrix)>,
        reader: impl FnOnce(Vec<Array>) -> ArrayReader,
    ) -> Result<Self, DataError> {
        let (mut arrays, mut sources) = (Vec::new(), Vec::new());
        for (path, Matrix { form, cells, genes, place, data, indices, starts }) in matrices {
            if form == Form::Csc {
                let problem = format!("{place} is stored by genes, and was not transposed");
                return Err(DataError::File { path, problem });
            }
            let (number, data_at) = (data.number, arrays.len());
            arrays.push(data);
            let indices_at = arrays.len();
            arrays.extend(indices);
            sources.push(Source {
                path,
                form,
                cells,
                genes,
                place,
                number,
                data: data_at,
                indices: indices_at,
                starts,
            });
        }
        Ok(Self { sources, reader: reader(arrays) })
    }

    pub fn sources(&self) -> &[Source] {
        &self.sources
    }

    pub fn reader(&self) -> &ArrayReader {
        &self.reader
    }

    /// Any range of cells of `file` costs its own bytes alone.
    pub fn is_plain(&self, file: usize) -> bool {
        self.sources.get(file).is_some_and(|source| {
            let arrays = self.reader.arrays();
            arrays[source.data].is_plain() && (source.form == Form::Dense || arrays[source.indices].is_plain())
        })
    }

    /// Stored values of the cells `cells` of `file`, zeros and repeated genes included.
    pub fn stored(&self, file: usize, cells: Range<u64>) -> u64 {
        match self.sources.get(file) {
            Some(source) if source.form == Form::Dense => (cells.end - cells.start) * source.genes,
            Some(source) => source.starts.at(cells.end) - source.starts.at(cells.start),
            None => 0,
        }
    }

    /// Reads the cells `cells` of `file` into `out`, in the numbers of the file's own genes.
    ///
    /// # Errors
    /// The file cannot be read, or holds a gene that it does not have, or a value that is no number.
    pub fn read(
        &self,
        file: usize,
        cells: Range<u64>,
        out: &mut Cells,
        buffers: &mut Buffers,
    ) -> Result<(), DataError> {
        let source = self.source(file)?;
        match source.form {
            Form::Dense => self.dense(source, cells, out, buffers),
            _ => {
                self.load(source, &cells, out, buffers)?;
                self.sparse(source, cells, out)
            }
        }
    }

    /// Reads cell `cell` of `file` as u16 into `ids` and `values`; the number of values. `columns`: place of each gene, u32::MAX for
    /// those left out; `None`: the gene itself. `None`: the cell cannot be written so, and lies in `out` as by [`read`](Self::read).
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn read_narrow(
        &self,
        (file, cell): (usize, u64),
        out: &mut Cells,
        buffers: &mut Buffers,
        columns: Option<&[u32]>,
        (ids, values): (&mut [[u8; 2]], &mut [[u8; 2]]),
    ) -> Result<Option<usize>, DataError> {
        let (source, cells) = (self.source(file)?, cell..cell + 1);
        if source.form == Form::Dense {
            return self.dense(source, cells, out, buffers).map(|()| None);
        }
        self.load(source, &cells, out, buffers)?;
        let index = self.reader.arrays()[source.indices].number;
        let raw = Raw { ids: (index, &out.id_bytes), values: (source.number, &out.bytes), genes: source.genes };
        match narrow(raw, columns, ids, values) {
            Some(count) => Ok(Some(count)),
            None => self.sparse(source, cells, out).map(|()| None),
        }
    }

    fn source(&self, file: usize) -> Result<&Source, DataError> {
        let count = self.sources.len() as u64;
        let missing = DataError::OutOfRange { what: "file", index: file as u64, place: "the data set", count };
        self.sources.get(file).ok_or(missing)
    }

    fn dense(
        &self,
        source: &Source,
        cells: Range<u64>,
        out: &mut Cells,
        buffers: &mut Buffers,
    ) -> Result<(), DataError> {
        out.clear();
        self.reader.read(source.data, cells.clone(), &mut out.bytes, buffers)?;
        let row_bytes = source.genes as usize * source.number.bytes();
        let bytes = std::mem::take(&mut out.bytes);
        for (cell, row) in (cells.start..).zip(bytes.chunks_exact(row_bytes.max(1))) {
            out.raw_values.clear();
            source.number.widen(row, &mut out.raw_values);
            for (gene, value) in (0u32..).zip(&out.raw_values).filter(|(_, value)| **value != 0.0) {
                finite(source, cell, u64::from(gene), *value)?;
                out.ids.push(gene);
                out.values.push(*value);
            }
            out.starts.push(out.ids.len());
        }
        out.bytes = bytes;
        Ok(())
    }

    /// Reads the raw genes and values of sparse cells.
    fn load(
        &self,
        source: &Source,
        cells: &Range<u64>,
        out: &mut Cells,
        buffers: &mut Buffers,
    ) -> Result<(), DataError> {
        let range = source.starts.range(cells);
        self.reader.read(source.indices, range.clone(), &mut out.id_bytes, buffers)?;
        self.reader.read(source.data, range, &mut out.bytes, buffers)
    }

    /// Cells out of what [`load`](Self::load) read.
    fn sparse(&self, source: &Source, cells: Range<u64>, out: &mut Cells) -> Result<(), DataError> {
        out.clear();
        out.raw_ids.clear();
        self.reader.arrays()[source.indices].number.whole(&out.id_bytes, &mut out.raw_ids);
        out.raw_values.clear();
        source.number.widen(&out.bytes, &mut out.raw_values);
        let mut at = 0;
        for cell in cells {
            let length = source.starts.lengths().get(cell as usize).map_or(0, |length| *length as usize);
            take_cell(source, cell, at..at + length, out)?;
            at += length;
        }
        Ok(())
    }
}

/// Appends the raw values `range` as the next cell.
fn take_cell(source: &Source, cell: u64, range: Range<usize>, out: &mut Cells) -> Result<(), DataError> {
    let Cells { ids, values, starts, raw_ids, raw_values, order, .. } = out;
    let (raw_ids, raw_values) = (&raw_ids[range.clone()], &raw_values[range]);
    if is_plain(source, raw_ids, raw_values) {
        ids.extend(raw_ids.iter().map(|id| *id as u32));
        values.extend_from_slice(raw_values);
        starts.push(ids.len());
        return Ok(());
    }
    let mut last = -1;
    let mut rises = true;
    for (id, value) in raw_ids.iter().zip(raw_values) {
        if *id < 0 || *id as u64 >= source.genes {
            let Source { path, place, genes, .. } = source;
            let problem = format!("{place}/indices: cell {cell} holds gene {id}, there are {genes}: it is damaged");
            return Err(DataError::Content { path: path.clone(), problem });
        }
        finite(source, cell, *id as u64, *value)?;
        rises &= *id > last;
        last = *id;
    }
    if rises {
        for (id, value) in raw_ids.iter().zip(raw_values).filter(|(_, value)| **value != 0.0) {
            ids.push(*id as u32);
            values.push(*value);
        }
    } else {
        order.clear();
        order.extend(0..raw_ids.len() as u32);
        order.sort_by_key(|n| raw_ids[*n as usize]);
        let mut at = 0;
        while at < order.len() {
            let id = raw_ids[order[at] as usize];
            let mut sum = 0.0;
            while at < order.len() && raw_ids[order[at] as usize] == id {
                sum += raw_values[order[at] as usize];
                // As scipy adds: in the type of the file.
                if source.number == Number::F32 {
                    sum = f64::from(sum as f32);
                }
                at += 1;
            }
            finite(source, cell, id as u64, sum)?;
            if sum != 0.0 {
                ids.push(id as u32);
                values.push(sum);
            }
        }
    }
    starts.push(ids.len());
    Ok(())
}

/// A cell that can be taken as it is: its genes rise and are there, its values are numbers and not 0.
fn is_plain(source: &Source, ids: &[i64], values: &[f64]) -> bool {
    let [first, last] = [ids.first(), ids.last()].map(|id| id.copied().unwrap_or(0));
    if first < 0 || last as u64 >= source.genes.max(1) {
        return false;
    }
    // Signs instead of comparisons, which processors take from several numbers at once: of a number, and of what it exceeds
    // the one before by, less 1.
    let signs =
        ids.iter().zip(ids.iter().skip(1)).fold(0, |signs, (a, b)| signs | b | b.wrapping_sub(*a).wrapping_sub(1));
    let odd = values.iter().fold(0u64, |odd, value| odd | u64::from(!value.is_finite() | (*value == 0.0)));
    signs >= 0 && odd == 0
}

fn finite(source: &Source, cell: u64, gene: u64, value: f64) -> Result<(), DataError> {
    if value.is_finite() {
        return Ok(());
    }
    let problem =
        format!("{}: cell {cell} holds {value} for gene {gene}: replace it, or leave the cell out", source.place);
    Err(DataError::Content { path: source.path.clone(), problem })
}

/// The file name of a source.
pub fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}
