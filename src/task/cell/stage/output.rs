//! Output of the stage `sample`: `generated.h5ad`, `metrics.json` and the picture.
//!
//! A part holds rows of f32: expression, latent, the classifier's verdict. Joining drops the latents that the filter refuses.

use super::super::read;
use super::super::report::{self, Cells};
use super::sample::{VERDICT, Wanted};
use super::sums::unreadable;
use crate::data::DataError;
use crate::data::source::h5ad::write::{Column, Storage, Writer};
use crate::task::Batch;
use crate::task::pass::{PassOutput, PassRange, Predictor};
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// The file of generated cells.
pub const GENERATED: &str = "generated.h5ad";
/// Measures of their quality, and the picture, beside it.
const METRICS: &str = "metrics.json";
const PICTURE: &str = "cells.png";
/// Column of `obs` with the class that guided a cell.
pub const CELLTYPE: &str = "celltype";
/// Column of `obs` with the class that the classifier assigns a cell.
const ASSIGNED: &str = "classifier";

/// Names and sizes of what is generated.
pub struct Shape {
    pub genes: Vec<String>,
    pub classes: Vec<String>,
    pub latent: usize,
}

/// Real cells, made when they are needed: `metrics.json` compares with them.
pub type Real = Box<dyn Fn() -> Result<Cells, DataError>>;

/// Writes generated cells.
pub struct CellWriter {
    shape: Shape,
    wanted: Wanted,
    /// Keep guided cells alone that the classifier assigns their class.
    filter: bool,
    real: Real,
    range: u64,
    identity: String,
    outputs: [PassOutput; 1],
    part: Option<(PathBuf, BufWriter<File>)>,
}

impl CellWriter {
    /// `range`: cells of a range. `identity`: what decides cells besides weights and config.
    pub fn new(shape: Shape, wanted: Wanted, (filter, range, identity): (bool, u64, String), real: Real) -> Self {
        let outputs = [PassOutput { name: GENERATED.into(), samples: 0..wanted.len() }];
        Self { shape, wanted, filter, real, range, identity, outputs, part: None }
    }

    fn row_floats(&self) -> usize {
        self.shape.genes.len() + self.shape.latent + VERDICT as usize
    }
}

impl Predictor for CellWriter {
    fn outputs(&self) -> &[PassOutput] {
        &self.outputs
    }

    fn range_samples(&self) -> u64 {
        self.range.max(1)
    }

    fn identity(&self) -> String {
        self.identity.clone()
    }

    fn begin(&mut self, _: &PassRange, part: &Path) -> Result<(), DataError> {
        let file = File::create_new(part).map_err(|e| DataError::output(part, e))?;
        self.part = Some((part.to_owned(), BufWriter::new(file)));
        Ok(())
    }

    fn take(&mut self, _: &Batch, prediction: &Tensor) -> Result<(), DataError> {
        let flat = prediction.to_device(Device::Cpu).to_kind(Kind::Float).flatten(0, -1);
        let values = Vec::<f32>::try_from(flat).map_err(unreadable)?;
        let Some((path, file)) = &mut self.part else { return Ok(()) };
        values.iter().try_for_each(|value| file.write_all(&value.to_le_bytes())).map_err(|e| DataError::output(path, e))
    }

    fn end(&mut self) -> Result<(), DataError> {
        let Some((path, file)) = self.part.take() else { return Ok(()) };
        let file = file.into_inner().map_err(|e| DataError::output(&path, e.into_error()))?;
        file.sync_all().map_err(|e| DataError::output(&path, e))
    }

    fn join(&mut self, output: &PassOutput, parts: &[PathBuf], into: &Path) -> Result<(), DataError> {
        let mut writer = Writer::create(into, &self.shape.genes, &Storage { gzip: Some(4), ..Storage::default() })?;
        let (mut guided, mut assigned) = (Vec::new(), Vec::new());
        let mut row = vec![0f32; self.row_floats()];
        let mut id = output.samples.start;
        for part in parts {
            let mut file = BufReader::new(File::open(part).map_err(|e| DataError::output(part, e))?);
            while read_row(&mut file, &mut row).map_err(|e| DataError::output(part, e))? {
                let (class, verdict) = (self.wanted.class_of(id) as i32, row[row.len() - VERDICT as usize] as i32);
                id += 1;
                if self.filter && class >= 0 && verdict != class {
                    continue;
                }
                writer.rows(&row[..self.shape.genes.len()])?;
                guided.push(class);
                assigned.push(verdict);
            }
        }
        let column = |name: &str, codes| Column { name: name.into(), codes, categories: self.shape.classes.clone() };
        let columns = match self.shape.classes.is_empty() {
            true => Vec::new(),
            false => vec![column(CELLTYPE, guided), column(ASSIGNED, assigned)],
        };
        writer.finish(None, &columns)
    }

    fn finish(&mut self, folder: &Path) -> Result<Vec<String>, DataError> {
        let real = (self.real)()?;
        let path = folder.join(GENERATED);
        let column = (!self.shape.classes.is_empty()).then_some(CELLTYPE);
        let generated = read::of_file(&path, column, &self.shape.classes)?;
        if generated.classes.is_empty() {
            return Ok(vec![format!("warning: {GENERATED} has no cells: cell.sample.filter refused all of them")]);
        }
        let values = report::compare(&real, &generated, &self.shape.classes);
        let metrics = folder.join(METRICS);
        let text = serde_json::to_string_pretty(&values).unwrap_or_default() + "\n";
        std::fs::write(&metrics, text).map_err(|e| DataError::output(&metrics, e))?;
        let mut lines = report::lines(&values);
        let picture = folder.join(PICTURE);
        match report::draw(&real, &generated, &self.shape.classes) {
            Ok(png) => std::fs::write(&picture, png).map_err(|e| DataError::output(&picture, e))?,
            Err(problem) => lines.push(format!("warning: {PICTURE} was not drawn: {problem}")),
        }
        Ok(lines)
    }
}

/// Reads the next row of f32; false at the end.
pub fn read_row(file: &mut impl Read, row: &mut [f32]) -> std::io::Result<bool> {
    let mut four = [0u8; 4];
    for (n, value) in row.iter_mut().enumerate() {
        match file.read_exact(&mut four) {
            Err(e) if n == 0 && e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(false),
            other => other?,
        }
        *value = f32::from_le_bytes(four);
    }
    Ok(true)
}
