//! Failures on the way to a batch.

use crate::entry::EntryError;
use cache::client::CacheError;
use pyo3::PyErr;
use pyo3::exceptions::{PyOSError, PyRuntimeError};
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
    /// A file of samples that are read without Python.
    #[error("{0}")]
    File(String),
    #[error("the loader's memory for a worker: {0}")]
    Scratch(#[source] io::Error),
    #[error("the loader was closed")]
    Closed,
}

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::File(problem) => PyOSError::new_err(problem),
            failure => PyRuntimeError::new_err(failure.to_string()),
        }
    }
}
