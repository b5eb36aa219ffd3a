//! The matrix of a file: its form, its arrays, and where each row or column begins.

use super::text::{attribute, whole_attribute};
use crate::data::source::chunks::LruChunks;
use crate::data::source::hdf5::array::{self, Array, ArrayReader, Buffers};
use crate::data::source::hdf5::open::stamp;
use ::hdf5::{Dataset, File, Group};
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Pointers read at a time.
const BLOCK: u64 = 1 << 18;
/// Cells whose first value is kept; those between follow from lengths.
const STEP: usize = 64;

/// How a matrix of cells × genes is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Form {
    /// The values of a cell are one after the other, with their genes.
    Csr,
    /// The values of a gene are one after the other, with their cells.
    Csc,
    Dense,
}

/// Where the values of each row of a sparse matrix begin: 4 bytes a row and 8 per 64.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Starts {
    bases: Vec<u64>,
    lengths: Vec<u32>,
}

impl Starts {
    pub fn new(lengths: Vec<u32>) -> Self {
        let mut at = 0;
        let bases = lengths.chunks(STEP).map(|block| {
            let base = at;
            at += block.iter().map(|length| u64::from(*length)).sum::<u64>();
            base
        });
        Self { bases: bases.collect(), lengths }
    }

    /// First value of `row`; behind the last row, the number of values.
    pub fn at(&self, row: u64) -> u64 {
        let block = (row as usize / STEP).min(self.bases.len().saturating_sub(1));
        let base = self.bases.get(block).copied().unwrap_or(0);
        let end = (row as usize).min(self.lengths.len());
        base + self.lengths[(block * STEP).min(end)..end].iter().map(|length| u64::from(*length)).sum::<u64>()
    }

    /// Values of `rows`.
    pub fn range(&self, rows: &Range<u64>) -> Range<u64> {
        let start = self.at(rows.start);
        if rows.end != rows.start + 1 {
            return start..self.at(rows.end);
        }
        start..start + self.lengths.get(rows.start as usize).map_or(0, |length| u64::from(*length))
    }

    pub fn rows(&self) -> u64 {
        self.lengths.len() as u64
    }

    pub fn lengths(&self) -> &[u32] {
        &self.lengths
    }

    pub fn values(&self) -> u64 {
        self.at(self.rows())
    }
}

/// A matrix that is described, not read.
#[derive(Clone, Debug)]
pub struct Matrix {
    pub form: Form,
    pub cells: u64,
    pub genes: u64,
    /// `X`, `layers/NAME`, `raw/X`, or what a 10x file calls it.
    pub place: String,
    pub data: Array,
    /// Genes of the values, or cells; none of a dense matrix.
    pub indices: Option<Array>,
    /// Where cells begin, or genes; empty of a dense matrix.
    pub starts: Starts,
}

impl Matrix {
    /// Stored values; of a dense matrix all.
    pub fn values(&self) -> u64 {
        match self.form {
            Form::Dense => self.cells.saturating_mul(self.genes),
            _ => self.starts.values(),
        }
    }
}

/// The matrix at `place` of `file`, which was opened at `path`.
///
/// # Errors
/// Nothing is there, it is of an unknown encoding, or it contradicts itself; without the path.
pub fn open(file: &File, path: &Path, place: &str) -> Result<Matrix, String> {
    let old = place.replace("raw/X", "raw.X");
    let place = [place, old.as_str()].into_iter().find(|place| is_there(file, place)).unwrap_or(place);
    if let Ok(dataset) = file.dataset(place) {
        return dense(&dataset, path, place);
    }
    match file.group(place) {
        Ok(group) => sparse(&group, path, place),
        Err(_) if is_there(file, place) => Err(format!("{place} is a link that leads nowhere")),
        Err(_) => Err(format!("no matrix {place}: {}", listed(file))),
    }
}

fn is_there(file: &File, place: &str) -> bool {
    match place.split_once('/') {
        Some((group, name)) => file.group(group).is_ok_and(|group| group.link_exists(name)),
        None => file.link_exists(place),
    }
}

/// The matrices that the file holds.
fn listed(file: &File) -> String {
    let layers = file.group("layers").and_then(|group| group.member_names()).unwrap_or_default();
    let some = ["X", "raw/X", "raw.X"].into_iter().filter(|place| is_there(file, place)).map(String::from);
    let all: Vec<String> = some.chain(layers.into_iter().map(|name| format!("layers/{name}"))).collect();
    if all.is_empty() {
        return "it holds none (cell.matrix)".into();
    }
    format!("it holds {} (cell.matrix)", all.join(", "))
}

/// An array of `group` or of where a link in it led.
pub(super) fn array(dataset: &Dataset, path: &Path) -> Result<Array, String> {
    let there = PathBuf::from(dataset.filename());
    let path = if there.as_os_str().is_empty() { path.to_owned() } else { there };
    let stamp = stamp(&path).map_err(|error| error.to_string())?;
    array::open::open(dataset, &path, stamp)
}

fn dense(dataset: &Dataset, path: &Path, place: &str) -> Result<Matrix, String> {
    if let Some(encoding) = attribute(dataset, "encoding-type").filter(|encoding| encoding != "array") {
        return Err(format!("{place} is of encoding {encoding}: expected array, csr_matrix or csc_matrix"));
    }
    let data = array(dataset, path)?;
    if data.is_flat {
        return Err(format!("{place} has one dimension: expected cells × genes"));
    }
    let (cells, genes) = (data.rows, data.columns);
    Ok(Matrix { form: Form::Dense, cells, genes, place: place.into(), data, indices: None, starts: Starts::default() })
}

