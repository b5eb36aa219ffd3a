//! `launch predict`: trajectories of joint angles for recordings, one file per session.
//!
//! Windows of `emg.window_size` rows start every `emg.predict_stride` rows, the last one ends with the session, so that every
//! row has a prediction; [`overlap`] makes one trajectory of them. The output has the source's name, group, table,
//! attributes and `time`, and `joint_angles` in radians, f4. Rows that were never written are NaN. Angles in the input
//! are not read: recordings of EMG alone will do.

mod overlap;
mod sessions;

use super::Carried;
use crate::data::source::chunks::LruChunks;
use crate::data::source::hdf5::gather::Transform;
use crate::data::source::hdf5::trajectory::{CHUNK_ROWS, Times, Trajectory};
use crate::data::source::hdf5::{Reader, Target};
use crate::data::{DataError, Dataset, Dtype, FieldSpec, ReadRequest, Scratch};
use crate::task::pass::{Opening, Pass, PassOutput, PassRange, Predictor};
use crate::task::{Batch, Datasets};
use overlap::{Parts, Sums};
use sessions::{Recordings, Windows};
use spec::contract::{USERS, shown};
use spec::task::emg::EmgConfig;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// Most bytes of sums that a range holds, and most windows.
const RANGE_BYTES: u64 = 16 << 20;
const RANGE_WINDOWS: u64 = 256;
/// Rows joined at a time.
const BLOCK_ROWS: u64 = 8 * CHUNK_ROWS as u64;

/// Opens recordings for prediction.
pub(super) fn predictor(opening: &Opening) -> Result<Pass, DataError> {
    let config = opening.config;
    let emg: EmgConfig = config.section();
    let normalise = emg.normalize.then(|| Carried::affine(opening.carried)).transpose()?;
    let Recordings { found, skipped, mut notes } = sessions::open_all(config, &emg, opening.team)?;
    let window = emg.window_size as u64;
    let stride = emg.predict_stride.map_or(window.div_ceil(2), |stride| stride as u64).min(window);
    let root = &config.data.dataset_path;
    let windows = Windows::new(found.iter().map(|recording| &recording.table), window, stride);
    let mut outputs = Vec::with_capacity(found.len());
    let mut identity = format!("{window} {stride}");
    for (file, recording) in found.iter().enumerate() {
        let path = &recording.table.path;
        let name = path.strip_prefix(root).ok().filter(|name| !name.as_os_str().is_empty());
        let name = name.or_else(|| path.file_name().map(Path::new)).unwrap_or(path);
        identity += &format!("\n{} {} {:016x}", name.display(), recording.table.rows, recording.identity.print);
        outputs.push(PassOutput { name: name.to_owned(), samples: windows.of_file(file) });
    }
    notes.push(format!("{} windows of {window} rows, every {stride} rows, in {} sessions", windows.len(), found.len()));
    let (tables, identities) = found.into_iter().map(|recording| (recording.table, recording.identity)).unzip();
    let reader = Reader::new(tables, Arc::new(LruChunks::new(config.data.chunk_cache_size))).recognising(identities);
    let (reader, windows) = (Arc::new(reader), Arc::new(windows));
    let shape = vec![emg.window_size, emg.emg_channels];
    let data: Arc<dyn Dataset> = Arc::new(WindowsOfSessions {
        reader: Arc::clone(&reader),
        windows: Arc::clone(&windows),
        fields: [FieldSpec::new("emg", &shape, Dtype::F32)],
        transform: Transform { rectify: emg.rectify, normalise },
    });
    let datasets = Datasets { skipped, notes, ..Datasets::new(Arc::clone(&data), Arc::clone(&data), data) };
    let rate = emg.model.original_sampling_rate;
    let predictor = Trajectories { reader, windows, emg, rate, outputs, identity, range: None };
    Ok(Pass { datasets, weights: Vec::new(), predictor: Box::new(predictor) })
}

/// `emg` f32 `[T, 16]` of every window, without angles.
struct WindowsOfSessions {
    reader: Arc<Reader>,
    windows: Arc<Windows>,
    fields: [FieldSpec; 1],
    transform: Transform,
}

impl Dataset for WindowsOfSessions {
    fn len(&self) -> usize {
        self.windows.len() as usize
    }

    fn fields(&self) -> &[FieldSpec] {
        &self.fields
    }

    fn read(&self, request: ReadRequest, out: &mut [&mut [u8]], scratch: &mut Scratch) -> Result<(), DataError> {
        let (index, count) = (request.index as u64, self.windows.len());
        let missing = DataError::OutOfRange { what: "window", index, place: "the sessions", count };
        let (file, row) = self.windows.place(index).ok_or(missing)?;
        let [emg] = out else { return Err(DataError::Fields { asked: out.len(), count: 1 }) };
        let target = Target { member: 0, transform: &self.transform, out: emg };
        let read = self.reader.read(file, row, self.fields[0].shape[0], &mut [target], scratch);
        scratch.count();
        read
    }

