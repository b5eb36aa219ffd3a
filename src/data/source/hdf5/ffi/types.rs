//! Types of a dataset as its file stores them, and reads with a type in memory that is made at run time.
//!
//! `H5Dget_type` describes rows in memory: a variable-length string is a pointer of 8 bytes there, and a length with a heap
//! address of 16 bytes in the file. [`of`] undoes that step (`H5T_set_loc`), so that offsets are those of the stored rows.
//! Where the size in the file is not certain, the offset is `None` and libhdf5 has to read the rows.

use super::datatype;
use crate::data::source::hdf5::{Member, Order, Scalar};
use ::hdf5::globals::{H5T_IEEE_F32BE, H5T_IEEE_F32LE, H5T_IEEE_F64BE, H5T_IEEE_F64LE};
use ::hdf5::globals::{H5T_STD_REF_DSETREG, H5T_STD_REF_OBJ};
use ::hdf5::plist::DatasetCreate;
use ::hdf5::sync::sync;
use ::hdf5::{Dataset, Dataspace, Datatype, Result, h5check};
use hdf5_sys::h5::H5free_memory;
use hdf5_sys::h5d::{H5Dread, H5Dwrite};
use hdf5_sys::h5i::hid_t;
use hdf5_sys::h5p::{H5P_DEFAULT, H5Pget_filter_by_id2};
use hdf5_sys::h5t::{
    H5T_class_t, H5Tarray_create2, H5Tcopy, H5Tcreate, H5Tget_array_dims2, H5Tget_array_ndims, H5Tget_class,
    H5Tget_member_name, H5Tget_member_offset, H5Tget_member_type, H5Tget_nmembers, H5Tget_super, H5Tinsert,
    H5Tis_variable_str,
};
use std::ffi::{CStr, CString};
use std::ops::Range;

/// Deepest nesting of types that is followed.
const MAX_DEPTH: usize = 16;
/// HDF5's registered number of the shuffle filter.
const SHUFFLE_ID: i32 = 2;

/// Element of a field.
#[derive(Clone, Debug, PartialEq)]
pub enum Element {
    /// IEEE single or double, bit for bit.
    Ieee(Scalar, Order),
    /// Another floating-point type of so many bytes, which libhdf5 converts.
    OtherFloat(usize),
    /// No floating-point type; its name.
    NoFloat(String),
}

/// Field of a compound, or the elements of a plain dataset.
#[derive(Clone, Debug)]
pub struct Field {
    pub name: String,
    /// Bytes from the row's start in the file.
    pub offset: Option<usize>,
    /// Extents of an array member, outermost first; empty for a single number.
    pub dims: Vec<usize>,
    pub element: Element,
}

/// Type of a dataset's elements.
#[derive(Clone, Debug)]
pub struct RowType {
    /// Bytes of an element in the file.
    pub bytes: Option<usize>,
    /// Bytes of an element in memory.
    pub memory_bytes: usize,
    /// Fields of a compound in the file's order; `None` for other types.
    pub fields: Option<Vec<Field>>,
    /// The type itself as a field without a name.
    pub whole: Field,
}

/// Type of `dataset`'s elements in a file whose addresses have `address_bytes`.
///
/// # Errors
/// libhdf5 cannot describe it.
pub fn of(dataset: &Dataset, address_bytes: usize) -> Result<RowType> {
    let dtype = dataset.dtype()?;
    let whole = field(String::new(), Some(0), &dtype)?;
    let fields = match class(&dtype) {
        H5T_class_t::H5T_COMPOUND => {
            let (members, _) = placed(&dtype, address_bytes, 0)?;
            let fields = members.into_iter().map(|(name, offset, ty)| field(name, offset, &ty));
            Some(fields.collect::<Result<Vec<Field>>>()?)
        }
        _ => None,
    };
    Ok(RowType { bytes: stored_bytes(&dtype, address_bytes, 0)?, memory_bytes: dtype.size(), fields, whole })
}

