//! Rows of many files, read by `pread` and decoded in the calling thread.

mod piece;

use super::decode::{self, Inflater};
use super::gather::{Transform, gather};
use super::open::stamp_of;
use super::types::{self, Selected};
use super::{ChunkAt, Layout, Member, Table, library, parts, runs};
use crate::data::source::chunks::ChunkStore;
use crate::data::source::{Identity, file_error};
use crate::data::{DataError, Scratch};
use lru::LruCache;
use spec::contract::USERS;
use std::any::Any;
use std::collections::BTreeSet;
use std::fs::File;
use std::num::{NonZeroU64, NonZeroUsize};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Files kept open at once: far below the usual limit of 1,024 descriptors per process.
const OPEN_FILES: NonZeroUsize = NonZeroUsize::new(128).unwrap();
/// Bytes of an entry of contiguous rows, about.
const PAGE_BYTES: usize = 512 << 10;
/// Datasets kept open through libhdf5.
const OPEN_DATASETS: NonZeroUsize = NonZeroUsize::new(8).unwrap();

/// A field to read: f32 `[rows, len]`, native byte order, into `out`.
pub struct Target<'a> {
    /// Place of the field in [`Table::members`].
    pub member: usize,
    pub transform: &'a Transform,
    pub out: &'a mut [u8],
}

/// Reads so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadStats {
    /// Rows handed out, once per field.
    pub rows: u64,
    /// Bytes that came by `pread`.
    pub bytes: u64,
    /// Chunks decoded here.
    pub decoded_chunks: u64,
    /// Blocks that libhdf5 had to read.
    pub library_blocks: u64,
}

/// Reads rows of the files of a data set. Shared by all loader threads of a rank.
pub struct Reader {
    tables: Vec<Table>,
    /// Identities of the files, where they are known: see [`Reader::recognising`].
    identities: Vec<Identity>,
    store: Arc<dyn ChunkStore>,
    files: Mutex<LruCache<usize, Arc<File>>>,
    /// By file, and 0 for its own dataset or 1 + the place of a part.
    datasets: Mutex<LruCache<(usize, usize), ::hdf5::Dataset>>,
    rows: AtomicU64,
    bytes: AtomicU64,
    decoded_chunks: AtomicU64,
    library_blocks: AtomicU64,
}

impl Reader {
    /// `tables[i]` is file `i` of every later call; each must have passed [`Table::validate`].
    pub fn new(tables: Vec<Table>, store: Arc<dyn ChunkStore>) -> Self {
        Self {
            tables,
            identities: Vec::new(),
            store,
            files: Mutex::new(LruCache::new(OPEN_FILES)),
            datasets: Mutex::new(LruCache::new(OPEN_DATASETS)),
            rows: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            decoded_chunks: AtomicU64::new(0),
            library_blocks: AtomicU64::new(0),
        }
    }

    /// `identities[i]` is that of file `i`: a file that was replaced by one of the same size and time is an error too.
    pub fn recognising(self, identities: Vec<Identity>) -> Self {
        Self { identities, ..self }
    }

