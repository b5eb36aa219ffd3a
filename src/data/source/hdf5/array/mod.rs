//! Numbers of one type in one or two dimensions: where they lie, and how any range of them is read without libhdf5.
//!
//! [`open`](open::open) asks libhdf5 for metadata; [`ArrayReader`] reads by `pread` and decodes chunks in the calling thread.
//! Two layouts go through libhdf5 and its lock: types that it has to convert, and chunks that were never written.

pub mod open;
mod read;

pub use read::{ArrayReader, Buffers};

use super::{ChunkAt, Filter, MAX_CHUNK_BYTES, MAX_RATIO, MAX_UNSTORED_BYTES, SUPERBLOCK_BYTES};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Most chunks of one array that are accepted.
const MAX_CHUNKS: u64 = 1 << 24;

/// Type of a number, in this machine's byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Number {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    U64,
    I64,
    F32,
    F64,
}

/// `$each!(type)` with the Rust type of a [`Number`].
macro_rules! with_type {
    ($number:expr, $each:ident) => {
        match $number {
            Number::U8 => $each!(u8),
            Number::I8 => $each!(i8),
            Number::U16 => $each!(u16),
            Number::I16 => $each!(i16),
            Number::U32 => $each!(u32),
            Number::I32 => $each!(i32),
            Number::U64 => $each!(u64),
            Number::I64 => $each!(i64),
            Number::F32 => $each!(f32),
            Number::F64 => $each!(f64),
        }
    };
}
pub(crate) use with_type;

impl Number {
    pub const fn bytes(self) -> usize {
        match self {
            Number::U8 | Number::I8 => 1,
            Number::U16 | Number::I16 => 2,
            Number::U32 | Number::I32 | Number::F32 => 4,
            Number::U64 | Number::I64 | Number::F64 => 8,
        }
    }

    pub const fn is_whole(self) -> bool {
        !matches!(self, Number::F32 | Number::F64)
    }

    /// Appends `bytes` as f64, which is exact but for whole numbers beyond 2⁵³.
    pub fn widen(self, bytes: &[u8], out: &mut Vec<f64>) {
        macro_rules! each {
            ($type:ty) => {{
                let cells = bytes.as_chunks::<{ size_of::<$type>() }>().0;
                out.extend(cells.iter().map(|cell| <$type>::from_ne_bytes(*cell) as f64));
            }};
        }
        with_type!(self, each);
    }

    /// Appends `bytes` of whole numbers; those beyond i64 become its greatest, which nothing that is counted reaches.
    pub fn whole(self, bytes: &[u8], out: &mut Vec<i64>) {
        macro_rules! each {
            ($type:ty) => {{
                let cells = bytes.as_chunks::<{ size_of::<$type>() }>().0;
                out.extend(cells.iter().map(|cell| i64::from(<$type>::from_ne_bytes(*cell))));
            }};
        }
        match self {
            Number::U8 => out.extend(bytes.iter().map(|byte| i64::from(*byte))),
            Number::I8 => out.extend(bytes.iter().map(|byte| i64::from(*byte as i8))),
            Number::U16 => each!(u16),
            Number::I16 => each!(i16),
            Number::U32 => each!(u32),
            Number::I32 => each!(i32),
            Number::I64 => each!(i64),
            Number::U64 => {
                let cells = bytes.as_chunks::<8>().0.iter();
                out.extend(cells.map(|cell| i64::try_from(u64::from_ne_bytes(*cell)).unwrap_or(i64::MAX)));
            }
            Number::F32 | Number::F64 => {}
        }
    }
}

/// Where an array lies in its file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Place {
    /// It holds nothing.
    Empty,
    Contiguous {
        addr: u64,
    },
    /// Chunks of `rows` × `columns`, row by row.
    Chunked {
        rows: u64,
        columns: u64,
        chunks: Box<[ChunkAt]>,
        filters: Vec<Filter>,
        /// Bytes of the elements that the shuffle filter saw.
        element_bytes: usize,
    },
    /// Only libhdf5 can read it.
    Library {
        reason: String,
    },
}

/// All that is needed to read an array.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Array {
    /// The file that holds the numbers: where an external link led, another one than was opened.
    pub path: PathBuf,
    /// Path of the dataset inside the file.
    pub dataset: String,
    pub rows: u64,
    /// 1 where the dataset has one dimension.
    pub columns: u64,
    /// The dataset has one dimension.
    pub is_flat: bool,
    pub number: Number,
    pub place: Place,
    pub file_bytes: u64,
    pub modified_ns: i128,
}

impl Array {
    /// Bytes of one row.
    pub fn row_bytes(&self) -> u64 {
        self.columns * self.number.bytes() as u64
    }

    /// Bytes of all rows.
    pub fn bytes(&self) -> u64 {
        self.rows.saturating_mul(self.row_bytes())
    }

    /// Stored as it is read: any range costs its own bytes alone.
    pub fn is_plain(&self) -> bool {
        match &self.place {
            Place::Empty | Place::Contiguous { .. } => true,
            Place::Chunked { filters, .. } => filters.is_empty(),
            Place::Library { .. } => false,
        }
    }