fn sparse(group: &Group, path: &Path, place: &str) -> Result<Matrix, String> {
    let encoding = attribute(group, "encoding-type").or_else(|| attribute(group, "h5sparse_format"));
    let form = match encoding.as_deref() {
        Some("csr_matrix" | "csr") => Form::Csr,
        Some("csc_matrix" | "csc") => Form::Csc,
        Some(other) => return Err(format!("{place} is of encoding {other}: expected array, csr_matrix or csc_matrix")),
        None => {
            return Err(format!("{place} is a group without encoding-type: expected array, csr_matrix or csc_matrix"));
        }
    };
    let shape = whole_attribute(group, "shape").or_else(|| whole_attribute(group, "h5sparse_shape"));
    let Some([cells, genes]) = shape.as_deref() else {
        return Err(format!("{place} has no shape of two numbers"));
    };
    let (Ok(cells), Ok(genes)) = (u64::try_from(*cells), u64::try_from(*genes)) else {
        return Err(format!("{place} has shape {cells} × {genes}: it is damaged"));
    };
    of_arrays(group, path, (place, form), (cells, genes))
}

/// A sparse matrix of `data`, `indices` and `indptr` in `group`.
pub(super) fn of_arrays(
    group: &Group,
    path: &Path,
    (place, form): (&str, Form),
    (cells, genes): (u64, u64),
) -> Result<Matrix, String> {
    let part = |name: &str| {
        let dataset = group.dataset(name).map_err(|_| format!("{place} has no {name}, or one that leads nowhere"))?;
        let array = array(&dataset, path)?;
        if array.is_flat { Ok(array) } else { Err(format!("{place}/{name} has two dimensions: expected one")) }
    };
    let (data, indices, indptr) = (part("data")?, part("indices")?, part("indptr")?);
    for (name, array) in [("indices", &indices), ("indptr", &indptr)] {
        if !array.number.is_whole() {
            return Err(format!("{place}/{name} holds {:?}: expected whole numbers", array.number));
        }
    }
    if data.rows != indices.rows {
        let (data, indices) = (data.rows, indices.rows);
        return Err(format!("{place} has {data} values in data and {indices} in indices: it is damaged"));
    }
    let (major, what) = if form == Form::Csc { (genes, "gene") } else { (cells, "cell") };
    if major.checked_add(1) != Some(indptr.rows) {
        let (found, shape) = (indptr.rows, format!("{cells} × {genes}"));
        return Err(format!(
            "{place}/indptr has {found} numbers, {shape} needs one more than it has {what}s ({major}): it is damaged"
        ));
    }
    let starts = pointers(indptr, data.rows, (place, what))?;
    Ok(Matrix { form, cells, genes, place: place.into(), data, indices: Some(indices), starts })
}

/// Reads and checks the pointers.
fn pointers(indptr: Array, values: u64, (place, what): (&str, &str)) -> Result<Starts, String> {
    let rows = indptr.rows;
    let reader = ArrayReader::new(vec![indptr], Vec::new(), Arc::new(LruChunks::new(1 << 20)));
    let (mut bytes, mut block, mut buffers) = (Vec::new(), Vec::new(), Buffers::default());
    let mut lengths = Vec::with_capacity(rows.saturating_sub(1) as usize);
    let mut before: Option<i64> = None;
    for start in (0..rows).step_by(BLOCK as usize) {
        block.clear();
        let end = (start + BLOCK).min(rows);
        reader.read(0, start..end, &mut bytes, &mut buffers).map_err(|error| match error {
            crate::data::DataError::File { problem, .. } => problem,
            other => other.to_string(),
        })?;
        reader.arrays()[0].number.whole(&bytes, &mut block);
        for (n, pointer) in block.iter().enumerate() {
            let at = start + n as u64;
            let refused = |why: String| Err(format!("{place}/indptr: number {at} is {pointer}, {why}: it is damaged"));
            let Some(last) = before.replace(*pointer) else {
                if *pointer != 0 {
                    return refused("the first must be 0".into());
                }
                continue;
            };
            if *pointer < last {
                return refused(format!("the one before {last}, so {what} {} has fewer than no values", at - 1));
            }
            if *pointer as u64 > values {
                return refused(format!("there are {values} values"));
            }
            match u32::try_from(pointer - last) {
                Ok(length) => lengths.push(length),
                Err(_) => return refused(format!("so {what} {} has {} values", at - 1, pointer - last)),
            }
        }
    }
    Ok(Starts::new(lengths))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_are_sums_of_lengths() {
        let lengths: Vec<u32> = (0..500u32).map(|n| n * 7919 % 23).collect();
        let starts = Starts::new(lengths.clone());
        for row in 0..=500 {
            let expected: u64 = lengths[..row].iter().map(|length| u64::from(*length)).sum();
            assert_eq!(starts.at(row as u64), expected, "{row}");
        }
        assert_eq!((starts.rows(), starts.values()), (500, lengths.iter().map(|n| u64::from(*n)).sum()));
        assert_eq!(Starts::new(vec![1; 64]).at(64), 64);
        assert_eq!((Starts::default().at(0), Starts::default().values()), (0, 0));
    }
}
