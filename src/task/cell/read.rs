//! Some cells as matrices on the host, for measures and pictures: of a data set, and of a file of generated cells.

use super::data::CellDataset;
use super::densify::{Scale, dense, labels};
use super::report::Cells;
use crate::data::source::Identity;
use crate::data::source::chunks::LruChunks;
use crate::data::source::h5ad::{self, CellReader, MISSING, Wanted};
use crate::data::source::hdf5::array::ArrayReader;
use crate::data::{DataError, Dataset, ReadRequest, Scratch};
use crate::task::Batch;
use crate::task::outline::kind;
use std::path::Path;
use std::sync::Arc;
use tch::{Kind, Tensor};

/// Most cells that are read.
pub const MOST: usize = 1000;
/// Cells of a file that are read at a time.
const BLOCK: u64 = 256;
/// Decoded chunks that are kept meanwhile.
const CHUNKS_BYTES: u64 = 16 << 20;

/// Every n-th of `len`, at most [`MOST`].
fn evenly(len: usize) -> impl Iterator<Item = usize> {
    let count = len.min(MOST);
    (0..count).map(move |n| n * len / count)
}

/// Cells of `dataset`, spread evenly.
///
/// # Errors
/// A cell cannot be read.
pub fn of_dataset(dataset: &CellDataset, genes: i64, scale: &Scale) -> Result<Cells, DataError> {
    let mut scratch = Scratch::default();
    let (mut rows, mut classes) = (Vec::new(), Vec::new());
    for index in evenly(dataset.len()) {
        let batch = one(dataset, index, &mut scratch)?;
        rows.push(dense(&batch, genes, scale));
        classes.push(labels(&batch).int64_value(&[0]));
    }
    let expression = if rows.is_empty() {
        Tensor::zeros([0, genes], (Kind::Float, tch::Device::Cpu))
    } else {
        Tensor::cat(&rows, 0)
    };
    Ok(Cells { expression, classes })
}

/// A batch of one cell.
fn one(dataset: &dyn Dataset, index: usize, scratch: &mut Scratch) -> Result<Batch, DataError> {
    let fields = dataset.fields();
    let mut buffers: Vec<Vec<u8>> = fields.iter().map(|field| vec![0; field.sample_bytes()]).collect();
    let mut out: Vec<&mut [u8]> = buffers.iter_mut().map(Vec::as_mut_slice).collect();
    dataset.read(ReadRequest { epoch: 0, index }, &mut out, scratch)?;
    let mut tensors = Vec::new();
    for (field, bytes) in fields.iter().zip(&out) {
        let rows = (bytes.len() / field.dtype.bytes()) as i64;
        tensors.push(Tensor::from_data_size(bytes, &[rows], kind(field.dtype)));
        if field.has_offsets() {
            tensors.push(Tensor::from_slice(&[0, rows]));
        }
    }
    Ok(Batch::new(tensors, vec![index as u64]))
}

/// Cells of the file at `path`, spread evenly, as they are, with their classes in `column` by `names`.
///
/// # Errors
/// The file cannot be read.
pub fn of_file(path: &Path, column: Option<&str>, names: &[String]) -> Result<Cells, DataError> {
    let wanted = Wanted { matrix: "X".into(), label: column.map(str::to_owned) };
    let file = h5ad::open(path, &wanted)?;
    let (cells, genes) = (file.matrix.cells, file.matrix.genes as i64);
    let identities = vec![(path.to_owned(), Identity::now(path)?)];
    let chunks = Arc::new(LruChunks::new(CHUNKS_BYTES));
    let reader = CellReader::new(vec![(path.to_owned(), file.matrix.clone())], |arrays| {
        ArrayReader::new(arrays, identities, chunks)
    })?;
    let chosen: Vec<usize> = evenly(cells as usize).collect();
    let mut expression = vec![0f32; chosen.len() * genes as usize];
    let (mut block, mut buffers) = (h5ad::Cells::default(), Default::default());
    let mut at = 0..0;
    for (cell, row) in chosen.iter().map(|&cell| cell as u64).zip(expression.chunks_exact_mut(genes.max(1) as usize)) {
        if !at.contains(&cell) {
            at = cell..(cell + BLOCK).min(cells);
            reader.read(0, at.clone(), &mut block, &mut buffers)?;
        }
        let (ids, values) = block.cell((cell - at.start) as usize);
        ids.iter().zip(values).for_each(|(&id, &value)| row[id as usize] = value as f32);
    }
    let class = |cell: usize| {
        let labels = file.labels.as_ref()?;
        let code = labels.codes.get(cell).copied().filter(|code| *code != MISSING)?;
        let name = labels.names.get(code as usize)?;
        names.iter().position(|known| known == name).map(|place| place as i64)
    };
    let classes = chosen.iter().map(|&cell| class(cell).unwrap_or(-1)).collect();
    let expression = Tensor::from_slice(&expression).view([chosen.len() as i64, genes]);
    Ok(Cells { expression, classes })
}
