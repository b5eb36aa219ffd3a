//! `launch predict`: one `predictions.npy` with a row per sample of the user's data set `predict`, else `test`, else `val`.

use super::Opened;
use crate::data::{DataError, Dataset};
use crate::task::pass::{Pass, PassOutput, PassRange, Predictor};
use crate::task::{Batch, Datasets};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

const OUTPUT: &str = "predictions.npy";
const RANGE_SAMPLES: u64 = 1024;
/// Length of a part's head: JSON, filled with blanks.
const HEAD_BYTES: usize = 256;

/// Element type and shape of a row.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Row {
    /// As numpy writes it.
    descr: String,
    shape: Vec<i64>,
    rows: u64,
}

/// The samples to predict for, in all three places.
pub(super) fn datasets(opened: &Opened) -> Result<Datasets, DataError> {
    let set = opened.set("predict").map_or_else(|| opened.need("test"), Ok)?;
    opened.host.use_structure(&set.source.layout.structure)?;
    let set: Arc<dyn Dataset> = set;
    Ok(Datasets::new(Arc::clone(&set), Arc::clone(&set), set))
}

pub(super) fn pass(opened: &Opened) -> Result<Pass, DataError> {
    let datasets = datasets(opened)?;
    let samples = datasets.val.len() as u64;
    let identity = format!("{:?} {}", opened.facts.splits, datasets.val.describe(0));
    let outputs = vec![PassOutput { name: OUTPUT.into(), samples: 0..samples }];
    let predictor = Rows { outputs, identity, part: None };
    Ok(Pass { datasets, weights: Vec::new(), predictor: Box::new(predictor) })
}

/// Rows of one array.
struct Rows {
    outputs: Vec<PassOutput>,
    identity: String,
    part: Option<Part>,
}

struct Part {
    path: PathBuf,
    file: BufWriter<File>,
    row: Row,
}

impl Predictor for Rows {
    fn outputs(&self) -> &[PassOutput] {
        &self.outputs
    }

    fn range_samples(&self) -> u64 {
        RANGE_SAMPLES
    }

    fn identity(&self) -> String {
        self.identity.clone()
    }

    fn begin(&mut self, _: &PassRange, part: &Path) -> Result<(), DataError> {
        let failed = |e| DataError::output(part, e);
        let mut file = BufWriter::new(File::create_new(part).map_err(failed)?);
        file.write_all(&[b' '; HEAD_BYTES]).map_err(failed)?;
        self.part = Some(Part { path: part.to_owned(), file, row: Row::default() });
        Ok(())
    }

    fn take(&mut self, batch: &Batch, prediction: &Tensor) -> Result<(), DataError> {
        let Some(part) = &mut self.part else { return Ok(()) };
        let (shape, samples) = (prediction.size(), batch.len() as i64);
        if shape.first() != Some(&samples) {
            return Err(DataError::User(format!(
                "a prediction of shape {shape:?} for {samples} samples: expected one row per sample"
            )));
        }
        let (kind, descr) = match prediction.kind() {
            kind @ Kind::Int64 => (kind, "<i8"),
            kind @ Kind::Double => (kind, "<f8"),
            _ => (Kind::Float, "<f4"),
        };
        let row = Row { descr: descr.into(), shape: shape[1..].to_vec(), rows: part.row.rows };
        if part.row.rows > 0 && part.row != row {
            return Err(DataError::User(format!("predictions of shapes {:?} and {:?}", part.row.shape, row.shape)));
        }
        let host = prediction.detach().to_device(Device::Cpu).to_kind(kind).contiguous();
        let mut bytes = vec![0; host.numel() * kind.elt_size_in_bytes()];
        host.f_copy_data_u8(&mut bytes, host.numel()).map_err(|e| DataError::User(e.to_string()))?;
        part.row = Row { rows: row.rows + samples as u64, ..row };
        part.file.write_all(&bytes).map_err(|e| DataError::output(&part.path, e))
    }

