//! Weights of a run for its predictions and evaluations: `--weights best|last|ema:DECAY|FILE`.

use super::files::read_manifest;
use super::load::{self, read_verified, tensors_of};
use super::{CheckpointError, EMA, MANIFEST, MODEL, Manifest, VERSION};
use crate::data::split::SplitList;
use spec::contract::Weights;
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};

/// Weights that were chosen.
#[derive(Debug)]
pub struct Chosen {
    /// The file.
    pub path: PathBuf,
    /// Step of its checkpoint; `None`: it is of none.
    pub step: Option<u64>,
    pub tensors: Vec<(String, Tensor)>,
    /// CRC-32 of the file's bytes.
    pub crc32: u32,
}

/// Reads the weights of the run, or stage, in `folder`. Only their file is read.
///
/// # Errors
/// There is no such checkpoint or average, or a file is damaged.
pub fn choose(folder: &Path, weights: &Weights) -> Result<Chosen, CheckpointError> {
    let (dir, manifest) = match (weights, checkpoint_of(folder, weights)?) {
        (_, Some(found)) => found,
        (Weights::File(path), None) => return of_file(path),
        (_, None) => newest(folder, |_| true)?,
    };
    let name = match weights {
        Weights::Ema(decay) => average(folder, &dir, &manifest, *decay)?,
        _ if manifest.files.contains_key(EMA) => EMA,
        _ => MODEL,
    };
    let path = dir.join(name);
    let facts = manifest.files.get(name).ok_or_else(|| CheckpointError::Corrupt {
        path: dir.join(MANIFEST),
        problem: format!("does not list {name}"),
    })?;
    let tensors = tensors_of(&path, &read_verified(&path, facts)?)?;
    Ok(Chosen { path, step: Some(manifest.step), tensors, crc32: facts.crc32 })
}

/// The checkpoint that `weights` mean; `None`: they are of a file.
fn checkpoint_of(folder: &Path, weights: &Weights) -> Result<Option<(PathBuf, Manifest)>, CheckpointError> {
    Ok(match weights {
        Weights::File(_) => None,
        Weights::Last => Some(newest(folder, |_| true)?),
        Weights::Best | Weights::Ema(_) => {
            Some(newest(folder, |manifest| manifest.best).or_else(|_| newest(folder, |_| true))?)
        }
    })
}

/// The split that the run in `folder` trained with, by the checkpoint of `weights`, or by its newest one where they are of a
/// file. `None`: no checkpoint says.
///
/// # Errors
/// As [`choose`].
pub fn split_of_run(folder: &Path, weights: &Weights) -> Result<Option<SplitList>, CheckpointError> {
    match checkpoint_of(folder, weights)? {
        Some((dir, manifest)) => load::split_of(&dir, &manifest),
        None => newest(folder, |_| true).map_or(Ok(None), |(dir, manifest)| load::split_of(&dir, &manifest)),
    }
}

/// The newest whole checkpoint of this version that is `wanted`.
fn newest(folder: &Path, wanted: impl Fn(&Manifest) -> bool) -> Result<(PathBuf, Manifest), CheckpointError> {
    let checkpoints = folder.join("checkpoints");
    let mut broken = None;
    for (_, dir) in load::list(&checkpoints)?.into_iter().rev() {
        match read_manifest(&dir.join(MANIFEST)) {
            Ok(manifest) if manifest.version == VERSION && wanted(&manifest) => return Ok((dir, manifest)),
            Ok(_) => {}
            Err(error) => broken = broken.or(Some(error)),
        }
    }
    let problem = match broken {
        Some(error) => format!("holds no whole checkpoint ({error})"),
        None => "holds no checkpoint".into(),
    };
    Err(CheckpointError::NothingSaved { path: checkpoints, problem })
}

/// The file with the average of this decay.
fn average(folder: &Path, dir: &Path, manifest: &Manifest, decay: f64) -> Result<&'static str, CheckpointError> {
    let refused = |problem: String| CheckpointError::NoSuchWeights { path: dir.to_owned(), problem };
    if !manifest.files.contains_key(EMA) {
        return Err(refused("keeps no average (train.ema_decay was null): use --weights best or last".into()));
    }
    let kept = kept_decay(folder);
    match kept {
        Some(kept) if kept != decay => {
            Err(refused(format!("keeps the average with decay {kept}, not {decay}: use --weights ema:{kept}")))
        }
        _ => Ok(EMA),
    }
}

/// `train.ema_decay` of the run.
fn kept_decay(folder: &Path) -> Option<f64> {
    let job: serde_json::Value = serde_json::from_slice(&std::fs::read(folder.join("job.json")).ok()?).ok()?;
    job.pointer("/config/train/ema_decay")?.as_f64()
}

/// A safetensors file, e.g. of `safetensors.torch.save_file`; f16, bf16 and f64 become f32.
fn of_file(path: &Path) -> Result<Chosen, CheckpointError> {
    let refused = |problem: String| CheckpointError::NoSuchWeights { path: path.to_owned(), problem };
    let way_out = "name a safetensors file of this model";
    let data = std::fs::read(path).map_err(|e| refused(format!("{e}: {way_out}")))?;
    let mut tensors = tensors_of(path, &data).map_err(|error| match error {
        CheckpointError::Corrupt { problem, .. } => refused(format!("{problem}: {way_out}")),
        other => other,
    })?;
    for (name, tensor) in &mut tensors {
        if matches!(tensor.kind(), Kind::Half | Kind::BFloat16 | Kind::Double) {
            let converted = tensor.f_to_kind(Kind::Float);
            *tensor = converted.map_err(|e| refused(format!("tensor {name}: {e}")))?;
        }
    }
    Ok(Chosen { path: path.to_owned(), step: None, tensors, crc32: libdeflater::crc32(&data) })
}
