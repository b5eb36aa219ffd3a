//! Samples and batches as Python takes them apart: `codec.py` knows what their specs mean.

use crate::batch::{Column, Form, Made, collate};
use crate::buffer::{Buffer, Pool};
use crate::entry::{Entry, EntryError, Leaf};
use crate::failure::Failure;
use crate::memory::{FORKED, Memory, Owner};
use crate::own::Own;
use cache::client::Taken;
use pyo3::exceptions::{PyIndexError, PyRuntimeError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyTuple};
use std::sync::Arc;

/// One sample: in the cache, read-only, or in a batch.
#[pyclass(frozen, module = "headroom_train._native")]
pub struct Sample {
    owner: Owner,
    /// Within the owner's bytes.
    offset: usize,
    spec: (usize, usize),
    leaves: Vec<Leaf>,
}

impl Sample {
    fn new(owner: Owner, offset: usize, entry: &Entry) -> Self {
        let start = entry.spec().as_ptr() as usize - entry.bytes().as_ptr() as usize;
        Self { owner, offset, spec: (start, entry.spec().len()), leaves: entry.leaves().collect() }
    }

    pub fn stored(taken: Taken, tag: u64) -> PyResult<Self> {
        let taken = Arc::new(Own::new(taken));
        let bytes = taken.get().ok_or_else(forked)?;
        let entry = Entry::parse(bytes, tag).map_err(|error| PyRuntimeError::new_err(error.to_string()))?;
        Ok(Self::new(Owner::Stored(taken.clone()), 0, &entry))
    }

    fn bytes<'py>(&self, py: Python<'py>, offset: usize, bytes: usize) -> PyResult<Bound<'py, PyBytes>> {
        let range = self.offset + offset..self.offset + offset + bytes;
        let found = match &self.owner {
            Owner::Batch(buffer) => buffer.get().ok_or_else(forked)?.bytes().get(range),
            Owner::Stored(taken) => taken.get().ok_or_else(forked)?.get(range),
        };
        Ok(PyBytes::new(py, found.unwrap_or_default()))
    }

    fn leaf_at(&self, leaf: usize) -> PyResult<Leaf> {
        self.leaves.get(leaf).copied().ok_or_else(|| PyIndexError::new_err(format!("leaf {leaf}")))
    }
}

fn forked() -> PyErr {
    PyRuntimeError::new_err(FORKED)
}

#[pymethods]
impl Sample {
    /// Structure, types and shapes.
    #[getter]
    fn spec<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        self.bytes(py, self.spec.0, self.spec.1)
    }

    fn __len__(&self) -> usize {
        self.leaves.len()
    }

    /// A leaf as an array.
    fn view(&self, leaf: usize, typestr: Py<PyAny>, shape: Py<PyTuple>) -> PyResult<Memory> {
        let leaf = self.leaf_at(leaf)?;
        self.owner.view(self.offset + leaf.offset, leaf.bytes, typestr, shape)
    }

    /// The bytes of a leaf, copied.
    fn leaf<'py>(&self, py: Python<'py>, leaf: usize) -> PyResult<Bound<'py, PyBytes>> {
        let leaf = self.leaf_at(leaf)?;
        self.bytes(py, leaf.offset, leaf.bytes)
    }
}

/// Stacks samples of the cache in the caller's thread.
#[pyclass(frozen, module = "headroom_train._native")]
pub struct Stacker {
    pool: Arc<Pool>,
    tag: u64,
}

#[pymethods]
impl Stacker {
    #[new]
    fn new(tag: u64, batches: usize) -> Self {
        Self { pool: Pool::new(batches), tag }
    }

    fn stack(&self, py: Python<'_>, samples: Vec<PyRef<'_, Sample>>) -> PyResult<Batch> {
        let owners: Vec<Owner> = samples.iter().map(|sample| sample.owner.clone()).collect();
        let (pool, tag) = (&self.pool, self.tag);
        let made = py.detach(|| {
            let entries = owners.iter().map(|owner| match owner {
                Owner::Stored(taken) => Entry::parse(taken.get().map(|taken| &**taken).unwrap_or_default(), tag),
                Owner::Batch(_) => Err(EntryError::Foreign),
            });
            let entries = entries.collect::<Result<Vec<_>, _>>().map_err(Failure::from)?;
            collate(pool, &entries, false)
        });
        Ok(Batch::new(made?))
    }
}

/// One batch.
#[pyclass(frozen, module = "headroom_train._native")]
pub struct Batch {
    buffer: Arc<Own<Arc<Buffer>>>,
    form: Form,
    samples: usize,
}

