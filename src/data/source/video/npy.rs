//! NumPy's `.npy` files of f32 (format versions 1 to 3), as precomputed voxels come.

use super::super::file_error;
use crate::data::DataError;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Longest header that is read: NumPy's own are of 118 bytes.
const MAX_HEADER_BYTES: usize = 1 << 16;

/// Content of the header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NpyFacts {
    /// `[K, H, W]`.
    pub shape: Vec<usize>,
    /// Where the values begin.
    pub data_start: usize,
}

/// Reads the header: little-endian f32 in C order.
///
/// # Errors
/// No `.npy` file, another type or order, or not the size that its shape asks for.
pub fn facts_of(path: &Path, file: &mut File) -> Result<NpyFacts, DataError> {
    let failed = |e: std::io::Error| file_error(path, e.to_string());
    let bytes = file.metadata().map_err(failed)?.len();
    let mut start = Vec::with_capacity(256);
    file.take((MAX_HEADER_BYTES + 12) as u64).read_to_end(&mut start).map_err(failed)?;
    let facts = parse(&start).map_err(|problem| file_error(path, problem))?;
    let values = facts.shape.iter().try_fold(4usize, |bytes, n| bytes.checked_mul(*n));
    if values.and_then(|values| values.checked_add(facts.data_start)).map(|n| n as u64) != Some(bytes) {
        let problem = format!("{bytes} bytes: an array of {:?} f32 values has another size", facts.shape);
        return Err(file_error(path, problem));
    }
    Ok(facts)
}

/// A value that no model can use.
#[derive(Debug, PartialEq, Eq)]
pub struct BadValue {
    /// Its place, the value and the way out.
    pub problem: String,
    /// It is a number, but no count: the config does not fit the data set, whichever file shows it.
    pub no_count: bool,
}

/// Checks little-endian f32 values of `shape`: no NaN, no infinity and, where they are `counts`, nothing below 0.
///
/// # Errors
/// Names the first such value, its place and the way out.
pub fn check_values(values: &[u8], shape: [usize; 3], counts: bool) -> Result<(), BadValue> {
    let bad = |value: f32| !value.is_finite() || (counts && value < 0.0);
    let all = || values.as_chunks::<4>().0.iter().map(|cell| f32::from_le_bytes(*cell));
    // Without a branch: this runs over all voxels of every clip that is decoded.
    if !all().fold(false, |found, value| found | bad(value)) {
        return Ok(());
    }
    let (at, value) = all().enumerate().find(|(_, value)| bad(*value)).unwrap_or_default();
    let [_, height, width] = shape.map(|side| side.max(1));
    let place = format!("bin {}, row {}, column {}", at / (height * width), at / width % height, at % width);
    let way_out = match value.is_finite() {
        true => "deblur.log1p takes the logarithm of counts, which are 0 or more: set it to false, or write counts",
        false => "repair the file or leave it out",
    };
    Err(BadValue { problem: format!("the value at {place} is {value}: {way_out}"), no_count: value.is_finite() })
}

fn parse(bytes: &[u8]) -> Result<NpyFacts, String> {
    let rest =
        bytes.strip_prefix(b"\x93NUMPY").ok_or("no .npy file: its first bytes are not those of NumPy's format")?;
    let (length, at) = match rest {
        [1, _, a, b, ..] => (u32::from(u16::from_le_bytes([*a, *b])), 10),
        [2 | 3, _, a, b, c, d, ..] => (u32::from_le_bytes([*a, *b, *c, *d]), 12),
        _ => return Err("a .npy file of an unknown version: expected 1, 2 or 3".into()),
    };
    let data_start = at + length as usize;
    let header = bytes.get(at..data_start).ok_or("its header is cut off")?;
    let header = String::from_utf8_lossy(header);
    let value = |key: &str| -> Option<&str> {
        let after = header.split_once(&format!("'{key}'"))?.1.trim_start();
        Some(after.strip_prefix(':')?.trim_start())
    };
    let kind = value("descr").ok_or("its header names no descr")?;
    if !kind.starts_with("'<f4'") {
        let kind = kind.split(',').next().unwrap_or_default();
        return Err(format!("values of type {kind}: expected '<f4' (array.astype(\"float32\") makes it so)"));
    }
    if !value("fortran_order").is_some_and(|order| order.starts_with("False")) {
        return Err("an array in Fortran order: expected C order (numpy.ascontiguousarray makes it so)".into());
    }
    let shape = value("shape").and_then(|shape| shape.strip_prefix('(')?.split_once(')')).ok_or("it has no shape")?.0;
    let sizes = shape.split(',').map(str::trim).filter(|size| !size.is_empty()).map(str::parse);
    let shape = sizes.collect::<Result<_, _>>().map_err(|_| format!("its shape ({shape}) is not one"))?;
    Ok(NpyFacts { shape, data_start })
}

