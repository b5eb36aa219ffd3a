//! Metadata of an array, by libhdf5: type, shape, layout, filters, addresses of chunks. No number is read.

use super::{Array, Number, Place};
use crate::data::source::hdf5::layout::last_chunk_is_raw;
use crate::data::source::hdf5::storage::{filters, refuse_unknown_filters};
use crate::data::source::hdf5::types::shuffled_bytes;
use crate::data::source::hdf5::{ChunkAt, Filter};
use ::hdf5::Dataset;
use ::hdf5::dataset::Layout as H5Layout;
use ::hdf5::types::{FloatSize, IntSize, TypeDescriptor};
use std::path::Path;

/// Describes `dataset`, which was reached from the file at `path` whose size and time are `stamp`.
///
/// # Errors
/// No numbers, another number of dimensions than one or two, or what is not credible; without the path.
pub fn open(dataset: &Dataset, path: &Path, stamp: (u64, i128)) -> Result<Array, String> {
    let name = dataset.name();
    let shape: Vec<u64> = dataset.shape().into_iter().map(|extent| extent as u64).collect();
    let (number, as_stored) = number(dataset).map_err(|found| format!("{name} holds {found}: expected numbers"))?;
    let (rows, columns) = match shape[..] {
        [rows] => (rows, 1),
        [rows, columns] => (rows, columns),
        _ => return Err(format!("{name} has {} dimensions: expected 1 or 2", shape.len())),
    };
    let (file_bytes, modified_ns) = stamp;
    let mut array = Array {
        path: path.to_owned(),
        dataset: name,
        rows,
        columns,
        is_flat: shape.len() == 1,
        number,
        place: Place::Empty,
        file_bytes,
        modified_ns,
    };
    array.validate()?;
    refuse_unknown_filters(dataset).map_err(|problem| format!("{} is {problem}", array.dataset))?;
    if rows > 0 && columns > 0 {
        array.place = place(dataset, &array, as_stored)?;
    }
    array.validate()?;
    Ok(array)
}

/// The type of the numbers, and true where they lie in the file as in memory.
fn number(dataset: &Dataset) -> Result<(Number, bool), String> {
    let dtype = dataset.dtype().map_err(|error| error.to_string())?;
    let descriptor =
        dtype.to_descriptor().map_err(|_| format!("a type of {} bytes that is not known", dtype.size()))?;
    let whole = |signed: bool, size: IntSize| match (signed, size) {
        (false, IntSize::U1) => Number::U8,
        (false, IntSize::U2) => Number::U16,
        (false, IntSize::U4) => Number::U32,
        (false, IntSize::U8) => Number::U64,
        (true, IntSize::U1) => Number::I8,
        (true, IntSize::U2) => Number::I16,
        (true, IntSize::U4) => Number::I32,
        (true, IntSize::U8) => Number::I64,
    };
    match &descriptor {
        TypeDescriptor::Integer(size) => {
            let number = whole(true, *size);
            Ok((number, is_native(&dtype, number)))
        }
        TypeDescriptor::Unsigned(size) => {
            let number = whole(false, *size);
            Ok((number, is_native(&dtype, number)))
        }
        TypeDescriptor::Float(FloatSize::U4) => Ok((Number::F32, dtype.is::<f32>())),
        TypeDescriptor::Float(FloatSize::U8) => Ok((Number::F64, dtype.is::<f64>())),
        // One byte has no order.
        TypeDescriptor::Boolean => Ok((Number::I8, true)),
        TypeDescriptor::Enum(of) if of.size == IntSize::U1 => Ok((whole(of.signed, of.size), true)),
        other => Err(other.to_string()),
    }
}

fn is_native(dtype: &::hdf5::Datatype, number: Number) -> bool {
    match number {
        Number::U8 => dtype.is::<u8>(),
        Number::I8 => dtype.is::<i8>(),
        Number::U16 => dtype.is::<u16>(),
        Number::I16 => dtype.is::<i16>(),
        Number::U32 => dtype.is::<u32>(),
        Number::I32 => dtype.is::<i32>(),
        Number::U64 => dtype.is::<u64>(),
        Number::I64 => dtype.is::<i64>(),
        Number::F32 => dtype.is::<f32>(),
        Number::F64 => dtype.is::<f64>(),
    }
}

