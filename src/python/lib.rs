//! Headroom's rank as an extension of the user's Python: the interpreter is the process, and Headroom's loop runs in it.
//!
//! ```text
//! python headroom_rank ─► import torch ─► this ─► headroom::rank ─► task python ─► Host ─► Session (headroom_rank/session.py)
//! ```
//! Libtorch is the one that PyTorch has loaded, found by its name: both sides see the same tensors. Python's lock is held only
//! while the user's code runs, never in a backward pass.
//!
//! | room | owns |
//! |---|---|
//! | [`session`] | the trainer's questions to the user's Python |
//! | [`tensor`] | tensors crossing between the two |

mod session;
mod tensor;

use pyo3::prelude::*;
use std::ffi::OsString;

/// Runs a rank to its end, with the words of its command line; returns its exit code. `session`: an object of
/// `headroom_rank.session.Session`.
#[pyfunction]
fn main(py: Python<'_>, session: Py<PyAny>, words: Vec<OsString>) -> u8 {
    session::host(session);
    py.detach(|| headroom::rank::embedded(words))
}

#[pymodule]
fn _rank(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_function(wrap_pyfunction!(main, module)?)
}
