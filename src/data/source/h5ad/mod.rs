//! Counts of genes in cells: `.h5ad` of every age, and 10x Genomics' `.h5`.
//!
//! ```text
//! path ─► open (libhdf5, metadata only) ─► H5ad: matrix, genes, labels ─► CellReader ─► cells as sorted genes and values
//!                                           ├ genes × cells (CSC): transpose, once, into a file beside the index
//!                                           └ compressed, and read at random: repack, likewise
//! ```
//!
//! Opening reads no values: the pointers of sparse rows, names of genes, and the labels alone.

pub mod cells;
mod frame;
pub mod kept;
mod matrix;
mod narrow;
mod open;
pub mod repack;
mod tenx;
mod text;
pub mod transpose;
pub mod write;

#[cfg(test)]
mod tests;

pub use cells::{CellReader, Cells, Source};
pub use frame::{Labels, MISSING};
pub use matrix::{Form, Matrix, Starts};
pub use open::{H5ad, Wanted, cell_names, genes_of, obsm, open};
