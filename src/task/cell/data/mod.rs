//! Cells as a data set: which files, which genes, which cells.
//!
//! ```text
//! files ─► h5ad::open (metadata) ─► transpose (matrices by genes, once) ─► genes (joined by name)
//!       ─► scan (one pass, divided among ranks and threads, kept in an index) ─► filter ─► split by cells ─► CellDataset
//! ```
//!
//! Architecture invariant: memory is O(cells) with a few bytes each (pointers of rows, labels, splits), never O(values).

pub mod copies;
mod dataset;
pub mod entry;
mod filter;
mod genes;
mod index;
mod known;
pub(super) mod members;
mod open;
mod outline;
pub mod sample;
mod scan;
pub mod store;

#[cfg(test)]
mod tests;

pub use dataset::CellDataset;
pub use filter::CellFacts;
pub use open::{CellData, open, open_cells, open_in_order, open_whole};
pub use outline::outline;

use std::path::Path;

/// The file name of `path`, for lines.
fn name(path: &Path) -> String {
    crate::data::source::h5ad::cells::name_of(path)
}
