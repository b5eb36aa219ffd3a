//! Parts of chunks as they are kept for single samples: the same columns, of fewer rows.

use super::{Reader, columns_to_targets};
use crate::data::source::chunks::{Chunk, ChunkKey};
use crate::data::source::file_error;
use crate::data::source::hdf5::Target;
use crate::data::{DataError, Scratch};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl Reader {
    /// Gathers a piece of `into.len()` rows, made by [`Reader::copy_rows`], into rows `into` of each target.
    ///
    /// # Errors
    /// Bytes or targets do not fit.
    pub fn gather_piece(
        &self,
        file: usize,
        piece: &[u8],
        into: Range<usize>,
        targets: &mut [Target],
    ) -> Result<(), DataError> {
        let table = self.table(file)?;
        let (rows, whole) = (into.len(), piece.len() == into.len() * table.used_row_bytes());
        let fits = |target: &Target| {
            table.members.get(target.member).is_some_and(|member| target.out.len() >= into.end * member.len * 4)
        };
        if !whole || !targets.iter().all(fits) {
            return Err(file_error(&table.path, format!("{} bytes as a piece of {rows} rows", piece.len())));
        }
        self.rows.fetch_add((rows * targets.len()) as u64, Ordering::Relaxed);
        columns_to_targets(table, rows, piece, 0, into, targets);
        Ok(())
    }

    /// Copies `rows` of entry `index`, whose columns are `entry`, into `out`: columns of that many rows.
    ///
    /// # Errors
    /// Bytes or rows do not fit.
    pub fn copy_rows(
        &self,
        (file, index): (usize, u64),
        entry: &[u8],
        rows: Range<usize>,
        out: &mut [u8],
    ) -> Result<(), DataError> {
        let table = self.table(file)?;
        let (entry_rows, row_bytes) = (self.rows_in(file, index), table.used_row_bytes());
        if entry.len() != entry_rows * row_bytes || rows.end > entry_rows || out.len() != rows.len() * row_bytes {
            return Err(file_error(&table.path, format!("rows {rows:?} of entry {index} into {} bytes", out.len())));
        }
        let (mut from, mut to) = (entry, out);
        for member in &table.members {
            let width = member.width();
            let (column, rest) = from.split_at(entry_rows * width);
            let (part, tail) = std::mem::take(&mut to).split_at_mut(rows.len() * width);
            part.copy_from_slice(&column[rows.start * width..rows.end * width]);
            (from, to) = (rest, tail);
        }
        Ok(())
    }

    /// Chunk `index` of `file`, from the store, and whether it was decoded for this call.
    ///
    /// # Errors
    /// As [`Reader::read`]; the file has no such chunk.
    pub fn chunk(&self, file: usize, index: u64, scratch: &mut Scratch) -> Result<(Arc<Chunk>, bool), DataError> {
        let chunked = self.tables.get(file).filter(|table| table.chunk_rows().is_some() && index < self.entries(file));
        let Some(table) = chunked else {
            let count = self.tables.get(file).map_or(0, |_| self.entries(file));
            return Err(DataError::OutOfRange { what: "chunk", index, place: "its file", count });
        };
        let (rows, mut fresh) = (self.entry_rows(file), false);
        let key = ChunkKey { file: file as u32, chunk: index as u32 };
        let chunk = self.store.get(key, &mut || {
            fresh = true;
            let mut bytes = vec![0; rows * table.used_row_bytes()].into_boxed_slice();
            self.fill_chunk(file, table, rows, index as usize, &mut bytes, scratch)?;
            Ok(Chunk { bytes })
        })?;
        Ok((chunk, fresh))
    }
}
