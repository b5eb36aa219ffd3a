//! The second guide's checklist for task `yolo`, through the real programs. Numbers are the checklist's.

use crate::support::{Run, Runs, assert_same_checkpoint, launch_program, run};
use crate::yolo::shapes;
use rustix::process::Signal;
use serde_json::Value;
use spec::contract::exit;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The smallest model on images of 64 pixels; an epoch has two steps.
const TINY: &str = r#"
task: yolo
seed: 7
yolo: {imgsz: 64, width: 0.125, nbs: 8, close_mosaic: 1, mosaic_window: 8}
train: {batch_size: 8, num_epochs: 2, warmup_epochs: 0, num_workers: 1, val_batch_size: 4}
data: {max_train_windows: 16, max_val_windows: 4}
log: {log_every: 1, memory_every: 1, plots: false, images: 0}
"#;

fn runs(sets: &[&str]) -> Runs {
    Runs::of(TINY, shapes(), sets)
}

fn launch(words: &[&str]) -> Command {
    let mut command = Command::new(launch_program());
    command.args(words);
    command
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn named(folder: &Path, word: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().flatten().map(|entry| entry.path());
    entries.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(word))).collect()
}

fn records(run: &Run) -> Vec<Value> {
    crate::support::read_lines(&run.path.join("memory.rank0.jsonl"))
}

/// 8: batches, and so the weights, are the same bits in the main thread, and with one thread or three.
#[test]
fn checklist_08_the_number_of_workers_changes_speed_alone() {
    let run = |workers: usize| {
        let runs = runs(&[&format!("train.num_workers={workers}"), "train.max_steps=3", "log.save_every=0"]);
        let done = runs.finish("a", &["--ranks", "1"]);
        (runs, done)
    };
    let (_kept, main) = run(0);
    for workers in [1, 3] {
        let (_kept, own) = run(workers);
        assert_same_checkpoint(&own, &main, 3, &format!("{workers} workers"));
    }
}

/// 19: decoded images are cached, the second epoch reads none again, and nothing changes without a cache.
#[test]
fn checklist_19_a_cache_is_filled_once_and_changes_no_bit() {
    let cached = runs(&["yolo.cache=ram", "data.cache_size_gb=0.02", "log.save_every=0"]);
    let with = cached.finish("with", &["--ranks", "2"]);
    let summary = with.summary();
    let count = |key: &str| summary["cache"][key].as_u64().unwrap();
    // Each of 16 + 4 images once, whatever the ranks, epochs and mosaics.
    assert_eq!((count("misses"), count("evictions")), (20, 0), "{summary}");
    let plain = runs(&["yolo.cache=off", "log.save_every=0"]);
    let without = plain.finish("without", &["--ranks", "2"]);
    assert_same_checkpoint(&with, &without, *with.steps().last().unwrap(), "cache");
}

/// 41, 42, 46, 47: a run is watched while it trains, by itself and by `launch monitor`; logs can be read and analysed.
#[test]
fn checklist_41_to_47_a_run_is_watched_logged_and_analysed() {
    let runs = runs(&["train.num_epochs=10000"]);
    let mut job = runs.start("watched", &["--ranks", "2"]);
    let own = runs.run("watched");
    assert!(job.until("the first epoch", || own.steps_so_far() > 2), "{}", job.read("err"));
    let mut monitor = launch(&["monitor", "--duration", "1", "--interval", "0.2", "--plot-interval", "60", "--run"]);
    let ended = run(monitor.arg(&own.path), runs.path());
    assert_eq!(ended.code, Some(0), "{ended}");
    let logs = named(&own.path, "memory_log_");
    let samples = json(&logs[0]);
    for key in ["ram_total_gb", "ram_used_gb", "ram_percent", "elapsed_time", "timestamp"] {
        assert!(!samples[0][key].is_null(), "{key}: {samples}");
    }
    job.signal(Signal::TERM);
    assert_eq!(job.wait().code, Some(i32::from(exit::STOPPED)));
    let of_rank = records(&own);
    assert!(of_rank.iter().all(|record| record["system_total_bytes"].as_u64() > Some(0)), "{of_rank:?}");
    let analysed = |path: &Path| run(launch(&["analyze"]).arg(path), runs.path());
    assert_eq!(analysed(&logs[0]).code, Some(0));
    let ended = analysed(&own.path);
    assert!(ended.code == Some(0) && ended.out.contains("rank, in all"), "{ended}");
    let missing = analysed(&own.path.join("no_such_log.json"));
    assert!(missing.code == Some(4) && missing.err.contains("no such run or log"), "{missing}");
}

