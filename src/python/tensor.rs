//! Tensors of Rust and of Python that are the same: no copy, and no edge of the graph is cut.
//!
//! Both directions use functions of `torch._C` without a promise of stability; the version of PyTorch is checked before
//! (headroom_rank/start.py).

#![allow(unsafe_code)]

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyCapsuleMethods};
use tch::Tensor;

/// The tensor of Python, seen from Rust.
pub fn to_rust(torch: &Bound<'_, PyAny>, tensor: &Bound<'_, PyAny>) -> PyResult<Tensor> {
    let capsule = torch.call_method1("_tensor_impl_raw_handle", (tensor,))?;
    let handle = capsule.cast::<PyCapsule>()?.pointer_checked(None)?;
    // SAFETY: `_tensor_impl_raw_handle` gives the address of the TensorImpl of `tensor`, which is held during this call, in the
    // libtorch that this extension has been linked with by name.
    let same = unsafe { headroom::torch::from_handle(handle) };
    same.map_err(|error| PyRuntimeError::new_err(error.to_string()))
}

/// The tensor of Rust, seen from Python.
pub fn to_python<'py>(torch: &Bound<'py, PyAny>, tensor: &Tensor) -> PyResult<Bound<'py, PyAny>> {
    let handle = headroom::torch::handle(tensor);
    // SAFETY: a capsule without name and destructor, as PyTorch makes its own. Nobody reads it but `_wrap_tensor_impl`, while
    // `tensor` lives; that takes a share of the TensorImpl for itself.
    let capsule = unsafe {
        let new = pyo3::ffi::PyCapsule_New(handle, std::ptr::null(), None);
        Bound::from_owned_ptr_or_err(torch.py(), new)?
    };
    torch.call_method1("_wrap_tensor_impl", (capsule,))
}
