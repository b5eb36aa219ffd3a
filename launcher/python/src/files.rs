//! Data sets of files as Python opens and reads them.

use crate::cells::AllCells;
use crate::images::Images;
use crate::memory::FORKED;
use crate::native::{Memory, Native, words};
use crate::node::Node;
use crate::own::Own;
use crate::windows::Windows;
use pyo3::exceptions::{PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyDict};
use source::data::DataError;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

fn failed(error: DataError) -> PyErr {
    PyOSError::new_err(words(&error))
}

enum Kind {
    Windows(Arc<Windows>),
    Cells(Arc<AllCells>),
    Images(Arc<Images>),
}

/// An open data set. A forked child opens its own.
#[pyclass(frozen, module = "headroom_train._native")]
pub struct Files {
    kind: Own<Kind>,
    /// For samples in the caller's thread.
    memory: Mutex<Memory>,
}

impl Files {
    fn new(kind: Kind) -> Self {
        Self { kind: Own::new(kind), memory: Mutex::default() }
    }

    fn kind(&self) -> PyResult<&Kind> {
        self.kind.get().ok_or_else(|| PyRuntimeError::new_err(FORKED))
    }

    /// The data set for the loader's threads.
    ///
    /// # Errors
    /// This is a forked child.
    pub fn native(&self) -> PyResult<Arc<dyn Native>> {
        Ok(match self.kind()? {
            Kind::Windows(windows) => windows.clone(),
            Kind::Cells(cells) => cells.clone(),
            Kind::Images(images) => images.clone(),
        })
    }
}

#[pymethods]
impl Files {
    /// Windows of `rows` rows, every `stride` rows, of HDF5 files. `base`: where the keys of their entries in the node's cache
    /// begin.
    #[staticmethod]
    #[pyo3(signature = (paths, columns, dataset, rows, stride, kept_bytes, node, base))]
    #[allow(clippy::too_many_arguments)]
    fn windows(
        py: Python<'_>,
        paths: Vec<PathBuf>,
        columns: Vec<String>,
        dataset: Option<String>,
        rows: u64,
        stride: u64,
        kept_bytes: u64,
        node: Option<PyRef<'_, Node>>,
        base: u64,
    ) -> PyResult<Self> {
        if rows == 0 || stride == 0 || columns.is_empty() || paths.is_empty() {
            return Err(PyValueError::new_err("windows want files, columns, and 1 row or more"));
        }
        let cache = node.map(|node| node.part().map(|part| (part.client.clone(), base))).transpose()?;
        let open = || Windows::open(paths, (&columns, dataset.as_deref()), (rows, stride), kept_bytes, cache);
        py.detach(open).map(|windows| Self::new(Kind::Windows(Arc::new(windows)))).map_err(failed)
    }

    /// Cells of AnnData files.
    #[staticmethod]
    fn cells(
        py: Python<'_>,
        paths: Vec<PathBuf>,
        matrix: String,
        label: Option<String>,
        kept_bytes: u64,
    ) -> PyResult<Self> {
        let open = || AllCells::open(&paths, &matrix, label.as_deref(), kept_bytes);
        py.detach(open).map(|cells| Self::new(Kind::Cells(Arc::new(cells)))).map_err(failed)
    }

    /// Image files with a label each. `spec`: of a sample, cut where its height and its width belong.
    #[staticmethod]
    fn images(paths: Vec<PathBuf>, labels: Vec<i64>, spec: [String; 3], tag: u64) -> PyResult<Self> {
        if paths.len() != labels.len() {
            return Err(PyValueError::new_err(format!("{} images have {} labels", paths.len(), labels.len())));
        }
        Ok(Self::new(Kind::Images(Arc::new(Images::new(paths, labels, spec, tag)))))
    }

    fn __len__(&self) -> PyResult<usize> {
        Ok(self.native()?.len())
    }

    /// Facts on the samples: `fields` of windows (name, type, shape of a row); `genes` and `classes` of cells.
    fn facts<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let facts = PyDict::new(py);
        match self.kind()? {
            Kind::Windows(windows) => facts.set_item("fields", windows.fields().to_vec())?,
            Kind::Cells(cells) => {
                facts.set_item("genes", &cells.genes)?;
                facts.set_item("classes", &cells.classes)?;
            }
            Kind::Images(_) => {}
        }
        Ok(facts)
    }

    /// Takes the entry that all samples resemble.
    fn set_template(&self, bytes: Vec<u8>) -> PyResult<()> {
        match self.kind()? {
            Kind::Windows(windows) => windows.set_template(bytes),
            Kind::Cells(cells) => cells.set_template(bytes),
            Kind::Images(_) => Ok(()),
        }
    }

    /// The entry of a sample.
    fn sample<'py>(&self, py: Python<'py>, index: u64) -> PyResult<Bound<'py, PyByteArray>> {
        let native = self.native()?;
        let made = py.detach(|| {
            let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
            native.sample(index, &mut memory)
        });
        Ok(PyByteArray::new(py, &made?))
    }

    fn describe(&self, index: usize) -> PyResult<String> {
        Ok(self.native()?.describe(index))
    }

    /// Bytes read, and chunks decoded.
    fn counts(&self) -> PyResult<(u64, u64)> {
        Ok(self.native()?.counts())
    }
}

/// Files below `root` with one of the extensions, sorted, and lines on what could not be listed.
#[pyfunction]
pub fn find_files(py: Python<'_>, root: PathBuf, extensions: Vec<String>) -> PyResult<(Vec<PathBuf>, Vec<String>)> {
    let extensions: Vec<&str> = extensions.iter().map(String::as_str).collect();
    let found = py.detach(|| source::data::source::find_files(Path::new(&root), &extensions)).map_err(failed)?;
    Ok((found.files, found.unreadable))
}
