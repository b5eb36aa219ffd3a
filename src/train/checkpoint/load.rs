//! Loading: everything is checked before anything is used.

use super::files::{kind_of, read_manifest};
use super::{CheckpointError, Facts, FileFacts, LOOP, MANIFEST, MODEL, Manifest, OPTIMIZER, SPLIT, VERSION, io_error};
use crate::data::split::SplitList;
use crate::train::ema::Named;
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor, no_grad};

/// Differences that an error lists.
const LISTED: usize = 5;

/// A whole checkpoint, tensors in host memory.
#[derive(Debug)]
pub struct Loaded {
    pub path: PathBuf,
    pub step: u64,
    pub best: bool,
    pub facts: Facts,
    pub model: Vec<(String, Tensor)>,
    pub optimizer: Vec<(String, Tensor)>,
    /// Averages with their rates, which older checkpoints do not name.
    pub ema: Vec<(Option<f64>, Named)>,
    /// Tensors besides: see [`super::Content`].
    pub rest: Named,
    /// Files of each split; `None`: an older checkpoint, or a task that keeps no account of its files.
    pub split: Option<SplitList>,
    pub state: serde_json::Value,
}

impl Loaded {
    /// Checks that a run with these facts may resume from here. The world size is free.
    ///
    /// # Errors
    /// Another model, global batch or seed; the error names both values.
    pub fn check_facts(&self, run: &Facts) -> Result<(), CheckpointError> {
        let (saved, mut problems) = (&self.facts, vec![]);
        if saved.model != run.model {
            problems.push(format!(
                "its model differs: {}; keep the model as it was",
                differences(&saved.model, &run.model)
            ));
        }
        if saved.global_batch != run.global_batch {
            problems.push(format!(
                "its global batch is {} (on {} ranks), this run's is {} (on {} ranks): choose train.batch_size and \
                 train.gradient_accumulation_steps so that batch_size × accumulation × ranks = {}",
                saved.global_batch, saved.world_size, run.global_batch, run.world_size, saved.global_batch
            ));
        }
        if saved.seed != run.seed {
            problems.push(format!("its seed is {}, this run's is {}: set seed={}", saved.seed, run.seed, saved.seed));
        }
        mismatch(&self.path, problems)
    }

    /// The caller's state as it was saved.
    ///
    /// # Errors
    /// It has another shape.
    pub fn state<S: serde::de::DeserializeOwned>(&self) -> Result<S, CheckpointError> {
        serde_json::from_value(self.state.clone())
            .map_err(|e| CheckpointError::Corrupt { path: self.path.join(MANIFEST), problem: format!("state: {e}") })
    }
}

/// The keys that differ, where both descriptions are a word and a JSON object; else both as they are.
fn differences(saved: &str, run: &str) -> String {
    let keys = |text: &str| {
        let (task, sizes) = text.split_once(' ')?;
        let sizes: BTreeMap<String, serde_json::Value> = serde_json::from_str(sizes).ok()?;
        Some((task.to_owned(), sizes))
    };
    match (keys(saved), keys(run)) {
        (Some((task, old)), Some((same, new))) if task == same => {
            let names: std::collections::BTreeSet<_> = old.keys().chain(new.keys()).collect();
            let show = |value: Option<&serde_json::Value>| value.map_or("absent".into(), ToString::to_string);
            let differ = names.into_iter().filter(|key| old.get(*key) != new.get(*key));
            let lines: Vec<_> = differ
                .map(|key| format!("{key} is {} there, {} here", show(old.get(key)), show(new.get(key))))
                .collect();
            lines.join(", ")
        }
        _ => format!("it is {saved}, this run's is {run}"),
    }
}

fn mismatch(path: &Path, problems: Vec<String>) -> Result<(), CheckpointError> {
    if problems.is_empty() {
        return Ok(());
    }
    Err(CheckpointError::Mismatch { path: path.to_owned(), problem: problems.join("; ") })
}