fn field(name: String, offset: Option<usize>, dtype: &Datatype) -> Result<Field> {
    let (mut dims, mut base) = (Vec::new(), dtype.clone());
    while class(&base) == H5T_class_t::H5T_ARRAY {
        dims.extend(array_dims(&base)?);
        base = base_of(&base)?;
    }
    Ok(Field { name, offset, dims, element: element(&base)? })
}

/// Compares with the types of a file as libhdf5 does: size, byte order, bit fields, bias and padding.
fn element(dtype: &Datatype) -> Result<Element> {
    for scalar in [Scalar::F32, Scalar::F64] {
        for order in [Order::Little, Order::Big] {
            if *dtype == ieee(scalar, order)? {
                return Ok(Element::Ieee(scalar, order));
            }
        }
    }
    Ok(match class(dtype) {
        H5T_class_t::H5T_FLOAT => Element::OtherFloat(dtype.size()),
        _ => Element::NoFloat(words(dtype)),
    })
}

/// Name of a type for messages.
fn words(dtype: &Datatype) -> String {
    if let Ok(descriptor) = dtype.to_descriptor() {
        return descriptor.to_string();
    }
    let kind = match class(dtype) {
        H5T_class_t::H5T_TIME => "time",
        H5T_class_t::H5T_BITFIELD => "bit field",
        H5T_class_t::H5T_OPAQUE => "opaque",
        H5T_class_t::H5T_COMPOUND => "compound",
        H5T_class_t::H5T_REFERENCE => "reference",
        H5T_class_t::H5T_ENUM => "enum",
        H5T_class_t::H5T_VLEN => "variable-length sequence",
        H5T_class_t::H5T_COMPLEX => "complex number",
        H5T_class_t::H5T_INTEGER => "integer",
        _ => "type of a kind that is not known",
    };
    format!("{kind} of {} bytes", dtype.size())
}

/// Bytes of a value of `dtype` in the file; `None` where libhdf5 alone knows.
///
/// Source: HDF5 file format 3.0, IV.A.2.d and VIII: a variable-length value is a length of 4 bytes and a global heap ID, which
/// is an address and an index of 4 bytes.
fn stored_bytes(dtype: &Datatype, address_bytes: usize, depth: usize) -> Result<Option<usize>> {
    let heap_bytes = 4 + address_bytes + 4;
    if depth > MAX_DEPTH {
        return Ok(None);
    }
    Ok(match class(dtype) {
        H5T_class_t::H5T_VLEN => Some(heap_bytes),
        H5T_class_t::H5T_STRING if is_variable(dtype)? => Some(heap_bytes),
        H5T_class_t::H5T_REFERENCE if *dtype == copy_of(*H5T_STD_REF_OBJ)? => Some(address_bytes),
        H5T_class_t::H5T_REFERENCE if *dtype == copy_of(*H5T_STD_REF_DSETREG)? => Some(address_bytes + 4),
        H5T_class_t::H5T_REFERENCE => None,
        H5T_class_t::H5T_COMPOUND => placed(dtype, address_bytes, depth + 1)?.1,
        H5T_class_t::H5T_ARRAY => {
            let cells = array_dims(dtype)?.into_iter().try_fold(1usize, usize::checked_mul);
            let one = stored_bytes(&base_of(dtype)?, address_bytes, depth + 1)?;
            cells.zip(one).and_then(|(cells, one)| cells.checked_mul(one))
        }
        H5T_class_t::H5T_INTEGER
        | H5T_class_t::H5T_FLOAT
        | H5T_class_t::H5T_TIME
        | H5T_class_t::H5T_STRING
        | H5T_class_t::H5T_BITFIELD
        | H5T_class_t::H5T_OPAQUE
        | H5T_class_t::H5T_ENUM
        | H5T_class_t::H5T_COMPLEX => Some(dtype.size()),
        _ => None,
    })
}

/// Name, offset in the file and type of a member.
type Placed = (String, Option<usize>, Datatype);

