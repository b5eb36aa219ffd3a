//! Content of an entry of the page cache: a chunk, or one window's part of a chunk.
//!
//! By chunk, a decoded chunk stays as a whole or not at all. By window, those windows of it stay that are needed soonest,
//! so that one decode serves them all: worth it where the cache holds a part of the chunks and windows overlap little
//! enough, since rows that several windows share are then stored for each of them.
//!
//! Both are estimated for an order in which every window is equally likely at every position. Let a chunk have `k` windows
//! and the cache hold the share `f` of the chunks' bytes, or `g` of the bytes of all windows; times in epochs.
//!
//! ```text
//! by chunk    gaps between uses are exponential; Belady's rule keeps gaps below x/k, which fill the cache when
//!             1 - (1+x)·exp(-x) = f;  reads = k·exp(-x)
//! by window   a decode keeps the windows needed within T; the next one follows 1/k after T. On average k·T·T/2/(T + 1/k)
//!             of k are held, which is g·k when T = g + sqrt(g·g + 2·g/k);  reads = 1/(T + 1/k)
//! ```
//! Architecture invariant: a pure function of what all ranks know alike, so that they choose alike.

use super::index::Windows;
use crate::data::source::hdf5::Reader;
use spec::config::{CacheEntries, DataConfig, ShuffleMode};

/// Windows that the shape of a data set is taken from, about.
const SHAPE_WINDOWS: usize = 2000;
/// Single windows are chosen when they save this much: the estimate leaves out look-ahead and the bounds of epochs, which
/// cost them up to a quarter in simulation, and they ask the directory more often.
const MARGIN: f64 = 1.4;
/// Windows of a chunk below which there is nothing to share.
const FEW: f64 = 2.0;

/// Sizes of a data set and its cache.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// Chunks that windows lie in.
    pub chunks: f64,
    /// Parts of windows, each in one chunk.
    pub pieces: f64,
    /// Bytes of all chunks, decoded.
    pub chunk_bytes: f64,
    /// Bytes of all pieces.
    pub piece_bytes: f64,
    pub cache_bytes: f64,
}

/// Expected decodes of a chunk per epoch, by what an entry holds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    pub by_chunk: f64,
    pub by_window: f64,
    /// Pieces of a chunk that one decode is expected to keep.
    pub kept: f64,
}

impl Shape {
    /// Windows that touch a chunk, on average.
    pub fn per_chunk(&self) -> f64 {
        self.pieces / self.chunks.max(1.0)
    }

    pub fn estimate(&self) -> Estimate {
        let k = self.per_chunk().max(1.0);
        let share = |bytes: f64| (self.cache_bytes / bytes.max(1.0)).clamp(0.0, 1.0);
        let (f, g) = (share(self.chunk_bytes), share(self.piece_bytes));
        let horizon = g + (g * g + 2.0 * g / k).sqrt();
        Estimate {
            by_chunk: if f < 1.0 { k * (-gap(f)).exp() } else { 0.0 },
            by_window: if g < 1.0 { 1.0 / (horizon + 1.0 / k) } else { 0.0 },
            kept: (k * horizon).min(k),
        }
    }

    /// True if entries of single windows read less.
    pub fn by_window(&self) -> bool {
        let Estimate { by_chunk, by_window, .. } = self.estimate();
        self.per_chunk() >= FEW && by_window * MARGIN < by_chunk
    }
}

/// Content of an entry of the training windows.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// Single windows, of which a decode is expected to keep so many; `None`: whole chunks.
    pub kept: Option<f64>,
    /// A line for the user.
    pub line: String,
}

/// Chooses by `data.cache_entries` and by sizes; `None`: nothing is to be chosen. `sees`: the policy looks ahead, and every
/// window's next use is known.
pub fn choose(
    config: &DataConfig,
    rows: usize,
    windows: &Windows,
    reader: &Reader,
    (cache_bytes, sees): (u64, bool),
) -> Option<Choice> {
    let asked = config.cache_entries;
    let global = sees && config.shuffle && config.shuffle_mode == ShuffleMode::Global;
    let shape = (asked != CacheEntries::Chunk && global).then(|| shape(rows, windows, reader, cache_bytes)).flatten();
    let Some(shape) = shape else {
        let why =
            "data.cache_entries: sample needs files in chunks, data.shuffle_mode: global and data.cache: next_use";
        let line = format!("page cache: entries are whole chunks: {why}");
        return (asked == CacheEntries::Sample).then_some(Choice { kept: None, line });
    };
    let Estimate { by_chunk, by_window, kept } = shape.estimate();
    let single = asked == CacheEntries::Sample || shape.by_window();
    let line = format!(
        "page cache: entries are {}; expected reads per chunk and epoch: {by_chunk:.1} by chunk, {by_window:.1} by window \
         ({:.0} windows in a chunk)",
        if single { "single windows" } else { "whole chunks" },
        shape.per_chunk()
    );
    Some(Choice { kept: single.then_some(kept), line })
}

