//! Facts on a run's files before any value is read.

use crate::data::source::h5ad::{H5ad, Matrix};
use spec::config::DataConfig;
use spec::task::cell::CellConfig;

/// Keys that the data set reads.
pub struct Keys {
    pub data: DataConfig,
    pub cell: CellConfig,
    pub seed: u64,
    /// Cells are read in the order of files and rows.
    pub in_order: bool,
}

/// A file that is known without its values.
pub struct Known {
    pub h5ad: H5ad,
    /// The matrix by cells: its own, or a copy.
    pub matrix: Matrix,
}
