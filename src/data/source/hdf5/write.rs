//! Writes recordings in the true format: for sample data and for tests.

use super::open::Attribute;
use super::{Order, Scalar};
use crate::data::DataError;
use crate::data::source::file_error;
use ::hdf5::types::{CompoundField, CompoundType, FloatSize, TypeDescriptor, VarLenUnicode};
use ::hdf5::{Group, H5Type};
use std::path::Path;

/// One sample, as it is in memory; libhdf5 converts to the file's types by name.
#[derive(Clone, Copy, Debug, PartialEq, H5Type)]
#[repr(C)]
pub struct Row {
    /// Seconds since 1970.
    pub time: f64,
    /// Radians.
    pub joint_angles: [f64; 20],
    pub emg: [f32; 16],
}

/// How a recording is stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Storage {
    pub group: String,
    pub dataset: String,
    /// Rows per chunk. `None` means contiguous.
    pub chunk_rows: Option<usize>,
    /// Deflate level; needs chunks.
    pub gzip: Option<u8>,
    pub shuffle: bool,
    pub fletcher32: bool,
    pub emg: Scalar,
    pub joint_angles: Scalar,
    pub order: Order,
    /// Order of the members: a permutation of `time`, `joint_angles`, `emg`.
    pub members: [&'static str; 3],
}

impl Default for Storage {
    /// As the public recordings are: chunked, gzip, shuffle, f8 angles and f4 EMG.
    fn default() -> Self {
        Self {
            group: "emg2pose".into(),
            dataset: "timeseries".into(),
            chunk_rows: Some(2000),
            gzip: Some(4),
            shuffle: true,
            fletcher32: false,
            emg: Scalar::F32,
            joint_angles: Scalar::F64,
            order: Order::Little,
            members: ["time", "joint_angles", "emg"],
        }
    }
}

impl Storage {
    /// Contiguous and uncompressed.
    pub fn contiguous() -> Self {
        Self { chunk_rows: None, gzip: None, shuffle: false, ..Self::default() }
    }

    fn descriptor(&self) -> TypeDescriptor {
        let float = |scalar| match scalar {
            Scalar::F32 => TypeDescriptor::Float(FloatSize::U4),
            Scalar::F64 => TypeDescriptor::Float(FloatSize::U8),
        };
        let mut size = 0;
        let mut fields = Vec::new();
        for (index, name) in self.members.into_iter().enumerate() {
            let ty = match name {
                "emg" => TypeDescriptor::FixedArray(Box::new(float(self.emg)), 16),
                "joint_angles" => TypeDescriptor::FixedArray(Box::new(float(self.joint_angles)), 20),
                _ => TypeDescriptor::Float(FloatSize::U8),
            };
            fields.push(CompoundField::new(name, ty.clone(), size, index));
            size += ty.size();
        }
        TypeDescriptor::Compound(CompoundType { fields, size })
    }
}

/// Writes one recording to `path`, replacing what is there.
///
/// # Errors
/// No room, no permission, or libhdf5 refuses.
pub fn write_session(
    path: &Path,
    storage: &Storage,
    attributes: &[(&str, Attribute)],
    rows: &[Row],
) -> Result<(), DataError> {
    let fail = |error: ::hdf5::Error| file_error(path, format!("cannot be written: {error}"));
    create(path, storage, rows.len()).map_err(fail)?;
    if storage.order == Order::Big {
        make_big_endian(path).map_err(|error| file_error(path, error.to_string()))?;
    }
    let fill = || -> ::hdf5::Result<()> {
        let file = ::hdf5::File::open_rw(path)?;
        let group = file.group(&storage.group)?;
        for (name, value) in attributes {
            write_attribute(&group, name, value)?;
        }
        if !rows.is_empty() {
            group.dataset(&storage.dataset)?.write_raw(rows)?;
        }
        file.flush()
    };
    fill().map_err(fail)
}

fn create(path: &Path, storage: &Storage, rows: usize) -> ::hdf5::Result<()> {
    // Object headers without checksums, so that `make_big_endian` may change them.
    let file = ::hdf5::File::with_options().with_fapl(|access| access.libver_earliest()).create(path)?;
    let group = file.create_group(&storage.group)?;
    let mut builder = group.new_dataset_builder().empty_as(storage.descriptor()).packed(true).shape([rows]);
    if let Some(chunk_rows) = storage.chunk_rows {
        // libhdf5 wants chunks of a fixed-size dataset to be no larger than it.
        builder = builder.chunk([chunk_rows.min(rows.max(1))]);
    }
    if storage.shuffle {
        builder = builder.shuffle();
    }
    if let Some(level) = storage.gzip {
        builder = builder.deflate(level);
    }
    if storage.fletcher32 {
        builder = builder.fletcher32();
    }
    builder.create(storage.dataset.as_str())?;
    file.flush()
}

pub(super) fn write_attribute(group: &Group, name: &str, value: &Attribute) -> ::hdf5::Result<()> {
    match value {
        Attribute::Float(number) => group.new_attr::<f64>().create(name)?.write_scalar(number),
        Attribute::Integer(number) => group.new_attr::<i64>().create(name)?.write_scalar(number),
        Attribute::Text(text) => {
            let text: VarLenUnicode = text.parse().map_err(|_| ::hdf5::Error::from("text with a zero byte"))?;
            group.new_attr::<VarLenUnicode>().create(name)?.write_scalar(&text)
        }
    }
}

/// Turns the IEEE types described in a file without data into big-endian ones, which the safe API cannot create: bit 0 of
/// the datatype message's class bit field (HDF5 file format, IV.A.2.d). libhdf5 then converts whatever is written.
fn make_big_endian(path: &Path) -> std::io::Result<()> {
    let mut bytes = std::fs::read(path)?;
    // Bit field and size: mantissa normalised, sign bit 31 or 63; 4 or 8 bytes.
    for pattern in [[0x20, 0x1F, 0, 4, 0, 0, 0], [0x20, 0x3F, 0, 8, 0, 0, 0]] {
        for at in 1..bytes.len().saturating_sub(pattern.len()) {
            // The byte before: version in the high half, class 1 (floating point) in the low.
            if bytes[at..].starts_with(&pattern) && bytes[at - 1] & 0x0F == 1 {
                bytes[at] |= 1;
            }
        }
    }
    std::fs::write(path, bytes)
}