    /// Lets go of decoded chunks and open files.
    pub fn give_back(&self) {
        self.store.clear();
        self.files.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Rows of an entry of `file`: those of a chunk, or of a page of contiguous rows.
    pub fn entry_rows(&self, file: usize) -> usize {
        self.tables.get(file).map_or(1, |table| {
            table.chunk_rows().unwrap_or_else(|| (PAGE_BYTES / table.used_row_bytes().max(1)).max(1))
        })
    }

    /// Entries of `file`.
    pub fn entries(&self, file: usize) -> u64 {
        self.tables.get(file).map_or(0, |table| table.rows.div_ceil(self.entry_rows(file) as u64))
    }

    /// Bytes of entry `index` of `file`: the columns in use, in the file's own types. A chunk is always whole, the last page
    /// of contiguous rows ends with the rows.
    pub fn entry_bytes(&self, file: usize, index: u64) -> usize {
        self.tables.get(file).map_or(0, |table| self.rows_in(file, index) * table.used_row_bytes())
    }

    /// Bytes of all entries of `file`.
    pub fn file_bytes(&self, file: usize) -> u64 {
        let (entries, bytes) = (self.entries(file), |index| self.entry_bytes(file, index) as u64);
        entries.checked_sub(1).map_or(0, |last| last * bytes(0) + bytes(last))
    }

    fn rows_in(&self, file: usize, index: u64) -> usize {
        let rows = self.entry_rows(file);
        match &self.tables[file].layout {
            Layout::Contiguous { .. } => {
                let left = self.tables[file].rows.saturating_sub(index.saturating_mul(rows as u64));
                left.min(rows as u64) as usize
            }
            _ => rows,
        }
    }

    /// Reads entry `index` of `file` into `out`, [`Reader::entry_bytes`] long. It is kept there, so the kernel may drop
    /// its copy of the file's bytes.
    ///
    /// # Errors
    /// As [`Reader::read`]; `out` holds anything then.
    pub fn fill_entry(&self, file: usize, index: u64, out: &mut [u8], scratch: &mut Scratch) -> Result<(), DataError> {
        if index >= self.entries(file) || out.len() != self.entry_bytes(file, index) {
            let problem = format!("{} bytes of room for entry {index}", out.len());
            return Err(file_error(&self.table(file)?.path, problem));
        }
        let table = &self.tables[file];
        let Layout::Contiguous { addr } = &table.layout else {
            self.fill_chunk(file, table, self.entry_rows(file), index as usize, out, scratch)?;
            if let Layout::Chunked { chunks, .. } = &table.layout
                && let Some(chunk) = chunks.get(index as usize)
            {
                self.forget(file, chunk.addr, u64::from(chunk.stored_bytes));
            }
            return Ok(());
        };
        let (first, rows) = (index * self.entry_rows(file) as u64, self.rows_in(file, index));
        let (at, bytes) = (addr + first * table.row_bytes as u64, rows * table.row_bytes);
        self.pread(file, at, bytes, &mut scratch.raw)
            .and_then(|()| decode::columns_of_rows(table, rows, &scratch.raw[..bytes], out))
            .map_err(|error| library::failed(&table.path, format!("rows {first}..{}: {error}", first + rows as u64)))?;
        self.forget(file, at, bytes as u64);
        Ok(())
    }

    /// Advice: a kernel or file system that keeps these pages all the same costs memory that it can take back.
    fn forget(&self, file: usize, addr: u64, bytes: u64) {
        if let Ok(opened) = self.opened(file) {
            let _ = rustix::fs::fadvise(&*opened, addr, NonZeroU64::new(bytes), rustix::fs::Advice::DontNeed);
        }
    }

    /// Gathers rows `first..` of entry `index`, whose bytes are `entry`, into rows `into` of each target.
    ///
    /// # Errors
    /// Bytes, rows or targets do not fit.
    pub fn gather_entry(
        &self,
        (file, index): (usize, u64),
        entry: &[u8],
        first: usize,
        into: Range<usize>,
        targets: &mut [Target],
    ) -> Result<(), DataError> {
        let table = self.table(file)?;
        let rows = self.rows_in(file, index);
        let fits = targets
            .iter()
            .all(|target| table.members.get(target.member).is_some_and(|m| target.out.len() >= into.end * m.len * 4));
        if !fits || entry.len() != rows * table.used_row_bytes() || first + into.len() > rows {
            return Err(file_error(&table.path, format!("rows {first}..+{} of entry {index}", into.len())));
        }
        self.rows.fetch_add((into.len() * targets.len()) as u64, Ordering::Relaxed);
        columns_to_targets(table, rows, entry, first, into, targets);
        Ok(())
    }

    pub fn tables(&self) -> &[Table] {
        &self.tables
    }

    /// File number `file`.
    ///
    /// # Errors
    /// There is no such file.
    pub fn table(&self, file: usize) -> Result<&Table, DataError> {
        let (index, count) = (file as u64, self.tables.len() as u64);
        self.tables.get(file).ok_or(DataError::OutOfRange { what: "file", index, place: "the data set", count })
    }

    pub fn store(&self) -> &Arc<dyn ChunkStore> {
        &self.store
    }

    pub fn stats(&self) -> ReadStats {
        ReadStats {
            rows: self.rows.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            decoded_chunks: self.decoded_chunks.load(Ordering::Relaxed),
            library_blocks: self.library_blocks.load(Ordering::Relaxed),
        }
    }

    /// Reads rows `start..start + rows` of `file` into each target. Contiguous files: exactly these rows are read.
    /// Chunked files: the chunks they touch, through the store.
    ///
    /// # Errors
    /// The file is gone, has changed, or holds bytes that do not decode; rows or lengths are out of range.
    pub fn read(
        &self,
        file: usize,
        start: u64,
        rows: usize,
        targets: &mut [Target],
        scratch: &mut Scratch,
    ) -> Result<(), DataError> {
        let table = self.check(file, start, rows, targets)?;
        self.rows.fetch_add((rows * targets.len()) as u64, Ordering::Relaxed);
        match &table.layout {
            Layout::Contiguous { addr } => {
                let bytes = rows * table.row_bytes;
                self.pread(file, addr + start * table.row_bytes as u64, bytes, &mut scratch.raw).map_err(|error| {
                    library::failed(&table.path, format!("rows {start}..{}: {error}", start + rows as u64))
                })?;
                for target in targets {
                    let member = &table.members[target.member];
                    gather(&scratch.raw[..bytes], table.row_bytes, member, target.transform, target.out);
                }
                Ok(())
            }
            Layout::Chunked { chunk_rows, .. } | Layout::Library { chunk_rows, .. } => {
                self.read_chunks(file, table, *chunk_rows, start, rows, targets, scratch)
            }
        }
    }

    /// Checks that `file` holds the rows, and that each target has room for them.
    ///
    /// # Errors
    /// It holds fewer, or a target is too small.
    pub fn check(&self, file: usize, start: u64, rows: usize, targets: &[Target]) -> Result<&Table, DataError> {
        let table = self.table(file)?;
        if start.checked_add(rows as u64).is_none_or(|end| end > table.rows) {
            let problem = format!("rows {start}..+{rows} asked for, it has {}", table.rows);
            return Err(file_error(&table.path, problem));
        }
        for target in targets {
            let fits = table.members.get(target.member).is_some_and(|m| target.out.len() == rows * m.len * 4);
            if !fits {
                let problem = format!("{} bytes of room for field {}", target.out.len(), target.member);
                return Err(file_error(&table.path, problem));
            }
        }
        Ok(table)
    }

    #[expect(clippy::too_many_arguments, reason = "a window, and where it goes")]
    fn read_chunks(
        &self,
        file: usize,
        table: &Table,
        chunk_rows: usize,
        start: u64,
        rows: usize,
        targets: &mut [Target],
        scratch: &mut Scratch,
    ) -> Result<(), DataError> {
        let mut done = 0;
        while done < rows {
            let row = start + done as u64;
            let index = (row / chunk_rows as u64) as usize;
            let first = (row % chunk_rows as u64) as usize;
            let take = (chunk_rows - first).min(rows - done);
            let (chunk, _) = self.chunk(file, index as u64, scratch)?;
            columns_to_targets(table, chunk_rows, &chunk.bytes, first, done..done + take, targets);
            done += take;
        }
        Ok(())
    }

    /// Decodes one chunk into its columns, which fill `out`.
    fn fill_chunk(
        &self,
        file: usize,
        table: &Table,
        chunk_rows: usize,
        index: usize,
        out: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<(), DataError> {
        let first = index as u64 * chunk_rows as u64;
        let fail = |problem: String| {
            library::failed(&table.path, format!("chunk {index} (rows {first}..+{chunk_rows}) {problem}"))
        };
        if let Layout::Chunked { chunks, filters, .. } = &table.layout
            && let Some(ChunkAt { addr, stored_bytes, filter_mask }) = chunks.get(index).copied()
            && stored_bytes > 0
        {
            let Scratch { raw, decoded, extra, .. } = scratch;
            self.pread(file, addr, stored_bytes as usize, raw).map_err(&fail)?;
            raw.truncate(stored_bytes as usize);
            self.decoded_chunks.fetch_add(1, Ordering::Relaxed);
            let inflater = inflater(extra);
            return decode::decode_into(table, chunk_rows, filters, filter_mask, raw, decoded, inflater, out)
                .map_err(&fail);
        }
        self.library_blocks.fetch_add(1, Ordering::Relaxed);
        self.by_library(file, table, chunk_rows, first, out).map_err(&fail)
    }

    /// Fills the first `bytes` of `buffer`, which only ever grows.
    fn pread(&self, file: usize, addr: u64, bytes: usize, buffer: &mut Vec<u8>) -> Result<(), String> {
        if buffer.len() < bytes {
            buffer.resize(bytes, 0);
        }
        let opened = self.opened(file)?;
        opened.read_exact_at(&mut buffer[..bytes], addr).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                format!("the file ends before byte {}: it was cut while in use", addr + bytes as u64)
            }
            _ => error.to_string(),
        })?;
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(())
    }

    fn opened(&self, file: usize) -> Result<Arc<File>, String> {
        if let Some(opened) = self.files.lock().unwrap_or_else(PoisonError::into_inner).get(&file) {
            return Ok(opened.clone());
        }
        let table = &self.tables[file];
        let opened = File::open(&table.path).map_err(|error| error.to_string())?;
        let facts = opened.metadata().map_err(|error| error.to_string())?;
        if (facts.len(), stamp_of(&facts)) != (table.file_bytes, table.modified_ns) {
            return Err(format!(
                "the file changed since it was opened (size or modification time; {} bytes then, {} now): start again",
                table.file_bytes,
                facts.len()
            ));
        }
        if let Some(Err(error)) = self.identities.get(file).map(|identity| identity.check(&table.path, &opened)) {
            return Err(match error {
                DataError::File { problem, .. } => problem,
                other => other.to_string(),
            });
        }
        let opened = Arc::new(opened);
        self.files.lock().unwrap_or_else(PoisonError::into_inner).put(file, opened.clone());
        Ok(opened)
    }

    /// The way through libhdf5 and its global lock: a block of rows, as columns in the table's types.
    fn by_library(
        &self,
        file: usize,
        table: &Table,
        block_rows: usize,
        first: u64,
        out: &mut [u8],
    ) -> Result<(), String> {
        warn_once(table);
        let rows = first..(first + block_rows as u64).min(table.rows);
        let mut packed = vec![0; (rows.end - rows.start) as usize * table.used_row_bytes()];
        let mut datasets = self.datasets.lock().unwrap_or_else(PoisonError::into_inner);
        match &table.layout {
            Layout::Library { runs: mapped, .. } if !mapped.is_empty() => {
                for run in runs::touching(mapped, rows.clone()) {
                    let other = &table.others[run.part];
                    let dataset = datasets.try_get_or_insert((file, run.part + 1), || parts::open_part(other))?;
                    parts::read_run(dataset, table, run, rows.clone(), &mut packed)
                        .map_err(|error| library::unreadable(&other.path, &error.to_string()))?;
                }
            }
            _ => {
                parts::check_others(table)?;
                let dataset = datasets.try_get_or_insert((file, 0), || open_dataset(table))?;
                let columns = table.plain.then(|| 0..table.columns());
                types::read_rows(dataset, &Selected { members: &table.members, columns }, rows, &mut packed)
                    .map_err(|error| format!("cannot be read by libhdf5: {error}"))?;
            }
        }
        split_columns(table, block_rows, &packed, out);
        Ok(())
    }
}