fn place(dataset: &Dataset, array: &Array, as_stored: bool) -> Result<Place, String> {
    let name = &array.dataset;
    let library = |reason: &str| Ok(Place::Library { reason: format!("{name}: {reason}") });
    match dataset.layout() {
        H5Layout::Virtual => {
            Err(format!("{name} is a virtual dataset: copy its numbers into one file (h5repack -l {name}:CONTI)"))
        }
        H5Layout::Compact => library("compact layout"),
        _ if !as_stored => library("numbers of another byte order or size"),
        H5Layout::Contiguous => {
            let external = dataset.dcpl().is_ok_and(|plist| !plist.external().is_empty());
            match dataset.offset() {
                Some(addr) if !external && dataset.storage_size() == array.bytes() => Ok(Place::Contiguous { addr }),
                _ => library(if external { "numbers in external files" } else { "numbers never written" }),
            }
        }
        H5Layout::Chunked => chunked(dataset, array),
    }
}

fn chunked(dataset: &Dataset, array: &Array) -> Result<Place, String> {
    let shape: Vec<u64> = dataset.chunk().unwrap_or_default().into_iter().map(|extent| extent as u64).collect();
    let (rows, columns) = match shape[..] {
        [rows] if array.is_flat => (rows, 1),
        [rows, columns] if !array.is_flat => (rows, columns),
        _ => return Err(format!("{} has chunks of {} dimensions", array.dataset, shape.len())),
    };
    array.validate_shape(rows, columns)?;
    let filters: Vec<Filter> = match filters(dataset) {
        Ok(filters) => filters,
        Err(name) => return Ok(Place::Library { reason: name }),
    };
    let chunks = chunks(dataset, array, (rows, columns))?;
    let recorded = filters.contains(&Filter::Shuffle).then(|| dataset.dcpl().ok().as_ref().and_then(shuffled_bytes));
    let element_bytes = recorded.flatten().unwrap_or(array.number.bytes());
    Ok(Place::Chunked { rows, columns, chunks, filters, element_bytes })
}

/// The chunks, row by row.
fn chunks(dataset: &Dataset, array: &Array, (rows, columns): (u64, u64)) -> Result<Box<[ChunkAt]>, String> {
    let across = array.chunks_across(columns);
    let mut chunks = vec![ChunkAt::default(); (array.rows.div_ceil(rows) * across) as usize];
    let mut problem = None;
    let visited = dataset.chunks_visit(|info| {
        let at = |n: usize, step: u64| {
            let offset = info.offset.get(n).copied().unwrap_or(0);
            offset.is_multiple_of(step).then_some(offset / step)
        };
        let column = if array.is_flat { Some(0) } else { at(1, columns) };
        let index = at(0, rows).zip(column).filter(|(_, column)| *column < across);
        let slot =
            index.and_then(|(row, column)| chunks.get_mut(row.checked_mul(across)?.checked_add(column)? as usize));
        match (slot, u32::try_from(info.size)) {
            (Some(slot), Ok(stored_bytes)) if stored_bytes > 0 => {
                *slot = ChunkAt { addr: info.addr, stored_bytes, filter_mask: info.filter_mask };
            }
            // Chunks behind the end are what a dataset leaves that was cut.
            (None, Ok(_)) if index.is_some() => {}
            _ => problem = Some(format!("{}: a chunk of {} bytes is not credible", array.dataset, info.size)),
        }
        0
    });
    visited.map_err(|error| {
        format!("the list of chunks of {} cannot be read ({error}): replace it or leave it out", array.dataset)
    })?;
    if let Some(problem) = problem {
        return Err(problem);
    }
    // Chunks at the edges may be stored without their filters.
    if last_chunk_is_raw(dataset, 1, 2) {
        let cut = |extent: u64, chunk: u64, n: u64| (n + 1) * chunk > extent;
        for (n, chunk) in chunks.iter_mut().enumerate() {
            let (row, column) = (n as u64 / across, n as u64 % across);
            if cut(array.rows, rows, row) || cut(array.columns, columns, column) {
                chunk.filter_mask = u32::MAX;
            }
        }
    }
    Ok(chunks.into())
}
