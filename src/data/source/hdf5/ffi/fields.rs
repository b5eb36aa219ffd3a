//! One field of all rows of a compound dataset, whatever the others hold.

use super::datatype;
use ::hdf5::globals::{H5T_NATIVE_DOUBLE, H5T_NATIVE_INT64};
use ::hdf5::sync::sync;
use ::hdf5::{Dataset, Dataspace, Result, h5check};
use hdf5_sys::h5d::H5Dread;
use hdf5_sys::h5p::H5P_DEFAULT;
use hdf5_sys::h5t::{
    H5T_class_t, H5Tcopy, H5Tcreate, H5Tget_class, H5Tget_member_index, H5Tget_member_type, H5Tinsert,
    H5Tis_variable_str, H5Treclaim,
};
use std::ffi::{CStr, CString, c_char};

/// Values of a field.
#[derive(Debug, PartialEq)]
pub enum Values {
    Text(Vec<String>),
    Whole(Vec<i64>),
    Float(Vec<f64>),
}

/// Field `name` of every row of `dataset`.
///
/// # Errors
/// No such field, one of another kind, or rows that libhdf5 cannot read.
pub fn read_field(dataset: &Dataset, name: &str) -> Result<Values> {
    let rows = dataset.shape().first().copied().unwrap_or(0);
    let field = CString::new(name).map_err(|_| "a field's name holds a zero byte")?;
    let of_file = dataset.dtype()?;
    // SAFETY: the id is a compound's, kept open by `of_file`, and the name ends with a zero byte; the lock is held.
    let index = sync(|| h5check(unsafe { H5Tget_member_index(of_file.id(), field.as_ptr()) }))?;
    // SAFETY: as above, and `index` is one of its members.
    let stored = datatype(|| unsafe { H5Tget_member_type(of_file.id(), index as u32) })?;
    // SAFETY: the id is a datatype's, kept open by `stored`; the lock is held.
    let class = sync(|| unsafe { H5Tget_class(stored.id()) });
    let member = match class {
        // SAFETY: predefined types live as long as the library; the lock is held by `datatype`.
        H5T_class_t::H5T_INTEGER => datatype(|| unsafe { H5Tcopy(*H5T_NATIVE_INT64) })?,
        // SAFETY: as above.
        H5T_class_t::H5T_FLOAT => datatype(|| unsafe { H5Tcopy(*H5T_NATIVE_DOUBLE) })?,
        H5T_class_t::H5T_STRING => stored,
        _ => return Err(format!("field {name} is neither text nor a number").into()),
    };
    // SAFETY: the id is a string type's, kept open by `member`; the lock is held.
    let is_variable =
        class == H5T_class_t::H5T_STRING && sync(|| h5check(unsafe { H5Tis_variable_str(member.id()) }))? > 0;
    let bytes = member.size();
    // SAFETY: plain values; the lock is held by `datatype`.
    let row = datatype(|| unsafe { H5Tcreate(H5T_class_t::H5T_COMPOUND, bytes) })?;
    // SAFETY: both ids are datatypes kept open by their values, `field` ends with a zero byte, and the member fills the row; the
    // lock is held.
    sync(|| h5check(unsafe { H5Tinsert(row.id(), field.as_ptr(), 0, member.id()) }))?;
    // Of u64, so that pointers to text are aligned.
    let mut cells = vec![0u64; (rows * bytes).div_ceil(8)];
    let space = Dataspace::try_new(rows)?;
    sync(|| {
        // SAFETY: all ids are kept open by their values, and the lock is held. Both spaces hold `rows` elements of `row`, whose
        // bytes `cells` has room for.
        h5check(unsafe {
            H5Dread(dataset.id(), row.id(), space.id(), space.id(), H5P_DEFAULT, cells.as_mut_ptr().cast())
        })
    })?;
    let values = match class {
        H5T_class_t::H5T_INTEGER => Values::Whole(cells.iter().map(|cell| *cell as i64).collect()),
        H5T_class_t::H5T_FLOAT => Values::Float(cells.iter().map(|cell| f64::from_bits(*cell)).collect()),
        _ if is_variable => {
            let text = |cell: &u64| {
                let text = *cell as usize as *const c_char;
                if text.is_null() {
                    return String::new();
                }
                // SAFETY: libhdf5 wrote a pointer to a string that ends with a zero byte, and it lives until it is reclaimed.
                unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
            };
            Values::Text(cells.iter().take(rows).map(text).collect())
        }
        _ => {
            let all: Vec<u8> = cells.iter().flat_map(|cell| cell.to_ne_bytes()).collect();
            Values::Text(all.chunks_exact(bytes.max(1)).take(rows).map(until_zero).collect())
        }
    };
    if is_variable {
        sync(|| {
            // SAFETY: `cells` holds what H5Dread put there for this type and space, and the pointers are not used again.
            h5check(unsafe { H5Treclaim(row.id(), space.id(), H5P_DEFAULT, cells.as_mut_ptr().cast()) })
        })?;
    }
    Ok(values)
}

fn until_zero(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}
