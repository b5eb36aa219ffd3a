//! Where the rows of a dataset lie, through which filters, and which of them were never written.

use super::bitshuffle::{BITSHUFFLE_ID, Codec};
use super::compress::{LZ4_ID, LZF_ID, ZSTD_ID};
use super::open::by_library;
use super::types::{RowType, shuffled_bytes};
use super::{ChunkAt, Filter, Layout, MAX_RATIO, MAX_UNSTORED_BYTES, Table, parts};
use ::hdf5::Dataset;
use ::hdf5::dataset::Layout as H5Layout;
use ::hdf5::filters::Filter as H5Filter;
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

/// Runs of rows of the chunks `indices`, which rise.
fn spans(indices: impl Iterator<Item = u64>, chunk_rows: u64, rows: u64) -> Vec<[u64; 2]> {
    let mut spans: Vec<[u64; 2]> = Vec::new();
    for n in indices {
        let (start, end) = (n * chunk_rows, ((n + 1) * chunk_rows).min(rows));
        match spans.last_mut() {
            Some(last) if last[1] == start => last[1] = end,
            _ => spans.push([start, end]),
        }
    }
    spans
}

/// Rows of `dataset` that were never written: libhdf5 gives a fill value for them.
///
/// # Errors
/// The list of chunks cannot be read.
pub fn unwritten_rows(dataset: &Dataset) -> Result<Vec<[u64; 2]>, String> {
    let rows = dataset.shape().first().copied().unwrap_or(0) as u64;
    let chunk_rows = dataset.chunk().and_then(|shape| shape.first().copied()).unwrap_or(0) as u64;
    match dataset.layout() {
        H5Layout::Chunked if chunk_rows > 0 => {
            let mut stored = std::collections::BTreeSet::new();
            let visit = |info: ::hdf5::dataset::ChunkInfoRef| {
                stored.insert(info.offset.first().copied().unwrap_or(u64::MAX) / chunk_rows);
                0
            };
            dataset.chunks_visit(visit).map_err(|error| error.to_string())?;
            let missing = (0..rows.div_ceil(chunk_rows)).filter(|n| !stored.contains(n));
            Ok(spans(missing, chunk_rows, rows))
        }
        H5Layout::Contiguous if dataset.offset().is_none() && dataset.storage_size() == 0 => Ok(vec![[0, rows]]),
        _ => Ok(Vec::new()),
    }
}

/// The filters that are decoded here, or the name of the first that is not.
pub fn filters(dataset: &Dataset) -> Result<Vec<Filter>, String> {
    let mut found = Vec::new();
    for filter in dataset.filters() {
        let known = match filter {
            H5Filter::Deflate(_) => Filter::Deflate,
            H5Filter::Shuffle => Filter::Shuffle,
            H5Filter::Fletcher32 => Filter::Fletcher32,
            H5Filter::User(LZF_ID, _) => Filter::Lzf,
            H5Filter::User(LZ4_ID, _) => Filter::Lz4,
            H5Filter::User(ZSTD_ID, _) => Filter::Zstd,
            H5Filter::User(BITSHUFFLE_ID, values) => match (values.get(2), values.get(3), values.get(4)) {
                (Some(element_bytes), Some(block_elements), codec) => {
                    let codec =
                        Codec::of(codec.copied().unwrap_or(0)).ok_or("bitshuffle with an unknown compressor")?;
                    Filter::Bitshuffle { element_bytes: *element_bytes, block_elements: *block_elements, codec }
                }
                _ => return Err("bitshuffle without its values".into()),
            },
            other => return Err(filter_name(&other)),
        };
        if found.contains(&known) {
            return Err(format!("{known:?} applied twice"));
        }
        found.push(known);
    }
    Ok(found)
}

/// The filters that neither Headroom nor this libhdf5 can undo.
///
/// # Errors
/// Names them, and the way out.
pub fn refuse_unknown_filters(dataset: &Dataset) -> Result<(), String> {
    let here =
        |filter: &H5Filter| matches!(filter.id(), LZF_ID | LZ4_ID | ZSTD_ID | BITSHUFFLE_ID) || filter.is_available();
    let unknown: Vec<String> = dataset.filters().iter().filter(|filter| !here(filter)).map(filter_name).collect();
    if unknown.is_empty() {
        return Ok(());
    }
    Err(format!(
        "compressed by {}, which neither Headroom nor its libhdf5 decodes: write it again with gzip, lzf, lz4 or zstd (h5repack -f GZIP=4)",
        unknown.join(" and ")
    ))
}

/// Usual names of HDF5's registered filters.
fn filter_name(filter: &H5Filter) -> String {
    let id = filter.id();
    let name = match id {
        4 => "szip",
        5 => "nbit",
        6 => "scale-offset",
        307 => "bzip2",
        32001 => "blosc",
        32008 => "bitshuffle",
        32013 => "zfp",
        32015 => "zstd",
        32026 => "blosc2",
        _ => "an unknown filter",
    };
    format!("{name} (filter {id})")
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
