//! What a dataset stores: filters, and rows that were never written.

use super::Filter;
use super::bitshuffle::{BITSHUFFLE_ID, Codec};
use super::compress::{LZ4_ID, LZF_ID, ZSTD_ID};
use ::hdf5::Dataset;
use ::hdf5::dataset::Layout as H5Layout;
use ::hdf5::filters::Filter as H5Filter;

/// Runs of rows of the chunks `indices`, which rise.
pub(super) fn spans(indices: impl Iterator<Item = u64>, chunk_rows: u64, rows: u64) -> Vec<[u64; 2]> {
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
pub(super) fn unwritten_rows(dataset: &Dataset) -> Result<Vec<[u64; 2]>, String> {
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
pub(super) fn filters(dataset: &Dataset) -> Result<Vec<Filter>, String> {
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
pub(super) fn refuse_unknown_filters(dataset: &Dataset) -> Result<(), String> {
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