    /// Rows of a chunk; all where there are no chunks.
    pub fn chunk_rows(&self) -> u64 {
        match &self.place {
            Place::Chunked { rows, .. } => *rows,
            _ => self.rows.max(1),
        }
    }

    /// Bytes of a decoded chunk, 0 where there are none.
    pub fn chunk_bytes(&self) -> u64 {
        match &self.place {
            Place::Chunked { rows, columns, .. } => rows * columns * self.number.bytes() as u64,
            _ => 0,
        }
    }

    /// Chunks beside each other.
    fn chunks_across(&self, columns: u64) -> u64 {
        self.columns.div_ceil(columns.max(1))
    }

    /// Checks every number that later becomes an index, an address or an allocation.
    ///
    /// # Errors
    /// What is wrong, without the path.
    pub fn validate(&self) -> Result<(), String> {
        let total = self.columns.checked_mul(self.number.bytes() as u64).and_then(|row| row.checked_mul(self.rows));
        let most = self.file_bytes.saturating_mul(MAX_RATIO).saturating_add(MAX_UNSTORED_BYTES);
        let total = total.filter(|total| *total <= most).ok_or_else(|| {
            let (rows, columns, file_bytes) = (self.rows, self.columns, self.file_bytes);
            format!("{} of {rows} × {columns} numbers is not credible in a file of {file_bytes} bytes", self.dataset)
        })?;
        match &self.place {
            Place::Contiguous { addr } => self.inside(*addr, total),
            Place::Chunked { rows, columns, chunks, filters, element_bytes } => {
                self.validate_chunks((*rows, *columns), chunks, filters, *element_bytes)
            }
            Place::Empty | Place::Library { .. } => Ok(()),
        }
    }

    fn validate_chunks(
        &self,
        (rows, columns): (u64, u64),
        chunks: &[ChunkAt],
        filters: &[Filter],
        element_bytes: usize,
    ) -> Result<(), String> {
        let name = &self.dataset;
        let decoded = self.validate_shape(rows, columns)?;
        let expected = self.rows.div_ceil(rows) * self.chunks_across(columns);
        if chunks.len() as u64 != expected || element_bytes == 0 {
            return Err(format!("{name} has {} chunks listed, {expected} expected", chunks.len()));
        }
        let unstored = chunks.iter().filter(|chunk| chunk.stored_bytes == 0).count() as u64;
        if unstored.saturating_mul(decoded) > MAX_UNSTORED_BYTES {
            return Err(format!("{unstored} of the {expected} chunks of {name} were never written: write it anew"));
        }
        for (index, chunk) in chunks.iter().enumerate().filter(|(_, chunk)| chunk.stored_bytes != 0) {
            let stored = u64::from(chunk.stored_bytes);
            self.inside(chunk.addr, stored)?;
            let active = filters.iter().enumerate().filter(|(n, _)| chunk.filter_mask & (1 << n) == 0);
            let ratio = active.fold(1u64, |ratio, (_, filter)| ratio.saturating_mul(filter.max_ratio()));
            let credible = if ratio > 1 {
                decoded <= stored.saturating_mul(ratio).saturating_add(1024) && stored <= 2 * decoded + 4096
            } else {
                stored >= decoded && stored <= decoded + 8
            };
            if !credible {
                return Err(format!("chunk {index} of {name}: {stored} stored bytes cannot hold {decoded} bytes"));
            }
        }
        super::apart(chunks).map_err(|problem| format!("{name}: {problem}"))
    }

    /// Checks a chunk's shape; its bytes.
    ///
    /// # Errors
    /// Chunks too large, or too many.
    fn validate_shape(&self, rows: u64, columns: u64) -> Result<u64, String> {
        let name = &self.dataset;
        let cells = rows.checked_mul(columns).and_then(|cells| cells.checked_mul(self.number.bytes() as u64));
        let bytes = cells.filter(|bytes| (1..=MAX_CHUNK_BYTES).contains(bytes)).ok_or_else(|| {
            format!("chunks of {rows} × {columns} numbers in {name}: at most {MAX_CHUNK_BYTES} bytes are accepted: write smaller chunks")
        })?;
        let chunks = self.rows.div_ceil(rows).saturating_mul(self.chunks_across(columns));
        let most = MAX_CHUNKS.min(self.file_bytes.saturating_add(super::MAX_UNSTORED_CHUNKS));
        if chunks > most {
            return Err(format!("{chunks} chunks in {name}, at most {most} are accepted: write larger chunks"));
        }
        Ok(bytes)
    }

    fn inside(&self, addr: u64, bytes: u64) -> Result<(), String> {
        let end = addr.checked_add(bytes).filter(|end| addr >= SUPERBLOCK_BYTES && *end <= self.file_bytes);
        end.map(drop).ok_or_else(|| {
            let (name, file_bytes) = (&self.dataset, self.file_bytes);
            format!("{name}: bytes {addr}..+{bytes} lie outside the file of {file_bytes} bytes, or in its header: it is truncated or damaged")
        })
    }
}
