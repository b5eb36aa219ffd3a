//! Where the rows of a dataset lie, through which filters, and which of them were never written.

use super::storage::{filters, refuse_unknown_filters, spans};
use super::types::{RowType, shuffled_bytes};
use super::{ChunkAt, Filter, Layout, MAX_RATIO, MAX_UNSTORED_BYTES, Table, parts};
use ::hdf5::Dataset;
use ::hdf5::dataset::Layout as H5Layout;
use ::hdf5::plist::dataset_create::ChunkOpts;
use std::os::unix::fs::MetadataExt;

/// Rows of a block that libhdf5 reads where the file has no chunks.
const BLOCK_ROWS: usize = 2048;

/// Completes `table`: its layout, the rows that were never written, the other files that hold rows.
///
/// # Errors
/// What is wrong, without the path.
pub fn layout(dataset: &Dataset, row: &RowType, table: &mut Table) -> Result<(), String> {
    refuse_unknown_filters(dataset)?;
    match dataset.layout() {
        H5Layout::Contiguous => contiguous(dataset, table),
        H5Layout::Chunked => chunked(dataset, row, table),
        H5Layout::Compact => {
            through_library(table, "compact layout", BLOCK_ROWS);
            Ok(())
        }
        H5Layout::Virtual => {
            through_library(table, "virtual dataset", BLOCK_ROWS);
            Ok(())
        }
    }
}

/// A layout whose rows libhdf5 reads, for `reason`.
pub(super) fn by_library(reason: &str) -> Layout {
    Layout::Library { chunk_rows: 0, reason: reason.into(), runs: Vec::new() }
}

/// Leaves the rows to libhdf5, for `reason` or for one that was found before.
fn through_library(table: &mut Table, reason: &str, chunk_rows: usize) {
    if !matches!(table.layout, Layout::Library { .. }) {
        table.layout = by_library(reason);
    }
    let some_rows = chunk_rows.min(table.rows.max(1) as usize);
    if let Layout::Library { chunk_rows, .. } = &mut table.layout {
        *chunk_rows = some_rows;
    }
}

fn contiguous(dataset: &Dataset, table: &mut Table) -> Result<(), String> {
    let plist = dataset.dcpl().map_err(|error| error.to_string())?;
    let stored = dataset.storage_size();
    if !plist.external().is_empty() {
        // Rows in other files have no address here.
        let bytes = table.rows.saturating_mul(table.row_bytes as u64);
        table.others = parts::raw_files(&plist, &table.path, if stored > 0 { stored } else { bytes })?;
        through_library(table, "rows in external files", BLOCK_ROWS);
        return Ok(());
    }
    let Some(addr) = dataset.offset() else {
        table.unwritten = vec![[0, table.rows]];
        through_library(table, "rows not yet written", BLOCK_ROWS);
        return Ok(());
    };
    if Some(stored) != table.rows.checked_mul(table.row_bytes as u64) {
        through_library(table, "rows of another size than their type", BLOCK_ROWS);
    }
    match &table.layout {
        Layout::Library { .. } => through_library(table, "", BLOCK_ROWS),
        _ => table.layout = Layout::Contiguous { addr },
    }
    Ok(())
}

