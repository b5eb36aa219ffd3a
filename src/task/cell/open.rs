//! Data sets of each stage, its models and its passes.

use super::data::members::Part;
use super::data::{self, CellData, CellFacts};
use super::diffusion::{Diffusion, StepChoice};
use super::facts::{ModelFacts, scale};
use super::latents::{LatentDataset, LatentFacts, MOST_CLASSES, sizes};
use super::model::{Autoencoder, CellUnet, Classifier};
use super::predict::{self, PredictNet};
use super::read;
use super::stage::autoencoder::AutoencoderNet;
use super::stage::classifier::ClassifierNet;
use super::stage::diffusion::DiffusionNet;
use super::stage::latents::{EncoderNet, LatentWriter};
use super::stage::output::{CellWriter, Shape};
use super::stage::sample::{Repeated, SampleNet, Wanted, WantedCells};
use crate::data::{DataError, Dataset};
use crate::task::outline::{Outline, SCRATCH_BYTES};
use crate::task::pass::{Opening, PartWeights, Pass};
use crate::task::{Datasets, Model, Team};
use spec::config::Config;
use spec::contract::{CacheMode, DataSizes, Weights};
use spec::task::cell::{
    AUTOENCODER, CLASSIFIER, CellConfig, CellDiffusion, CellSample, DIFFUSION, LATENTS, PREDICT, SAMPLE,
};
use std::path::Path;
use std::sync::Arc;
use tch::nn;

/// Cells that the plan's passes of sampling take, whatever `num_samples`.
const PLANNED_STEPS: usize = 2;

/// The stage that `config` is of.
pub fn stage(config: &Config) -> &str {
    config.stage.as_deref().unwrap_or(AUTOENCODER)
}

/// Data sets of a stage that trains.
///
/// # Errors
/// The files cannot be used, or an earlier stage is missing.
pub fn open(config: &Config, team: &Team, index_dir: &Path) -> Result<Datasets, DataError> {
    if stage(config) == AUTOENCODER {
        let CellData { datasets, facts, .. } = data::open_cells(config, team, index_dir)?;
        let carried = serde_json::json!({"genes": facts.genes, "classes": facts.classes});
        let facts = ModelFacts { genes: facts.genes.len(), classes: facts.classes.clone(), planning: false };
        return Ok(Datasets { facts: Some(Arc::new(facts)), carried: Some(carried), ..datasets });
    }
    let folder = team.stages.folder(LATENTS)?;
    let facts = LatentFacts::read(folder)?;
    check_latents(config, &facts, folder)?;
    let [train, val, test] = LatentDataset::open(folder, team.cache.clone())?;
    let notes = vec![format!(
        "latents of {} cells: {} train, {} val, {} test",
        facts.cells,
        train.len(),
        val.len(),
        test.len()
    )];
    let facts = ModelFacts { genes: facts.genes, classes: facts.classes, planning: false };
    Ok(Datasets { facts: Some(Arc::new(facts)), notes, ..Datasets::new(train, val, test) })
}

/// Latents are of the autoencoder that the config describes.
fn check_latents(config: &Config, facts: &LatentFacts, folder: &Path) -> Result<(), DataError> {
    let cell: CellConfig = config.section();
    if facts.latent == cell.autoencoder.latent {
        return Ok(());
    }
    let problem = format!(
        "cell.autoencoder.latent is {}, but {} holds latents of {} numbers: set it back, or run the stages again with --from \
         autoencoder",
        cell.autoencoder.latent,
        spec::contract::shown(folder),
        facts.latent
    );
    Err(DataError::setting("cell.autoencoder.latent", problem))
}

/// Shapes and sizes of a stage, known before earlier stages ran.
///
/// # Errors
/// As [`open`].
pub fn outline(config: &Config, index_dir: &Path) -> Result<Outline, DataError> {
    let of_cells = data::outline(config, index_dir)?;
    let found =
        of_cells.datasets.facts.clone().and_then(|facts| facts.downcast::<CellFacts>().ok()).unwrap_or_default();
    let facts = ModelFacts { genes: found.genes.len(), classes: found.classes.clone(), planning: true };
    let cell: CellConfig = config.section();
    let mut outline = match stage(config) {
        AUTOENCODER | LATENTS | PREDICT => of_cells,
        SAMPLE => {
            let wanted = WantedCells::new(Wanted::new(&cell.sample, &facts.classes)?);
            let fields =
                if cell.sample.init_cells.is_some() { of_cells.datasets.train.fields() } else { wanted.fields() };
            Outline::new(fields.to_vec(), fields.to_vec(), nothing_to_read())
        }
        _ => {
            let latents = latent_facts(&cell, &facts, found.cells);
            Outline::new(latents.fields(), latents.fields(), sizes(&latents))
        }
    };
    outline.datasets.facts = Some(Arc::new(facts));
    Ok(outline)
}

