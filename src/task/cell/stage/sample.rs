//! Stage `sample`: generates cells, guided by the classifier or not.
//!
//! Samples are numbered: first `num_samples`, guided by `class` where it is set (`all`: the classes in turn), then `per_class` of each
//! class. Everything drawn for a cell is a function of seed and number, so that neither ranks nor batches change a cell.

use super::super::densify::{Scale, dense};
use super::super::diffusion::{Diffusion, Walk};
use super::super::model::{Autoencoder, CellUnet, Classifier};
use super::super::stream;
use crate::data::{DataError, Dataset, Dtype, FieldSpec, ReadRequest, Scratch};
use crate::task::draw::Draws;
use crate::task::{Batch, Model, Output};
use spec::task::cell::{CellSample, DecoderActivation};
use std::sync::Arc;
use tch::{Kind, Tensor, no_grad};

/// `cell.sample.class` that means each class in turn.
const ALL: &str = "all";
/// Weights of two classes are shares of this.
const WEIGHTS: f64 = 10.0;

/// Which cells are wanted.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    /// Cells of the first part.
    pub first: u64,
    /// What guides them.
    pub class: Class,
    /// Cells of each class behind them.
    pub per_class: u64,
    pub classes: u64,
    /// A second class that guides every guided cell.
    pub second: Option<i64>,
}

/// What guides the cells of the first part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    None,
    One(i64),
    InTurn,
}

impl Wanted {
    /// # Errors
    /// A class that the data do not have, or guidance without a classifier.
    pub fn new(keys: &CellSample, classes: &[String]) -> Result<Self, DataError> {
        let find = |key: &'static str, name: &str| {
            classes.iter().position(|class| class == name).map(|place| place as i64).ok_or_else(|| {
                let known = if classes.is_empty() { "none: cell.label is null".to_owned() } else { classes.join(", ") };
                DataError::setting(key, format!("{key} is {name}, which is no class of the data; they are {known}"))
            })
        };
        let class = match keys.class.as_deref() {
            None => Class::None,
            Some(ALL) if !classes.is_empty() && !classes.iter().any(|class| class == ALL) => Class::InTurn,
            Some(name) => Class::One(find("cell.sample.class", name)?),
        };
        let second = keys.second_class.as_deref().map(|name| find("cell.sample.second_class", name)).transpose()?;
        if classes.is_empty() && keys.per_class > 0 {
            let problem = "cell.sample.per_class guides by the classes of the data, which has none: set it to 0, or set cell.label";
            return Err(DataError::setting("cell.sample.per_class", problem));
        }
        let (first, per_class) = (keys.num_samples as u64, keys.per_class as u64);
        Ok(Self { first, class, per_class, classes: classes.len() as u64, second })
    }

    pub fn len(&self) -> u64 {
        self.first + self.per_class * self.classes
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Class that guides sample `id`; −1: none.
    pub fn class_of(&self, id: u64) -> i64 {
        match (id.checked_sub(self.first), self.class) {
            (Some(behind), _) => behind.checked_div(self.per_class).map_or(-1, |class| class as i64),
            (None, Class::None) => -1,
            (None, Class::One(class)) => class,
            (None, Class::InTurn) => id.checked_rem(self.classes).map_or(-1, |class| class as i64),
        }
    }

    /// True if a classifier is needed.
    pub fn is_guided(&self) -> bool {
        self.class != Class::None || self.per_class > 0
    }
}

/// Samples without data: their class, i64 (−1: none).
pub struct WantedCells {
    wanted: Wanted,
    fields: Vec<FieldSpec>,
}

impl WantedCells {
    pub fn new(wanted: Wanted) -> Self {
        Self { wanted, fields: vec![FieldSpec::new("class", &[], Dtype::I64)] }
    }
}

impl Dataset for WantedCells {
    fn len(&self) -> usize {
        self.wanted.len() as usize
    }

    fn fields(&self) -> &[FieldSpec] {
        &self.fields
    }

    fn read(&self, request: ReadRequest, out: &mut [&mut [u8]], _: &mut Scratch) -> Result<(), DataError> {
        let [class] = out else { return Err(DataError::Fields { asked: out.len(), count: 1 }) };
        class.copy_from_slice(&self.wanted.class_of(request.index as u64).to_ne_bytes());
        Ok(())
    }