    fn give_back(&self) {
        self.reader.give_back();
    }

    fn describe(&self, index: usize) -> String {
        match self.windows.place(index as u64) {
            Some((file, row)) => format!("{} rows {row}..", shown(&self.reader.tables()[file].path)),
            None => format!("window {index} of {}", self.windows.len()),
        }
    }
}

/// One file per session.
struct Trajectories {
    reader: Arc<Reader>,
    windows: Arc<Windows>,
    emg: EmgConfig,
    /// Samples per second, for recordings without times.
    rate: f64,
    outputs: Vec<PassOutput>,
    identity: String,
    range: Option<(PathBuf, Sums)>,
}

impl Trajectories {
    fn row(&self, window: u64) -> Result<u64, DataError> {
        let (index, count) = (window, self.windows.len());
        let missing = DataError::OutOfRange { what: "window", index, place: "the sessions", count };
        self.windows.place(window).map(|(_, row)| row).ok_or(missing)
    }
}

impl Predictor for Trajectories {
    fn outputs(&self) -> &[PassOutput] {
        &self.outputs
    }

    fn range_samples(&self) -> u64 {
        let each = 4 * self.emg.window_size as u64 * (self.emg.joint_angles_channels as u64 + 1);
        (RANGE_BYTES / each.max(1)).clamp(1, RANGE_WINDOWS)
    }

    fn identity(&self) -> String {
        self.identity.clone()
    }

    fn begin(&mut self, range: &PassRange, part: &Path) -> Result<(), DataError> {
        let rows = match range.samples.end.checked_sub(1).filter(|last| *last >= range.samples.start) {
            Some(last) => self.row(range.samples.start)?..self.row(last)? + self.emg.window_size as u64,
            None => 0..0,
        };
        self.range = Some((part.to_owned(), Sums::new(rows, self.emg.joint_angles_channels)));
        Ok(())
    }

    fn take(&mut self, batch: &Batch, prediction: &Tensor) -> Result<(), DataError> {
        let flat = prediction.to_device(Device::Cpu).to_kind(Kind::Float).flatten(0, -1);
        let values = Vec::<f32>::try_from(flat).map_err(|e| DataError::NothingUsable(format!("a prediction: {e}")))?;
        let each = self.emg.window_size * self.emg.joint_angles_channels;
        for (window, id) in values.chunks_exact(each.max(1)).zip(&batch.sample_ids) {
            let row = self.row(*id)?;
            if let Some((_, sums)) = &mut self.range {
                sums.add(row, window);
            }
        }
        Ok(())
    }

    fn end(&mut self) -> Result<(), DataError> {
        self.range.take().map_or(Ok(()), |(part, sums)| sums.write(&part))
    }

    fn join(&mut self, output: &PassOutput, parts: &[PathBuf], into: &Path) -> Result<(), DataError> {
        let file = self.outputs.iter().position(|other| other == output).unwrap_or(0);
        let table = self.reader.table(file)?;
        let angles = self.emg.joint_angles_channels;
        let attributes = sessions::attributes(&table.path, &self.emg)?;
        let places = (self.emg.hdf5_group.as_str(), self.emg.table_name.as_str());
        let trajectory = Trajectory::create(into, places, (table.rows, angles), &attributes)?;
        let times = Times::open(&table.path, &table.dataset)?;
        if times.is_none() {
            let (path, rate) = (shown(&table.path), self.rate);
            tracing::warn!(target: USERS, "{path} has no times: its output counts seconds from 0 at {rate} samples per second");
        }
        let sums = Parts::open(parts, angles)?;
        let mut without = 0;
        for first in (0..table.rows).step_by(BLOCK_ROWS as usize) {
            let rows = first..(first + BLOCK_ROWS).min(table.rows);
            let seconds = match &times {
                Some(times) => times.read(rows.clone())?,
                None => rows.clone().map(|row| row as f64 / self.rate).collect(),
            };
            let poses = sums.angles(rows)?;
            without +=
                poses.chunks_exact(angles.max(1)).filter(|pose| pose.iter().any(|x| !x.is_finite())).count() as u64;
            trajectory.write(first, &seconds, &poses)?;
        }
        let without = without - without.min(table.rows - table.written_rows());
        if without > 0 {
            let path = shown(&table.path);
            tracing::warn!(target: USERS, "{path}: {without} rows have no finite prediction: look for NaN in its EMG");
        }
        trajectory.close()
    }
}