/// 44, 60: memory is looked at before training, given back on the way, and reported at the end. 43: the report's lines. 63: the look
/// before training says what is available.
#[test]
fn checklist_43_44_60_63_memory_is_looked_at_before_given_back_and_reported_after() {
    let runs = runs(&["train.cleanup_every=2", "log.language=zh"]);
    let ended = runs.train("a", &["--ranks", "1"]);
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(ended.out.contains("可用内存: "), "{ended}");
    let log = fs::read_to_string(runs.run("a").path.join("rank0.log")).unwrap();
    let cleanups = log.matches("Memory cleanup completed").count();
    assert!(cleanups >= 2, "{cleanups} clean-ups: {log}");
    let summary = runs.run("a").summary();
    assert!(summary["peak_node_bytes"].as_u64() > Some(0), "{summary}");
}

/// 61: legs of fresh processes, decided by the guide's targets on what an epoch measured; results.csv continues over the legs.
#[test]
fn checklist_61_the_smart_trainer_decides_from_results_and_starts_afresh() {
    let sets = [
        "smart.leg_epochs=1",
        "smart.increment=1",
        "smart.max_total_epochs=3",
        "smart.threshold=0",
        "smart.window=100",
    ];
    let runs = runs(&sets);
    let own = runs.finish("legs", &["--ranks", "1", "--smart"]);
    let report = json(&own.path.join("smart_report.json"));
    let legs = report["legs"].as_array().unwrap();
    let epochs: Vec<u64> = legs.iter().map(|leg| leg["epochs"].as_u64().unwrap()).collect();
    // Whether losses of so few epochs fall is chance.
    assert!([[1, 2].as_slice(), &[1, 2, 3]].contains(&epochs.as_slice()), "{report}");
    let last = &legs[legs.len() - 1]["decision"];
    assert_eq!(last, if epochs.len() == 3 { "epochs_done" } else { "no_progress" }, "{report}");
    let text = report.to_string();
    for target in ["train.box_loss", "train.cls_loss", "train.dfl_loss", "val.map50"] {
        assert!(text.contains(target), "{target}: {text}");
    }
    let table = fs::read_to_string(own.path.join("results.csv")).unwrap();
    let firsts: Vec<&str> = table.lines().map(|line| line.split(',').next().unwrap()).collect();
    assert_eq!(firsts, ["epoch", "1", "2", "3"][..=epochs.len()]);
    let peaks: Vec<f64> = report["peak_pss_bytes"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
    assert!(peaks.iter().all(|peak| *peak < 1.3 * peaks[0]), "{peaks:?}");
}

/// 62: several batch sizes, one after the other, none of which leaves anything behind for the next.
#[test]
fn checklist_62_batch_experiments_are_runs_of_their_own() {
    let runs = runs(&["train.max_steps=1", "log.save_every=0"]);
    let mut command = runs.command(&["sweep"]);
    command.args(["--name", "batches", "--set", "train.batch_size=2,8"]);
    let ended = run(&mut command, runs.path());
    assert_eq!(ended.code, Some(0), "{ended}");
    let rows = ended.out.lines().filter(|line| line.starts_with("batches-00") && line.contains("finished")).count();
    assert_eq!(rows, 2, "{ended}");
    for (name, batch) in [("batches-000", 2), ("batches-001", 8)] {
        let kept = fs::read_to_string(runs.run(name).path.join("config.yaml")).unwrap();
        assert!(kept.contains(&format!("batch_size: {batch}")), "{name}: {kept}");
    }
}

/// 64: the package's name for a key is kept with the run under its own, and an unknown one is refused with the nearest.
#[test]
fn checklist_64_keys_set_at_the_start_are_kept_and_unknown_ones_refused() {
    let runs = runs(&["train.max_steps=1", "log.save_every=0"]);
    let own = runs.finish("set", &["--ranks", "1", "--set", "batch=4"]);
    let kept = fs::read_to_string(own.path.join("config.yaml")).unwrap();
    assert!(kept.contains("batch_size: 4"), "{kept}");
    let ended = runs.train("unknown", &["--set", "yolo.close_mosaics=3"]);
    assert_eq!(ended.code, Some(i32::from(exit::USAGE)), "{ended}");
    assert!(ended.err.contains("yolo.close_mosaic"), "{ended}");
}
