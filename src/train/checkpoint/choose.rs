//! Weights of a run for its predictions and evaluations: `--weights best|last|ema:DECAY|FILE`.

use super::files::read_manifest;
use super::load::{self, read_verified, tensors_of};
use super::{CheckpointError, MANIFEST, MODEL, Manifest, VERSION};
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
        _ => manifest.averages().into_iter().next().map_or_else(|| MODEL.into(), |(file, _)| file),
    };
    let path = dir.join(&name);
    let facts = manifest.files.get(&name).ok_or_else(|| CheckpointError::Corrupt {
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
fn average(folder: &Path, dir: &Path, manifest: &Manifest, decay: f64) -> Result<String, CheckpointError> {
    let refused = |problem: String| CheckpointError::NoSuchWeights { path: dir.to_owned(), problem };
    // Older checkpoints do not name the decay of their one average.
    let decay_of = |named: Option<f64>| named.or_else(|| kept_decay(folder));
    let averages: Vec<_> = manifest.averages().into_iter().map(|(file, named)| (file, decay_of(named))).collect();
    if let Some((file, _)) = averages.iter().find(|(_, kept)| kept.is_none_or(|kept| kept == decay)) {
        return Ok(file.clone());
    }
    let kept: Vec<String> = averages.iter().filter_map(|(_, kept)| Some(kept.as_ref()?.to_string())).collect();
    Err(refused(match &kept[..] {
        [] => "keeps no average (train.ema_decay was null): use --weights best or last".into(),
        _ => {
            let words: Vec<String> = kept.iter().map(|kept| format!("ema:{kept}")).collect();
            format!(
                "keeps the average with decay {}, not {decay}: use --weights {}",
                kept.join(", "),
                words.join(" or ")
            )
        }
    }))
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

#[cfg(test)]
mod tests {
    use super::super::tests::{facts, tensors};
    use super::super::{Checkpointer, Content};
    use super::*;
    use serde_json::json;

    /// Checkpoints `(step, best)` with these averages; the weights of a step are `step`, those of an average `step + rate`.
    fn run(checkpoints: &[(u64, bool)], rates: &[f64]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let mut keeper = Checkpointer::open(&dir.path().join("checkpoints"), 9).unwrap();
        for &(step, best) in checkpoints {
            let ema: Vec<_> = rates.iter().map(|rate| (*rate, tensors(step as f64 + rate))).collect();
            let content = Content {
                step,
                model: &tensors(step as f64),
                optimizer: &[],
                ema: &ema,
                rest: &[],
                facts: facts(),
                best,
                keep: false,
                last: false,
                state: json!({}),
            };
            keeper.save(content).unwrap();
        }
        keeper.wait().unwrap();
        dir
    }

    fn chosen(dir: &tempfile::TempDir, word: &str) -> (f64, String) {
        let chosen = choose(dir.path(), &word.parse().unwrap()).unwrap();
        let (_, weight) = chosen.tensors.iter().find(|(name, _)| name == "encoder.0.weight").unwrap();
        assert!(chosen.tensors.iter().any(|(name, _)| name == "count"), "buffers come along");
        (weight.double_value(&[0, 0]), chosen.path.file_name().unwrap().to_string_lossy().into_owned())
    }

    #[test]
    fn words_lead_to_the_weights_that_they_mean() {
        let plain = run(&[(5, true), (10, false)], &[]);
        assert_eq!(chosen(&plain, "best"), (5.0, "model.safetensors".into()));
        assert_eq!(chosen(&plain, "last").0, 10.0);
        let one = run(&[(5, true), (10, false)], &[0.5]);
        assert_eq!(chosen(&one, "best"), (5.5, "ema.safetensors".into()));
        assert_eq!([chosen(&one, "last").0, chosen(&one, "ema:0.5").0], [10.5, 5.5]);
        let several = run(&[(5, false), (10, true), (15, false)], &[0.75, 0.5]);
        assert_eq!(chosen(&several, "best").0, 10.75);
        assert_eq!(chosen(&several, "ema:0.5"), (10.5, "ema-0.5.safetensors".into()));
        let file = several.path().join("checkpoints/step-5/model.safetensors");
        assert_eq!(chosen(&several, file.to_str().unwrap()).0, 5.0);
        assert_eq!(chosen(&run(&[(5, false)], &[]), "best").0, 5.0, "none is marked: the newest");
    }

    #[test]
    fn averages_that_are_not_kept_are_named_with_those_that_are() {
        let error =
            |dir: &tempfile::TempDir, word: &str| choose(dir.path(), &word.parse().unwrap()).unwrap_err().to_string();
        let empty = tempfile::tempdir().unwrap();
        assert!(error(&empty, "best").contains("holds no checkpoint"), "{}", error(&empty, "best"));
        assert!(error(&run(&[(5, false)], &[]), "ema:0.9").contains("keeps no average"));
        let text = error(&run(&[(5, false)], &[0.75, 0.5]), "ema:0.9");
        assert!(text.contains("decay 0.75, 0.5, not 0.9: use --weights ema:0.75 or ema:0.5"), "{text}");
    }

    #[test]
    fn damaged_files_are_refused() {
        let dir = run(&[(5, true)], &[]);
        let path = dir.path().join("checkpoints/step-5/model.safetensors");
        let mut data = std::fs::read(&path).unwrap();
        *data.last_mut().unwrap() ^= 1;
        std::fs::write(&path, &data).unwrap();
        let error = choose(dir.path(), &Weights::Best).unwrap_err().to_string();
        assert!(error.contains("model.safetensors"), "{error}");
    }
}
