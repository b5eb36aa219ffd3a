//! Images and their labels as a data set.
//!
//! ```text
//! form (data.yaml, COCO, labelme) ─► scan (headers and labels, divided among ranks, kept in an index) ─► Store
//!   ─► page cache: files, or pixels at the size of training ─► train: augment (mosaic … flips), val: rectangles ─► batch
//! ```
//!
//! Architecture invariants: input files are never written. A sample is a pure function of (seed, epoch, index); what the page cache
//! holds decides about speed alone.

pub mod augment;
pub mod batch;
pub mod convert;
mod facts;
pub mod form;
mod index;
pub mod labels;
pub mod letterbox;
mod open;
mod outline;
pub mod sample;
mod scan;
mod shared;
pub mod store;
pub mod train;
pub mod val;

#[cfg(test)]
mod parity;
#[cfg(test)]
mod tests;

pub use facts::{GRID, LabelCounts, YoloFacts};
pub use open::{evaluation, open, unlabelled};
pub use outline::{outline, predict_outline};
