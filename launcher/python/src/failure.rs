//! What can go wrong on the way to a batch.

use crate::entry::EntryError;
use cache::client::CacheError;
use pyo3::PyErr;
use pyo3::exceptions::PyRuntimeError;
use std::io;

/// Why there is no batch.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error(transparent)]
    Cache(#[from] CacheError),
    #[error(transparent)]
    Entry(#[from] EntryError),
    /// The user's own error, pickled.
    #[error("the user's code failed")]
    User(Vec<u8>),
    #[error("{0}")]
    Worker(String),
    #[error("the loader's memory for a worker: {0}")]
    Scratch(#[source] io::Error),
    #[error("the loader was closed")]
    Closed,
}

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> Self {
        PyRuntimeError::new_err(failure.to_string())
    }
}