    fn end(&mut self) -> Result<(), DataError> {
        use std::os::unix::fs::FileExt;
        let Some(Part { path, file, row }) = self.part.take() else { return Ok(()) };
        let failed = |e: std::io::Error| DataError::output(&path, e);
        let file = file.into_inner().map_err(|e| failed(e.into_error()))?;
        let head = serde_json::to_vec(&row).map_err(|e| failed(e.into()))?;
        file.write_all_at(&head, 0).and_then(|()| file.sync_all()).map_err(failed)
    }

    fn join(&mut self, _: &PassOutput, parts: &[PathBuf], into: &Path) -> Result<(), DataError> {
        let mut whole: Option<Row> = None;
        for part in parts {
            let (row, _) = open(part)?;
            let rows = whole.as_ref().map_or(0, |whole| whole.rows) + row.rows;
            if whole.as_ref().is_some_and(|whole| (&whole.descr, &whole.shape) != (&row.descr, &row.shape)) {
                return Err(DataError::User("predictions of different shapes for different samples".into()));
            }
            whole = Some(Row { rows, ..row });
        }
        let failed = |e: std::io::Error| DataError::output(into, e);
        let mut file = BufWriter::new(File::create_new(into).map_err(failed)?);
        file.write_all(&npy_head(&whole.unwrap_or_default())).map_err(failed)?;
        for part in parts {
            std::io::copy(&mut open(part)?.1, &mut file).map_err(failed)?;
        }
        file.into_inner().map_err(|e| failed(e.into_error()))?.sync_all().map_err(failed)
    }
}

/// A part's head, and the rest of it.
fn open(part: &Path) -> Result<(Row, BufReader<File>), DataError> {
    let failed = |e: std::io::Error| DataError::output(part, e);
    let mut file = BufReader::new(File::open(part).map_err(failed)?);
    let mut head = [0; HEAD_BYTES];
    file.read_exact(&mut head).map_err(failed)?;
    let row = serde_json::from_slice(&head).map_err(|e| failed(e.into()))?;
    Ok((row, file))
}

/// Head of a `.npy` file, version 1. Source: numpy.lib.format.
fn npy_head(row: &Row) -> Vec<u8> {
    let sides: Vec<String> =
        std::iter::once(row.rows as i64).chain(row.shape.iter().copied()).map(|side| format!("{side},")).collect();
    let mut text = format!("{{'descr': '{}', 'fortran_order': False, 'shape': ({}), }}", row.descr, sides.join(" "));
    let length = (10 + text.len() + 1).next_multiple_of(64) - 10;
    text.extend(std::iter::repeat_n(' ', length - text.len() - 1));
    text.push('\n');
    [b"\x93NUMPY\x01\x00".as_slice(), &(length as u16).to_le_bytes(), text.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_join_into_an_array_of_numpy() {
        let folder = tempfile::tempdir().unwrap();
        let mut rows = Rows { outputs: Vec::new(), identity: String::new(), part: None };
        let parts = ["a", "b"].map(|name| folder.path().join(name));
        for (part, first) in parts.iter().zip([0.0, 4.0]) {
            rows.begin(&PassRange { output: 0, samples: 0..2 }, part).unwrap();
            let prediction = Tensor::arange(4, (Kind::Float, Device::Cpu)).view([2, 2]) + first;
            rows.take(&Batch::new(vec![], vec![0, 1]), &prediction).unwrap();
            assert!(rows.take(&Batch::new(vec![], vec![0]), &prediction).is_err());
            rows.end().unwrap();
        }
        let into = folder.path().join("out.npy");
        rows.join(&PassOutput { name: "out".into(), samples: 0..4 }, &parts, &into).unwrap();
        let bytes = std::fs::read(&into).unwrap();
        assert!(
            bytes.starts_with(b"\x93NUMPY\x01\x00\x76\x00{'descr': '<f4', 'fortran_order': False, 'shape': (4, 2,), }")
        );
        assert_eq!(bytes.len(), 128 + 32);
        let last = f32::from_le_bytes(bytes[156..].try_into().unwrap());
        assert_eq!(last, 7.0);
    }
}
