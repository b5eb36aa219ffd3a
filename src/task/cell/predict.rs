//! `launch predict`: cells of other files as the autoencoder sees them, with the type that the classifier assigns.
//!
//! Per input file an `.h5ad` of the same name: `X` is the reconstructed expression (normalised, log1p), `obs.celltype` the class where
//! the run has a classifier, `obsm.X_latent` the latent, and cells have the names of the input. Genes are those of training, matched by name; genes that a file lacks are 0. No cell is left out.

use super::data::{self, CellData};
use super::densify::{Scale, dense};
use super::facts::{ModelFacts, scale};
use super::model::{Autoencoder, Classifier};
use super::stage::output::{CELLTYPE, read_row};
use super::stage::sums::unreadable;
use crate::data::source::h5ad;
use crate::data::source::h5ad::write::{Column, Storage, Writer};
use crate::data::{DataError, Dataset};
use crate::task::pass::{Opening, PartWeights, Pass, PassOutput, PassRange, Predictor};
use crate::task::{Batch, Datasets, Model, Output};
use serde::Deserialize;
use spec::contract::Weights;
use spec::task::cell::{AUTOENCODER, CLASSIFIER, CellConfig};
use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tch::{Device, Kind, Tensor, nn};

/// Cells of a range.
const RANGE: u64 = 4096;
/// Facts on the training data, in the folder of the stage.
const CARRIED: &str = "carried.json";

/// Genes and classes of the training.
#[derive(Deserialize)]
struct Carried {
    genes: Vec<String>,
    classes: Vec<String>,
}

impl Carried {
    fn read(folder: &Path) -> Result<Self, DataError> {
        let path = folder.join(CARRIED);
        let failed = |e: String| DataError::File { path: path.clone(), problem: format!("{e}: train the stage again") };
        let text = std::fs::read(&path).map_err(|e| failed(e.to_string()))?;
        serde_json::from_slice(&text).map_err(|e| failed(e.to_string()))
    }
}

/// Opens files of cells for prediction.
///
/// # Errors
/// The run has no autoencoder, or the files cannot be used.
pub fn predictor(opening: &Opening) -> Result<Pass, DataError> {
    let stages = &opening.team.stages;
    let autoencoder = stages.folder(AUTOENCODER)?.to_owned();
    let classifier = stages.folder(CLASSIFIER).ok().map(Path::to_owned);
    let Carried { genes, classes } = Carried::read(&autoencoder)?;
    let mut config = opening.config.clone();
    let reference = reference(&genes, opening)?;
    config.with_section::<CellConfig>(|cell| cell.reference = Some(reference));
    let CellData { datasets, all, store, .. } = data::open_in_order(&config, opening.team, opening.index_dir)?;
    let part = |prefix: &str, folder: PathBuf| PartWeights { prefix: prefix.into(), folder, weights: Weights::Best };
    let has_classifier = classifier.is_some();
    let weights = std::iter::once(part("autoencoder.", autoencoder));
    let weights = weights.chain(classifier.map(|folder| part("classifier.", folder))).collect();
    let classes = if has_classifier { classes } else { Vec::new() };
    let facts = ModelFacts { genes: genes.len(), classes: classes.clone(), planning: false };
    let root = &opening.config.data.dataset_path;
    let mut at = 0;
    let outputs = store.reader.sources().iter().map(|source| {
        let name = source.path.strip_prefix(root).ok().filter(|name| !name.as_os_str().is_empty());
        let name = name.or_else(|| source.path.file_name().map(Path::new)).unwrap_or(&source.path);
        at += source.cells;
        PassOutput { name: name.with_extension("h5ad"), samples: at - source.cells..at }
    });
    let outputs: Vec<PassOutput> = outputs.collect();
    let identity = outputs.iter().map(|output| format!("{} {:?}\n", output.name.display(), output.samples)).collect();
    let sources = store.reader.sources().iter().map(|source| source.path.clone()).collect();
    let latent = config.section::<CellConfig>().autoencoder.latent;
    let writer = PredictionWriter { genes, classes, latent, outputs, sources, identity, part: None };
    let val: Arc<dyn Dataset> = all;
    Ok(Pass {
        datasets: Datasets { val, facts: Some(Arc::new(facts)), ..datasets },
        weights,
        predictor: Box::new(writer),
    })
}

