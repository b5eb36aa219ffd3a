//! A matrix by cells, decoded once into a plain file of few bytes that later starts find: a cell read alone costs its own bytes
//! then, and not those of two chunks.

use super::kept::{Draft, Kinds};
use super::matrix::{Form, Matrix};
use crate::data::DataError;
use crate::data::source::chunks::LruChunks;
use crate::data::source::hdf5::array::{ArrayReader, Buffers, Number};
use std::path::Path;
use std::sync::Arc;

/// Extension of these copies.
pub const WHY: &str = "plain";
/// Values decoded at a time.
const BLOCK: u64 = 1 << 18;

/// Types of a copy of `matrix`; `counts`: all its values are whole numbers below 65,536.
pub fn kinds(matrix: &Matrix, counts: bool) -> Kinds {
    Kinds {
        gene: if matrix.genes <= 1 << 16 { Number::U16 } else { Number::U32 },
        value: if counts { Number::U16 } else { matrix.data.number },
    }
}

/// Writes the copy of `matrix`, a matrix by cells of the file at `source`, and describes it.
///
/// # Errors
/// The file cannot be read, or holds other values than it was found to; there is no room for the copy.
pub fn write(source: &Path, matrix: &Matrix, copy: &Path, kinds: Kinds) -> Result<Matrix, DataError> {
    let indices = matrix.indices.clone().filter(|_| matrix.form == Form::Csr);
    let content = |problem: String| DataError::Content { path: source.to_owned(), problem };
    let indices = indices.ok_or_else(|| content(format!("{} is not stored by cells", matrix.place)))?;
    let (gene_kind, value_kind) = (indices.number, matrix.data.number);
    let reader = ArrayReader::new(vec![indices, matrix.data.clone()], Vec::new(), Arc::new(LruChunks::new(4 << 20)));
    let draft = Draft::create(matrix, copy, matrix.starts.lengths().to_vec(), kinds)?;
    let (mut buffers, mut bytes) = (Buffers::default(), Vec::new());
    let (mut whole, mut wide) = (Vec::new(), Vec::new());
    let (mut genes, mut values) = (Vec::new(), Vec::new());
    for first in (0..matrix.values()).step_by(BLOCK as usize) {
        let range = first..(first + BLOCK).min(matrix.values());
        let odd = |what: &str| {
            content(format!("{}: {what} of value {first} or behind it is not as it was found", matrix.place))
        };
        whole.clear();
        genes.clear();
        reader.read(0, range.clone(), &mut bytes, &mut buffers)?;
        gene_kind.whole(&bytes, &mut whole);
        let inside = |gene: &i64| (0..matrix.genes as i64).contains(gene);
        if !whole.iter().all(inside) {
            return Err(odd("the gene"));
        }
        match kinds.gene {
            Number::U16 => genes.extend(whole.iter().flat_map(|gene| (*gene as u16).to_ne_bytes())),
            _ => genes.extend(whole.iter().flat_map(|gene| (*gene as u32).to_ne_bytes())),
        }
        wide.clear();
        values.clear();
        reader.read(1, range, &mut bytes, &mut buffers)?;
        if kinds.value == value_kind {
            std::mem::swap(&mut values, &mut bytes);
        } else {
            value_kind.widen(&bytes, &mut wide);
            let fits = |value: &f64| f64::from(*value as i64 as u16) == *value;
            if !wide.iter().all(fits) {
                return Err(odd("the count"));
            }
            values.extend(wide.iter().flat_map(|value| (*value as i64 as u16).to_ne_bytes()));
        }
        draft.put(first, &genes, &values)?;
    }
    draft.finish()
}
