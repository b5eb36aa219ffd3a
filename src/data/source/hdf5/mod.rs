//! Recordings in HDF5: one row per sample, compound or plain 2-D.
//!
//! [`open`](open::open) asks libhdf5 for metadata; [`Reader`] reads rows by `pread`; [`SessionData`] is one file for tools.

pub mod array;
mod bitshuffle;
mod compress;
pub mod decode;
mod ffi;
pub mod gather;
mod layout;
mod library;
mod links;
pub mod open;
mod parts;
pub mod probe;
pub mod reader;
mod runs;
pub mod session;
mod shuffle;
mod storage;
mod superblock;
pub mod trajectory;
pub mod write;

pub use library::without_locks;
pub use open::{Attribute, Opened, Wanted};
pub use reader::{ReadStats, Reader, Target};
pub use session::SessionData;

#[cfg(test)]
mod fixtures;
#[cfg(test)]
mod tests;

use crate::data::source::Identity;
pub use ffi::fields;
use ffi::types;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Decoded bytes of the largest chunk that is accepted: a loader thread holds one as stored, as rows and as columns.
pub const MAX_CHUNK_BYTES: u64 = 256 << 20;
/// Most chunks of one file that are accepted.
const MAX_CHUNKS: u64 = 1 << 22;
/// Rows that a file may promise without storing them (chunks never written, rows in other files): all of them are read.
const MAX_UNSTORED_BYTES: u64 = 4 << 30;
const MAX_UNSTORED_CHUNKS: u64 = 1 << 16;
/// No filter that is in use shrinks rows further: deflate ends at 1032, and is mostly alone.
const MAX_RATIO: u64 = 1 << 11;
/// The shortest superblock: nothing else lies below this address.
const SUPERBLOCK_BYTES: u64 = 48;

/// Element type on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Scalar {
    F32,
    F64,
}

impl Scalar {
    pub fn bytes(self) -> usize {
        match self {
            Scalar::F32 => 4,
            Scalar::F64 => 8,
        }
    }
}

/// Byte order on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    Little,
    Big,
}

impl Order {
    /// This machine's.
    pub const NATIVE: Order = if cfg!(target_endian = "big") { Order::Big } else { Order::Little };
}

/// An array of numbers in each row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    pub name: String,
    /// Bytes from the row's start.
    pub offset: usize,
    pub scalar: Scalar,
    pub order: Order,
    /// Numbers per row.
    pub len: usize,
}

impl Member {
    /// Bytes per row.
    pub fn width(&self) -> usize {
        self.scalar.bytes() * self.len
    }
}

/// Where a chunk lies in the file. `stored_bytes` 0: never written, libhdf5 gives the fill value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u64, u32, u32)", into = "(u64, u32, u32)")]
pub struct ChunkAt {
    pub addr: u64,
    pub stored_bytes: u32,
    /// Bit i: filter i was not applied.
    pub filter_mask: u32,
}

impl From<(u64, u32, u32)> for ChunkAt {
    fn from((addr, stored_bytes, filter_mask): (u64, u32, u32)) -> Self {
        Self { addr, stored_bytes, filter_mask }
    }
}

impl From<ChunkAt> for (u64, u32, u32) {
    fn from(chunk: ChunkAt) -> Self {
        (chunk.addr, chunk.stored_bytes, chunk.filter_mask)
    }
}

/// A filter that is decoded here, in the order of writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Filter {
    Shuffle,
    Deflate,
    Fletcher32,
    /// h5py's `lzf`.
    Lzf,
    Lz4,
    Zstd,
    /// Bits shuffled in blocks that may be compressed.
    Bitshuffle {
        element_bytes: u32,
        block_elements: u32,
        codec: bitshuffle::Codec,
    },
}

impl Filter {
    /// Changes the number of bytes by what they hold.
    pub fn compresses(self) -> bool {
        self.max_ratio() > 1
    }

    /// No more bytes come out than this times those that go in, a few aside.
    fn max_ratio(self) -> u64 {
        match self {
            Filter::Shuffle | Filter::Fletcher32 => 1,
            // A 258-byte match in about two bits.
            Filter::Deflate => 1040,
            // 264 bytes from three.
            Filter::Lzf => 88,
            Filter::Bitshuffle { codec: bitshuffle::Codec::None, .. } => 1,
            Filter::Lz4 | Filter::Bitshuffle { codec: bitshuffle::Codec::Lz4, .. } => 255,
            // A block of 128 KiB of one byte in four.
            Filter::Zstd | Filter::Bitshuffle { .. } => 1 << 15,
        }
    }
}

/// How rows lie in the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Layout {
    Contiguous {
        addr: u64,
    },
    Chunked {
        chunk_rows: usize,
        chunks: Box<[ChunkAt]>,
        filters: Vec<Filter>,
    },
    /// Only libhdf5 can read it (compact, virtual, in external files, a filter or a type of numbers that only it knows), in
    /// blocks of `chunk_rows`.
    Library {
        chunk_rows: usize,
        reason: String,
        /// Where the rows of a virtual dataset lie; empty for other datasets.
        runs: Vec<Run>,
    },
}

