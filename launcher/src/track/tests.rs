//! A small run to export, and the forms that are one file each.

use super::facts::of_node;
use super::*;
use spec::contract::{MetricsRecord, NodeRecord, RunStatus, Summary};
use std::fmt::Write;

/// A run of three steps in `root/night`.
pub(crate) fn run(root: &Path) -> PathBuf {
    let folder = root.join("night");
    std::fs::create_dir_all(&folder).unwrap();
    let mut lines = String::new();
    for step in 1..=3u64 {
        let loss = if step == 3 { f64::NAN } else { 1.0 / (1.0 + step as f64) };
        let mut record = MetricsRecord { t: step as f64, step, epoch: 1, loss, lr: 1e-3, ..MetricsRecord::default() };
        if step == 2 {
            record.metrics.insert("val.loss".into(), 0.25);
        }
        writeln!(lines, "{}", serde_json::to_string(&record).unwrap()).unwrap();
    }
    std::fs::write(folder.join("metrics.jsonl"), lines).unwrap();
    std::fs::write(folder.join("memory.rank0.jsonl"), "").unwrap();
    std::fs::write(folder.join("plan.json"), serde_json::to_vec(&spec::plan::Plan::default()).unwrap()).unwrap();
    let mut summary = Summary { status: RunStatus::Finished, steps: 3, start: "s".into(), ..Summary::default() };
    summary.metrics.insert("val.loss".into(), 0.25);
    std::fs::write(folder.join("summary.json"), serde_json::to_vec(&summary).unwrap()).unwrap();
    let job = serde_json::json!({"start": "s", "config": {"task": "emg", "train": {"batch_size": 4}}});
    std::fs::write(folder.join("job.json"), job.to_string()).unwrap();
    folder
}

#[test]
fn an_event_file_of_a_whole_run_goes_into_its_folder() {
    let dir = tempfile::tempdir().unwrap();
    let folder = run(dir.path());
    let made = export(&folder, Form::TensorBoard, None).unwrap();
    assert_eq!(made.parent(), Some(folder.as_path()));
    let bytes = std::fs::read(made).unwrap();
    let holds = |word: &str| bytes.windows(word.len()).any(|window| window == word.as_bytes());
    for word in ["loss", "val.loss", "_hparams_/session_start_info", "train.batch_size", "final/val.loss"] {
        assert!(holds(word), "{word}");
    }
}

#[test]
fn a_follower_continues_behind_the_checkpoint_and_marks_steps_that_come_again() {
    let dir = tempfile::tempdir().unwrap();
    let folder = run(dir.path());
    let out = dir.path().join("out");
    std::fs::create_dir(&out).unwrap();
    let node = folder.join("memory.node.jsonl");
    let records = |count| format!("{}\n", serde_json::to_string(&NodeRecord::default()).unwrap()).repeat(count);
    std::fs::write(&node, records(1)).unwrap();
    let before = Before::of(&folder, 2);
    // The watch may be faster than the first look.
    std::fs::write(&node, records(2)).unwrap();
    let mut follower = Follower::start(&folder, &out, Vec::new(), Some(&before)).unwrap();
    let size = |follower: &Follower| follower.path().metadata().unwrap().len();
    let began = size(&follower);
    follower.advance().unwrap();
    let third = size(&follower);
    assert!(third > began, "step 3 is behind the checkpoint");
    let bytes = std::fs::read(follower.path()).unwrap();
    let scalars = bytes.windows(12).filter(|window| *window == b"memory_gib/n").count();
    let one = of_node(&NodeRecord::default()).iter().filter(|(name, _)| name.starts_with("memory_gib/n")).count();
    assert!(one > 0 && scalars == one, "the node's record after the resume, once: {scalars}, {one}");
    follower.advance().unwrap();
    assert_eq!(size(&follower), third, "each record once");
    // The run is cut back to its checkpoint and trains step 3 again.
    let text = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    let two: String = text.lines().take(2).map(|line| format!("{line}\n")).collect();
    std::fs::write(folder.join("metrics.jsonl"), two).unwrap();
    follower.advance().unwrap();
    let cut = size(&follower);
    assert!(cut > third, "what was written of step 3 is no longer valid");
    std::fs::write(folder.join("metrics.jsonl"), text).unwrap();
    follower.advance().unwrap();
    assert!(size(&follower) > cut);
    follower.finish(SessionEnd::Success).unwrap();
}

#[test]
fn a_run_without_metrics_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let folder = run(dir.path());
    std::fs::write(folder.join("metrics.jsonl"), "").unwrap();
    let error = export(&folder, Form::Csv, None).unwrap_err().to_string();
    assert!(error.contains("has no metrics yet"), "{error}");
}
