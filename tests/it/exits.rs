//! Exit codes as `spec::contract::exit` lists them, and what `launch` links.

use crate::support::{Runs, folder, launch_program, run};
use std::process::Command;

fn launch(words: &[&str]) -> (Option<i32>, String) {
    let folder = folder();
    let mut command = Command::new(launch_program());
    let ended = run(command.args(words).current_dir(folder.path()), folder.path());
    (ended.code, ended.err)
}

#[test]
fn the_launcher_links_no_tensor_cuda_or_hdf5_library() {
    let output = Command::new("ldd").arg(launch_program()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("libc.so"), "{text}");
    // Load addresses are left out: one of them may contain `c10`.
    let libraries: Vec<&str> = text.lines().map(|line| line.split("(0x").next().unwrap_or(line)).collect();
    for name in ["torch", "c10", "cuda", "nvidia", "hdf5"] {
        assert!(libraries.iter().all(|library| !library.contains(name)), "{text}");
    }
}

#[test]
fn a_wrong_command_line_or_config_is_2() {
    for (words, says) in [
        (&["--gpus", "3"][..], "no config"),
        (&["--config", "quick_demo", "--gpus", "0"], "expected a whole number of 1 or more"),
        (&["--config", "no_such_config"], "quick_demo"),
        (&["--config", "quick_demo", "--set", "train.batchsize=3"], "train.batch_size"),
        (&["--config", "quick_demo", "--set", "train.batch_size=many"], "train.batch_size"),
        (&["--config", "quick_demo", "--name", "../up", "--set", "data.sample_if_missing=false"], "--name"),
    ] {
        let (code, err) = launch(words);
        assert_eq!(code, Some(2), "{words:?}: {err}");
        assert!(err.contains(says), "{words:?}: {err}");
    }
    assert_eq!(launch(&["--help"]).0, Some(0));
}

#[test]
fn a_plan_that_does_not_fit_is_3_and_starts_nothing() {
    let runs = Runs::new(&["memory.budget=300MiB"]);
    let ended = runs.train("big", &["--ranks", "3"]);
    assert_eq!(ended.code, Some(3), "{ended}");
    assert!(!runs.run("big").path.exists());
    let planned = run(&mut runs.command(&["plan", "--ranks", "3"]), runs.path());
    assert_eq!((planned.code, planned.err), (Some(3), ended.err));
}

#[test]
fn data_that_are_not_there_are_4_in_training_and_in_batch() {
    let runs = Runs::new(&["data.dataset_path=/no/such/folder"]);
    let ended = runs.train("nothing", &["--ranks", "2"]);
    assert_eq!(ended.code, Some(4), "{ended}");
    assert!(ended.err.contains("/no/such/folder"), "{ended}");
    let mut batch = runs.command(&["batch", "--step", "0", "--rank", "0", "--world", "1", "--out", "/dev/null"]);
    let ended = run(&mut batch, runs.path());
    assert_eq!(ended.code, Some(4), "{ended}");
}

#[test]
fn a_checkpoint_that_cannot_be_used_is_5_and_the_others_stay() {
    let runs = Runs::new(&["train.max_steps=4", "log.save_every_steps=2"]);
    let run = runs.finish("a", &[]);
    let (older, newer) = (run.checkpoint(2), run.checkpoint(4));
    let weights = newer.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&weights, &bytes).unwrap();
    let ended = runs.train("a", &["--resume", "auto"]);
    assert_eq!(ended.code, Some(5), "{ended}");
    assert!(ended.err.contains("step-4") && ended.err.contains("resume from an earlier checkpoint"), "{ended}");
    let kept = (run.steps(), std::fs::read(older.join("model.safetensors")).unwrap());
    assert_eq!(kept.0, [1, 2, 3, 4], "a refused resume has cut the records");
    let none = runs.path().join("none");
    let path = none.display().to_string();
    let missing = crate::support::run(&mut runs.command(&["--resume", &path]), runs.path());
    assert_eq!(missing.code, Some(5), "{missing}");
    let path = older.display().to_string();
    let resumed = crate::support::run(&mut runs.command(&["--resume", &path]), runs.path());
    assert_eq!(resumed.code, Some(0), "{resumed}");
    assert_eq!(run.steps(), [1, 2, 3, 4]);
}

#[test]
fn a_loss_that_is_no_number_is_7_and_the_last_good_state_can_be_read() {
    let runs = Runs::new(&["train.optimizer=sgd", "train.learning_rate=1e30", "train.gradient_clip_norm=0.0"]);
    for words in [&["--ranks", "2"][..], &["--ranks", "2", "--resume", "auto"]] {
        let ended = runs.train("nan", words);
        assert_eq!(ended.code, Some(7), "{ended}");
        assert!(ended.err.contains("the last good state is in checkpoints/step-1"), "{ended}");
    }
    let tensors = runs.run("nan").tensors(1, "model.safetensors");
    let finite = tensors.values().all(|(_, bytes)| crate::support::floats(bytes).iter().all(|x| x.is_finite()));
    assert!(finite);
}

#[test]
fn devices_that_are_not_there_are_8_when_strict() {
    let runs = Runs::new(&[]);
    let ended = runs.train("strict", &["--gpus", "4096", "--strict"]);
    assert_eq!(ended.code, Some(8), "{ended}");
}