/// `None`: some files have no chunks, so a window is read without its neighbours. How many chunks a window touches is taken
/// from windows spread evenly.
fn shape(rows: usize, windows: &Windows, reader: &Reader, cache_bytes: u64) -> Option<Shape> {
    let rows = rows.max(1) as u64;
    let step = (windows.len() / SHAPE_WINDOWS).max(1);
    let (mut some, mut touched) = (0u64, 0u64);
    for (file, row) in (0..windows.len()).step_by(step).filter_map(|index| windows.get(index)) {
        let entry_rows = reader.entry_rows(file as usize).max(1) as u64;
        touched += (row + rows).div_ceil(entry_rows) - row / entry_rows;
        some += 1;
    }
    let (mut chunks, mut chunk_bytes, mut row_bytes) = (0u64, 0u64, 0usize);
    for file in windows.files().map(|file| file as usize) {
        let table = reader.tables().get(file).filter(|table| table.chunk_rows().is_some())?;
        chunks += reader.entries(file);
        chunk_bytes += reader.file_bytes(file);
        row_bytes = row_bytes.max(table.used_row_bytes());
    }
    let count = windows.len() as f64;
    Some(Shape {
        chunks: chunks as f64,
        pieces: count * touched as f64 / some.max(1) as f64,
        chunk_bytes: chunk_bytes as f64,
        piece_bytes: count * rows as f64 * row_bytes as f64,
        cache_bytes: cache_bytes as f64,
    })
}

/// `x` with `1 - (1+x)·exp(-x) = share`, for a share below 1; the left side rises with `x`.
fn gap(share: f64) -> f64 {
    let (mut low, mut high) = (0.0, 100.0);
    for _ in 0..60 {
        let x: f64 = (low + high) / 2.0;
        if 1.0 - (1.0 + x) * (-x).exp() < share {
            low = x;
        } else {
            high = x;
        }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::simulate::{Grain, Trace, Walk};
    use cache::PolicyKind;

    /// `k` windows in each of 1000 chunks, which store `overlap` times the chunks' bytes.
    fn shape(k: usize, share: f64, overlap: f64) -> Shape {
        Shape {
            chunks: 1000.0,
            pieces: 1000.0 * k as f64,
            chunk_bytes: 1e9,
            piece_bytes: 1e9 * overlap,
            cache_bytes: 1e9 * share,
        }
    }

    #[test]
    fn the_rule_chooses_what_reads_less_in_simulation() {
        for (k, share, overlap) in [
            (16, 0.25, 1.0),
            (16, 0.5, 1.0),
            (4, 0.25, 1.0),
            (40, 0.1, 1.0),
            (40, 0.1, 8.0),
            (40, 0.8, 8.0),
            (16, 0.75, 4.0),
            (8, 0.5, 8.0),
        ] {
            let trace = Trace::shuffled(1000, k, 4, 7);
            let walk = Walk { world_size: 2, batch: 4, ahead: 2 };
            let reads = |share: f64, grain| {
                let capacity = (1000.0 * share) as usize;
                trace.walk(PolicyKind::NextUse, capacity, grain, walk).per_chunk_and_epoch
            };
            let (chunk, window) = (reads(share, Grain::Chunk), reads(share / overlap, Grain::Sample));
            let found = shape(k, share, overlap);
            let Estimate { by_chunk, by_window, kept } = found.estimate();
            println!(
                "{k} per chunk, {share} cached, overlap {overlap}: by chunk {chunk:.2} ({by_chunk:.2} expected), \
                 by window {window:.2} ({by_window:.2}), {kept:.1} kept, chosen by window: {}",
                found.by_window()
            );
            assert!((by_chunk / chunk - 1.0).abs() < 0.25, "{by_chunk} {chunk}");
            assert!((by_window / window - 1.0).abs() < 0.35, "{by_window} {window}");
            // Where they read about alike, either will do.
            let choice = if found.by_window() { window } else { chunk };
            assert!(choice <= 1.15 * chunk.min(window), "{choice} of {chunk} and {window}");
        }
    }

    #[test]
    fn chunks_stay_whole_where_nothing_is_shared_or_all_fits() {
        assert!(!shape(1, 0.25, 1.0).by_window());
        assert!(!shape(16, 1.0, 1.0).by_window());
        assert!(!shape(16, 2.0, 10.0).by_window());
        assert!(shape(16, 0.25, 1.0).by_window());
        // No cache to speak of: a decode per use either way.
        assert!(!shape(16, 0.0, 1.0).by_window());
        let none = Shape { chunks: 0.0, pieces: 0.0, chunk_bytes: 0.0, piece_bytes: 0.0, cache_bytes: 0.0 };
        assert!(!none.by_window());
    }
}
