//! Windows through the node's page cache: which entries a window lies in, and how they are read.
//!
//! An entry is a chunk of a file, or a page of its contiguous rows: the columns in use, in the file's own types. Of a data set
//! with [`Pieces`] it is a window's part of a chunk.

use super::pieces::{Fresh, Piece, Pieces};
use crate::data::source::chunks::Chunk;
use crate::data::source::hdf5::{Reader, Target};
use crate::data::{DataError, Scratch};
use cache::client::{CacheClient, Item};
use std::ops::Range;
use std::sync::Arc;

/// The files of a data set as entries of the page cache, numbered alike on every rank.
pub struct ChunkEntries {
    reader: Arc<Reader>,
    cache: Arc<CacheClient>,
    /// Entries before each file.
    bases: Vec<u64>,
    /// Entries of all files; keys from here on are those of pieces.
    total: u64,
    /// Pieces of the one data set that is cached by window.
    pieces: Option<Pieces>,
}

impl ChunkEntries {
    pub fn new(reader: Arc<Reader>, cache: Arc<CacheClient>) -> Self {
        let mut bases = Vec::with_capacity(reader.tables().len());
        let mut total = 0;
        for file in 0..reader.tables().len() {
            bases.push(total);
            total += reader.entries(file);
        }
        Self { reader, cache, bases, total, pieces: None }
    }

    /// The same with a data set that is cached by window, where there is one; its keys begin at [`ChunkEntries::total`].
    pub fn with_pieces(self, pieces: Option<Pieces>) -> Self {
        Self { pieces, ..self }
    }

    /// Entries of all files.
    pub fn total(&self) -> u64 {
        self.total
    }

    pub fn pieces(&self) -> Option<&Pieces> {
        self.pieces.as_ref()
    }

    pub fn reader(&self) -> &Reader {
        &self.reader
    }

    pub fn cache(&self) -> &CacheClient {
        &self.cache
    }

    /// Keys of the entries that hold rows `start..start + rows` of `file`.
    pub fn keys(&self, file: usize, start: u64, rows: usize) -> Range<u64> {
        let (base, entry_rows) = (self.bases[file], self.reader.entry_rows(file) as u64);
        base + start / entry_rows..base + (start + rows as u64).div_ceil(entry_rows)
    }

    /// File and entry in it.
    pub fn locate(&self, key: u64) -> (usize, u64) {
        // Files without entries share their base with the next one, which is the one meant.
        let file = self.bases.partition_point(|base| *base <= key).saturating_sub(1);
        (file, key - self.bases.get(file).copied().unwrap_or(0))
    }

    /// Rows of the entry in its file.
    pub fn rows(&self, key: u64) -> Range<u64> {
        let (file, index) = self.locate(key);
        let entry_rows = self.reader.entry_rows(file) as u64;
        index * entry_rows..(index + 1) * entry_rows
    }

    pub fn bytes(&self, key: u64) -> u64 {
        let (file, index) = self.locate(key);
        self.reader.entry_bytes(file, index) as u64
    }

    /// As [`Reader::read`], with each entry read once for all ranks while there is room.
    ///
    /// # Errors
    /// As [`Reader::read`]; the page cache is gone.
    pub fn read(
        &self,
        file: usize,
        start: u64,
        rows: usize,
        targets: &mut [Target],
        scratch: &mut Scratch,
    ) -> Result<(), DataError> {
        self.reader.check(file, start, rows, targets)?;
        let entry_rows = self.reader.entry_rows(file) as u64;
        let mut done = 0;
        while done < rows {
            let row = start + done as u64;
            let (index, first) = (row / entry_rows, (row % entry_rows) as usize);
            let take = (entry_rows as usize - first).min(rows - done);
            let key = self.bases[file] + index;
            let want =
                Item { key, bytes: self.reader.entry_bytes(file, index) as u64, next_use: u64::MAX, offer: false };
            let into = done..done + take;
            let mut filler = Filler::new(self, scratch);
            match self.cache.read(want, &mut |key, out| filler.fill(key, out))? {
                Some(entry) => self.reader.gather_entry((file, index), &entry, first, into, targets)?,
                None => self.read_past(file, row, into, targets, filler.scratch)?,
            }
            filler.offer()?;
            done += take;
        }
        Ok(())
    }

