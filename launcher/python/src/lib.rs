//! The native part of the Python package `headroom_train`: the node's shared cache and a loader for a user's own train.py.
//!
//! ```text
//! headroom_train (Python) ─► loader ─► engine (threads) ─► lane (worker processes: the user's dataset[i])
//!        │                               │
//!        │                               ├─► disk (decoded samples that the cache has no room for)
//!        │                               ├─► native (windows, cells, images: files, read without Python)
//!        │                               └─► cache::client ─► directory (launcher, or a rank)
//!        └─► node, order, sample, memory (numpy and torch see bytes in place)
//! ```
//! It links no libtorch and no Python: any interpreter from 3.9 on loads it, beside any PyTorch.
//!
//! | room | owns | may not touch |
//! |---|---|---|
//! | [`entry`] | the bytes of one sample: head, spec, leaves | what a spec means |
//! | [`sizes`] | how long samples are, as far as was seen | everything else |
//! | [`buffer`] | memory of batches, used again | samples |
//! | [`failure`] | what can go wrong | |
//! | [`batch`] | samples stacked, or put one behind the other | Python |
//! | [`disk`] | decoded samples in a file, for which the cache has no room | what a spec means |
//! | [`lane`] | a decode worker: its socket, its messages | Python |
//! | [`work`] | batches under way, pure state | Python |
//! | [`engine`] | the threads: reading, filling, making batches | Python |
//! | [`own`] | values that a forked child must not end | |
//! | [`memory`] | arrays over bytes in place | |
//! | [`sample`] | samples and batches as Python takes them apart | |
//! | [`native`] | samples that are made without Python: the trait, a template of their bytes | |
//! | [`windows`] | windows over the rows of HDF5 files, through the node's cache | Python's objects |
//! | [`cells`] | cells of AnnData files | Python's objects |
//! | [`images`] | PNG and JPEG files | Python's objects |
//! | [`files`] | data sets of files as Python opens and reads them | |
//! | [`order`] | which samples a rank's batch has | the cache |
//! | [`node`] | this process's connection to the node's cache | |
//! | [`loader`] | the threads as Python starts and asks them | |
//! | [`system`] | facts on this process and machine | |
//!
//! Files are read by the package `source`: the root package's readers, without libtorch.
//!
//! Architecture invariant: no bytes of a sample are interpreted here; a sample's structure is `codec.py`'s. There is no `unsafe`.

mod batch;
mod buffer;
mod cells;
mod disk;
mod engine;
mod entry;
mod failure;
mod files;
mod images;
mod lane;
mod loader;
mod memory;
mod native;
mod node;
mod order;
mod own;
mod sample;
mod sizes;
mod system;
mod windows;
mod work;

use pyo3::prelude::*;

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("INDEX_BITS", entry::INDEX_BITS)?;
    module.add("CacheLost", module.py().get_type::<node::CacheLost>())?;
    module.add_class::<node::Node>()?;
    module.add_class::<order::Order>()?;
    module.add_class::<sample::Sample>()?;
    module.add_class::<sample::Batch>()?;
    module.add_class::<sample::Stacker>()?;
    module.add_class::<memory::Memory>()?;
    module.add_class::<files::Files>()?;
    module.add_class::<disk::PyDisk>()?;
    module.add_class::<loader::Lane>()?;
    module.add_class::<loader::Loader>()?;
    module.add_function(wrap_pyfunction!(files::find_files, module)?)?;
    module.add_function(wrap_pyfunction!(order::mixed, module)?)?;
    module.add_function(wrap_pyfunction!(system::process_memory, module)?)?;
    module.add_function(wrap_pyfunction!(system::machine_memory, module)?)?;
    module.add_function(wrap_pyfunction!(system::end_with_parent, module)?)?;
    Ok(())
}