/// Header of a version 1 file of f32 values in `shape`, padded as NumPy pads it.
pub fn header(shape: &[usize]) -> Vec<u8> {
    let sizes: Vec<String> = shape.iter().map(usize::to_string).collect();
    let comma = if shape.len() == 1 { "," } else { "" };
    let mut text = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({}{comma}), }}", sizes.join(", "));
    while (10 + text.len() + 1) % 64 != 0 {
        text.push(' ');
    }
    text.push('\n');
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    // At most a few hundred bytes.
    bytes.extend((text.len() as u16).to_le_bytes());
    bytes.extend(text.as_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read_as_they_are_written() {
        for shape in [vec![32, 360, 640], vec![7], vec![]] {
            let bytes = header(&shape);
            assert_eq!(bytes.len() % 64, 0);
            assert_eq!(parse(&bytes).unwrap(), NpyFacts { shape, data_start: bytes.len() });
        }
        // As NumPy 2 writes numpy.zeros((2, 3), "float32") in version 2.
        let mut second = b"\x93NUMPY\x02\x00\x42\x00\x00\x00".to_vec();
        second.extend(format!("{:66}", "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)}\n").as_bytes());
        assert_eq!(parse(&second).unwrap(), NpyFacts { shape: vec![2, 3], data_start: 78 });
    }

    #[test]
    fn values_that_no_model_can_use_are_named_with_their_place() {
        let mut values = [0.5f32; 24];
        let check = |values: &[f32], counts| {
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            check_values(&bytes, [2, 3, 4], counts).map_err(|bad| bad.problem)
        };
        assert_eq!(check(&values, true), Ok(()));
        values[23] = -0.0;
        assert_eq!(check(&values, true), Ok(()), "minus zero is zero");
        values[22] = -1e-6;
        assert_eq!(check(&values, false), Ok(()));
        let error = check(&values, true).unwrap_err();
        assert!(error.starts_with("the value at bin 1, row 2, column 2 is -0.000001: deblur.log1p"), "{error}");
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            values[5] = bad;
            let error = check(&values, false).unwrap_err();
            assert_eq!(error, format!("the value at bin 0, row 1, column 1 is {bad}: repair the file or leave it out"));
        }
    }

    #[test]
    fn what_is_no_array_of_f32_is_named() {
        let with = |from: &str, to: &str| {
            let text = String::from_utf8_lossy(&header(&[2, 3])[10..]).replace(from, to);
            let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
            bytes.extend((text.len() as u16).to_le_bytes());
            bytes.extend(text.as_bytes());
            parse(&bytes).unwrap_err()
        };
        assert!(with("<f4", "<f8").contains("'<f8'"));
        assert!(with("False", "True").contains("Fortran"));
        assert!(with("(2, 3)", "(2, x)").contains("(2, x)"));
        assert!(with("(2, 3)", "(2, -3)").contains("(2, -3)"));
        assert!(parse(b"\x93NUMPY\x01\x00\xff\xff{").unwrap_err().contains("cut off"));
        assert!(parse(b"PK\x03\x04").unwrap_err().contains("no .npy file"));
        assert!(parse(b"\x93NUMPY\x09\x00\x01").unwrap_err().contains("version"));
    }
}