/// Members of a compound in its order, and its bytes in the file. Each member is moved by what the members before it grow or
/// shrink between file and memory, in the order of offsets.
fn placed(compound: &Datatype, address_bytes: usize, depth: usize) -> Result<(Vec<Placed>, Option<usize>)> {
    let members = members(compound)?;
    let mut by_offset: Vec<usize> = (0..members.len()).collect();
    by_offset.sort_by_key(|n| members[*n].1);
    let mut moved = Some(0isize);
    let place = |at: usize, moved: Option<isize>| at.checked_add_signed(moved?);
    let mut offsets = vec![None; members.len()];
    for n in by_offset {
        let (_, at, dtype) = &members[n];
        offsets[n] = place(*at, moved);
        let stored = stored_bytes(dtype, address_bytes, depth + 1)?;
        moved = moved.zip(stored).and_then(|(moved, stored)| {
            moved.checked_add(isize::try_from(stored).ok()?.checked_sub_unsigned(dtype.size())?)
        });
    }
    let bytes = place(compound.size(), moved);
    let placed = members.into_iter().zip(offsets).map(|((name, _, dtype), offset)| (name, offset, dtype));
    Ok((placed.collect(), bytes))
}

fn class(dtype: &Datatype) -> H5T_class_t {
    // SAFETY: the id is a datatype's, kept open by `dtype`; the lock is held. Every class of the linked libhdf5 is in the enum,
    // which is generated for its version.
    sync(|| unsafe { H5Tget_class(dtype.id()) })
}

fn is_variable(dtype: &Datatype) -> Result<bool> {
    // SAFETY: the id is a datatype's, kept open by `dtype`; the lock is held.
    sync(|| h5check(unsafe { H5Tis_variable_str(dtype.id()) })).map(|found| found > 0)
}

fn copy_of(id: hid_t) -> Result<Datatype> {
    // SAFETY: `id` is one of libhdf5's predefined types, which live as long as the library.
    datatype(|| unsafe { H5Tcopy(id) })
}

fn ieee(scalar: Scalar, order: Order) -> Result<Datatype> {
    copy_of(match (scalar, order) {
        (Scalar::F32, Order::Little) => *H5T_IEEE_F32LE,
        (Scalar::F32, Order::Big) => *H5T_IEEE_F32BE,
        (Scalar::F64, Order::Little) => *H5T_IEEE_F64LE,
        (Scalar::F64, Order::Big) => *H5T_IEEE_F64BE,
    })
}

/// Type that an array, enum or sequence is made of.
fn base_of(dtype: &Datatype) -> Result<Datatype> {
    // SAFETY: the id is a datatype's, kept open by `dtype`; the lock is held by `datatype`.
    datatype(|| unsafe { H5Tget_super(dtype.id()) })
}

fn array_dims(dtype: &Datatype) -> Result<Vec<usize>> {
    sync(|| {
        // SAFETY: the id is a datatype's, kept open by `dtype`; the lock is held.
        let rank = h5check(unsafe { H5Tget_array_ndims(dtype.id()) })?;
        let mut dims = vec![0u64; rank as usize];
        // SAFETY: as above; libhdf5 writes `rank` numbers, as many as `dims` holds.
        h5check(unsafe { H5Tget_array_dims2(dtype.id(), dims.as_mut_ptr()) })?;
        Ok(dims.into_iter().map(|dim| dim as usize).collect())
    })
}

/// Name, offset in memory and type of each member of a compound.
fn members(compound: &Datatype) -> Result<Vec<(String, usize, Datatype)>> {
    let id = compound.id();
    // SAFETY: the id is a datatype's, kept open by `compound`; the lock is held.
    let count = sync(|| h5check(unsafe { H5Tget_nmembers(id) }))? as u32;
    let member = |n| {
        // SAFETY: as above, and `n` is below the number of members.
        let dtype = datatype(|| unsafe { H5Tget_member_type(id, n) })?;
        // SAFETY: as above.
        let offset = sync(|| unsafe { H5Tget_member_offset(id, n) });
        Ok((member_name(compound, n)?, offset, dtype))
    };
    (0..count).map(member).collect()
}

