//! Runs that resume after the files of their data set changed.

use crate::support::{Ended, Runs, folder, rank_program, run};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// Fourteen sessions of one second, and runs over them that stop after 4 steps. Epochs have 5 steps however many files
/// training has.
fn data_and_runs() -> (TempDir, PathBuf, Runs) {
    let folder = folder();
    let data = folder.path().join("data");
    let mut command = Command::new(rank_program());
    command.args(["sample-data", "--task", "emg", "--sessions", "14", "--seconds", "1", "--out"]).arg(&data);
    let made = run(&mut command, folder.path());
    assert_eq!(made.code, Some(0), "{made}");
    let path = format!("data.dataset_path={}", data.display());
    let runs = Runs::new(&[&path, "log.save_every_steps=4", "train.max_steps=4", "data.max_train_windows=40"]);
    (folder, data, runs)
}

/// Names of the files of a split (0: training) by a checkpoint's own list.
fn files_of(checkpoint: &Path, split: usize) -> Vec<String> {
    let list: Value = serde_json::from_slice(&fs::read(checkpoint.join("split.json")).unwrap()).unwrap();
    let units = list["units"].as_array().unwrap();
    let of_split = units.iter().filter(|unit| unit["splits"][split].as_bool().unwrap());
    of_split.map(|unit| unit["name"].as_str().unwrap().to_owned()).collect()
}

fn resume(runs: &Runs, name: &str, steps: &str, more: &[&str]) -> Ended {
    let steps = format!("train.max_steps={steps}");
    runs.train(name, &[&["--ranks", "2", "--resume", "auto", "--set", &steps], more].concat())
}

#[test]
fn a_renamed_session_that_was_held_out_stays_held_out_and_the_losses_are_the_same() {
    let (_folder, data, runs) = data_and_runs();
    let reference = runs.finish("reference", &["--ranks", "2", "--set", "train.max_steps=8"]);
    let stopped = runs.finish("r", &["--ranks", "2"]);
    let held_out = files_of(&stopped.checkpoint(4), 1);
    fs::rename(data.join(&held_out[0]), data.join("a-renamed.hdf5")).unwrap();
    let ended = resume(&runs, "r", "8", &[]);
    assert_eq!(ended.code, Some(0), "{ended}");
    let line = format!("resumed split: 1 file is renamed: {} is a-renamed.hdf5 now", held_out[0]);
    assert_eq!(ended.out.matches(&line).count(), 1, "{ended}");
    assert_eq!(stopped.losses(), reference.losses());
    assert_eq!(files_of(&stopped.checkpoint(8), 1)[0], "a-renamed.hdf5");
    assert_eq!(files_of(&stopped.checkpoint(8), 0), files_of(&stopped.checkpoint(4), 0));
}

#[test]
fn a_doubtful_split_is_refused_until_the_user_decides() {
    let (_folder, data, runs) = data_and_runs();
    let stopped = runs.finish("r", &["--ranks", "2"]);
    let of_step = |step| [0, 1, 2].map(|split| files_of(&stopped.checkpoint(step), split));
    let [train, val, _] = of_step(4);
    // The content of a held-out session under a training session's name, stored anew: nothing recognises it.
    let text = fs::read(data.join(&val[0])).unwrap();
    fs::write(data.join(&train[0]), [text, vec![0; 8]].concat()).unwrap();
    fs::remove_file(data.join(&val[0])).unwrap();
    let refused = resume(&runs, "r", "8", &[]);
    assert_eq!(refused.code, Some(4), "{refused}");
    let doubt = format!("{} (train) has other content and {} (val) is gone", train[0], val[0]);
    for part in [&*doubt, "checkpoints/step-4", "--resume-split keep", "--resume-split new"] {
        assert!(refused.err.contains(part), "{part}: {refused}");
    }
    assert_eq!(stopped.steps(), [1, 2, 3, 4], "nothing was trained on");
    let kept = resume(&runs, "r", "8", &["--resume-split", "keep"]);
    assert_eq!(kept.code, Some(0), "{kept}");
    assert!(kept.out.contains("known by name alone, with other content than before"), "{kept}");
    assert_eq!(of_step(8), of_step(4), "by names, the missing one included");
    let new = resume(&runs, "r", "12", &["--resume-split", "new"]);
    assert_eq!(new.code, Some(0), "{new}");
    assert_eq!(of_step(12).concat().len(), 13, "the files that are there");
}

#[test]
fn an_older_checkpoint_without_a_list_resumes_with_a_line() {
    let (_folder, _data, runs) = data_and_runs();
    let stopped = runs.finish("r", &["--ranks", "2"]);
    let checkpoint = stopped.checkpoint(4);
    fs::remove_file(checkpoint.join("split.json")).unwrap();
    // As an earlier version wrote the manifest: without the file.
    let manifest = checkpoint.join("state.json");
    let mut state: Value = serde_json::from_slice(&fs::read(&manifest).unwrap()).unwrap();
    state["files"].as_object_mut().unwrap().remove("split.json").unwrap();
    state.as_object_mut().unwrap().remove("crc32");
    let crc32 = libdeflater::crc32(&serde_json::to_vec(&state).unwrap());
    state["crc32"] = crc32.into();
    fs::write(&manifest, serde_json::to_vec_pretty(&state).unwrap()).unwrap();
    let ended = resume(&runs, "r", "8", &[]);
    assert_eq!(ended.code, Some(0), "{ended}");
    assert_eq!(ended.out.matches("step-4 does not say which files each split had").count(), 1, "{ended}");
    assert!(stopped.checkpoint(8).join("split.json").is_file());
}
