//! Samples that are windows over rows of chunked files: which windows there are, which entries of the page cache they lie in,
//! and when an entry is needed next.
//!
//! ```text
//! set ─► index   (windows as numbers)
//!     ─► entries (chunks in the page cache) ─► pieces (parts of windows in the page cache)
//!     ─► grain   (which of the two entries hold)
//!     ─► future  (when an entry is needed next)
//! ```
//!
//! Architecture invariant: names no task. Nothing is kept per window: a window's place is computed.

pub(crate) mod entries;
pub(crate) mod future;
mod grain;
mod index;
pub(crate) mod pieces;
mod set;

pub use index::{Windows, permuted, split_files, windows_in};
pub use set::{Reading, WindowSet, WindowSets};