/// Checkpoints below `dir` by step, oldest first. A missing folder holds none.
///
/// # Errors
/// The folder cannot be read.
pub fn list(dir: &Path) -> Result<Vec<(u64, PathBuf)>, CheckpointError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
        Err(e) => return Err(io_error(dir, "read")(e)),
    };
    let mut found = vec![];
    for entry in entries {
        let entry = entry.map_err(io_error(dir, "read"))?;
        let step = entry.file_name().to_str().and_then(|name| name.strip_prefix("step-")?.parse().ok());
        found.extend(step.map(|step| (step, entry.path())));
    }
    found.sort();
    Ok(found)
}

/// Reads the checkpoint folder `dir` (`checkpoints/step-<N>`) and verifies sizes and checksums.
///
/// # Errors
/// The manifest or a file is missing, damaged or of another version.
pub fn load(dir: &Path) -> Result<Loaded, CheckpointError> {
    let manifest_path = dir.join(MANIFEST);
    let manifest = read_manifest(&manifest_path)?;
    if manifest.version != VERSION {
        let problem = format!("has version {}, this program reads version {VERSION}", manifest.version);
        return Err(CheckpointError::Corrupt { path: manifest_path, problem });
    }
    let read = |name: &str| -> Result<Option<Vec<(String, Tensor)>>, CheckpointError> {
        manifest
            .files
            .get(name)
            .map(|facts| tensors_of(&dir.join(name), &read_verified(&dir.join(name), facts)?))
            .transpose()
    };
    let must = |name: &str| {
        read(name)?.ok_or_else(|| CheckpointError::Corrupt {
            path: manifest_path.clone(),
            problem: format!("does not list {name}"),
        })
    };
    let average = |(file, rate): &(String, Option<f64>)| Ok((*rate, must(file)?));
    let ema = manifest.averages().iter().map(average).collect::<Result<_, CheckpointError>>()?;
    let split = split_of(dir, &manifest)?;
    Ok(Loaded {
        split,
        path: dir.to_owned(),
        step: manifest.step,
        best: manifest.best,
        model: must(MODEL)?,
        optimizer: must(OPTIMIZER)?,
        ema,
        rest: read(LOOP)?.unwrap_or_default(),
        facts: manifest.facts,
        state: manifest.state,
    })
}