impl Batch {
    pub fn new(made: Made) -> Self {
        let Made { buffer, form, samples } = made;
        Self { buffer: Arc::new(Own::new(buffer)), form, samples }
    }

    fn owner(&self) -> Owner {
        Owner::Batch(self.buffer.clone())
    }

    fn sample(&self, offset: usize, bytes: usize) -> PyResult<Sample> {
        let buffer = self.buffer.get().ok_or_else(forked)?;
        let range = buffer.bytes().get(offset..offset + bytes).unwrap_or_default();
        let entry = Entry::of_any(range).ok_or_else(|| PyRuntimeError::new_err("a batch without a sample in it"))?;
        Ok(Sample::new(self.owner(), offset, &entry))
    }
}

#[pymethods]
impl Batch {
    fn __len__(&self) -> usize {
        self.samples
    }

    /// The spec that all its samples have; `None` where they were not stacked.
    #[getter]
    fn spec<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyBytes>> {
        match &self.form {
            Form::Stacked { spec, .. } => Some(PyBytes::new(py, spec)),
            _ => None,
        }
    }

    /// Column `leaf` of a stacked batch as an array.
    fn view(&self, leaf: usize, typestr: Py<PyAny>, shape: Py<PyTuple>) -> PyResult<Memory> {
        match &self.form {
            Form::Stacked { columns, .. } => match columns.get(leaf) {
                Some(Column::Fixed { offset, bytes }) => {
                    self.owner().view(*offset, *bytes * self.samples, typestr, shape)
                }
                _ => Err(PyIndexError::new_err(format!("column {leaf} has no one size"))),
            },
            _ => Err(PyIndexError::new_err("the batch is not stacked")),
        }
    }

    /// Column `leaf` of a stacked batch as a list of bytes.
    fn texts<'py>(&self, py: Python<'py>, leaf: usize) -> PyResult<Bound<'py, PyList>> {
        match &self.form {
            Form::Stacked { columns, .. } => match columns.get(leaf) {
                Some(Column::Varying(list)) => PyList::new(py, list.iter().map(|text| PyBytes::new(py, text))),
                _ => Err(PyIndexError::new_err(format!("column {leaf} has one size"))),
            },
            _ => Err(PyIndexError::new_err("the batch is not stacked")),
        }
    }

    /// A leaf of sample `row` of a stacked batch as an array.
    fn row_view(&self, leaf: usize, row: usize, typestr: Py<PyAny>, shape: Py<PyTuple>) -> PyResult<Memory> {
        match &self.form {
            Form::Stacked { columns, .. } if row < self.samples => match columns.get(leaf) {
                Some(Column::Fixed { offset, bytes }) => {
                    self.owner().view(*offset + row * *bytes, *bytes, typestr, shape)
                }
                _ => Err(PyIndexError::new_err(format!("column {leaf} has no one size"))),
            },
            _ => Err(PyIndexError::new_err(format!("no sample {row} in a stacked batch"))),
        }
    }

    /// The bytes of a leaf of sample `row` of a stacked batch, copied.
    fn row_leaf<'py>(&self, py: Python<'py>, leaf: usize, row: usize) -> PyResult<Bound<'py, PyBytes>> {
        let none = || PyIndexError::new_err(format!("no sample {row} with a column {leaf} in a stacked batch"));
        let Form::Stacked { columns, .. } = &self.form else { return Err(none()) };
        match columns.get(leaf).filter(|_| row < self.samples).ok_or_else(none)? {
            Column::Varying(list) => Ok(PyBytes::new(py, list.get(row).ok_or_else(none)?)),
            Column::Fixed { offset, bytes } => {
                let buffer = self.buffer.get().ok_or_else(forked)?;
                let start = *offset + row * *bytes;
                Ok(PyBytes::new(py, buffer.bytes().get(start..start + *bytes).unwrap_or_default()))
            }
        }
    }

    /// The samples of a batch that is not stacked, or what a worker made of them, alone.
    fn samples(&self) -> PyResult<Vec<Sample>> {
        match &self.form {
            Form::Samples(places) => places.iter().map(|(offset, bytes)| self.sample(*offset, *bytes)).collect(),
            Form::Built => {
                let bytes = self.buffer.get().ok_or_else(forked)?.len();
                Ok(vec![self.sample(0, bytes)?])
            }
            Form::Stacked { .. } => Err(PyIndexError::new_err("the batch is stacked")),
        }
    }

    /// A worker made it: one structure instead of samples.
    #[getter]
    fn built(&self) -> bool {
        matches!(self.form, Form::Built)
    }
}
