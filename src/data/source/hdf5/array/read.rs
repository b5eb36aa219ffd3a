//! Rows of arrays, read by `pread` and decoded in the calling thread.

use super::{Array, Number, Place, with_type};
use crate::data::DataError;
use crate::data::source::Identity;
use crate::data::source::chunks::{Chunk, ChunkKey, ChunkStore};
use crate::data::source::hdf5::decode::{Inflater, Stored, undo};
use crate::data::source::hdf5::open::stamp_of;
use crate::data::source::hdf5::{ChunkAt, library};
use ::hdf5::{Dataset, H5Type};
use lru::LruCache;
use spec::contract::USERS;
use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Files kept open at once.
const OPEN_FILES: NonZeroUsize = NonZeroUsize::new(128).unwrap();

/// Memory that a thread keeps between reads.
#[derive(Default)]
pub struct Buffers {
    stored: Vec<u8>,
    spare: Vec<u8>,
    inflater: Inflater,
}

impl Buffers {
    pub fn bytes(&self) -> usize {
        self.stored.capacity() + self.spare.capacity()
    }
}

/// Datasets kept open through libhdf5.
const OPEN_DATASETS: NonZeroUsize = NonZeroUsize::new(8).unwrap();

/// Reads rows of the arrays of a data set. Shared by all loader threads of a rank.
pub struct ArrayReader {
    arrays: Vec<Array>,
    /// Identities of the files at opening: a file that was replaced is an error.
    identities: Vec<(PathBuf, Identity)>,
    store: Arc<dyn ChunkStore>,
    /// Number of the file of each array: the first array in it.
    numbers: Vec<usize>,
    files: Mutex<LruCache<usize, Arc<File>>>,
    /// Opened by libhdf5.
    datasets: Mutex<LruCache<(PathBuf, String), Dataset>>,
    /// Bytes that came by `pread`.
    bytes: AtomicU64,
    decoded_chunks: AtomicU64,
}

impl ArrayReader {
    /// `arrays[i]` is array `i` of every later call; each must have passed [`Array::validate`].
    pub fn new(arrays: Vec<Array>, identities: Vec<(PathBuf, Identity)>, store: Arc<dyn ChunkStore>) -> Self {
        let (files, datasets) = (Mutex::new(LruCache::new(OPEN_FILES)), Mutex::new(LruCache::new(OPEN_DATASETS)));
        let mut first = HashMap::new();
        let number = |(n, array): (usize, &Array)| *first.entry(array.path.clone()).or_insert(n);
        let numbers = arrays.iter().enumerate().map(number).collect();
        let [bytes, decoded_chunks] = [0; 2].map(AtomicU64::new);
        Self { arrays, identities, store, numbers, files, datasets, bytes, decoded_chunks }
    }

    pub fn arrays(&self) -> &[Array] {
        &self.arrays
    }

    /// Bytes read and chunks decoded so far.
    pub fn stats(&self) -> (u64, u64) {
        (self.bytes.load(Ordering::Relaxed), self.decoded_chunks.load(Ordering::Relaxed))
    }

