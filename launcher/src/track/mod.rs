//! Records of a run in the forms of other tools: TensorBoard's event files, `MLflow`'s file store, W&B's offline runs, CSV.
//!
//! ```text
//! metrics.jsonl, memory.*.jsonl, images/ ──► follow (while the run trains) ──► events.out.tfevents.…
//!                    a run's folder, whole ──► export ──► csv, mlflow, wandb, event files
//! ```
//! Architecture invariant: the run's own records stay the source; nothing here is read back by Headroom.

mod csv;
mod events;
mod facts;
mod follow;
mod mlflow;
mod proto;
mod tail;
mod wandb;

pub use events::SessionEnd;
pub use facts::{Param, Params, Scalar, hostname, params};
pub use follow::{Before, Follower};

use crate::advise::{LogError, Run};
use serde_json::Value;
use spec::contract::shown;
use std::io;
use std::path::{Path, PathBuf};

/// A form of another tool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    Csv,
    TensorBoard,
    Mlflow,
    WandbOffline,
}

/// Why a run was not exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    #[error(transparent)]
    Read(#[from] LogError),
    #[error("{path}: the run has no metrics yet: export it once it has trained a step", path = shown(.0))]
    Empty(PathBuf),
    #[error("cannot write {path}", path = shown(path))]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// A run, read whole for an export.
struct Source {
    folder: PathBuf,
    name: String,
    run: Run,
    job: Value,
    params: Params,
}

impl Source {
    fn read(folder: &Path) -> Result<Self, ExportError> {
        let run = Run::read(folder, Path::new(""))?;
        if run.metrics.is_empty() {
            return Err(ExportError::Empty(folder.to_owned()));
        }
        let folder = std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned());
        let job: Value = crate::advise::json(&folder.join("job.json")).unwrap_or_default();
        let params = job.get("config").map(params).unwrap_or_default();
        Ok(Self { name: facts::name(&folder), folder, run, job, params })
    }

    /// Seconds since the Unix epoch.
    fn times(&self) -> [f64; 2] {
        let times = self.run.metrics.iter().map(|record| record.t).filter(|t| *t > 0.0);
        let first = times.clone().reduce(f64::min).unwrap_or(0.0);
        let train_s = self.run.summary.as_ref().map_or(0.0, |summary| summary.wall_s);
        [first, times.reduce(f64::max).unwrap_or(0.0).max(first + train_s)]
    }

    /// Id of 32 hexadecimal digits; the same for every export of this start of the run.
    fn id(&self) -> String {
        let start = self.job.get("start").and_then(Value::as_str).unwrap_or_default();
        facts::digest(&[self.folder.as_os_str().as_encoded_bytes(), start.as_bytes()])
    }

    /// One of the run's small files, for trackers that keep copies.
    fn artifacts(&self) -> Vec<(String, PathBuf)> {
        let mut found = Vec::new();
        for name in ["config.yaml", "plan.json", "summary.json"] {
            found.push((name.to_owned(), self.folder.join(name)));
        }
        for folder in ["plots", "images"] {
            let mut files: Vec<_> =
                self.folder.join(folder).read_dir().into_iter().flatten().flatten().map(|entry| entry.path()).collect();
            files.sort();
            let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            found.extend(files.into_iter().map(|path| (format!("{folder}/{}", name(&path)), path)));
        }
        found.retain(|(_, path)| path.is_file());
        found
    }
}

/// Writes the run in `folder` in another tool's form. `out`: where; else that tool's usual place. Returns the place.
///
/// # Errors
/// There is no such run, it has no metrics, or the files cannot be written.
pub fn export(folder: &Path, form: Form, out: Option<&Path>) -> Result<PathBuf, ExportError> {
    let source = Source::read(folder)?;
    let out = out.map_or_else(
        || match form {
            Form::Csv => source.folder.join("metrics.csv"),
            Form::TensorBoard => source.folder.clone(),
            Form::Mlflow => "mlruns".into(),
            Form::WandbOffline => "wandb".into(),
        },
        Path::to_owned,
    );
    let at = std::path::absolute(&out).unwrap_or(out);
    let written = match form {
        Form::Csv => csv::write(&source, &at),
        Form::TensorBoard => follow::export(&source, &at),
        Form::Mlflow => mlflow::write(&source, &at),
        Form::WandbOffline => wandb::write(&source, &at),
    };
    written.map_err(|source| ExportError::Write { path: at, source })
}

#[cfg(test)]
pub(crate) mod tests;