fn chunked(dataset: &Dataset, row: &RowType, table: &mut Table) -> Result<(), String> {
    let shape = dataset.chunk().unwrap_or_default();
    let chunk_rows = shape.first().copied().unwrap_or(1);
    let columns = table.columns();
    // Chunks beside each other that hold the columns in use.
    let beside = if table.plain { columns.div_ceil(shape.get(1).copied().unwrap_or(columns).max(1)) } else { 1 };
    let (chunks, found) = chunks(dataset, table, chunk_rows)?;
    let short = found.iter().enumerate().filter(|(_, found)| (**found as usize) < beside);
    table.unwritten = spans(short.map(|(n, _)| n as u64), chunk_rows as u64, table.rows);
    if table.plain && shape.get(1).is_some_and(|width| *width != table.row_bytes / table.element_bytes) {
        through_library(table, "chunks that cut rows", chunk_rows);
    }
    let filters = match filters(dataset) {
        Ok(filters) => filters,
        Err(name) => {
            through_library(table, &name, chunk_rows);
            Vec::new()
        }
    };
    if filters.contains(&Filter::Shuffle) {
        let recorded = dataset.dcpl().ok().as_ref().and_then(shuffled_bytes);
        table.element_bytes = recorded.unwrap_or(table.element_bytes);
        if !table.row_bytes.is_multiple_of(table.element_bytes) {
            table.element_bytes = table.row_bytes;
            through_library(table, "shuffled elements that do not fill rows", chunk_rows);
        }
    }
    // Where sizes in memory and in the file differ, chunks without filters show the size of a row.
    let decoded = (chunk_rows as u64).saturating_mul(table.row_bytes as u64);
    let differs = row.bytes != Some(row.memory_bytes);
    let odd = |chunk: &ChunkAt| chunk.stored_bytes > 0 && u64::from(chunk.stored_bytes) != decoded;
    if differs && filters.is_empty() && chunks.iter().any(odd) {
        through_library(table, "rows of another size than their type", chunk_rows);
    }
    match &table.layout {
        Layout::Library { .. } => through_library(table, "", chunk_rows),
        _ => table.layout = Layout::Chunked { chunk_rows, chunks, filters },
    }
    Ok(())
}

/// True if an incomplete last chunk is stored without its filters.
pub fn last_chunk_is_raw(dataset: &Dataset, rows: u64, chunk_rows: usize) -> bool {
    let raw = |opts: ChunkOpts| opts.contains(ChunkOpts::DONT_FILTER_PARTIAL_CHUNKS);
    !rows.is_multiple_of(chunk_rows as u64) && dataset.dcpl().ok().and_then(|plist| plist.chunk_opts()).is_some_and(raw)
}

/// The chunk at each step of `chunk_rows` rows, and how many were found there: several where chunks cut rows.
fn chunks(dataset: &Dataset, table: &Table, chunk_rows: usize) -> Result<(Box<[ChunkAt]>, Vec<u32>), String> {
    table.validate_chunk_rows(chunk_rows)?;
    let mut chunks = vec![ChunkAt::default(); table.rows.div_ceil(chunk_rows as u64) as usize];
    let mut found = vec![0u32; chunks.len()];
    let used = table.columns() as u64;
    let mut problem = None;
    let visited = dataset.chunks_visit(|info| {
        let row = info.offset.first().copied().unwrap_or(u64::MAX);
        let column = info.offset.get(1).copied().unwrap_or(0);
        let slot = (row.is_multiple_of(chunk_rows as u64)).then(|| (row / chunk_rows as u64) as usize);
        match (slot.and_then(|n| chunks.get_mut(n).zip(found.get_mut(n))), u32::try_from(info.size)) {
            (Some((slot, found)), Ok(stored_bytes)) if stored_bytes > 0 => {
                *slot = ChunkAt { addr: info.addr, stored_bytes, filter_mask: info.filter_mask };
                *found += u32::from(!table.plain || column < used);
            }
            _ => problem = Some(format!("a chunk of {} bytes at row {row} is not credible", info.size)),
        }
        0
    });
    visited.map_err(|error| format!("its list of chunks cannot be read ({error}): replace it or leave it out"))?;
    if let Some(problem) = problem {
        return Err(problem);
    }
    if last_chunk_is_raw(dataset, table.rows, chunk_rows)
        && let Some(last) = chunks.last_mut()
    {
        last.filter_mask = u32::MAX;
    }
    Ok((chunks.into(), found))
}

/// A file that is mostly holes: its rows would be zeros without end.
pub fn refuse_holes(facts: &std::fs::Metadata) -> Result<(), String> {
    let (bytes, stored) = (facts.len(), facts.blocks().saturating_mul(512));
    // Some file systems count no blocks.
    if stored > 0 && bytes > stored.saturating_mul(MAX_RATIO).saturating_add(MAX_UNSTORED_BYTES) {
        return Err(format!("says {bytes} bytes, {stored} of them are stored: replace it or leave it out"));
    }
    Ok(())
}