fn nothing_to_read() -> DataSizes {
    DataSizes {
        entry_bytes: [0; 2],
        scratch_bytes: SCRATCH_BYTES,
        useful_bytes: 0,
        useful: "nothing: cells are generated".into(),
        auto_policy: CacheMode::Off,
        ..DataSizes::default()
    }
}

fn latent_facts(cell: &CellConfig, facts: &ModelFacts, cells: u64) -> LatentFacts {
    LatentFacts {
        latent: cell.autoencoder.latent,
        kind: cell.latents,
        cells,
        genes: facts.genes,
        classes: facts.classes.clone(),
    }
}

/// Builds the model of a stage.
///
/// # Errors
/// The diffusion cannot be as the config says, or a class is not there.
pub fn model(config: &Config, datasets: &Datasets, vs: &nn::Path) -> Result<Box<dyn Model>, DataError> {
    let cell: CellConfig = config.section();
    let facts = datasets.facts.as_ref().and_then(|facts| facts.downcast_ref::<ModelFacts>());
    let facts = facts.ok_or_else(|| DataError::NothingUsable("the cells' genes and classes are not known".into()))?;
    let (genes, latent, classes) = (facts.genes as i64, cell.autoencoder.latent as i64, facts.classes.len() as i64);
    let autoencoder = |vs: &nn::Path| Autoencoder::new(&cell.autoencoder, genes, vs);
    Ok(match stage(config) {
        LATENTS => Box::new(EncoderNet { net: autoencoder(vs), genes, scale: scale(&cell) }),
        DIFFUSION => {
            let process = process(&cell.diffusion, vs)?;
            let steps = StepChoice::new(cell.diffusion.schedule_sampler, process.steps(), vs.device());
            Box::new(DiffusionNet { net: unet(&cell, latent, vs), process, steps, latent })
        }
        CLASSIFIER => {
            let process = process(&cell.diffusion, vs)?;
            let below = ClassifierNet::steps_below(&process, cell.classifier.start_guide_time);
            let below = if cell.classifier.noised { below } else { 0 };
            Box::new(ClassifierNet {
                net: Classifier::new(&cell.classifier, latent, classes, vs),
                process,
                below,
                latent,
            })
        }
        SAMPLE => Box::new(sampler(config, &cell, facts, vs)?),
        PREDICT => Box::new(PredictNet::new(&cell, facts, vs)),
        _ => Box::new(AutoencoderNet { net: autoencoder(vs), genes, scale: scale(&cell) }),
    })
}

fn unet(cell: &CellConfig, latent: i64, vs: &nn::Path) -> CellUnet {
    CellUnet::new(&cell.unet, latent, latent * Diffusion::outputs_per_input(&cell.diffusion), vs)
}

fn process(keys: &CellDiffusion, vs: &nn::Path) -> Result<Diffusion, DataError> {
    Diffusion::new(keys, vs.device()).map_err(|problem| {
        DataError::setting("cell.diffusion", format!("cell.diffusion.timestep_respacing: {problem}"))
    })
}

fn sampler(config: &Config, cell: &CellConfig, facts: &ModelFacts, vs: &nn::Path) -> Result<SampleNet, DataError> {
    let (latent, genes, classes) = (cell.autoencoder.latent as i64, facts.genes as i64, facts.classes.len() as i64);
    let wanted = Wanted::new(&cell.sample, &facts.classes)?;
    let classifier = (classes > 0).then(|| Classifier::new(&cell.classifier, latent, classes, &(vs / CLASSIFIER)));
    // Memory of a step is that of all of them.
    let quick = CellDiffusion { timestep_respacing: PLANNED_STEPS.to_string(), ..cell.diffusion.clone() };
    Ok(SampleNet {
        autoencoder: Autoencoder::new(&cell.autoencoder, genes, &(vs / AUTOENCODER)),
        unet: unet(cell, latent, &(vs / DIFFUSION)),
        classifier,
        process: process(if facts.planning { &quick } else { &cell.diffusion }, vs)?,
        begin: cell.sample.init_cells.is_some().then(|| (genes, scale(cell))),
        keys: cell.sample.clone(),
        wanted,
        latent,
        seed: config.seed,
        activation: cell.autoencoder.decoder_activation,
    })
}