    fn describe(&self, index: usize) -> String {
        format!("generated cell {index}")
    }
}

/// So many samples of another data set, over and over: cells that generation begins with.
pub struct Repeated {
    pub cells: Arc<dyn Dataset>,
    pub count: usize,
}

impl Dataset for Repeated {
    fn len(&self) -> usize {
        if self.cells.is_empty() { 0 } else { self.count }
    }

    fn fields(&self) -> &[FieldSpec] {
        self.cells.fields()
    }

    fn read(&self, request: ReadRequest, out: &mut [&mut [u8]], scratch: &mut Scratch) -> Result<(), DataError> {
        let index = request.index % self.cells.len().max(1);
        self.cells.read(ReadRequest { index, ..request }, out, scratch)
    }

    fn describe(&self, index: usize) -> String {
        self.cells.describe(index % self.cells.len().max(1))
    }
}

/// All models, and how they sample.
pub struct SampleNet {
    pub autoencoder: Autoencoder,
    pub unet: CellUnet,
    /// `None`: cells have no classes.
    pub classifier: Option<Classifier>,
    pub process: Diffusion,
    pub keys: CellSample,
    pub wanted: Wanted,
    pub latent: i64,
    pub seed: u64,
    pub activation: DecoderActivation,
    /// Samples are cells to begin with: genes, and how counts become expression.
    pub begin: Option<(i64, Scale)>,
}

/// Numbers of a generated cell behind its expression and its latent: the class that the classifier assigns it, and that
/// class's probability.
pub const VERDICT: i64 = 2;

impl Model for SampleNet {
    fn forward(&self, batch: &Batch, _train: bool) -> Output {
        let prediction = self.predict(batch);
        Output::new(prediction.mean(Kind::Float), prediction)
    }

    /// `[B, G + L + 2]`: expression, latent, [`VERDICT`].
    fn predict(&self, batch: &Batch) -> Tensor {
        no_grad(|| {
            let latents = self.latents(batch);
            let expression = match self.activation {
                DecoderActivation::Relu => self.autoencoder.generate(&latents),
                DecoderActivation::None => self.autoencoder.decode(&latents, None),
            };
            let verdict = self.verdict(&latents);
            Tensor::cat(&[expression.to_kind(Kind::Float), latents, verdict], 1)
        })
    }
}

impl SampleNet {
    /// Generated latents `[B, L]`. Guided cells and others walk apart: they are clipped differently.
    fn latents(&self, batch: &Batch) -> Tensor {
        let device = batch.fields[0].device();
        let classes: Vec<i64> = batch.sample_ids.iter().map(|&id| self.wanted.class_of(id)).collect();
        let start = self.start(batch);
        let latents = Tensor::zeros([classes.len() as i64, self.latent], (Kind::Float, device));
        for guided in [false, true] {
            let places: Vec<i64> =
                (0..).zip(&classes).filter(|(_, class)| (**class >= 0) == guided).map(|(n, _)| n).collect();
            if places.is_empty() {
                continue;
            }
            let ids: Vec<i64> = places.iter().map(|&place| batch.sample_ids[place as usize] as i64).collect();
            let y: Vec<i64> = places.iter().map(|&place| classes[place as usize]).collect();
            let on = |numbers: &[i64]| Tensor::from_slice(numbers).to_device(device);
            let (places, ids, y) = (on(&places), on(&ids), on(&y));
            let walked = self.walk(start.index_select(0, &places), &ids, guided.then_some(&y));
            let _ = latents.shallow_clone().index_copy_(0, &places, &walked);
        }
        latents
    }

    /// What the walk begins with: noise, or noised cells.
    fn start(&self, batch: &Batch) -> Tensor {
        let ids: Vec<i64> = batch.sample_ids.iter().map(|&id| id as i64).collect();
        let ids = Tensor::from_slice(&ids).to_device(batch.fields[0].device());
        let noise = Draws::new(self.seed, 0, ids).normals(stream::START, self.latent);
        let Some((genes, scale)) = &self.begin else { return noise };
        let cells = self.autoencoder.encode(&dense(batch, *genes, scale), None);
        let t = Tensor::full([cells.size()[0]], self.from() as i64 - 1, (Kind::Int64, cells.device()));
        self.process.noised(&cells, &t, &noise)
    }

