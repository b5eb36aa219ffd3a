//! Memory as numpy and torch see it, by `__array_interface__`: an array keeps the object alive that it was made of.

use crate::buffer::Buffer;
use crate::own::Own;
use cache::client::Taken;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use std::sync::Arc;

/// Whose the bytes are.
#[derive(Clone)]
pub enum Owner {
    /// Of a batch: whoever has it may write.
    Batch(Arc<Own<Arc<Buffer>>>),
    /// Of the cache: nobody may.
    Stored(Arc<Own<Taken>>),
}

impl Owner {
    fn address(&self) -> Option<(usize, usize)> {
        match self {
            Owner::Batch(buffer) => buffer.get().map(|buffer| (buffer.address(), buffer.len())),
            Owner::Stored(taken) => taken.get().map(|taken| (taken.address(), taken.len())),
        }
    }

    fn is_readonly(&self) -> bool {
        matches!(self, Owner::Stored(_))
    }

    /// Bytes at `offset`, as an array of `typestr` and `shape`.
    ///
    /// # Errors
    /// They are not inside, or this is a forked child.
    pub fn view(&self, offset: usize, bytes: usize, typestr: Py<PyAny>, shape: Py<PyTuple>) -> PyResult<Memory> {
        let (address, len) = self.address().ok_or_else(|| PyRuntimeError::new_err(FORKED))?;
        match offset.checked_add(bytes) {
            Some(end) if end <= len => Ok(Memory { owner: self.clone(), address: address + offset, typestr, shape }),
            _ => Err(PyRuntimeError::new_err(format!("bytes {offset}..+{bytes} are not within {len}"))),
        }
    }
}

/// Said by everything that a fork cannot take along.
pub const FORKED: &str = "this belongs to the process that made it, and cannot be used in a forked child: make it there, or start with spawn";

/// Bytes with a type and a shape.
#[pyclass(frozen, module = "headroom_train._native")]
pub struct Memory {
    owner: Owner,
    address: usize,
    typestr: Py<PyAny>,
    shape: Py<PyTuple>,
}

#[pymethods]
impl Memory {
    #[getter]
    fn __array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let interface = PyDict::new(py);
        interface.set_item(pyo3::intern!(py, "version"), 3)?;
        interface.set_item(pyo3::intern!(py, "typestr"), &self.typestr)?;
        interface.set_item(pyo3::intern!(py, "shape"), &self.shape)?;
        interface.set_item(pyo3::intern!(py, "data"), (self.address, self.owner.is_readonly()))?;
        Ok(interface)
    }
}