fn open_dataset(table: &Table) -> Result<::hdf5::Dataset, String> {
    let opened = library::open(&table.path).map_err(|fault| fault.into_words(&table.path))?;
    opened.dataset(&table.dataset).map_err(|error| format!("cannot be read by libhdf5: {error}"))
}

/// Gathers rows `first..` of an entry's columns, `entry_rows` long, into rows `into` of each target.
fn columns_to_targets(
    table: &Table,
    entry_rows: usize,
    columns: &[u8],
    first: usize,
    into: Range<usize>,
    targets: &mut [Target],
) {
    for target in targets {
        let before: usize = table.members[..target.member].iter().map(Member::width).sum();
        let member = Member { offset: 0, name: String::new(), ..table.members[target.member] };
        let column = &columns[entry_rows * before..][..entry_rows * member.width()];
        let out = &mut target.out[into.start * member.len * 4..into.end * member.len * 4];
        gather(&column[first * member.width()..], member.width(), &member, target.transform, out);
    }
}

/// Splits packed rows, as many as there are, into columns of `block_rows` rows; rows behind the last are zero.
fn split_columns(table: &Table, block_rows: usize, packed: &[u8], out: &mut [u8]) {
    out.fill(0);
    let (mut rest, mut at) = (out, 0);
    for member in &table.members {
        let (column, tail) = std::mem::take(&mut rest).split_at_mut(block_rows * member.width());
        let rows = packed.chunks_exact(table.used_row_bytes());
        for (row, cells) in rows.zip(column.chunks_exact_mut(member.width())) {
            cells.copy_from_slice(&row[at..at + member.width()]);
        }
        at += member.width();
        rest = tail;
    }
}

/// One line per reason and process.
fn warn_once(table: &Table) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let reason = match &table.layout {
        Layout::Library { reason, .. } => reason.as_str(),
        _ => "chunks never written",
    };
    if SAID.lock().unwrap_or_else(PoisonError::into_inner).insert(reason.into()) {
        tracing::warn!(
            target: USERS,
            "{}: {reason}: read through libhdf5, one thread at a time; deflate, lzf, lz4, shuffle and uncompressed files are faster",
            table.path.display()
        );
    }
}

/// The thread's decoder, made at first use.
fn inflater(extra: &mut Option<Box<dyn Any + Send>>) -> &mut Inflater {
    if !extra.as_ref().is_some_and(|kept| kept.is::<Inflater>()) {
        *extra = None;
    }
    let kept = extra.get_or_insert_with(|| Box::new(Inflater::default()));
    match kept.downcast_mut() {
        Some(inflater) => inflater,
        None => unreachable!("only an Inflater is kept here"),
    }
}
