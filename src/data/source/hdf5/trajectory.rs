//! Predicted trajectories: one row per sample with `time` and `joint_angles`, in the form of the recordings.

use super::ffi::types::{self, Element, Selected};
use super::library::{self, Fault};
use super::open::Attribute;
use super::write::write_attribute;
use super::{Member, Order, Scalar};
use crate::data::DataError;
use crate::data::source::file_error;
use ::hdf5::types::{CompoundField, CompoundType, FloatSize, TypeDescriptor};
use ::hdf5::{Dataset, File};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Rows of a chunk; blocks that are written begin at its multiples.
pub const CHUNK_ROWS: usize = 2000;
/// Deflate level, as the public recordings have it.
const GZIP: u8 = 4;

/// A file that is being written.
pub struct Trajectory {
    path: PathBuf,
    file: File,
    dataset: Dataset,
    angles: usize,
}

impl Trajectory {
    /// Makes the file with `rows` rows of `angles` angles in `group`/`dataset`, compressed as recordings are.
    ///
    /// # Errors
    /// No room, no permission, or libhdf5 refuses.
    pub fn create(
        path: &Path,
        (group, dataset): (&str, &str),
        (rows, angles): (u64, usize),
        attributes: &BTreeMap<String, Attribute>,
    ) -> Result<Self, DataError> {
        let make = || -> ::hdf5::Result<(File, Dataset)> {
            // Neither times nor their room in the file's headers: equal trajectories are equal files.
            let file = File::with_options().with_fapl(|access| access.libver_earliest()).create_excl(path)?;
            let group = file.create_group(group)?;
            let float = |size| TypeDescriptor::Float(size);
            let of_angles = TypeDescriptor::FixedArray(Box::new(float(FloatSize::U4)), angles);
            let fields = vec![
                CompoundField::new("time", float(FloatSize::U8), 0, 0),
                CompoundField::new("joint_angles", of_angles, 8, 1),
            ];
            let row = TypeDescriptor::Compound(CompoundType { fields, size: 8 + 4 * angles });
            let rows = usize::try_from(rows).map_err(|_| "more rows than this machine can count")?;
            let builder = group.new_dataset_builder().empty_as(row).packed(true).shape([rows]);
            let builder = builder.chunk([CHUNK_ROWS.min(rows.max(1))]).shuffle().deflate(GZIP);
            let made = builder.obj_track_times(false).create(dataset)?;
            for (name, value) in attributes {
                write_attribute(&group, name, value)?;
            }
            Ok((file, made))
        };
        let (file, dataset) = make().map_err(|error| failed(path, &error))?;
        Ok(Self { path: path.to_owned(), file, dataset, angles })
    }

    /// Writes rows from `first` on: a time and the angles of each.
    ///
    /// # Errors
    /// As [`Trajectory::create`].
    pub fn write(&self, first: u64, times: &[f64], angles: &[f32]) -> Result<(), DataError> {
        let mut bytes = Vec::with_capacity(times.len() * (8 + 4 * self.angles));
        for (time, pose) in times.iter().zip(angles.chunks_exact(self.angles.max(1))) {
            bytes.extend_from_slice(&time.to_le_bytes());
            pose.iter().for_each(|angle| bytes.extend_from_slice(&angle.to_le_bytes()));
        }
        let members = [member("time", Scalar::F64, 1), member("joint_angles", Scalar::F32, self.angles)];
        let selected = Selected { members: &members, columns: None };
        let rows = first..first + times.len() as u64;
        types::write_rows(&self.dataset, &selected, rows, &bytes).map_err(|error| failed(&self.path, &error))
    }

    /// Writes what libhdf5 still holds.
    ///
    /// # Errors
    /// As [`Trajectory::create`].
    pub fn close(self) -> Result<(), DataError> {
        self.file.flush().map_err(|error| failed(&self.path, &error))
    }
}

fn member(name: &str, scalar: Scalar, len: usize) -> Member {
    Member { name: name.into(), offset: 0, scalar, order: Order::Little, len }
}

