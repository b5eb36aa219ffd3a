//! Task `python`: the user's PyTorch model and data sets as they are.
//!
//! ```text
//! the user's interpreter ── imports ──► the trainer as an extension (src/python), which gives this room its [`Host`]
//! loader thread ─► lane ─► decode worker: dataset[i], transform ─► scratch memory ─► entry of the page cache, or batch slot
//! step ─► Host::forward (Python, the same tensors) ─► loss ─► backward, buckets, optimizer: here, without Python's lock
//! ```
//! A rank is the user's own Python. This room knows no Python: what it asks for goes through [`Host`].

mod host;
mod lane;
mod layout;
mod model;
mod optimizer;
mod predict;
mod samples;

pub use self::host::{Facts, Host, Named, OptimizerState, Passed, UserError, WorkerEnds, be_hosted_by};

use super::outline::Outline;
use super::pass::{Opening, Pass};
use super::{Datasets, Metrics, Model, Task, Team};
use crate::data::loader::train_order;
use crate::data::{DataError, Dataset};
use lane::Lanes;
use layout::Layout;
use model::{Measures, PythonModel};
use samples::{Samples, Source, Sources};
use spec::config::Config;
use spec::contract::{CacheMode, DataSizes};
use spec::task::python::PythonConfig;
use std::path::Path;
use std::sync::Arc;
use tch::nn;

/// Entries of the page cache begin at multiples of this.
const ENTRY_BYTES: u64 = 64;

/// The task, as the registry knows it.
pub struct Python;

/// Data sets by name, open.
struct Opened {
    host: &'static dyn Host,
    facts: Facts,
    sets: Vec<(String, Arc<Samples>)>,
}

impl Opened {
    fn new(config: &Config, team: &Team) -> Result<Self, DataError> {
        let host = self::host::of_this_process()?;
        let facts = host.facts()?;
        let python: PythonConfig = config.section();
        let lanes = Lanes::new(host, python.workers);
        let (mut sources, mut base, mut structure) = (Vec::new(), 0, None);
        for (number, (name, len)) in facts.splits.iter().enumerate() {
            if *len == 0 {
                return Err(DataError::User(format!("data set {name} is empty: expected at least one sample")));
            }
            let layout = Layout::of_split(&lanes, number as u64)?;
            let of_first = structure.get_or_insert_with(|| (name.clone(), layout.structure.clone()));
            // Samples to predict for may lack targets; collate sees to those of different sizes.
            if of_first.1 != layout.structure && name != "predict" && layout.most.is_none() {
                return Err(DataError::User(format!(
                    "samples of {name} have the structure {}, those of {} {}: expected the same in all data sets",
                    layout.structure, of_first.0, of_first.1
                )));
            }
            let most = match name.as_str() {
                "train" => config.data.max_train_windows as u64,
                "val" => config.data.max_val_windows as u64,
                _ => 0,
            };
            let used = if most == 0 { *len } else { most.min(*len) };
            sources.push(Arc::new(Source { lanes: lanes.clone(), split: number as u64, base, len: used, layout }));
            base += *len;
        }
        let (all, mut sets) = (Arc::new(Sources(sources)), Vec::new());
        for ((name, _), source) in facts.splits.iter().zip(&all.0) {
            let own = (Arc::clone(source), &all);
            let mut samples = Samples::new(name.clone(), own, team.cache.clone(), facts.transforms);
            if name == "train" {
                samples.order = Some(train_order(&samples, &config.data, config.seed)?);
            }
            sets.push((name.clone(), Arc::new(samples)));
        }
        Ok(Self { host, facts, sets })
    }

    fn set(&self, name: &str) -> Option<Arc<Samples>> {
        self.sets.iter().find(|(known, _)| known == name).map(|(_, set)| Arc::clone(set))
    }

    /// The set of this name, or the nearest that there is.
    fn need(&self, name: &str) -> Result<Arc<Samples>, DataError> {
        let or = |other: &str| self.set(other);
        let found = self.set(name).or_else(|| or("val")).or_else(|| or("train"));
        found.ok_or_else(|| DataError::User(format!("python.build gives no data set {name}")))
    }

