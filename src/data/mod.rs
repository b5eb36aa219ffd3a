//! From files to batches: `source → cache → loader`.

pub mod cache;
pub mod loader;
pub mod source;

use std::path::PathBuf;

/// What can go wrong with data. Messages name the file and the way out.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    #[error("{path}: {problem}", path = path.display())]
    File { path: PathBuf, problem: String },
    /// Reading one sample failed; `place` is [`Dataset::describe`]'s.
    #[error("sample {index} ({place}): {error}")]
    Sample { index: u64, place: String, error: Box<DataError> },
    #[error("{0}")]
    Other(String),
}

/// Element type of a field in a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    U8,
    F32,
    I64,
}

impl Dtype {
    pub fn bytes(self) -> usize {
        match self {
            Dtype::U8 => 1,
            Dtype::F32 => 4,
            Dtype::I64 => 8,
        }
    }
}

/// One tensor of a batch: `[B, shape...]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldSpec {
    pub name: &'static str,
    /// Shape of one sample, without the batch dimension.
    pub shape: Vec<usize>,
    pub dtype: Dtype,
}

impl FieldSpec {
    /// Bytes of one sample.
    pub fn sample_bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bytes()
    }
}

/// Samples by index. Opening one reads metadata only; a sample is read when asked for.
pub trait Dataset: Send + Sync {
    fn len(&self) -> usize;
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Tensors of a batch, in the order of [`Dataset::read`]'s `out`.
    fn fields(&self) -> &[FieldSpec];
    /// Reads sample `index` into one slice per field, each [`FieldSpec::sample_bytes`] long, native byte order.
    ///
    /// # Errors
    /// The file cannot be read or holds what it must not; the error names file and rows.
    fn read(&self, index: usize, out: &mut [&mut [u8]], scratch: &mut Scratch) -> Result<(), DataError>;
    /// Where sample `index` comes from, for people: `s03.hdf5 rows 500..1000`.
    fn describe(&self, index: usize) -> String;
    /// Runs of samples that share stored bytes, for orders that use such a run while it is decoded. `None`: no such runs.
    fn pages(&self) -> Option<Pages> {
        None
    }
}

/// Where runs of samples begin, each list ascending from 0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pages {
    /// First sample of every page: samples that one read serves, such as the windows of one chunk.
    pub pages: Vec<u64>,
    /// First sample of every sequence: samples that belong together, such as the windows of one recording.
    pub sequences: Vec<u64>,
}

/// Buffers that a loader thread keeps between samples, so that reading allocates nothing in the steady state.
#[derive(Default)]
pub struct Scratch {
    pub raw: Vec<u8>,
    pub decoded: Vec<u8>,
    /// Whatever else a data set wants to keep per thread.
    pub extra: Option<Box<dyn std::any::Any + Send>>,
}
