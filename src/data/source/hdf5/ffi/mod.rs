//! Calls of libhdf5 that the safe crate lacks, or gets wrong.
//!
//! Architecture invariant: the only folder of the rank's data that calls a C library itself. Every call is made under the crate's
//! lock, with ids that safe values of the crate keep open.

#![allow(unsafe_code)]

pub mod fields;
pub mod mapping;
pub mod types;

use ::hdf5::sync::sync;
use ::hdf5::{Dataspace, Datatype, Result, h5check};
use hdf5_sys::h5i::hid_t;

/// Takes over a datatype that libhdf5 has just made.
fn datatype(make: impl FnOnce() -> hid_t) -> Result<Datatype> {
    sync(|| {
        let id = h5check(make())?;
        // SAFETY: libhdf5 returned `id` to this call alone, so its one reference is this value's to close.
        unsafe { ::hdf5::from_id(id) }
    })
}

/// Takes over a dataspace that libhdf5 has just made.
fn dataspace(make: impl FnOnce() -> hid_t) -> Result<Dataspace> {
    sync(|| {
        let id = h5check(make())?;
        // SAFETY: as in `datatype`.
        unsafe { ::hdf5::from_id(id) }
    })
}
