//! Stage `latents`: one pass of the encoder over all cells, written as [`super::super::latents`] reads it.

use super::super::densify::{Scale, dense, labels};
use super::super::latents::{LatentFacts, ROWS};
use super::super::model::Autoencoder;
use super::sums::unreadable;
use crate::data::DataError;
use crate::task::pass::{PassOutput, PassRange, Predictor};
use crate::task::{Batch, Model, Output};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};

/// Cells of a range: about a second of the published encoder on one core.
const RANGE: u64 = 8192;

/// The encoder. Running statistics decide: a cell's latent depends on that cell alone.
pub struct EncoderNet {
    pub net: Autoencoder,
    pub genes: i64,
    pub scale: Scale,
}

impl Model for EncoderNet {
    fn forward(&self, batch: &Batch, _train: bool) -> Output {
        let prediction = self.predict(batch);
        Output::new(prediction.square().mean(Kind::Float), prediction)
    }

    fn predict(&self, batch: &Batch) -> Tensor {
        self.net.encode(&dense(batch, self.genes, &self.scale), None)
    }
}

/// Writes rows of latents.
pub struct LatentWriter {
    facts: LatentFacts,
    /// Part of each cell.
    parts: Vec<u8>,
    outputs: [PassOutput; 1],
    part: Option<(PathBuf, BufWriter<File>)>,
}

impl LatentWriter {
    /// `parts`: the part of each cell, in the order of files and rows.
    pub fn new(facts: LatentFacts, parts: Vec<u8>) -> Self {
        let outputs = [PassOutput { name: ROWS.into(), samples: 0..facts.cells }];
        Self { facts, parts, outputs, part: None }
    }
}

impl Predictor for LatentWriter {
    fn outputs(&self) -> &[PassOutput] {
        &self.outputs
    }

    fn range_samples(&self) -> u64 {
        RANGE
    }

    fn identity(&self) -> String {
        let facts = serde_json::to_string(&self.facts).unwrap_or_default();
        format!("{facts} {:08x}", libdeflater::crc32(&self.parts))
    }

    fn begin(&mut self, _: &PassRange, part: &Path) -> Result<(), DataError> {
        let file = File::create_new(part).map_err(|e| DataError::output(part, e))?;
        self.part = Some((part.to_owned(), BufWriter::new(file)));
        Ok(())
    }

    fn take(&mut self, batch: &Batch, prediction: &Tensor) -> Result<(), DataError> {
        let rows = self.facts.rows(prediction, &labels(batch)).map_err(unreadable)?;
        let Some((path, file)) = &mut self.part else { return Ok(()) };
        file.write_all(&rows).map_err(|e| DataError::output(path, e))
    }

    fn end(&mut self) -> Result<(), DataError> {
        let Some((path, file)) = self.part.take() else { return Ok(()) };
        let file = file.into_inner().map_err(|e| DataError::output(&path, e.into_error()))?;
        file.sync_all().map_err(|e| DataError::output(&path, e))
    }

    fn finish(&mut self, folder: &Path) -> Result<Vec<String>, DataError> {
        self.facts.write(folder, &self.parts)?;
        let LatentFacts { latent, kind, cells, .. } = &self.facts;
        let bytes = spec::plan::bytes_text(self.facts.bytes());
        Ok(vec![format!("{cells} cells as latents of {latent} {} numbers: {bytes}", kind.word())])
    }
}