    /// Lets go of decoded chunks and open files.
    pub fn give_back(&self) {
        self.store.clear();
        self.files.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.datasets.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Reads `rows` of array `index`, row by row in its own type, into `out`, which then holds nothing else.
    ///
    /// # Errors
    /// The file is gone, has changed, or holds bytes that do not decode; rows are out of range.
    pub fn read(
        &self,
        index: usize,
        rows: Range<u64>,
        out: &mut Vec<u8>,
        buffers: &mut Buffers,
    ) -> Result<(), DataError> {
        let count = self.arrays.len() as u64;
        let out_of_range = DataError::OutOfRange { what: "array", index: index as u64, place: "the data set", count };
        let array = self.arrays.get(index).ok_or(out_of_range)?;
        let fail = |problem: String| {
            let Range { start, end } = rows;
            library::failed(&array.path, format!("{} {start}..{end}: {problem}", array.dataset))
        };
        if rows.start > rows.end || rows.end > array.rows {
            return Err(fail(format!("out of range, there are {}", array.rows)));
        }
        // What is there is written over: only more than that is zeroed.
        out.resize(((rows.end - rows.start) * array.row_bytes()) as usize, 0);
        let room = out.as_mut_slice();
        match &array.place {
            Place::Empty => {
                room.fill(0);
                Ok(())
            }
            Place::Contiguous { addr } => self.pread((index, array), addr + rows.start * array.row_bytes(), room),
            Place::Chunked { .. } => return self.read_chunks((index, array), rows.clone(), room, buffers),
            Place::Library { reason } => {
                warn_once(array, reason);
                self.by_library((index, array), rows.clone(), 0..array.columns, room)
            }
        }
        .map_err(fail)
    }

    fn read_chunks(
        &self,
        (index, array): (usize, &Array),
        rows: Range<u64>,
        out: &mut [u8],
        buffers: &mut Buffers,
    ) -> Result<(), DataError> {
        let Place::Chunked { rows: chunk_rows, columns: chunk_columns, .. } = &array.place else { return Ok(()) };
        let across = array.chunks_across(*chunk_columns);
        let mut row = rows.start;
        while row < rows.end {
            let (band, first) = (row / chunk_rows, row % chunk_rows);
            let take = (chunk_rows - first).min(rows.end - row);
            for column in 0..across {
                let tile = Tile {
                    chunk: band * across + column,
                    first,
                    rows: take,
                    columns: column * chunk_columns..((column + 1) * chunk_columns).min(array.columns),
                    into: row - rows.start,
                };
                self.read_tile((index, array), &tile, out, buffers).map_err(|error| match error {
                    Failed::Here(problem) => {
                        let (name, end) = (&array.dataset, row + take);
                        library::failed(&array.path, format!("chunk {} of {name} ({row}..{end}) {problem}", tile.chunk))
                    }
                    Failed::Known(error) => error,
                })?;
            }
            row += take;
        }
        Ok(())
    }

    fn read_tile(
        &self,
        (index, array): (usize, &Array),
        tile: &Tile,
        out: &mut [u8],
        buffers: &mut Buffers,
    ) -> Result<(), Failed> {
        let Place::Chunked { rows, columns, chunks, filters, element_bytes } = &array.place else { return Ok(()) };
        let Some(ChunkAt { addr, stored_bytes, filter_mask }) = chunks.get(tile.chunk as usize).copied() else {
            return Err(Failed::Here("is not there".into()));
        };
        let width = array.number.bytes() as u64;
        let (row_bytes, from) = (array.row_bytes() as usize, (tile.columns.start * width) as usize);
        let bytes = ((tile.columns.end - tile.columns.start) * width) as usize;
        let place = |n: u64, out: &mut [u8], fill: &mut dyn FnMut(&mut [u8]) -> Result<(), String>| {
            let at = (tile.into + n) as usize * row_bytes + from;
            fill(&mut out[at..at + bytes])
        };
        if stored_bytes == 0 {
            // Row by row of the chunk, as libhdf5 fills it.
            let first = tile.chunk / array.chunks_across(*columns) * rows + tile.first;
            for n in 0..tile.rows {
                let row = first + n..first + n + 1;
                place(n, out, &mut |out| self.by_library((index, array), row.clone(), tile.columns.clone(), out))?;
            }
            return Ok(());
        }
        let stride = columns * width;
        let is_raw = filters.iter().enumerate().all(|(n, _)| filter_mask & (1 << n) != 0);
        if is_raw && bytes == row_bytes && stride as usize == row_bytes {
            // Rows of the chunk are rows of the array.
            let into = tile.into as usize * row_bytes..(tile.into + tile.rows) as usize * row_bytes;
            return Ok(self.pread((index, array), addr + tile.first * stride, &mut out[into])?);
        }
        if is_raw {
            for n in 0..tile.rows {
                place(n, out, &mut |out| self.pread((index, array), addr + (tile.first + n) * stride, out))?;
            }
            return Ok(());
        }
        let decoded_bytes = (rows * stride) as usize;
        let stored = Stored { filters, filter_mask, element_bytes: *element_bytes, decoded_bytes };
        let key = ChunkKey { file: index as u32, chunk: tile.chunk as u32 };
        let chunk = self.store.get(key, &mut || {
            let Buffers { stored: raw, spare, inflater } = &mut *buffers;
            raw.resize(stored_bytes as usize, 0);
            self.pread((index, array), addr, raw).and_then(|()| undo(&stored, raw, spare, inflater)).map_err(
                |problem| {
                    let (name, chunk) = (&array.dataset, tile.chunk);
                    library::failed(&array.path, format!("chunk {chunk} of {name} {problem}"))
                },
            )?;
            self.decoded_chunks.fetch_add(1, Ordering::Relaxed);
            Ok(Chunk { bytes: raw.as_slice().into() })
        });
        let chunk = chunk.map_err(Failed::Known)?;
        for n in 0..tile.rows {
            let at = ((tile.first + n) * stride) as usize;
            place(n, out, &mut |out| {
                out.copy_from_slice(&chunk.bytes[at..at + out.len()]);
                Ok(())
            })?;
        }
        Ok(())
    }

    fn pread(&self, of: (usize, &Array), addr: u64, out: &mut [u8]) -> Result<(), String> {
        let opened = self.opened(of)?;
        opened.read_exact_at(out, addr).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                format!("the file ends before byte {}: it was cut while in use", addr + out.len() as u64)
            }
            _ => error.to_string(),
        })?;
        self.bytes.fetch_add(out.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn opened(&self, (index, array): (usize, &Array)) -> Result<Arc<File>, String> {
        let number = self.numbers[index];
        if let Some(opened) = self.files.lock().unwrap_or_else(PoisonError::into_inner).get(&number) {
            return Ok(opened.clone());
        }
        let opened = File::open(&array.path).map_err(|error| error.to_string())?;
        let facts = opened.metadata().map_err(|error| error.to_string())?;
        if (facts.len(), stamp_of(&facts)) != (array.file_bytes, array.modified_ns) {
            let (then, now) = (array.file_bytes, facts.len());
            return Err(format!(
                "the file changed since it was opened (size or modification time; {then} bytes then, {now} now): start again"
            ));
        }
        if let Some((_, identity)) = self.identities.iter().find(|(path, _)| *path == array.path) {
            identity.check(&array.path, &opened).map_err(|error| match error {
                DataError::File { problem, .. } => problem,
                other => other.to_string(),
            })?;
        }
        let opened = Arc::new(opened);
        self.files.lock().unwrap_or_else(PoisonError::into_inner).put(number, opened.clone());
        Ok(opened)
    }

    /// The way through libhdf5 and its global lock.
    fn by_library(
        &self,
        (index, array): (usize, &Array),
        rows: Range<u64>,
        columns: Range<u64>,
        out: &mut [u8],
    ) -> Result<(), String> {
        // Its size and time are compared there.
        self.opened((index, array))?;
        let failed = |error: ::hdf5::Error| format!("cannot be read by libhdf5: {error}");
        let mut datasets = self.datasets.lock().unwrap_or_else(PoisonError::into_inner);
        let dataset = datasets.try_get_or_insert((array.path.clone(), array.dataset.clone()), || {
            let opened = library::open(&array.path).map_err(|fault| fault.into_words(&array.path))?;
            opened.dataset(&array.dataset).map_err(failed)
        })?;
        let rows = rows.start as usize..rows.end as usize;
        let columns = columns.start as usize..columns.end as usize;
        macro_rules! each {
            ($type:ty) => {
                numbers::<$type>(dataset, array.is_flat, rows, columns, out, |value, cell| {
                    cell.copy_from_slice(&value.to_ne_bytes())
                })
            };
        }
        with_type!(array.number, each).map_err(failed)
    }
}

