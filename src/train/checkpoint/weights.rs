//! Trained weights for use without training: the words of `--weights`, the file that each names, and loading it.

use super::files::read_manifest;
use super::load::{apply, list, read_verified, tensors_of, to_f32};
use super::{CheckpointError, FileFacts, MANIFEST, MODEL, Manifest, load_weights};
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use tch::{Tensor, nn};

/// A value of `--weights`.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Weights {
    /// Those of the best validation, averaged where the run averages: the ones that the run tests at its end.
    #[default]
    Best,
    /// Those of the newest checkpoint, averaged where the run averages.
    Last,
    /// The average with this rate, of the newest checkpoint; `None`: the first of `train.ema_decay`.
    Ema(Option<f64>),
    /// A safetensors file, or the folder of a checkpoint.
    File(PathBuf),
}

impl FromStr for Weights {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        Ok(match word {
            "" => return Err("expected best, last, ema, ema:RATE or a file".into()),
            "best" => Self::Best,
            "last" => Self::Last,
            "ema" => Self::Ema(None),
            other => match other.strip_prefix("ema:") {
                None => Self::File(other.into()),
                Some(rate) => match rate.parse::<f64>() {
                    Ok(number) if (0.0..1.0).contains(&number) => Self::Ema(Some(number)),
                    _ => {
                        return Err(format!(
                            "ema:{rate}: expected a rate of at least 0 and below 1, such as ema:0.9999"
                        ));
                    }
                },
            },
        })
    }
}

impl fmt::Display for Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Best => f.write_str("best"),
            Self::Last => f.write_str("last"),
            Self::Ema(None) => f.write_str("ema"),
            Self::Ema(Some(rate)) => write!(f, "ema:{rate}"),
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

/// A file of weights, as [`choose`] found it.
#[derive(Clone, Debug, PartialEq)]
pub struct Chosen {
    pub path: PathBuf,
    /// Optimizer steps that the weights are of, where a checkpoint says so.
    pub step: Option<u64>,
    /// Rate of the average; `None`: the trained weights themselves, or a file that does not say.
    pub decay: Option<f64>,
    facts: Option<FileFacts>,
}

impl fmt::Display for Chosen {
    /// `ema-0.9999.safetensors of step 40`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.step, self.path.file_name()) {
            (Some(step), Some(name)) => write!(f, "{} of step {step}", name.to_string_lossy()),
            _ => write!(f, "{}", self.path.display()),
        }
    }
}

/// The file that `wish` names among the `checkpoints` of a run (the folder that holds `step-<N>`).
///
/// # Errors
/// There is none; the message lists what there is.
pub fn choose(wish: &Weights, checkpoints: &Path) -> Result<Chosen, CheckpointError> {
    if let Weights::File(path) = wish {
        return match path.join(MANIFEST).exists() {
            true => averaged(path, &read_manifest(&path.join(MANIFEST))?),
            false => Ok(Chosen { path: path.clone(), step: None, decay: None, facts: None }),
        };
    }
    let missing =
        |problem: String| CheckpointError::NoWeights { dir: checkpoints.into(), wish: wish.to_string(), problem };
    let all = list(checkpoints)?;
    let Some((_, newest)) = all.last() else {
        return Err(missing("there is no checkpoint: train first, or name a file".into()));
    };
    match wish {
        Weights::Best => {
            let mut newest_first = all.iter().rev();
            let best = newest_first.find_map(|(_, path)| {
                // A damaged one is reported when it is the one that is used.
                let manifest = read_manifest(&path.join(MANIFEST)).ok()?;
                manifest.best.then_some((path, manifest))
            });
            let (path, manifest) = best.ok_or_else(|| {
                missing(
                    "no checkpoint is marked as the best: the run ended before its first validation; use last".into(),
                )
            })?;
            averaged(path, &manifest)
        }
        Weights::Ema(rate) => {
            let manifest = read_manifest(&newest.join(MANIFEST))?;
            average(newest, &manifest, *rate)?.ok_or_else(|| missing(no_average(&manifest, *rate)))
        }
        _ => averaged(newest, &read_manifest(&newest.join(MANIFEST))?),
    }
}

fn no_average(manifest: &Manifest, rate: Option<f64>) -> String {
    let rates: Vec<String> =
        manifest.averages().iter().filter_map(|(_, decay)| Some(decay.as_ref()?.to_string())).collect();
    let wanted = rate.map(|rate| format!(" with rate {rate}")).unwrap_or_default();
    let there = if rates.is_empty() { "none".to_owned() } else { rates.join(", ") };
    format!("the newest checkpoint, of step {}, has no average{wanted} (train.ema_decay there: {there})", manifest.step)
}

/// The first average of a checkpoint, else its weights.
fn averaged(dir: &Path, manifest: &Manifest) -> Result<Chosen, CheckpointError> {
    match average(dir, manifest, None)? {
        Some(chosen) => Ok(chosen),
        None => of_checkpoint(dir, manifest, MODEL, None),
    }
}

fn average(dir: &Path, manifest: &Manifest, rate: Option<f64>) -> Result<Option<Chosen>, CheckpointError> {
    let averages = manifest.averages();
    let found = averages.iter().find(|(_, decay)| rate.is_none() || *decay == rate);
    found.map(|(file, decay)| of_checkpoint(dir, manifest, file, *decay)).transpose()
}

fn of_checkpoint(dir: &Path, manifest: &Manifest, file: &str, decay: Option<f64>) -> Result<Chosen, CheckpointError> {
    let Some(facts) = manifest.files.get(file) else {
        let problem = format!("does not list {file}");
        return Err(CheckpointError::Corrupt { path: dir.join(MANIFEST), problem });
    };
    Ok(Chosen { path: dir.join(file), step: Some(manifest.step), decay, facts: Some(*facts) })
}

/// Reads `chosen` into the variables of `vs`, buffers included, by PyTorch's names. f16, bf16 and f64 become f32. A file of
/// a checkpoint is verified.
///
/// # Errors
/// The file cannot be read or is damaged, or names, shapes or types differ from the model's: nothing is changed then.
pub fn load_into(vs: &nn::VarStore, chosen: &Chosen) -> Result<(), CheckpointError> {
    let path = &chosen.path;
    let tensors = match &chosen.facts {
        Some(facts) => read_verified(path, facts)
            .and_then(|data| tensors_of(path, &data))
            .and_then(|tensors| to_f32(path, tensors)),
        None => load_weights(path),
    };
    let variables: Vec<(String, Tensor)> = vs.variables().into_iter().collect();
    tensors.and_then(|tensors| apply(path, &tensors, &variables)).map_err(CheckpointError::of_chosen)
}

#[cfg(test)]
#[path = "weights_tests.rs"]
mod tests;