    /// Steps of the walk.
    fn from(&self) -> usize {
        match self.begin {
            Some(_) => self.process.places().iter().filter(|&&place| place <= self.keys.init_time).count().max(1),
            None => self.process.steps(),
        }
    }

    fn walk(&self, x: Tensor, ids: &Tensor, y: Option<&Tensor>) -> Tensor {
        let network = |x: &Tensor, time: &Tensor| self.unet.forward(x, time, None);
        let second = y.and_then(|y| Some(y.full_like(self.wanted.second?)));
        let scale = self.keys.classifier_scale;
        let [of_first, of_second] = self.keys.class_weights.map(|weight| weight * scale / WEIGHTS);
        let guide = |x: &Tensor, time: &Tensor| match (&self.classifier, y, &second) {
            (Some(net), Some(y), Some(second)) => net.gradient(x, time, &[(y, of_first), (second, of_second)]),
            (Some(net), Some(y), None) => net.gradient(x, time, &[(y, scale)]),
            _ => x.zeros_like(),
        };
        let noise = |step: usize| {
            Draws::new(self.seed, 1 + step as u64, ids.shallow_clone()).normals(stream::FRESH, self.latent)
        };
        let walk = Walk {
            network: &network,
            guide: y.is_some().then_some(&guide),
            guide_below: self.keys.start_guide_steps,
            clip: self.keys.clip_denoised.unwrap_or(y.is_some()),
            ddim: self.keys.use_ddim.then_some(self.keys.ddim_eta),
            noise: &noise,
        };
        let start = x.shallow_clone();
        // It never stops of itself.
        self.process.sample(&walk, x, self.from(), &mut || false).unwrap_or(start)
    }

    /// [`VERDICT`] of clean latents `[B, L]`: `[B, 2]`; −1 and 0 without a classifier.
    fn verdict(&self, latents: &Tensor) -> Tensor {
        let rows = latents.size()[0];
        let Some(classifier) = &self.classifier else {
            return Tensor::from_slice(&[-1f32, 0.0]).to_device(latents.device()).expand([rows, VERDICT], false);
        };
        let t = Tensor::zeros([rows], (Kind::Int64, latents.device()));
        let p = classifier.forward(latents, &self.process.network_time(&t), None).softmax(-1, Kind::Float);
        let (largest, class) = p.max_dim(1, false);
        Tensor::stack(&[class.to_kind(Kind::Float), largest], 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Vec<String> {
        ["B", "T", "NK"].map(String::from).to_vec()
    }

    fn wanted(change: impl FnOnce(&mut CellSample)) -> Result<Wanted, DataError> {
        let mut keys = CellSample { num_samples: 5, ..CellSample::default() };
        change(&mut keys);
        Wanted::new(&keys, &names())
    }

    #[test]
    fn samples_are_numbered_first_those_asked_for_then_those_of_each_class() {
        let classes = |wanted: &Wanted| (0..wanted.len()).map(|id| wanted.class_of(id)).collect::<Vec<_>>();
        let plain = wanted(|keys| keys.per_class = 2).unwrap();
        assert_eq!(classes(&plain), [-1, -1, -1, -1, -1, 0, 0, 1, 1, 2, 2]);
        assert!(plain.is_guided());
        assert_eq!(classes(&wanted(|keys| keys.class = Some("NK".into())).unwrap()), [2; 5]);
        let turn = wanted(|keys| keys.class = Some("all".into())).unwrap();
        assert_eq!(classes(&turn), [0, 1, 2, 0, 1]);
        assert!(!wanted(|_| ()).unwrap().is_guided());
    }

    #[test]
    fn unknown_classes_are_refused_with_those_there_are() {
        let error = wanted(|keys| keys.class = Some("A".into())).unwrap_err().to_string();
        assert_eq!(error, "cell.sample.class is A, which is no class of the data; they are B, T, NK");
        assert!(wanted(|keys| keys.second_class = Some("A".into())).is_err());
        let keys = CellSample { per_class: 1, ..CellSample::default() };
        assert!(Wanted::new(&keys, &[]).unwrap_err().to_string().contains("set cell.label"));
    }
}
