//! `MLflow`'s file store: `mlruns/<experiment>/<run>/{meta.yaml, metrics, params, tags, artifacts}`.
//!
//! Source: mlflow/store/tracking/file_store.py.

use super::Source;
use super::facts::{digest, of_metrics};
use serde_json::Value;
use spec::contract::RunStatus;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::io;
use std::path::{Path, PathBuf};

const EXPERIMENT: &str = "headroom";
/// `RunStatus` of mlflow/entities.
const RUNNING: u8 = 1;
const FINISHED: u8 = 3;
const FAILED: u8 = 4;
const KILLED: u8 = 5;
/// `SourceType.LOCAL`.
const LOCAL: u8 = 4;
/// Longest value of a parameter that the store accepts, characters.
const LONGEST_PARAM: usize = 6000;

pub(super) fn write(source: &Source, out: &Path) -> io::Result<PathBuf> {
    let experiment_id = experiment(out)?;
    let folder = out.join(&experiment_id);
    let id = source.id();
    let (run, partial) = (folder.join(&id), folder.join(format!(".{id}.new")));
    let _ = std::fs::remove_dir_all(&partial);
    let written = fill(source, &partial, &meta(source, &id, &experiment_id, &run));
    // The same start exported again replaces what was there.
    let moved = written.and_then(|()| {
        let _ = std::fs::remove_dir_all(&run);
        std::fs::rename(&partial, &run)
    });
    moved.inspect_err(|_| drop(std::fs::remove_dir_all(&partial)))?;
    Ok(run)
}

/// Writes a run's folder.
fn fill(source: &Source, partial: &Path, meta: &str) -> io::Result<()> {
    for name in ["metrics", "params", "tags", "artifacts"] {
        std::fs::create_dir_all(partial.join(name))?;
    }
    metrics(source, &partial.join("metrics"))?;
    for (key, value) in &source.params {
        let text: String = value.text().chars().take(LONGEST_PARAM).collect();
        std::fs::write(partial.join("params").join(safe(key)), text)?;
    }
    for (key, value) in tags(source) {
        std::fs::write(partial.join("tags").join(key), value)?;
    }
    for (name, path) in source.artifacts() {
        let to = partial.join("artifacts").join(name);
        to.parent().map(std::fs::create_dir_all).transpose()?;
        std::fs::copy(path, to)?;
    }
    std::fs::write(partial.join("meta.yaml"), meta)
}

/// The store's experiment of Headroom's runs, made where it is missing.
fn experiment(out: &Path) -> io::Result<String> {
    // A number below 2^60, as `MLflow` chooses them.
    let hex = digest(&[EXPERIMENT.as_bytes()]);
    let id = (u64::from_str_radix(&hex[..15], 16).unwrap_or(1)).to_string();
    let folder = out.join(&id);
    std::fs::create_dir_all(&folder)?;
    let meta = folder.join("meta.yaml");
    if !meta.is_file() {
        let text = format!(
            "artifact_location: {}\nexperiment_id: '{id}'\nlifecycle_stage: active\nname: {EXPERIMENT}\n",
            quoted(&uri(&folder))
        );
        host::journal::replace(&meta, &meta.with_extension("new"), text.as_bytes(), host::journal::ROOM_LIMIT)?;
    }
    Ok(id)
}

fn metrics(source: &Source, folder: &Path) -> io::Result<()> {
    let mut files: BTreeMap<String, String> = BTreeMap::new();
    for record in &source.run.metrics {
        for (name, value) in of_metrics(record) {
            let text = files.entry(name).or_default();
            let number = match value {
                value if value.is_nan() => "nan".to_owned(),
                value if value.is_infinite() => if value > 0.0 { "inf" } else { "-inf" }.to_owned(),
                value => format!("{value:?}"),
            };
            let _ = writeln!(text, "{:.0} {number} {}", record.t * 1000.0, record.step);
        }
    }
    for (name, text) in files {
        std::fs::write(folder.join(safe(&name)), text)?;
    }
    Ok(())
}