/// A failure to write, by the system's number where libhdf5 says it.
fn failed(path: &Path, error: &::hdf5::Error) -> DataError {
    let fault = Fault::of(error);
    let source = match fault.errno {
        Some(errno) => std::io::Error::from(errno),
        None => std::io::Error::other(fault.words),
    };
    DataError::output(path, source)
}

/// The times of a recording's samples.
pub struct Times {
    path: PathBuf,
    dataset: Dataset,
}

impl Times {
    /// `None`: its rows hold no field `time` of floats.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn open(path: &Path, dataset: &str) -> Result<Option<Self>, DataError> {
        let file = library::open(path).map_err(|fault| file_error(path, fault.into_words(path)))?;
        let refused = |error: ::hdf5::Error| file_error(path, format!("cannot be read by libhdf5: {error}"));
        let dataset = file.dataset(dataset).map_err(refused)?;
        let row = types::of(&dataset, 8).map_err(refused)?;
        let is_time = |field: &types::Field| {
            field.name == "time" && field.dims.is_empty() && !matches!(field.element, Element::NoFloat(_))
        };
        let known = row.fields.is_some_and(|fields| fields.iter().any(is_time));
        Ok(known.then(|| Self { path: path.to_owned(), dataset }))
    }

    /// Seconds since 1970 of these rows, as the file has them.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn read(&self, rows: Range<u64>) -> Result<Vec<f64>, DataError> {
        let mut bytes = vec![0; (rows.end - rows.start) as usize * 8];
        let members = [member("time", Scalar::F64, 1)];
        let selected = Selected { members: &members, columns: None };
        types::read_rows(&self.dataset, &selected, rows, &mut bytes)
            .map_err(|error| file_error(&self.path, format!("time cannot be read by libhdf5: {error}")))?;
        Ok(bytes.as_chunks::<8>().0.iter().map(|cell| f64::from_le_bytes(*cell)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::source::hdf5::write::{Row, Storage, write_session};
    use crate::data::source::hdf5::{SessionData, Wanted};

    #[test]
    fn times_are_read_bit_for_bit_and_a_trajectory_reads_as_a_recording_does() {
        let dir = tempfile::tempdir().unwrap();
        let (source, out) = (dir.path().join("s.hdf5"), dir.path().join("p.hdf5"));
        let time = |row: usize| 1_704_110_400.0 + row as f64 / 3000.0;
        let rows: Vec<Row> =
            (0..4500).map(|row| Row { time: time(row), joint_angles: [0.5; 20], emg: [0.0; 16] }).collect();
        write_session(&source, &Storage::default(), &[], &rows).unwrap();
        let times = Times::open(&source, "emg2pose/timeseries").unwrap().unwrap();
        assert_eq!(times.read(1999..2002).unwrap(), [time(1999), time(2000), time(2001)]);
        let attributes = [("user".to_owned(), Attribute::Text("u".into()))].into();
        let trajectory = Trajectory::create(&out, ("emg2pose", "timeseries"), (4500, 3), &attributes).unwrap();
        for first in [0, 2000, 4000] {
            let last = (first + 2000).min(4500);
            let angles: Vec<f32> = (first * 3..last * 3).map(|cell| cell as f32).collect();
            trajectory.write(first, &times.read(first..last).unwrap(), &angles).unwrap();
        }
        trajectory.close().unwrap();
        let fields = vec![("time".into(), 1), ("joint_angles".into(), 3)];
        let wanted = Wanted { group: "emg2pose".into(), dataset: "timeseries".into(), fields };
        let read = SessionData::open(&out, &wanted).unwrap();
        assert_eq!((read.len(), &read.attributes()["user"]), (4500, &Attribute::Text("u".into())));
        let angles = &read.window(3999, 4001).unwrap()[1];
        assert_eq!(angles, &[11997.0, 11998.0, 11999.0, 12000.0, 12001.0, 12002.0]);
        let again = Times::open(&out, "emg2pose/timeseries").unwrap().unwrap();
        assert_eq!(again.read(4499..4500).unwrap(), [time(4499)]);
        let taken = Trajectory::create(&out, ("a", "b"), (1, 1), &BTreeMap::new()).err().unwrap().to_string();
        assert!(taken.contains("p.hdf5: cannot be written"), "{taken}");
    }
}
