//! Columns of text and of small numbers, by libhdf5.

use ::hdf5::types::{FixedAscii, FixedUnicode, TypeDescriptor, VarLenAscii, VarLenUnicode};
use ::hdf5::{Dataset, H5Type, Location};

/// Rows read at a time.
const BLOCK: usize = 1 << 16;
/// Longest text of fixed length that is read.
const LONGEST: usize = 4096;
/// Most categories, and most names of anything that is no row of the matrix.
pub const MOST_NAMES: usize = 1 << 24;

/// The values of a column as text, `None` where a number is NaN.
///
/// # Errors
/// The dataset is of another type or length, or libhdf5 cannot read it.
pub fn texts(dataset: &Dataset, len: Option<usize>) -> Result<Vec<Option<String>>, String> {
    let rows = checked_len(dataset, len)?;
    let descriptor = descriptor(dataset)?;
    let some = |text: String| Some(text);
    match &descriptor {
        TypeDescriptor::VarLenUnicode => each(dataset, rows, |text: &VarLenUnicode| some(lossy(text.as_bytes()))),
        TypeDescriptor::VarLenAscii => each(dataset, rows, |text: &VarLenAscii| some(lossy(text.as_bytes()))),
        TypeDescriptor::FixedAscii(n) if *n <= 64 => {
            each(dataset, rows, |text: &FixedAscii<64>| some(lossy(text.as_bytes())))
        }
        TypeDescriptor::FixedUnicode(n) if *n <= 64 => {
            each(dataset, rows, |text: &FixedUnicode<64>| some(lossy(text.as_bytes())))
        }
        TypeDescriptor::FixedAscii(n) if *n <= LONGEST => {
            each(dataset, rows, |text: &FixedAscii<LONGEST>| some(lossy(text.as_bytes())))
        }
        TypeDescriptor::FixedUnicode(n) if *n <= LONGEST => {
            each(dataset, rows, |text: &FixedUnicode<LONGEST>| some(lossy(text.as_bytes())))
        }
        TypeDescriptor::Integer(_) => each(dataset, rows, |number: &i64| some(number.to_string())),
        TypeDescriptor::Unsigned(_) => each(dataset, rows, |number: &u64| some(number.to_string())),
        TypeDescriptor::Boolean => each(dataset, rows, |flag: &bool| some(flag_text(*flag))),
        TypeDescriptor::Float(_) => each(dataset, rows, |number: &f64| float_text(*number)),
        other => Err(format!("{} holds {other}: expected text or numbers", dataset.name())),
    }
}

/// The whole numbers of a dataset.
///
/// # Errors
/// As [`texts`].
pub fn wholes(dataset: &Dataset, len: Option<usize>) -> Result<Vec<i64>, String> {
    let rows = checked_len(dataset, len)?;
    match descriptor(dataset)? {
        TypeDescriptor::Integer(_) | TypeDescriptor::Unsigned(_) => each(dataset, rows, |number: &i64| *number),
        TypeDescriptor::Boolean => each(dataset, rows, |flag: &bool| i64::from(*flag)),
        other => Err(format!("{} holds {other}: expected whole numbers", dataset.name())),
    }
}

/// As Python writes a number.
pub fn float_text(number: f64) -> Option<String> {
    match number {
        _ if number.is_nan() => None,
        _ if number.fract() == 0.0 && number.abs() < 1e16 => Some(format!("{number:.1}")),
        _ => Some(number.to_string()),
    }
}

pub fn flag_text(flag: bool) -> String {
    if flag { "True" } else { "False" }.into()
}

/// The text of an attribute, where it is one.
pub fn attribute(place: &Location, name: &str) -> Option<String> {
    let attribute = place.attr(name).ok()?;
    match attribute.dtype().ok()?.to_descriptor().ok()? {
        TypeDescriptor::VarLenUnicode => attribute.read_scalar::<VarLenUnicode>().ok().map(|t| lossy(t.as_bytes())),
        TypeDescriptor::VarLenAscii => attribute.read_scalar::<VarLenAscii>().ok().map(|t| lossy(t.as_bytes())),
        TypeDescriptor::FixedUnicode(n) if n <= LONGEST => {
            attribute.read_scalar::<FixedUnicode<LONGEST>>().ok().map(|t| lossy(t.as_bytes()))
        }
        TypeDescriptor::FixedAscii(n) if n <= LONGEST => {
            attribute.read_scalar::<FixedAscii<LONGEST>>().ok().map(|t| lossy(t.as_bytes()))
        }
        _ => None,
    }
}

/// The whole numbers of an attribute, where it holds a few.
pub fn whole_attribute(place: &Location, name: &str) -> Option<Vec<i64>> {
    let attribute = place.attr(name).ok()?;
    let few = attribute.size() <= 16;
    few.then(|| attribute.read_raw::<i64>().ok()).flatten()
}

fn descriptor(dataset: &Dataset) -> Result<TypeDescriptor, String> {
    let dtype = dataset.dtype().map_err(|error| error.to_string())?;
    dtype
        .to_descriptor()
        .map_err(|_| format!("{} holds a type of {} bytes that is not known", dataset.name(), dtype.size()))
}

fn checked_len(dataset: &Dataset, len: Option<usize>) -> Result<usize, String> {
    let (name, shape) = (dataset.name(), dataset.shape());
    let [rows] = shape[..] else { return Err(format!("{name} has {} dimensions: expected 1", shape.len())) };
    match len {
        Some(len) if len != rows => Err(format!("{name} has {rows} values, there are {len}")),
        None if rows > MOST_NAMES => Err(format!("{name} has {rows} values, at most {MOST_NAMES} are accepted")),
        _ => Ok(rows),
    }
}

fn each<T: H5Type, R>(dataset: &Dataset, rows: usize, turn: impl Fn(&T) -> R) -> Result<Vec<R>, String> {
    let mut all = Vec::with_capacity(rows.min(BLOCK));
    for start in (0..rows).step_by(BLOCK) {
        let block = dataset.read_slice_1d::<T, _>((start..(start + BLOCK).min(rows),));
        let block = block.map_err(|error| format!("{} cannot be read: {error}", dataset.name()))?;
        all.extend(block.iter().map(&turn));
    }
    Ok(all)
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