/// Rows of a virtual dataset that lie one after the other in one of its parts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// Place of the part in [`Table::others`].
    pub part: usize,
    /// Rows `[start, end)` of the virtual dataset.
    pub rows: [u64; 2],
    /// First of these rows in the part.
    pub source_row: u64,
    /// Columns `[start, end)` of a plain dataset; `[0, 0]` for rows of a compound.
    pub columns: [u64; 2],
    /// First of these columns in the part.
    pub source_column: u64,
}

/// Another file that holds rows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OtherFile {
    pub path: PathBuf,
    /// Path of the dataset inside the file; empty for raw data.
    pub dataset: String,
    /// Identity when the file was opened; a file that changed is not read on.
    pub identity: Identity,
}

/// All that is needed to read the rows of one file without libhdf5.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    pub path: PathBuf,
    /// Path of the dataset inside the file.
    pub dataset: String,
    pub rows: u64,
    pub row_bytes: usize,
    /// Element size that the shuffle filter saw: a row of a compound, a number of a 2-D dataset.
    pub element_bytes: usize,
    /// Plain 2-D dataset instead of a compound.
    pub plain: bool,
    /// Fields in use, in the order asked for.
    pub members: Vec<Member>,
    pub layout: Layout,
    /// Runs `[start, end)` of rows that were never written: space was set aside, and libhdf5 gives a fill value for them. No
    /// sensor recorded these rows, so they are no data, whatever the fill value is.
    pub unwritten: Vec<[u64; 2]>,
    /// Other files that hold rows: parts of a virtual dataset, external raw data.
    pub others: Vec<OtherFile>,
    /// Size and modification time when the file was opened; a file that changed is not read on.
    pub file_bytes: u64,
    pub modified_ns: i128,
}

impl Table {
    /// Rows per chunk, or `None` for contiguous rows.
    pub fn chunk_rows(&self) -> Option<usize> {
        match &self.layout {
            Layout::Contiguous { .. } => None,
            Layout::Chunked { chunk_rows, .. } | Layout::Library { chunk_rows, .. } => Some(*chunk_rows),
        }
    }

    /// Bytes of the fields in use, per row.
    pub fn used_row_bytes(&self) -> usize {
        self.members.iter().map(Member::width).sum()
    }

    /// Columns of a plain dataset that are in use; numbers per row in use.
    pub fn columns(&self) -> usize {
        self.members.iter().map(|member| member.len).sum()
    }

    /// Runs of rows that were written, in rising order.
    pub fn written(&self) -> Vec<[u64; 2]> {
        let mut written = Vec::with_capacity(self.unwritten.len() + 1);
        let mut row = 0;
        for [start, end] in self.unwritten.iter().copied().chain([[self.rows, self.rows]]) {
            if start > row {
                written.push([row, start]);
            }
            row = end;
        }
        written
    }

    /// Number of rows that were written.
    pub fn written_rows(&self) -> u64 {
        self.written().iter().map(|run| run[1] - run[0]).sum()
    }

    /// Checks every number that later becomes an index, an address or an allocation.
    ///
    /// # Errors
    /// What is wrong, without the path.
    pub fn validate(&self) -> Result<(), String> {
        if self.row_bytes == 0 || self.row_bytes > 1 << 20 {
            return Err(format!("a row of {} bytes is not credible", self.row_bytes));
        }
        if self.element_bytes == 0 || !self.row_bytes.is_multiple_of(self.element_bytes) {
            return Err(format!("elements of {} bytes do not fill rows of {}", self.element_bytes, self.row_bytes));
        }
        for member in &self.members {
            let end = member.len.checked_mul(member.scalar.bytes()).and_then(|width| width.checked_add(member.offset));
            if member.len == 0 || end.is_none_or(|end| end > self.row_bytes) {
                return Err(format!("a field leaves its row of {} bytes", self.row_bytes));
            }
        }
        let rising = self.unwritten.iter().flatten().is_sorted_by(|a, b| a < b);
        if !rising || self.unwritten.last().is_some_and(|run| run[1] > self.rows) {
            return Err("rows never written that are none of its rows".into());
        }
        let total = self.validate_extent()?;
        match &self.layout {
            Layout::Contiguous { addr } => self.inside(*addr, total).map_err(|e| format!("rows: {e}")),
            Layout::Chunked { chunk_rows, chunks, filters } => self.validate_chunks(*chunk_rows, chunks, filters),
            Layout::Library { chunk_rows, runs, .. } => {
                self.validate_chunk_rows(*chunk_rows)?;
                runs.iter().try_for_each(|run| self.validate_run(run))
            }
        }
    }