/// A part of a chunk, and where it goes.
struct Tile {
    chunk: u64,
    /// First row in the chunk.
    first: u64,
    rows: u64,
    /// Columns of the array.
    columns: Range<u64>,
    /// First row of the result.
    into: u64,
}

enum Failed {
    /// In words, without the place.
    Here(String),
    Known(DataError),
}

impl From<String> for Failed {
    fn from(problem: String) -> Self {
        Failed::Here(problem)
    }
}

fn numbers<T: H5Type + Copy>(
    dataset: &Dataset,
    is_flat: bool,
    rows: Range<usize>,
    columns: Range<usize>,
    out: &mut [u8],
    put: impl Fn(T, &mut [u8]),
) -> ::hdf5::Result<()> {
    let values: Vec<T> = if is_flat {
        dataset.read_slice_1d::<T, _>((rows,))?.into_raw_vec_and_offset().0
    } else {
        dataset.read_slice_2d::<T, _>((rows, columns))?.into_raw_vec_and_offset().0
    };
    if values.len() * size_of::<T>() != out.len() {
        return Err("another number of values than asked for".into());
    }
    values.into_iter().zip(out.chunks_exact_mut(size_of::<T>())).for_each(|(value, cell)| put(value, cell));
    Ok(())
}

/// One line per reason and process.
fn warn_once(array: &Array, reason: &str) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    if SAID.lock().unwrap_or_else(PoisonError::into_inner).insert(reason.into()) {
        tracing::warn!(
            target: USERS,
            "{}: {reason}: read through libhdf5, one thread at a time; deflate, lzf, lz4, zstd, shuffle and uncompressed \
             little-endian numbers are faster",
            array.path.display()
        );
    }
}