pub(super) fn read_verified(path: &Path, facts: &FileFacts) -> Result<Vec<u8>, CheckpointError> {
    let corrupt = |problem: String| Err(CheckpointError::Corrupt { path: path.to_owned(), problem });
    let bytes = match fs::metadata(path) {
        Ok(about) => about.len(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return corrupt("the file is missing".into()),
        Err(e) => return Err(io_error(path, "read")(e)),
    };
    if bytes != facts.bytes {
        return corrupt(format!("has {bytes} bytes, the manifest says {}: it was cut or changed", facts.bytes));
    }
    let data = fs::read(path).map_err(io_error(path, "read"))?;
    let crc32 = libdeflater::crc32(&data);
    if crc32 != facts.crc32 {
        return corrupt(format!("its checksum is {crc32:08x}, the manifest says {:08x}: it is damaged", facts.crc32));
    }
    Ok(data)
}

/// The split of the checkpoint in `dir`; `None`: it has none.
pub(super) fn split_of(dir: &Path, manifest: &Manifest) -> Result<Option<SplitList>, CheckpointError> {
    manifest.files.get(SPLIT).map(|facts| read_split(&dir.join(SPLIT), facts)).transpose()
}

fn read_split(path: &Path, facts: &FileFacts) -> Result<SplitList, CheckpointError> {
    let data = read_verified(path, facts)?;
    serde_json::from_slice(&data)
        .map_err(|e| CheckpointError::Corrupt { path: path.to_owned(), problem: format!("is no list of files: {e}") })
}

pub(super) fn tensors_of(path: &Path, data: &[u8]) -> Result<Vec<(String, Tensor)>, CheckpointError> {
    let corrupt = |problem: String| CheckpointError::Corrupt { path: path.to_owned(), problem };
    let file = SafeTensors::deserialize(data).map_err(|e| corrupt(format!("is no safetensors file: {e}")))?;
    let one = |(name, view): (&str, safetensors::tensor::TensorView)| {
        let kind = kind_of(view.dtype()).map_err(|problem| corrupt(format!("tensor {name} {problem}")))?;
        let size: Vec<i64> = view.shape().iter().map(|d| *d as i64).collect();
        // `deserialize` has checked that the bytes are as many as shape and type say.
        let tensor = Tensor::f_from_data_size(view.data(), &size, kind);
        Ok((name.to_owned(), tensor.map_err(|e| corrupt(format!("tensor {name}: {e}")))?))
    };
    let mut tensors = file.iter().map(one).collect::<Result<Vec<_>, _>>()?;
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(tensors)
}

/// Reads weights for `train.init_from`, e.g. written by `safetensors.torch.save_file`; f16, bf16 and f64 become f32.
///
/// # Errors
/// The file cannot be read, or is no safetensors file.
pub fn load_weights(path: &Path) -> Result<Vec<(String, Tensor)>, CheckpointError> {
    let data = fs::read(path).map_err(io_error(path, "read the weights"))?;
    to_f32(path, tensors_of(path, &data)?)
}

/// The same tensors, those of f16, bf16 and f64 as f32.
pub(super) fn to_f32(
    path: &Path,
    mut tensors: Vec<(String, Tensor)>,
) -> Result<Vec<(String, Tensor)>, CheckpointError> {
    for (name, tensor) in &mut tensors {
        if matches!(tensor.kind(), Kind::Half | Kind::BFloat16 | Kind::Double) {
            *tensor = tensor.f_to_kind(Kind::Float).map_err(|e| CheckpointError::Corrupt {
                path: path.to_owned(),
                problem: format!("tensor {name}: {e}"),
            })?;
        }
    }
    Ok(tensors)
}

/// Checks that `found` has exactly the names, shapes and types of `expected`.
///
/// # Errors
/// Lists the first differences: missing, unexpected, another shape or type.
pub fn check_coverage(
    path: &Path,
    found: &[(String, Tensor)],
    expected: &[(String, Tensor)],
) -> Result<(), CheckpointError> {
    let found: BTreeMap<_, _> = found.iter().map(|(name, t)| (name, t)).collect();
    let expected: BTreeMap<_, _> = expected.iter().map(|(name, t)| (name, t)).collect();
    let mut problems = vec![];
    for (name, want) in &expected {
        match found.get(name) {
            None => problems.push(format!("missing {name} {}", describe(want))),
            Some(have) if have.size() != want.size() || have.kind() != want.kind() => problems.push(format!(
                "{name} is {} in the file, {} in this run's model",
                describe(have),
                describe(want)
            )),
            Some(_) => {}
        }
    }
    let unexpected = found.iter().filter(|(name, _)| !expected.contains_key(*name));
    problems.extend(unexpected.map(|(name, t)| format!("unexpected {name} {}", describe(t))));
    if problems.len() > LISTED {
        let more = problems.len() - LISTED;
        problems.truncate(LISTED);
        problems.push(format!("and {more} more"));
    }
    mismatch(path, problems)
}

fn describe(tensor: &Tensor) -> String {
    format!("{:?} {:?}", tensor.kind(), tensor.size())
}

/// Copies `found` into the tensors of the same names, after [`check_coverage`].
///
/// # Errors
/// The names, shapes or types differ: nothing is copied then.
pub fn apply(path: &Path, found: &[(String, Tensor)], into: &[(String, Tensor)]) -> Result<(), CheckpointError> {
    check_coverage(path, found, into)?;
    let found: BTreeMap<_, _> = found.iter().map(|(name, t)| (name, t)).collect();
    for (name, target) in into {
        let copy = |source: &Tensor| no_grad(|| target.shallow_clone().f_copy_(source));
        if let Some(Err(e)) = found.get(name).map(|source| copy(source)) {
            return Err(CheckpointError::Corrupt { path: path.to_owned(), problem: format!("tensor {name}: {e}") });
        }
    }
    Ok(())
}