    fn validate_run(&self, run: &Run) -> Result<(), String> {
        let ordered = run.rows[0] < run.rows[1] && run.columns[0] <= run.columns[1];
        let far = run.source_row.checked_add(run.rows[1]).zip(run.source_column.checked_add(run.columns[1]));
        if run.part >= self.others.len() || !ordered || far.is_none_or(|(row, column)| row.max(column) > 1 << 62) {
            return Err("a virtual dataset with pieces that cannot be".into());
        }
        Ok(())
    }

    /// Bytes of all rows, which the file can hold.
    fn validate_extent(&self) -> Result<u64, String> {
        let total = self.rows.checked_mul(self.row_bytes as u64);
        let most = self.file_bytes.saturating_mul(MAX_RATIO).saturating_add(MAX_UNSTORED_BYTES);
        total.filter(|total| *total <= most).ok_or_else(|| {
            let (rows, row_bytes, file_bytes) = (self.rows, self.row_bytes, self.file_bytes);
            format!("{rows} rows of {row_bytes} bytes are not credible in a file of {file_bytes} bytes")
        })
    }

    fn validate_chunk_rows(&self, chunk_rows: usize) -> Result<u64, String> {
        let bytes = (chunk_rows as u64).saturating_mul(self.row_bytes as u64);
        if bytes == 0 || bytes > MAX_CHUNK_BYTES {
            return Err(format!(
                "chunks of {chunk_rows} rows are {bytes} bytes, at most {MAX_CHUNK_BYTES} are accepted: write smaller chunks"
            ));
        }
        let chunks = self.rows.div_ceil(chunk_rows as u64);
        // A written chunk has at least one byte.
        let most = MAX_CHUNKS.min(self.file_bytes.saturating_add(MAX_UNSTORED_CHUNKS));
        if chunks > most {
            return Err(format!("{chunks} chunks, at most {most} are accepted: write larger chunks"));
        }
        Ok(bytes)
    }

    fn validate_chunks(&self, chunk_rows: usize, chunks: &[ChunkAt], filters: &[Filter]) -> Result<(), String> {
        let decoded = self.validate_chunk_rows(chunk_rows)?;
        let expected = self.rows.div_ceil(chunk_rows as u64);
        if chunks.len() as u64 != expected {
            return Err(format!("{} chunks listed, {expected} expected", chunks.len()));
        }
        let unstored = chunks.iter().filter(|chunk| chunk.stored_bytes == 0).count() as u64;
        if unstored > MAX_UNSTORED_CHUNKS || unstored.saturating_mul(decoded) > MAX_UNSTORED_BYTES {
            return Err(format!(
                "{unstored} of its {expected} chunks of {decoded} bytes were never written: cut it to the rows that are there"
            ));
        }
        for (index, chunk) in chunks.iter().enumerate().filter(|(_, chunk)| chunk.stored_bytes != 0) {
            let stored = u64::from(chunk.stored_bytes);
            self.inside(chunk.addr, stored).map_err(|error| format!("chunk {index}: {error}"))?;
            let active = filters.iter().enumerate().filter(|(n, _)| chunk.filter_mask & (1 << n) == 0);
            let ratio = active.fold(1u64, |ratio, (_, filter)| ratio.saturating_mul(filter.max_ratio()));
            // Without a compressor only checksums are added; with one, nothing shrinks or grows without limit.
            let credible = if ratio > 1 {
                decoded <= stored.saturating_mul(ratio).saturating_add(64) && stored <= 2 * decoded + 4096
            } else {
                stored >= decoded && stored <= decoded + 8
            };
            if !credible {
                return Err(format!("chunk {index}: {stored} stored bytes cannot hold {decoded} bytes of rows"));
            }
        }
        apart(chunks)
    }

    fn inside(&self, addr: u64, bytes: u64) -> Result<(), String> {
        if addr < SUPERBLOCK_BYTES {
            return Err(format!("bytes {addr}..+{bytes} overlap the file's header: it is damaged"));
        }
        match addr.checked_add(bytes) {
            Some(end) if end <= self.file_bytes => Ok(()),
            _ => Err(format!(
                "bytes {addr}..+{bytes} lie outside the file of {} bytes: it is truncated or damaged",
                self.file_bytes
            )),
        }
    }
}

/// No two chunks of an honest file share a byte.
fn apart(chunks: &[ChunkAt]) -> Result<(), String> {
    let mut places: Vec<_> =
        (0..chunks.len()).filter(|n| chunks[*n].stored_bytes != 0).map(|n| (chunks[n].addr, n)).collect();
    // In most files they already lie in order.
    places.sort_unstable();
    for pair in places.windows(2) {
        let [(addr, one), (next, other)] = [pair[0], pair[1]];
        if addr + u64::from(chunks[one].stored_bytes) > next {
            return Err(format!("chunks {one} and {other} overlap at byte {next}: the file is damaged"));
        }
    }
    Ok(())
}
