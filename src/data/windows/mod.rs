//! Samples that are windows over rows of chunked files: which windows there are, which entries of the page cache they lie in,
//! and when an entry is needed next.
//!
//! ```text
//! index (windows as numbers) ─► entries (chunks in the page cache) ─► pieces (windows in the page cache)
//!          └────► future (next uses)            └── grain (which of the two)
//! ```
//!
//! Architecture invariant: nothing is kept per window; a window's place is computed.

pub mod entries;
pub mod future;
pub mod grain;
pub mod index;
pub mod pieces;
