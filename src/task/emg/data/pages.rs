//! Windows through the node's page cache: which entries a window lies in, and how they are read.
//!
//! An entry is a chunk of a file, or a page of its contiguous rows: the columns in use, in the file's own types.

use crate::data::cache::{CacheClient, CachedEntries, EntrySource};
use crate::data::source::hdf5::{Reader, Target};
use crate::data::{DataError, Scratch};
use std::ops::Range;
use std::sync::Arc;

/// The files of a data set as entries of the page cache, numbered alike on every rank.
pub struct Pages {
    files: Arc<Files>,
    entries: CachedEntries<Files>,
}

struct Files {
    reader: Arc<Reader>,
    /// Entries before each file.
    bases: Vec<u64>,
}

impl Files {
    /// File and entry in it.
    fn locate(&self, key: u64) -> (usize, u64) {
        // Files without entries share their base with the next one, which is the one meant.
        let file = self.bases.partition_point(|base| *base <= key).saturating_sub(1);
        (file, key - self.bases.get(file).copied().unwrap_or(0))
    }
}

impl EntrySource for Files {
    fn entry_bytes(&self, key: u64) -> u64 {
        let (file, index) = self.locate(key);
        self.reader.entry_bytes(file, index) as u64
    }

    fn fill_entry(&self, key: u64, out: &mut [u8], scratch: &mut Scratch) -> Result<(), DataError> {
        let (file, index) = self.locate(key);
        self.reader.fill_entry(file, index, out, scratch)
    }
}

impl Pages {
    pub fn new(reader: Arc<Reader>, cache: Arc<CacheClient>) -> Self {
        let mut bases = Vec::with_capacity(reader.tables().len());
        let mut total = 0;
        for file in 0..reader.tables().len() {
            bases.push(total);
            total += reader.entries(file);
        }
        let files = Arc::new(Files { reader, bases });
        Self { entries: CachedEntries::new(Arc::clone(&files), cache), files }
    }

    /// The same entries as the page cache has them.
    pub fn entries(&self) -> &CachedEntries<impl EntrySource + use<>> {
        &self.entries
    }

    /// Keys of the entries that hold rows `start..start + rows` of `file`.
    pub fn keys(&self, file: usize, start: u64, rows: usize) -> Range<u64> {
        let (base, entry_rows) = (self.files.bases[file], self.files.reader.entry_rows(file) as u64);
        base + start / entry_rows..base + (start + rows as u64).div_ceil(entry_rows)
    }

    /// File and entry in it.
    pub fn locate(&self, key: u64) -> (usize, u64) {
        self.files.locate(key)
    }

    /// Rows of the entry in its file.
    pub fn rows(&self, key: u64) -> Range<u64> {
        let (file, index) = self.locate(key);
        let entry_rows = self.files.reader.entry_rows(file) as u64;
        index * entry_rows..(index + 1) * entry_rows
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
        self.check(file, start, rows, targets)?;
        let entry_rows = self.files.reader.entry_rows(file) as u64;
        let mut done = 0;
        while done < rows {
            let row = start + done as u64;
            let (index, first) = (row / entry_rows, (row % entry_rows) as usize);
            let take = (entry_rows as usize - first).min(rows - done);
            let key = self.files.bases[file] + index;
            let mut gathered = Ok(());
            let cached = self.entries.read(key, scratch, &mut |entry| {
                gathered = self.files.reader.gather_entry((file, index), entry, first, done..done + take, targets);
            })?;
            gathered?;
            if !cached {
                self.read_past(file, row, done..done + take, targets, scratch)?;
            }
            done += take;
        }
        Ok(())
    }

    fn check(&self, file: usize, start: u64, rows: usize, targets: &[Target]) -> Result<(), DataError> {
        let table = self.files.reader.tables().get(file).ok_or_else(|| DataError::Other(format!("no file {file}")))?;
        let room = |t: &Target| table.members.get(t.member).is_some_and(|m| t.out.len() == rows * m.len * 4);
        if start.checked_add(rows as u64).is_some_and(|end| end <= table.rows) && targets.iter().all(room) {
            return Ok(());
        }
        let problem = format!("rows {start}..+{rows} asked for, it has {}, or no room for them", table.rows);
        Err(crate::data::source::file_error(&table.path, problem))
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
        let members = &self.files.reader.tables()[file].members;
        let mut parts: Vec<Target> = targets
            .iter_mut()
            .map(|target| {
                let width = members[target.member].len * 4;
                let out = &mut target.out[into.start * width..into.end * width];
                Target { member: target.member, transform: target.transform, out }
            })
            .collect();
        self.files.reader.read(file, row, into.len(), &mut parts, scratch)
    }
}
