//! The native part of the Python package `headroom_train`: the node's shared cache and a loader for a user's own train.py.
//!
//! ```text
//! headroom_train (Python) ─► loader ─► engine (threads) ─► lane (worker processes: the user's dataset[i])
//!        │                               │
//!        │                               └─► cache::client ─► directory (launcher, or a rank)
//!        └─► node, order, sample, memory (numpy and torch see bytes in place)
//! ```
//! It links no libtorch and no Python: any interpreter from 3.9 on loads it, beside any PyTorch.
//!
//! Architecture invariant: only `node`, `loader`, `sample`, `memory`, `order` and `system` know Python; `engine`, `work`, `batch`,
//! `entry`, `lane`, `buffer` and `sizes` do not. No bytes of a sample are interpreted here; a sample's structure is `codec.py`'s.

mod batch;
mod buffer;
mod engine;
mod entry;
mod lane;
mod loader;
mod memory;
mod node;
mod order;
mod own;
mod sample;
mod sizes;
mod system;
mod work;

use pyo3::prelude::*;

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("INDEX_BITS", engine::INDEX_BITS)?;
    module.add("CacheLost", module.py().get_type::<node::CacheLost>())?;
    module.add_class::<node::Node>()?;
    module.add_class::<order::Order>()?;
    module.add_class::<sample::Sample>()?;
    module.add_class::<sample::Batch>()?;
    module.add_class::<sample::Stacker>()?;
    module.add_class::<memory::Memory>()?;
    module.add_class::<loader::Lane>()?;
    module.add_class::<loader::Loader>()?;
    module.add_function(wrap_pyfunction!(order::mixed, module)?)?;
    module.add_function(wrap_pyfunction!(system::process_memory, module)?)?;
    module.add_function(wrap_pyfunction!(system::machine_memory, module)?)?;
    module.add_function(wrap_pyfunction!(system::end_with_parent, module)?)?;
    Ok(())
}