/// Opens the pass of a stage.
///
/// # Errors
/// The files cannot be used, or an earlier stage is missing.
pub fn pass(opening: &Opening) -> Result<Pass, DataError> {
    match stage(opening.config) {
        SAMPLE => sample_pass(opening),
        _ => latents_pass(opening),
    }
}

/// Weights of an earlier stage, below `prefix`.
fn weights(opening: &Opening, stage: &str, prefix: &str) -> Result<PartWeights, DataError> {
    let folder = opening.team.stages.folder(stage)?.to_owned();
    Ok(PartWeights { prefix: prefix.into(), folder, weights: Weights::Best })
}

fn latents_pass(opening: &Opening) -> Result<Pass, DataError> {
    let cell: CellConfig = opening.config.section();
    let CellData { datasets, facts, all, splits, .. } =
        data::open_in_order(opening.config, opening.team, opening.index_dir)?;
    if facts.classes.len() > MOST_CLASSES {
        let problem = format!(
            "cell.label {} has {} classes; at most {MOST_CLASSES} are possible",
            facts.label.as_deref().unwrap_or(""),
            facts.classes.len()
        );
        return Err(DataError::setting("cell.label", problem));
    }
    let mut parts = vec![Part::Out as u8; all.len()];
    for (split, part) in splits.iter().zip([Part::Train, Part::Val, Part::Test]) {
        for index in 0..split.len() as u64 {
            if let Some(place) = split.number(index).and_then(|number| parts.get_mut(number as usize)) {
                *place = part as u8;
            }
        }
    }
    let model = ModelFacts { genes: facts.genes.len(), classes: facts.classes.clone(), planning: false };
    let latents = latent_facts(&cell, &model, all.len() as u64);
    let val: Arc<dyn Dataset> = all;
    Ok(Pass {
        datasets: Datasets { val, facts: Some(Arc::new(model)), ..datasets },
        weights: vec![weights(opening, AUTOENCODER, "")?],
        predictor: Box::new(LatentWriter::new(latents, parts)),
    })
}

fn sample_pass(opening: &Opening) -> Result<Pass, DataError> {
    let config = opening.config;
    let cell: CellConfig = config.section();
    let CellData { datasets, facts, all, splits, .. } = data::open_in_order(config, opening.team, opening.index_dir)?;
    let wanted = Wanted::new(&cell.sample, &facts.classes)?;
    let mut parts = vec![weights(opening, AUTOENCODER, "autoencoder.")?, weights(opening, DIFFUSION, "diffusion.")?];
    if !facts.classes.is_empty() {
        parts.push(weights(opening, CLASSIFIER, "classifier.")?);
    }
    let model = ModelFacts { genes: facts.genes.len(), classes: facts.classes.clone(), planning: false };
    let identity = format!(
        "{} cells, {:?}, {:08x}",
        all.len(),
        model.classes,
        libdeflater::crc32(facts.genes.join("\n").as_bytes())
    );
    let samples = generated(&cell.sample, &wanted, &facts.genes, opening)?;
    let shape = Shape { genes: facts.genes.clone(), classes: facts.classes.clone(), latent: cell.autoencoder.latent };
    let (genes, scale) = (facts.genes.len() as i64, scale(&cell));
    let real = Box::new(move || read::of_dataset(&splits[0], genes, &scale));
    let range = config.train.val_batch_size.unwrap_or(config.train.batch_size) as u64;
    Ok(Pass {
        datasets: Datasets { val: samples, facts: Some(Arc::new(model)), ..datasets },
        weights: parts,
        predictor: Box::new(CellWriter::new(shape, wanted, (cell.sample.filter, range, identity), real)),
    })
}

/// Samples to generate: numbers alone, or cells to begin with, brought to the `genes` of the training by name.
fn generated(
    keys: &CellSample,
    wanted: &Wanted,
    genes: &[String],
    opening: &Opening,
) -> Result<Arc<dyn Dataset>, DataError> {
    let Some(path) = &keys.init_cells else { return Ok(Arc::new(WantedCells::new(wanted.clone()))) };
    let mut config = opening.config.clone();
    config.data.dataset_path = path.clone();
    let reference = predict::reference(genes, opening)?;
    config.with_section::<CellConfig>(|cell| {
        (cell.reference, cell.min_genes, cell.min_cells, cell.label) = (Some(reference), 0, 0, None);
    });
    let CellData { all, .. } = data::open_in_order(&config, opening.team, opening.index_dir)?;
    Ok(Arc::new(Repeated { cells: all, count: wanted.len() as usize }))
}