fn tags(source: &Source) -> Vec<(&'static str, String)> {
    let at = |pointer: &str| source.job.pointer(pointer).and_then(Value::as_str).map(str::to_owned);
    let mut tags = vec![("mlflow.runName", source.name.clone()), ("mlflow.source.type", "LOCAL".into())];
    tags.extend(at("/config/task").map(|task| ("headroom.task", task)));
    tags.extend(at("/origin/host").map(|host| ("headroom.host", host)));
    tags.extend(at("/origin/commit").map(|commit| ("mlflow.source.git.commit", commit)));
    let words = source.job.pointer("/origin/command").and_then(Value::as_array);
    let line = words.map(|words| words.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" "));
    tags.push(("mlflow.source.name", line.unwrap_or_else(|| "launch".into())));
    tags.push(("headroom.run_dir", source.folder.display().to_string()));
    tags
}

fn meta(source: &Source, id: &str, experiment_id: &str, run: &Path) -> String {
    let [first, last] = source.times().map(|t| (t * 1000.0) as i64);
    let (status, end) = match source.run.summary.as_ref().map(|summary| summary.status) {
        _ if source.run.open_ended => (RUNNING, "null".to_owned()),
        Some(RunStatus::Finished | RunStatus::EarlyStopped) => (FINISHED, last.to_string()),
        Some(RunStatus::Stopped) => (KILLED, last.to_string()),
        _ => (FAILED, last.to_string()),
    };
    let artifacts = quoted(&uri(&run.join("artifacts")));
    let name = quoted(&source.name);
    format!(
        "artifact_uri: {artifacts}\nend_time: {end}\nentry_point_name: ''\nexperiment_id: '{experiment_id}'\n\
         lifecycle_stage: active\nrun_id: {id}\nrun_name: {name}\nrun_uuid: {id}\nsource_name: ''\nsource_type: {LOCAL}\n\
         source_version: ''\nstart_time: {first}\nstatus: {status}\ntags: []\nuser_id: {user}\n",
        user = quoted(&std::env::var("USER").unwrap_or_else(|_| "unknown".into()))
    )
}

/// A scalar of YAML: JSON's strings are.
fn quoted(text: &str) -> String {
    serde_json::to_string(text).unwrap_or_default()
}

/// A `file://` address.
fn uri(path: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/-_.~".contains(&byte);
    let escape = |byte: &u8| if plain(*byte) { char::from(*byte).to_string() } else { format!("%{byte:02X}") };
    format!("file://{}", path.as_os_str().as_bytes().iter().map(escape).collect::<String>())
}

/// A name that the store accepts as a file's: letters, digits, `_ - . space :`; a slash makes a folder, which names here avoid.
fn safe(name: &str) -> String {
    let good = |c: char| c.is_alphanumeric() || "_-. :".contains(c);
    match name {
        "" => "_".into(),
        // They are folders.
        "." | ".." => "_".repeat(name.len()),
        name => name.chars().map(|c| if good(c) { c } else { '_' }).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::track::{Form, export, tests::run};

    #[test]
    fn the_store_holds_every_metric_and_the_same_run_twice_is_one() {
        let dir = tempfile::tempdir().unwrap();
        let folder = run(dir.path());
        let out = dir.path().join("ml runs");
        let first = export(&folder, Form::Mlflow, Some(&out)).unwrap();
        assert_eq!(export(&folder, Form::Mlflow, Some(&out)).unwrap(), first);
        let loss = std::fs::read_to_string(first.join("metrics/loss")).unwrap();
        assert_eq!(loss.lines().next(), Some("1000 0.5 1"), "{loss}");
        assert!(loss.ends_with(" nan 3\n"), "{loss}");
        assert_eq!(std::fs::read_to_string(first.join("params/train.batch_size")).unwrap(), "4");
        let meta = std::fs::read_to_string(first.join("meta.yaml")).unwrap();
        assert!(meta.contains("status: 3") && meta.contains("ml%20runs"), "{meta}");
        assert!(meta.contains("run_name: \"night\""), "{meta}");
        assert_eq!(["a/b\"c", "", ".", ".."].map(safe), ["a_b_c", "_", "_", "__"]);
    }
}
