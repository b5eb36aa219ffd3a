//! Task `yolo` through the real programs: training on several ranks, what a run leaves, evaluation, prediction, first weights.

use crate::support::{Ended, Run, Runs, distance, folder, launch_program, run};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

const TINY: &str = r#"
task: yolo
seed: 7
yolo: {imgsz: 64, width: 0.125, nbs: 6, warmup_bias_lr: 0.01, augment: {mosaic: 0.5}, close_mosaic: 1, mosaic_window: 8}
train: {batch_size: 6, num_epochs: 2, warmup_epochs: 1, num_workers: 1, val_batch_size: 4, sync_batchnorm: true}
log: {log_every: 1, memory_every: 1000, plots: false}
"#;

pub fn shapes() -> &'static Path {
    static DATA: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = DATA.get_or_init(|| {
        let here = folder();
        let out = here.path().join("shapes");
        let mut made = Command::new(launch_program());
        made.args(["sample-data", "--task", "yolo", "--out"]).arg(&out);
        let ended = run(&mut made, here.path());
        assert_eq!(ended.code, Some(0), "{ended}");
        (here, out)
    });
    path
}

fn runs(sets: &[&str]) -> Runs {
    Runs::of(TINY, shapes(), sets)
}

fn done(folder: &Path, words: &[&str]) -> Ended {
    let mut command = Command::new(launch_program());
    let ended = run(command.args(words).current_dir(folder), folder);
    assert_eq!(ended.code, Some(0), "{words:?}: {ended}");
    ended
}

fn last_step(run: &Run) -> u64 {
    run.steps().last().copied().unwrap()
}

/// Six images of a step on one, two and three ranks: the same weights but for rounding.
#[test]
fn ranks_train_one_model() {
    // At small rates: a large step brings anchors so near to a tie that rounding gives them to another box.
    let small = ["train.learning_rate=1e-3", "train.warmup_epochs=0", "train.max_steps=4", "log.save_every=0"];
    let limit =
        |ranks: usize| runs(&[&[format!("train.batch_size={}", 6 / ranks).as_str()], small.as_slice()].concat());
    let one = limit(1);
    let alone = one.finish("one", &["--ranks", "1"]);
    for ranks in [2, 3] {
        let many = limit(ranks);
        let own = many.finish("many", &["--ranks", &ranks.to_string()]);
        for (a, b) in own.losses().iter().zip(alone.losses()) {
            assert!(
                (a / b - 1.0).abs() < 1e-5,
                "{ranks} ranks: losses {:?} against {:?}",
                own.losses(),
                alone.losses()
            );
        }
        let far = distance(&own.tensors(4, "model.safetensors"), &alone.tensors(4, "model.safetensors"));
        // Of a tensor that began as zeros it is the distance of gradients, whose terms cancel.
        assert!(far.norm < 1e-3, "{ranks} ranks: weights differ by {:e} in {}", far.norm, far.worst);
    }
}

#[test]
fn a_run_leaves_tables_and_weights_that_are_evaluated_and_predict() {
    let runs = runs(&["yolo.save_period=1", "log.keep_last=1"]);
    let own = runs.finish("a", &["--ranks", "1"]);
    let table = fs::read_to_string(own.path.join("results.csv")).unwrap();
    let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split(',').collect()).collect();
    assert!(rows.len() == 3 && rows.iter().all(|row| row.len() == 15), "{table}");
    assert_eq!((rows[0][7], rows[1][0], rows[2][0]), ("metrics/mAP50(B)", "1", "2"));
    assert!(rows[1][2..].iter().all(|cell| cell.parse::<f64>().is_ok_and(f64::is_finite)), "{table}");
    for name in ["classes.csv", "PR_curve.png", "confusion_matrix.png"] {
        assert!(own.path.join(name).is_file(), "{name}");
    }
    // Samples of training, and one validation each epoch.
    assert!(own.path.join("images/train.png").is_file());
    assert_eq!(fs::read_dir(own.path.join("images")).unwrap().count(), 3);
    let last = last_step(&own);
    assert!(own.checkpoint(last / 2).is_dir(), "the first epoch's is kept for good");
    let record = own.metrics().into_iter().rev().find(|record| record.get("val.map50").is_some()).unwrap();
    for ranks in ["1", "3"] {
        let ended = done(runs.path(), &["evaluate", "a", "--json", "--weights", "last", "--ranks", ranks]);
        let found: Value = serde_json::from_str(&ended.out).unwrap_or_else(|e| panic!("{e}: {ended}"));
        for name in ["val.map50", "val.map50_95", "val.precision", "val.recall"] {
            let (a, b) = (found["metrics"][name].as_f64().unwrap(), record[name].as_f64().unwrap());
            assert!((a - b).abs() < 1e-3, "{name} on {ranks} ranks: {a} against {b}");
        }
    }
    let images = shapes().join("images/val");
    let count = fs::read_dir(&images).unwrap().count();
    done(runs.path(), &["predict", "a", "--data", images.to_str().unwrap(), "--out", "found", "--ranks", "2"]);
    let found = runs.path().join("found/predictions");
    for folder in ["labels", "images"] {
        assert_eq!(fs::read_dir(found.join(folder)).unwrap().count(), count, "{folder}");
    }
    let json: Value = serde_json::from_slice(&fs::read(found.join("predictions.json")).unwrap()).unwrap();
    assert!(json.is_array());
}

/// Weights of a run for three classes begin one for a single class.
#[test]
fn first_weights_of_other_classes_keep_all_but_the_class_branches() {
    let runs = runs(&["train.max_steps=1", "log.save_every=0"]);
    let own = runs.finish("three", &["--ranks", "1"]);
    let weights = own.checkpoint(1).join("model.safetensors");
    let set = format!("train.init_from={}", weights.display());
    let words = ["--ranks", "1", "--set", &set, "--set", "yolo.single_cls=true"];
    let ended = runs.train("one", &words);
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(ended.to_string().contains("are drawn anew, such as model.22.cv3.0.2.bias"), "{ended}");
    let before = own.tensors(1, "model.safetensors");
    let after = runs.run("one").tensors(1, "model.safetensors");
    assert_eq!(after["model.22.cv3.0.2.bias"].0, [1]);
    // The first step's rate is 0 but for biases.
    assert_eq!(before["model.0.conv.weight"], after["model.0.conv.weight"]);
}