    /// Rows that the cache has no room for, into rows `into` of each target.
    fn read_past(
        &self,
        file: usize,
        row: u64,
        into: Range<usize>,
        targets: &mut [Target],
        scratch: &mut Scratch,
    ) -> Result<(), DataError> {
        let members = &self.reader.tables()[file].members;
        let mut parts: Vec<Target> = targets
            .iter_mut()
            .map(|target| {
                let width = members[target.member].len * 4;
                let out = &mut target.out[into.start * width..into.end * width];
                Target { member: target.member, transform: target.transform, out }
            })
            .collect();
        self.reader.read(file, row, into.len(), &mut parts, scratch)
    }

    /// As [`ChunkEntries::read`] for window `index` of the data set with pieces, rows `start..start + rows` of `file`.
    ///
    /// # Errors
    /// As [`ChunkEntries::read`].
    pub fn read_pieces(
        &self,
        pieces: &Pieces,
        (index, file, start, rows): (usize, usize, u64, usize),
        targets: &mut [Target],
        scratch: &mut Scratch,
    ) -> Result<(), DataError> {
        self.reader.check(file, start, rows, targets)?;
        for Piece { key, file, chunk, rows, into } in pieces.of(index as u64, &self.reader) {
            let bytes = rows.len() * self.reader.tables()[file].used_row_bytes();
            let want = Item { key, bytes: bytes as u64, next_use: u64::MAX, offer: false };
            let mut filler = Filler::new(self, scratch);
            match self.cache.read_again(want, &mut |key, out| filler.fill(key, out))? {
                Some(piece) => self.reader.gather_piece(file, &piece, into, targets)?,
                None => {
                    let bytes = filler.chunk(file, chunk)?;
                    self.reader.gather_entry((file, chunk), &bytes.bytes, rows.start, into, targets)?;
                }
            }
            filler.offer()?;
        }
        Ok(())
    }

    /// Fills one entry that this rank was granted ahead of need. False means that there was no such entry.
    pub fn work_ahead(&self, scratch: &mut Scratch) -> bool {
        let mut filler = Filler::new(self, scratch);
        let done = self.cache.work_ahead(&mut |key, out| filler.fill(key, out));
        // Whoever needs them meets the error.
        let _ = filler.offer();
        done
    }
}

/// Makes the bytes of entries, and keeps the chunks that it decoded for them.
struct Filler<'a, 'b> {
    entries: &'a ChunkEntries,
    scratch: &'b mut Scratch,
    decoded: Vec<Fresh>,
}

impl<'a, 'b> Filler<'a, 'b> {
    fn new(entries: &'a ChunkEntries, scratch: &'b mut Scratch) -> Self {
        Self { entries, scratch, decoded: Vec::new() }
    }

    fn fill(&mut self, key: u64, out: &mut [u8]) -> Result<(), DataError> {
        let ChunkEntries { reader, pieces, total, .. } = self.entries;
        match pieces {
            Some(pieces) if key >= *total => {
                let piece = pieces.locate(key, reader)?;
                let bytes = self.chunk(piece.file, piece.chunk)?;
                reader.copy_rows((piece.file, piece.chunk), &bytes.bytes, piece.rows, out)
            }
            _ => {
                let (file, index) = self.entries.locate(key);
                reader.fill_entry(file, index, out, self.scratch)
            }
        }
    }

    /// A decoded chunk; kept when it was not at hand.
    fn chunk(&mut self, file: usize, chunk: u64) -> Result<Arc<Chunk>, DataError> {
        if let Some(known) = self.decoded.iter().find(|known| (known.file, known.chunk) == (file, chunk)) {
            return Ok(Arc::clone(&known.bytes));
        }
        let (bytes, decoded) = self.entries.reader.chunk(file, chunk, self.scratch)?;
        if decoded {
            self.decoded.push(Fresh { file, chunk, bytes: Arc::clone(&bytes) });
        }
        Ok(bytes)
    }

    /// Offers the other pieces of chunks that were decoded.
    fn offer(&self) -> Result<(), DataError> {
        let ChunkEntries { reader, cache, pieces, .. } = self.entries;
        let Some(pieces) = pieces else { return Ok(()) };
        for decoded in &self.decoded {
            let mut copy = |key, out: &mut [u8]| {
                let piece = pieces.locate(key, reader)?;
                reader.copy_rows((piece.file, piece.chunk), &decoded.bytes.bytes, piece.rows, out)
            };
            cache.offer(&pieces.offers(decoded, reader), &mut copy)?;
        }
        Ok(())
    }
}