/// A file with the names of the genes, as `cell.reference` reads it.
///
/// # Errors
/// It cannot be written.
pub(super) fn reference(genes: &[String], opening: &Opening) -> Result<PathBuf, DataError> {
    let text = genes.join("\n");
    let path = opening.index_dir.join(format!("genes-{:08x}.txt", libdeflater::crc32(text.as_bytes())));
    let failed = |e| DataError::output(&path, e);
    // Every rank writes the same bytes; renaming makes them whole.
    let sibling = path.with_extension(format!("{}.new", std::process::id()));
    std::fs::create_dir_all(opening.index_dir).map_err(failed)?;
    std::fs::write(&sibling, text).and_then(|()| std::fs::rename(&sibling, &path)).map_err(failed)?;
    Ok(path)
}

/// Autoencoder and classifier.
pub struct PredictNet {
    autoencoder: Autoencoder,
    classifier: Option<Classifier>,
    genes: i64,
    scale: Scale,
}

impl PredictNet {
    pub fn new(cell: &CellConfig, facts: &ModelFacts, vs: &nn::Path) -> Self {
        let (latent, classes) = (cell.autoencoder.latent as i64, facts.classes.len() as i64);
        let genes = facts.genes as i64;
        Self {
            autoencoder: Autoencoder::new(&cell.autoencoder, genes, &(vs / AUTOENCODER)),
            classifier: (classes > 0).then(|| Classifier::new(&cell.classifier, latent, classes, &(vs / CLASSIFIER))),
            genes,
            scale: scale(cell),
        }
    }
}

impl Model for PredictNet {
    fn forward(&self, batch: &Batch, _train: bool) -> Output {
        let prediction = self.predict(batch);
        Output::new(prediction.square().mean(Kind::Float), prediction)
    }

    /// `[B, G + L + 1]`: expression, latent, class (−1: no classifier).
    fn predict(&self, batch: &Batch) -> Tensor {
        let latent = self.autoencoder.encode(&dense(batch, self.genes, &self.scale), None);
        let rows = latent.size()[0];
        let class = match &self.classifier {
            Some(classifier) => {
                let t = Tensor::zeros([rows], (Kind::Int64, latent.device()));
                classifier.forward(&latent, &t, None).argmax(-1, true).to_kind(Kind::Float)
            }
            None => Tensor::full([rows, 1], -1.0, (Kind::Float, latent.device())),
        };
        let expression = self.autoencoder.generate(&latent);
        Tensor::cat(&[expression.to_kind(Kind::Float), latent.to_kind(Kind::Float), class], 1)
    }
}

/// Writes a file per input.
struct PredictionWriter {
    genes: Vec<String>,
    classes: Vec<String>,
    latent: usize,
    outputs: Vec<PassOutput>,
    /// Input of each output.
    sources: Vec<PathBuf>,
    identity: String,
    part: Option<(PathBuf, BufWriter<File>)>,
}

impl Predictor for PredictionWriter {
    fn outputs(&self) -> &[PassOutput] {
        &self.outputs
    }

    fn range_samples(&self) -> u64 {
        RANGE
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
        let flat = prediction.to_device(Device::Cpu).flatten(0, -1);
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
        let mut writer = Writer::create(into, &self.genes, &Storage { gzip: Some(4), ..Storage::default() })?;
        writer.embedding("X_latent", self.latent)?;
        let (genes, latent) = (self.genes.len(), self.latent);
        let mut row = vec![0f32; genes + latent + 1];
        let mut codes = Vec::new();
        for part in parts {
            let mut file = BufReader::new(File::open(part).map_err(|e| DataError::output(part, e))?);
            while read_row(&mut file, &mut row).map_err(|e| DataError::output(part, e))? {
                writer.rows(&row[..genes])?;
                writer.embed(&row[genes..genes + latent])?;
                codes.push(row[genes + latent] as i32);
            }
        }
        let column = Column { name: CELLTYPE.into(), codes, categories: self.classes.clone() };
        let place = self.outputs.iter().position(|other| other.name == output.name);
        let names = place.and_then(|place| self.sources.get(place)).map(|path| h5ad::cell_names(path)).transpose()?;
        let columns = if self.classes.is_empty() { &[] } else { std::slice::from_ref(&column) };
        writer.finish(names.as_deref(), columns)
    }
}