fn member_name(compound: &Datatype, n: u32) -> Result<String> {
    sync(|| {
        // SAFETY: the id is a compound's, kept open by `compound`, `n` is below its number of members; the lock is held.
        let name = unsafe { H5Tget_member_name(compound.id(), n) };
        if name.is_null() {
            return Err("a field without a name".into());
        }
        // SAFETY: libhdf5 returned a string that ends with a zero byte and is this call's to free.
        let text = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
        // SAFETY: `name` came from libhdf5's allocator and is not used again.
        unsafe { H5free_memory(name.cast()) };
        Ok(text)
    })
}

/// Bytes of the elements that the shuffle filter of a dataset took apart, as the filter itself recorded them.
pub fn shuffled_bytes(plist: &DatasetCreate) -> Option<usize> {
    let (mut flags, mut count, mut values, mut config) = (0, 1, [0], 0);
    sync(|| {
        // SAFETY: the id is a property list's, kept open by `plist`; the lock is held. libhdf5 writes at most `count` = 1
        // value, and no name for the null pointer of length 0.
        h5check(unsafe {
            H5Pget_filter_by_id2(
                plist.id(),
                SHUFFLE_ID,
                &raw mut flags,
                &raw mut count,
                values.as_mut_ptr(),
                0,
                std::ptr::null_mut(),
                &raw mut config,
            )
        })
    })
    .ok()?;
    (count >= 1 && values[0] > 0).then_some(values[0] as usize)
}

/// Fields to read: of a compound by name, or columns of a plain dataset.
pub struct Selected<'a> {
    pub members: &'a [Member],
    /// Columns of a plain dataset. All `members` are of one type then.
    pub columns: Option<Range<usize>>,
}

impl Selected<'_> {
    fn row_bytes(&self) -> usize {
        match (&self.columns, self.members.first()) {
            (Some(columns), Some(first)) => columns.len() * first.scalar.bytes(),
            _ => self.members.iter().map(Member::width).sum(),
        }
    }
}

/// Reads `rows` of `dataset` into `out`, row by row, each with the selected fields one after the other in the members' own
/// types. libhdf5 converts what the file holds.
///
/// # Errors
/// libhdf5 cannot read or convert the rows, or `out` is of another size.
pub fn read_rows(dataset: &Dataset, selected: &Selected, rows: Range<u64>, out: &mut [u8]) -> Result<()> {
    let count = (rows.end - rows.start) as usize;
    if selected.members.is_empty() || count.checked_mul(selected.row_bytes()) != Some(out.len()) {
        return Err("rows and room differ".into());
    }
    let memory = memory_type(dataset, selected)?;
    let range = rows.start as usize..rows.end as usize;
    let space = dataset.space()?;
    let (there, here) = match &selected.columns {
        None => (space.select((range,))?, Dataspace::try_new(count)?),
        Some(columns) => (space.select((range, columns.clone()))?, Dataspace::try_new((count, columns.len()))?),
    };
    if there.selection_size() != here.size() {
        return Err("rows out of range".into());
    }
    sync(|| {
        // SAFETY: all ids are kept open by their values, and the lock is held. `here` selects count × columns elements of
        // `memory`, whose size is that of a row or of a column, so libhdf5 writes exactly the bytes of `out` (checked above).
        let read =
            unsafe { H5Dread(dataset.id(), memory.id(), here.id(), there.id(), H5P_DEFAULT, out.as_mut_ptr().cast()) };
        h5check(read)
    })?;
    Ok(())
}

