//! Cells of AnnData files, one per sample: all genes as float32, and the cell's label.

use crate::failure::Failure;
use crate::native::{Memory, Native, Template, words};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use source::data::DataError;
use source::data::source::chunks::LruChunks;
use source::data::source::h5ad::{CellReader, H5ad, MISSING, Wanted, open};
use source::data::source::hdf5::array::ArrayReader;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

/// Cells of all files, one file after the other.
pub struct AllCells {
    reader: CellReader,
    /// Cells before each file.
    before: Vec<u64>,
    total: u64,
    /// Label of every cell as a place in `classes`, -1 where it has none; empty: without labels.
    labels: Vec<i64>,
    pub classes: Vec<String>,
    pub genes: Vec<String>,
    template: OnceLock<Template>,
}

fn file(path: &std::path::Path, problem: String) -> DataError {
    DataError::File { path: path.to_owned(), problem }
}

impl AllCells {
    /// # Errors
    /// A file cannot be read, or has other genes than the first.
    pub fn open(paths: &[PathBuf], matrix: &str, label: Option<&str>, kept_bytes: u64) -> Result<Self, DataError> {
        let wanted = Wanted { matrix: matrix.into(), label: label.map(Into::into) };
        let (mut matrices, mut identities) = (Vec::new(), Vec::new());
        let (mut genes, mut classes, mut labels) = (Vec::<String>::new(), Vec::<String>::new(), Vec::new());
        let (mut before, mut total) = (Vec::new(), 0);
        for path in paths {
            let H5ad { path, identities: files, matrix, genes: found, labels: given, .. } = open(path, &wanted)?;
            if !genes.is_empty() && genes != found {
                let problem = format!("{} genes, others than the {} of the first file", found.len(), genes.len());
                return Err(file(&path, format!("{problem}: give files of the same genes in the same order")));
            }
            (genes, before) = (found, {
                before.push(total);
                before
            });
            total += matrix.cells;
            if let Some(given) = given {
                // Classes of all files, in the order in which they appear.
                let places: Vec<i64> = given.names.iter().map(|name| place_of(&mut classes, name)).collect();
                let label =
                    |code: &u32| if *code == MISSING { -1 } else { places.get(*code as usize).copied().unwrap_or(-1) };
                labels.extend(given.codes.iter().map(label));
            }
            identities.extend(files);
            matrices.push((path, matrix));
        }
        let store = Arc::new(LruChunks::new(kept_bytes));
        let by_genes = "write it by cells: adata.X = adata.X.tocsr(); adata.write_h5ad(...)";
        let reader = CellReader::new(matrices, |arrays| ArrayReader::new(arrays, identities, store)).map_err(
            |error| match error {
                DataError::File { path, problem } => file(&path, format!("{problem}; {by_genes}")),
                other => other,
            },
        )?;
        Ok(Self { reader, before, total, labels, classes, genes, template: OnceLock::new() })
    }

    /// Takes the entry of a cell of zeros.
    ///
    /// # Errors
    /// The bytes are not such an entry.
    pub fn set_template(&self, bytes: Vec<u8>) -> PyResult<()> {
        let sizes = [self.genes.len() * 4, 8];
        let template = Template::new(bytes, if self.labels.is_empty() { &sizes[..1] } else { &sizes });
        let template = template.ok_or_else(|| PyValueError::new_err("this is no entry of a cell"))?;
        // The second one is the same.
        let _ = self.template.set(template);
        Ok(())
    }

    fn place(&self, index: u64) -> Option<(usize, u64)> {
        let file = self.before.partition_point(|before| *before <= index).checked_sub(1)?;
        (index < self.total).then(|| (file, index - self.before[file]))
    }
}

fn place_of(classes: &mut Vec<String>, name: &str) -> i64 {
    let known = classes.iter().position(|known| known == name);
    known.unwrap_or_else(|| {
        classes.push(name.to_owned());
        classes.len() - 1
    }) as i64
}

impl Native for AllCells {
    fn len(&self) -> usize {
        self.total as usize
    }

    fn describe(&self, index: usize) -> String {
        match self.place(index as u64) {
            Some((file, cell)) => format!("{} cell {cell}", self.reader.sources()[file].path.display()),
            None => format!("cell {index} of {}", self.total),
        }
    }

    fn counts(&self) -> (u64, u64) {
        self.reader.reader().stats()
    }

    fn sample(&self, index: u64, memory: &mut Memory) -> Result<Vec<u8>, Failure> {
        let ((file, cell), template) = self
            .place(index)
            .zip(self.template.get())
            .ok_or_else(|| Failure::File(format!("cell {index} of {}", self.total)))?;
        let (cells, buffers) = (&mut memory.cells, &mut memory.buffers);
        let read = self.reader.read(file, cell..cell + 1, cells, buffers);
        read.map_err(|error| Failure::File(words(&error)))?;
        template.filled(|leaves| {
            let [values, label @ ..] = leaves else { return Ok(()) };
            let (ids, found) = cells.cell(0);
            let (row, _) = values.as_chunks_mut::<4>();
            for (id, value) in ids.iter().zip(found) {
                if let Some(place) = row.get_mut(*id as usize) {
                    *place = (*value as f32).to_ne_bytes();
                }
            }
            if let ([label], Some(value)) = (label, self.labels.get(index as usize)) {
                label.copy_from_slice(&value.to_le_bytes());
            }
            Ok(())
        })
    }
}
