//! The mapping of a virtual dataset. The safe crate refuses a selection of one long block, which is how most files are written.

use super::dataspace;
use ::hdf5::plist::DatasetCreate;
use ::hdf5::sync::sync;
use ::hdf5::{Dataspace, Result, h5check};
use hdf5_sys::h5i::hid_t;
use hdf5_sys::h5p::{
    H5Pget_virtual_count, H5Pget_virtual_dsetname, H5Pget_virtual_filename, H5Pget_virtual_srcspace,
    H5Pget_virtual_vspace,
};
use hdf5_sys::h5s::{H5S_sel_type, H5Sget_regular_hyperslab, H5Sget_select_type, H5Sis_regular_hyperslab};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

/// Longest name of a file or dataset that is accepted.
const MAX_NAME: usize = 1 << 16;
/// Count or block of a selection without an end.
const UNLIMITED: u64 = u64::MAX;

/// Elements of a virtual dataset, and those of another dataset that they are.
#[derive(Debug)]
pub struct Mapping {
    pub file: OsString,
    pub dataset: String,
    pub here: Places,
    pub there: Places,
}

/// Selected elements of a dataset.
#[derive(Debug, PartialEq)]
pub enum Places {
    /// All of a dataset of these extents.
    All(Vec<u64>),
    /// Blocks, by dimension.
    Slab(Vec<Slice>),
    /// Points, irregular or empty selections.
    Other,
}

/// Indices of one dimension: `count` blocks of `block` indices, `step` apart. `None`: without an end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slice {
    pub start: u64,
    pub step: u64,
    pub count: Option<u64>,
    pub block: u64,
}

/// # Errors
/// libhdf5's.
pub fn mappings(plist: &DatasetCreate) -> Result<Vec<Mapping>> {
    let id = plist.id();
    let mut count = 0;
    // SAFETY: the id is a property list's, kept open by `plist`; the lock is held; libhdf5 writes one number.
    sync(|| h5check(unsafe { H5Pget_virtual_count(id, &raw mut count) }))?;
    let mapping = |n| {
        // SAFETY: as above, and `n` is below the number of mappings. With a null pointer libhdf5 returns the length alone, else
        // it writes at most `room` bytes.
        let file = name(|at, room| unsafe { H5Pget_virtual_filename(id, n, at, room) })?;
        // SAFETY: as above.
        let dataset = name(|at, room| unsafe { H5Pget_virtual_dsetname(id, n, at, room) })?;
        // SAFETY: as above; the lock is held by `dataspace`.
        let here = dataspace(|| unsafe { H5Pget_virtual_vspace(id, n) })?;
        // SAFETY: as above.
        let there = dataspace(|| unsafe { H5Pget_virtual_srcspace(id, n) })?;
        Ok(Mapping {
            file: OsString::from_vec(file),
            dataset: String::from_utf8_lossy(&dataset).into_owned(),
            here: places(&here)?,
            there: places(&there)?,
        })
    };
    (0..count).map(mapping).collect()
}

/// Text of a call that writes into a buffer and returns the text's length.
fn name(call: impl Fn(*mut std::ffi::c_char, usize) -> isize) -> Result<Vec<u8>> {
    sync(|| {
        let length = usize::try_from(call(std::ptr::null_mut(), 0)).unwrap_or(usize::MAX);
        if length > MAX_NAME {
            return Err("a name of a virtual dataset's part cannot be read".into());
        }
        let mut bytes = vec![0u8; length + 1];
        call(bytes.as_mut_ptr().cast(), bytes.len());
        bytes.truncate(length);
        Ok(bytes)
    })
}

fn places(space: &Dataspace) -> Result<Places> {
    let dims = || space.shape().into_iter().map(|dim| dim as u64).collect::<Vec<u64>>();
    // SAFETY: the id is a dataspace's, kept open by `space`; the lock is held.
    match sync(|| unsafe { H5Sget_select_type(space.id()) }) {
        H5S_sel_type::H5S_SEL_ALL => Ok(Places::All(dims())),
        H5S_sel_type::H5S_SEL_HYPERSLABS => slab(space.id(), dims().len()),
        _ => Ok(Places::Other),
    }
}

fn slab(id: hid_t, rank: usize) -> Result<Places> {
    let (mut start, mut step, mut count, mut block) = (vec![0; rank], vec![0; rank], vec![0; rank], vec![0; rank]);
    let regular = sync(|| {
        // SAFETY: the caller's dataspace keeps the id open; the lock is held.
        if h5check(unsafe { H5Sis_regular_hyperslab(id) })? <= 0 {
            return Ok(false);
        }
        // SAFETY: as above; libhdf5 writes `rank` numbers into each vector, as many as it holds.
        let found = unsafe {
            H5Sget_regular_hyperslab(id, start.as_mut_ptr(), step.as_mut_ptr(), count.as_mut_ptr(), block.as_mut_ptr())
        };
        h5check(found).map(|_| true)
    })?;
    if !regular {
        return Ok(Places::Other);
    }
    let slice = |n: usize| Slice {
        start: start[n],
        step: step[n],
        count: Some(count[n]).filter(|count| *count != UNLIMITED && block[n] != UNLIMITED),
        block: block[n],
    };
    Ok(Places::Slab((0..rank).map(slice).collect()))
}