/// Writes `rows` of a compound `dataset` from `bytes`, in the order of [`read_rows`].
///
/// # Errors
/// libhdf5 cannot write the rows, or `bytes` are of another size.
pub fn write_rows(dataset: &Dataset, selected: &Selected, rows: Range<u64>, bytes: &[u8]) -> Result<()> {
    let count = (rows.end - rows.start) as usize;
    let is_whole = count.checked_mul(selected.row_bytes()) == Some(bytes.len());
    if selected.members.is_empty() || selected.columns.is_some() || !is_whole {
        return Err("rows and bytes differ".into());
    }
    let memory = memory_type(dataset, selected)?;
    let there = dataset.space()?.select((rows.start as usize..rows.end as usize,))?;
    let here = Dataspace::try_new(count)?;
    if there.selection_size() != here.size() {
        return Err("rows out of range".into());
    }
    sync(|| {
        // SAFETY: all ids are kept open by their values, and the lock is held. `here` selects `count` elements of `memory`,
        // whose size is that of a row, so libhdf5 reads exactly `bytes` (checked above).
        let written =
            unsafe { H5Dwrite(dataset.id(), memory.id(), here.id(), there.id(), H5P_DEFAULT, bytes.as_ptr().cast()) };
        h5check(written)
    })?;
    Ok(())
}

fn memory_type(dataset: &Dataset, selected: &Selected) -> Result<Datatype> {
    if let (Some(_), Some(first)) = (&selected.columns, selected.members.first()) {
        return ieee(first.scalar, first.order);
    }
    let of_file = members(&dataset.dtype()?)?;
    // SAFETY: plain values; the lock is held by `datatype`.
    let row = datatype(|| unsafe { H5Tcreate(H5T_class_t::H5T_COMPOUND, selected.row_bytes()) })?;
    let mut at = 0;
    for member in selected.members {
        let found = of_file.iter().find(|(name, ..)| *name == member.name);
        let (_, _, dtype) = found.ok_or_else(|| format!("no field {}", member.name))?;
        let dtype = converted(dtype, member, 0)?;
        if dtype.size() != member.width() {
            return Err(format!("field {} is of another size than before", member.name).into());
        }
        let name = CString::new(member.name.as_str()).map_err(|_| "a field's name holds a zero byte")?;
        // SAFETY: both ids are datatypes kept open by their values, `name` ends with a zero byte; the lock is held. The member
        // ends inside the row, whose size is the sum of all members'.
        sync(|| h5check(unsafe { H5Tinsert(row.id(), name.as_ptr(), at, dtype.id()) }))?;
        at += member.width();
    }
    Ok(row)
}

/// The same arrays as in the file, of the member's own element type.
fn converted(dtype: &Datatype, member: &Member, depth: usize) -> Result<Datatype> {
    if class(dtype) != H5T_class_t::H5T_ARRAY {
        return ieee(member.scalar, member.order);
    }
    if depth > MAX_DEPTH {
        return Err("arrays of arrays without end".into());
    }
    let dims: Vec<u64> = array_dims(dtype)?.into_iter().map(|dim| dim as u64).collect();
    let base = converted(&base_of(dtype)?, member, depth + 1)?;
    // SAFETY: the id is a datatype's, kept open by `base`; `dims` holds as many numbers as said; the lock is held by `datatype`.
    datatype(|| unsafe { H5Tarray_create2(base.id(), dims.len() as u32, dims.as_ptr()) })
}

/// Checks that libhdf5 converts the fields of `dataset` into `members`, one by one: a compound is converted field by field, and
/// fields that the file lacks stay as they were.
///
/// # Errors
/// Names the field and its type.
pub fn check_convertible(dataset: &Dataset, members: &[Member], plain: bool) -> std::result::Result<(), String> {
    let row = of(dataset, 8).map_err(|error| error.to_string())?;
    for member in members {
        let found = match (&row.fields, plain) {
            (Some(fields), false) => fields.iter().find(|field| field.name == member.name),
            (None, true) => Some(&row.whole),
            _ => None,
        };
        let field = found.ok_or_else(|| format!("no field {} there", member.name))?;
        let cells = field.dims.iter().try_fold(1usize, |cells, dim| cells.checked_mul(*dim));
        if let Element::NoFloat(words) = &field.element {
            return Err(format!("field {} is {words} there: expected f4 or f8", member.name));
        }
        if !plain && cells != Some(member.len) {
            return Err(format!("field {} has {cells:?} channels there, {} expected", member.name, member.len));
        }
    }
    Ok(())
}
