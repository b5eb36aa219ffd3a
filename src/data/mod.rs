//! From files to batches: `source → cache → windows → loader`; which files each split has: [`split`].

#[cfg(test)]
#[path = "../../launcher/cache/src/client/testing.rs"]
pub(crate) mod cache_testing;
pub mod entries;
mod error;
pub mod loader;
mod pages;
mod scratch;
#[cfg(test)]
#[allow(dead_code)]
#[path = "../../tests/benches/simulate.rs"]
mod simulate;
pub mod source;
pub mod split;
pub mod windows;

pub use cache::client::Wake;
pub use error::{Cause, DataError};
pub use pages::Pages;
pub use scratch::Scratch;

use cache::client::Lent;
use std::sync::Weak;

/// Element type of a field in a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    Bool,
    U8,
    I8,
    I16,
    F16,
    Bf16,
    I32,
    F32,
    I64,
    F64,
}

impl Dtype {
    pub fn bytes(self) -> usize {
        match self {
            Dtype::Bool | Dtype::U8 | Dtype::I8 => 1,
            Dtype::I16 | Dtype::F16 | Dtype::Bf16 => 2,
            Dtype::I32 | Dtype::F32 => 4,
            Dtype::I64 | Dtype::F64 => 8,
        }
    }
}

/// Elements of a field in one sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// One: the field is `[B, shape...]`.
    One,
    /// Any number up to `most`: the field is `[N, shape...]` with the elements of all samples one after the other, followed
    /// in the batch by its offsets, i64 `[B + 1]`.
    Ragged { most: usize },
    /// As many as field `field`, a ragged one before this, whose offsets serve this one too.
    As { field: usize, most: usize },
}

/// A field of a batch: one tensor `[B, shape...]`, or elements and offsets where samples differ in length ([`Rows`]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldSpec {
    pub name: &'static str,
    /// Shape of one element, without the batch dimension.
    pub shape: Vec<usize>,
    pub dtype: Dtype,
    pub rows: Rows,
}

impl FieldSpec {
    /// A field of one element per sample.
    pub fn new(name: &'static str, shape: &[usize], dtype: Dtype) -> Self {
        Self { name, shape: shape.to_vec(), dtype, rows: Rows::One }
    }

    /// A field whose samples have different numbers of elements, at most `most`.
    pub fn ragged(name: &'static str, shape: &[usize], dtype: Dtype, most: usize) -> Self {
        Self { rows: Rows::Ragged { most }, ..Self::new(name, shape, dtype) }
    }

    /// A field with as many elements per sample as `of`, which is number `field`.
    pub fn along(name: &'static str, shape: &[usize], dtype: Dtype, (field, of): (usize, &FieldSpec)) -> Self {
        Self { rows: Rows::As { field, most: of.most_rows() }, ..Self::new(name, shape, dtype) }
    }

    /// Bytes of one element.
    pub fn row_bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bytes()
    }

    /// Most elements of one sample.
    pub fn most_rows(&self) -> usize {
        match self.rows {
            Rows::One => 1,
            Rows::Ragged { most } | Rows::As { most, .. } => most,
        }
    }

    /// Bytes of one sample; of a ragged field, of the longest one.
    pub fn sample_bytes(&self) -> usize {
        self.row_bytes() * self.most_rows()
    }

    /// Samples differ in length.
    pub fn is_ragged(&self) -> bool {
        self.rows != Rows::One
    }

    /// The field is followed by its offsets.
    pub fn has_offsets(&self) -> bool {
        matches!(self.rows, Rows::Ragged { .. })
    }
}

/// A part of a sample's field that lies in the page cache, where a device reads it.
pub struct LentPart {
    pub field: usize,
    /// Where it belongs, bytes from the field's beginning: of a sample, or of a batch.
    pub at: usize,
    pub lent: Lent,
}

/// A batch that will be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchAhead<'a> {
    pub epoch: u64,
    pub ids: &'a [u64],
}

/// Which sample to read, and in which epoch: augmentation is a pure function of both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadRequest {
    pub epoch: u64,
    pub index: usize,
}

/// Samples by index. Opening one reads metadata only; a sample is read when asked for.
pub trait Dataset: Send + Sync {
    fn len(&self) -> usize;
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Fields of a batch, in the order of [`Dataset::read`]'s `out`.
    fn fields(&self) -> &[FieldSpec];
    /// Reads a sample into one slice per field, each [`FieldSpec::sample_bytes`] long, native byte order. Of a ragged field
    /// the slice is replaced by its beginning that was written: `*out = &mut std::mem::take(out)[..bytes]`.
    ///
    /// # Errors
    /// The file cannot be read or holds what it must not; the error names file and rows.
    fn read(&self, request: ReadRequest, out: &mut [&mut [u8]], scratch: &mut Scratch) -> Result<(), DataError>;
    /// As [`Dataset::read`], for a reader that copies to a device: a large part that is stored as it is wanted may be left
    /// unwritten, and put into `lent` instead. Ragged fields are written.
    ///
    /// # Errors
    /// As [`Dataset::read`].
    fn read_or_lend(
        &self,
        request: ReadRequest,
        out: &mut [&mut [u8]],
        _lent: &mut Vec<LentPart>,
        scratch: &mut Scratch,
    ) -> Result<(), DataError> {
        self.read(request, out, scratch)
    }
    /// Sample `index` of an evaluation was read, and cannot be used: its part of the batch means nothing.
    fn is_left_out(&self, _index: u64) -> bool {
        false
    }
    /// Files that reading found to be unusable since the last call, and went on without: a line each. `None`: this data
    /// set never does so, on any rank.
    fn take_left_out(&self) -> Option<Vec<String>> {
        None
    }
    /// Origin of sample `index`, for messages: `s03.hdf5 rows 500..1000`.
    fn describe(&self, index: usize) -> String;
    /// The samples of `batch` will be read; called in the order of batches, before any of its samples is read. Ids may
    /// be out of range: such a batch is refused later.
    fn announce(&self, _batch: BatchAhead) {}
    /// The batch was read, failed or was cancelled: once for each [`Dataset::announce`], after its last read.
    fn retire(&self, _batch: BatchAhead) {}
    /// Does a piece of work ahead of need. Returns false if there was no work. Called by threads that have nothing to
    /// read.
    fn work_ahead(&self, _scratch: &mut Scratch) -> bool {
        false
    }
    /// Gives back decoded bytes that are kept for speed alone.
    fn give_back(&self) {}
    /// `waker` wants to know when there is something for [`Dataset::work_ahead`].
    fn wake_by(&self, _waker: Weak<dyn Wake>) {}
    /// Runs of samples that share stored bytes, for orders that use such a run while it is decoded. `None`: no such runs.
    fn pages(&self) -> Option<Pages> {
        None
    }
}