    fn datasets(&self) -> Result<Datasets, DataError> {
        let [train, val, test] = [self.need("train")?, self.need("val")?, self.need("test")?];
        self.host.use_structure(&train.source.layout.structure)?;
        let random: Vec<&str> =
            self.sets.iter().filter(|(_, set)| set.is_random()).map(|(name, _)| name.as_str()).collect();
        let mut datasets = Datasets::new(train, val, test);
        if self.set("test").is_none() {
            datasets.notes.push("python.build gives no data set test: values named test are measured on val".into());
        }
        if !random.is_empty() {
            datasets.notes.push(format!(
                "samples of {} differ from reading to reading, so they are not kept in the page cache: random \
                 parts moved to transform let the rest be kept",
                random.join(", ")
            ));
        }
        Ok(datasets)
    }

    /// Each sample is an entry of the page cache, as `dataset[i]` gives it.
    fn sizes(&self) -> DataSizes {
        let entry = |name: &str| self.set(name).map_or(0, |set| set.source.layout.stored_bytes() as u64);
        let kept = self.sets.iter().filter(|(name, set)| name != "predict" && !set.is_random());
        let entry_of = |set: &Samples| (set.source.layout.stored_bytes() as u64).next_multiple_of(ENTRY_BYTES);
        let bytes = |set: &Samples| entry_of(set).saturating_mul(set.len() as u64);
        let useful_bytes: u64 = kept.clone().map(|(_, set)| bytes(set)).sum();
        let words: Vec<String> =
            kept.map(|(name, set)| format!("{} {name} samples × {} B", set.len(), entry_of(set))).collect();
        DataSizes {
            entry_bytes: [entry("train"); 2],
            // Threads that load for training and those for validation keep theirs.
            scratch_bytes: 2 * self
                .sets
                .iter()
                .map(|(_, set)| set.source.layout.scratch_bytes() as u64)
                .max()
                .unwrap_or(0),
            useful_bytes,
            useful: words.join(" + "),
            useful_is_exact: true,
            auto_policy: CacheMode::Pin,
            ..DataSizes::default()
        }
    }
}

impl Task for Python {
    fn name(&self) -> &'static str {
        "python"
    }

    fn open(&self, config: &Config, team: &Team, _: &Path) -> Result<Datasets, DataError> {
        Opened::new(config, team)?.datasets()
    }

    fn outline(&self, config: &Config, _: &Path) -> Result<Outline, DataError> {
        let opened = Opened::new(config, &Team::alone())?;
        Ok(Outline { datasets: opened.datasets()?, sizes: opened.sizes() })
    }

    fn predict_outline(&self, config: &Config, _: &Path) -> Result<Outline, DataError> {
        let opened = Opened::new(config, &Team::alone())?;
        Ok(Outline { datasets: predict::datasets(&opened)?, sizes: opened.sizes() })
    }

    fn predictor(&self, opening: &Opening) -> Result<Pass, DataError> {
        let opened = Opened::new(opening.config, opening.team)?;
        predict::pass(&opened)
    }

    fn model(&self, config: &Config, _: &Datasets, vs: &nn::Path) -> Result<Box<dyn Model>, DataError> {
        let host = self::host::of_this_process()?;
        for named in host.model(config.seed, vs.device())? {
            let mut place = vs.clone();
            let mut parts: Vec<&str> = named.name.split('.').collect();
            let last = parts.pop().unwrap_or_default();
            for part in parts {
                place = place.sub(part);
            }
            // The store keeps the tensor; the module has it already.
            let _ = place.add(last, named.tensor, named.trained);
        }
        Ok(Box::new(PythonModel::new(host, config)))
    }

    fn metrics(&self, _: &Config, _: &Datasets) -> Result<Box<dyn Metrics>, DataError> {
        Ok(Box::new(Measures::new(self::host::of_this_process()?.facts()?.metrics)))
    }

    fn architecture(&self, config: &Config) -> String {
        let python: PythonConfig = config.section();
        serde_json::json!({ "build": python.build, "args": python.args }).to_string()
    }
}
