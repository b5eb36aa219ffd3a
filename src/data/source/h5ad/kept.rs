//! Copies of matrices by cells: plain files beside the index, which later starts find.
//!
//! ```text
//! magic │ cells │ genes │ values │ types │ checksum of the lengths │ 0 …         64 bytes
//! length u32 × cells │ gene u16 or u32 × values │ value × values
//! ```
//! Any range of cells costs its own bytes alone, in two reads.

use super::matrix::{Form, Matrix, Starts};
use crate::data::DataError;
use crate::data::source::file_error;
use crate::data::source::hdf5::array::{Array, Number, Place};
use crate::data::source::hdf5::open::stamp;
use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const MAGIC: [u8; 8] = *b"hr-cell2";
const HEAD_BYTES: u64 = 64;

/// Types of a copy's genes and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kinds {
    pub gene: Number,
    pub value: Number,
}

impl Kinds {
    /// Those of a sparse matrix as it is.
    pub fn of(matrix: &Matrix) -> Option<Self> {
        matrix.indices.as_ref().map(|indices| Self { gene: indices.number, value: matrix.data.number })
    }

    fn bytes(self) -> u64 {
        (self.gene.bytes() + self.value.bytes()) as u64
    }

    fn code(self) -> u64 {
        (self.gene as u64) << 8 | self.value as u64
    }
}

/// Place of the copy of the matrix at `place` of a file; `why` keeps copies of different purposes apart.
pub fn path(folder: &Path, print: u64, place: &str, why: &str) -> PathBuf {
    let place = place.replace('/', "-");
    folder.join(format!("cell-{print:016x}-{place}.{why}"))
}

/// Bytes of a copy.
pub fn file_bytes(cells: u64, values: u64, kinds: Kinds) -> u64 {
    HEAD_BYTES + 4 * cells + values * kinds.bytes()
}

/// The copy at `copy` of `matrix`, where it is there and whole.
pub fn find(copy: &Path, matrix: &Matrix, kinds: Kinds) -> Option<Matrix> {
    let mut head = [0; HEAD_BYTES as usize];
    let mut file = File::open(copy).ok()?;
    file.read_exact(&mut head).ok()?;
    let number = |n: usize| head.get(8 * n..8 * n + 8).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes);
    let values = matrix.values();
    let alike = head[..8] == MAGIC
        && [matrix.cells, matrix.genes, values, kinds.code()].into_iter().zip(1..).all(|(n, at)| number(at) == Some(n));
    if !alike || file.metadata().ok()?.len() != file_bytes(matrix.cells, values, kinds) {
        return None;
    }
    let mut lengths = vec![0; 4 * matrix.cells as usize];
    file.read_exact(&mut lengths).ok()?;
    if number(5) != Some(u64::from(libdeflater::crc32(&lengths))) {
        return None;
    }
    let lengths = lengths.as_chunks::<4>().0.iter().map(|cell| u32::from_le_bytes(*cell)).collect();
    described(copy, matrix, lengths, kinds).ok().filter(|copy| copy.values() == values)
}

/// The matrix of the finished copy of `matrix`.
fn described(copy: &Path, matrix: &Matrix, lengths: Vec<u32>, kinds: Kinds) -> Result<Matrix, DataError> {
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
    let data = array("data", kinds.value, first + kinds.gene.bytes() as u64 * starts.values());
    let indices = array("indices", kinds.gene, first);
    let Matrix { cells, genes, place, .. } = matrix;
    let (cells, genes, place) = (*cells, *genes, place.clone());
    Ok(Matrix { form: Form::Csr, cells, genes, place, data, indices: Some(indices), starts })
}

/// A copy that is being written: removed again unless it is finished.
pub(super) struct Draft<'a> {
    matrix: &'a Matrix,
    copy: &'a Path,
    beside: PathBuf,
    file: File,
    kinds: Kinds,
    starts: Starts,
}

impl<'a> Draft<'a> {
    /// Begins the copy at `copy` of `matrix`, whose cells have `lengths` values.
    ///
    /// # Errors
    /// There is no room, or no permission.
    pub fn create(matrix: &'a Matrix, copy: &'a Path, lengths: Vec<u32>, kinds: Kinds) -> Result<Self, DataError> {
        let beside = copy.with_extension(format!("partial-{}", std::process::id()));
        let failed = |error| no_room(copy, error);
        if let Some(folder) = beside.parent() {
            std::fs::create_dir_all(folder).map_err(failed)?;
        }
        let file = File::create(&beside).map_err(failed)?;
        let draft = Self { matrix, copy, beside, file, kinds, starts: Starts::new(lengths) };
        draft.head().map_err(failed)?;
        Ok(draft)
    }

    fn head(&self) -> std::io::Result<()> {
        let lengths: Vec<u8> = self.starts.lengths().iter().flat_map(|length| length.to_le_bytes()).collect();
        let sum = u64::from(libdeflater::crc32(&lengths));
        let Matrix { cells, genes, .. } = self.matrix;
        let mut head = MAGIC.to_vec();
        let numbers = [*cells, *genes, self.starts.values(), self.kinds.code(), sum];
        numbers.iter().for_each(|n| head.extend(n.to_le_bytes()));
        head.resize(HEAD_BYTES as usize, 0);
        let mut out = BufWriter::new(&self.file);
        out.write_all(&head)?;
        out.write_all(&lengths)?;
        out.flush()
    }

    pub fn starts(&self) -> &Starts {
        &self.starts
    }

    /// Writes genes and values from value `first` on.
    ///
    /// # Errors
    /// There is no room.
    pub fn put(&self, first: u64, genes: &[u8], values: &[u8]) -> Result<(), DataError> {
        let genes_at = HEAD_BYTES + 4 * self.matrix.cells;
        let [gene, value] = [self.kinds.gene, self.kinds.value].map(|number| number.bytes() as u64);
        let values_at = genes_at + gene * self.starts.values();
        let write = |bytes, at| self.file.write_all_at(bytes, at).map_err(|error| no_room(self.copy, error));
        write(genes, genes_at + gene * first)?;
        write(values, values_at + value * first)
    }

    /// Gives the copy its name, and describes it.
    ///
    /// # Errors
    /// There is no room.
    pub fn finish(self) -> Result<Matrix, DataError> {
        let done = self.file.sync_data().and_then(|()| std::fs::rename(&self.beside, self.copy));
        done.map_err(|error| no_room(self.copy, error))?;
        described(self.copy, self.matrix, self.starts.lengths().to_vec(), self.kinds)
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        // Nothing has this name once the draft is finished.
        let _ = std::fs::remove_file(&self.beside);
    }
}

fn no_room(copy: &Path, error: std::io::Error) -> DataError {
    file_error(
        copy,
        format!(
            "the copy by cells cannot be written: {error}: make room, or write the matrix as an uncompressed csr_matrix"
        ),
    )
}
