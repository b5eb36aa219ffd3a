//! The plan of shipped configs against what short runs of them use. `scripts/bench plan_truth` does so for all of them.

use crate::support::{Ended, Runs, folder, launch_program, run, sample_data};
use cache::Directory;
use serde_json::Value;
use spec::plan::DIRECTORY_ENTRY_BYTES;
use std::path::Path;
use std::process::Command;

/// Planned over measured, for what is no bound. Wider than the 1.15 of the bench: a run of a few steps may end before its
/// heap has come to its full size. Below 1.00 nothing is forgiven.
const MOST: f64 = 1.25;

/// `launch analyze --json` of a short run of a shipped config.
fn checks(config: &str, data: &Path, words: &[&str], sets: &[&str]) -> Vec<Value> {
    let folder = folder();
    let mut command = Command::new(launch_program());
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs").join(config);
    command.args(["--device", "cpu", "--name", "short", "--config"]).arg(file).args(words);
    let (data, runs) = (format!("data.dataset_path={}", data.display()), folder.path().join("runs"));
    let runs_dir = format!("log.runs_dir={}", runs.display());
    let usual = ["log.plots=false", "train.early_stopping=false", "train.num_epochs=2"];
    for set in [data.as_str(), runs_dir.as_str()].into_iter().chain(usual).chain(sets.iter().copied()) {
        command.args(["--set", set]);
    }
    let ended = run(command.env("OMP_WAIT_POLICY", "passive"), folder.path());
    assert_eq!(ended.code, Some(0), "{config}: {ended}");
    let said = run(Command::new(launch_program()).arg("analyze").arg(runs.join("short")).arg("--json"), folder.path());
    assert_eq!(said.code, Some(0), "{said}");
    let found: Value = serde_json::from_str(&said.out).unwrap();
    println!("{config} {words:?}");
    for check in found["checks"].as_array().unwrap() {
        println!("  {check}");
    }
    found["checks"].as_array().unwrap().clone()
}

fn hold(checks: &[Value], names: &[&str]) {
    for name in names {
        assert!(checks.iter().any(|check| check["name"] == *name), "{name} is not compared: {checks:?}");
    }
    for check in checks {
        assert!(check["verdict"] != "too_small", "{check}");
        let ratio = check["ratio"].as_f64();
        // A launcher's pages count in part where other tests run the same program at this moment.
        let forgiven = check["verdict"] == "bound" || check["name"] == "launcher";
        assert!(forgiven || ratio.is_none_or(|ratio| ratio <= MOST), "{check}");
    }
}

#[test]
fn no_line_of_the_plan_is_below_what_the_emg_model_uses() {
    let sets = ["data.stride=20", "data.max_train_windows=384", "data.max_val_windows=128"];
    let found = checks("default.yaml", sample_data(), &["--ranks", "2"], &sets);
    let all = ["launcher", "libraries", "runtime", "model state", "activations", "staging slots", "validation slots"];
    hold(&found, &all);
    hold(
        &found,
        &["decode scratch", "collectives", "checkpoint staging", "page cache", "a rank, in all", "all of the job"],
    );
}

#[test]
fn no_line_of_the_plan_is_below_what_the_video_model_uses() {
    let folder = folder();
    let data = folder.path().join("data");
    let mut made = Command::new(launch_program());
    made.args(["sample-data", "--task", "deblur", "--out"]).arg(&data);
    let ended = run(&mut made, folder.path());
    assert_eq!(ended.code, Some(0), "{ended}");
    let sets = ["data.max_train_windows=4", "data.max_val_windows=2"];
    hold(&checks("baseline.yaml", &data, &["--ranks", "1"], &sets), &["runtime", "activations", "a rank, in all"]);
}

/// Its table is filled to between 7/16 and 7/8, and doubles beside the old one; a list of holders and the policy's record
/// come on top.
#[test]
fn the_plan_has_room_for_the_directory_of_the_page_cache() {
    let table = Directory::PLACE_BYTES as u64 * 16 / 7 * 3 / 2;
    assert!(table + 48 + 2 * 16 <= DIRECTORY_ENTRY_BYTES, "{table}");
}

/// `launch plan` of the tiny config, measurements kept in a folder of its own.
fn plan_of(runs: &Runs, words: &[&str]) -> Ended {
    let mut command = runs.command(&["plan"]);
    command.args(["--ranks", "1", "--device", "cpu"]).args(words).env("XDG_CACHE_HOME", runs.path().join("cache"));
    run(&mut command, runs.path())
}

fn table_line<'a>(ended: &'a Ended, name: &str) -> &'a str {
    let start = format!("  {name} ");
    ended.out.lines().find(|line| line.starts_with(&start)).unwrap_or_else(|| panic!("no line {name}: {ended}"))
}

#[test]
fn a_model_is_measured_once_and_files_of_data_are_looked_at_each_time() {
    let data = folder();
    let of = format!("data.dataset_path={}", data.path().display());
    let runs = Runs::new(&[&of]);
    let first = plan_of(&runs, &[]);
    assert_eq!(first.code, Some(0), "{first}");
    assert!(first.err.contains("measuring the model") && first.err.contains("measured in "), "{first}");
    assert!(table_line(&first, "activations").contains("4 samples × "), "{first}");
    assert!(table_line(&first, "page cache").contains("no data set to keep"), "{first}");
    let second = plan_of(&runs, &[]);
    assert_eq!((second.code, &second.out), (Some(0), &first.out), "{second}");
    assert!(!second.err.contains("measur"), "{second}");
    // Neither another batch nor another learning rate is another model; another width is.
    assert!(
        !plan_of(&runs, &["--set", "train.batch_size=7", "--set", "train.learning_rate=0.1"]).err.contains("measur")
    );
    assert!(plan_of(&runs, &["--set", "model.decoder_hidden_size=17"]).err.contains("measured in "));
    std::fs::copy(sample_data().join(first_file(sample_data())), data.path().join("one.h5")).unwrap();
    let third = plan_of(&runs, &[]);
    assert!(!third.err.contains("measuring"), "{third}");
    assert!(third.out.contains("next_use"), "{third}");
    assert_eq!(table_line(&third, "activations"), table_line(&first, "activations"));
}

fn first_file(folder: &Path) -> String {
    let names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.ends_with("hdf5") || name.ends_with("h5")).min().unwrap()
}

#[test]
fn a_plan_for_another_machine_needs_its_file_alone() {
    let runs = Runs::new(&[]);
    let file = runs.path().join("machine.json");
    let mut command = Command::new(launch_program());
    command.args(["plan", "--write-machine"]).arg(&file);
    let written = run(&mut command, runs.path());
    assert_eq!(written.code, Some(0), "{written}");
    let mut machine: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let gpu = serde_json::json!({ "index": 0, "name": "a card that is not here", "memory_total_bytes": 24_u64 << 30, "memory_free_bytes": 23_u64 << 30 });
    machine["gpus"] = Value::Array(vec![gpu]);
    machine["memory_total_bytes"] = (64_u64 << 30).into();
    machine["memory_available_bytes"] = (60_u64 << 30).into();
    machine["cgroup_limit_bytes"] = Value::Null;
    machine["cgroup_room_bytes"] = Value::Null;
    std::fs::write(&file, machine.to_string()).unwrap();
    let of = format!("--machine={}", file.display());
    let planned = run(&mut runs.command(&["plan", "--gpus", "1", &of]), runs.path());
    assert_eq!(planned.code, Some(0), "{planned}");
    for part in ["1 on CUDA", "51.20 GiB (80 % of 64.00 GiB memory)", "each GPU: 23.00 GiB free", "assumed"] {
        assert!(planned.out.contains(part), "{part} is missing: {planned}");
    }
    std::fs::write(&file, "{}").unwrap();
    let refused = run(&mut runs.command(&["plan", &of]), runs.path());
    assert_eq!(refused.code, Some(2), "{refused}");
    assert!(refused.err.contains("launch plan --write-machine FILE"), "{refused}");
}

#[test]
fn sizes_of_a_model_that_do_not_fit_together_are_refused_by_the_plan() {
    let folder = folder();
    let mut command = Command::new(launch_program());
    command.args(["plan", "--device", "cpu", "--config", "baseline", "--set", "model.vrt.heads=3"]);
    let ended = run(command.current_dir(env!("CARGO_MANIFEST_DIR")), folder.path());
    assert_eq!(ended.code, Some(2), "{ended}");
    assert!(ended.err.contains("must be a multiple of deblur.vrt.heads 3"), "{ended}");
}

#[test]
fn samples_beyond_any_machine_are_refused_by_the_plan() {
    let runs = Runs::new(&["data.window_size=4000000000000000"]);
    let ended = plan_of(&runs, &[]);
    assert_eq!(ended.code, Some(3), "{ended}");
    assert!(ended.err.contains("beyond any machine"), "{ended}");
}

/// A pass of one sample takes about half of the quarter that a measurement may take, a pass of two would take more than that:
/// the plan rests on the first and says so.
#[test]
fn a_measurement_keeps_to_a_quarter_of_the_budget() {
    let of = |window: &str| {
        let (size, stride) = (format!("emg.window_size={window}"), format!("data.stride={window}"));
        Runs::new(&["memory.budget=1GiB", &size, &stride, "train.batch_size=1"])
    };
    let runs = of("31000");
    let ended = plan_of(&runs, &[]);
    assert_eq!(ended.code, Some(0), "{ended}");
    let note = ended.out.split_once("model sizes: ").unwrap_or_else(|| panic!("{ended}")).1;
    let note = note.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(note.starts_with("not measured, since about ") && note.contains("the limit of 256 MiB"), "{note}");
    let folder = runs.path().join("cache/headroom/measured");
    let file = std::fs::read_dir(folder).unwrap().next().unwrap().unwrap().path();
    let kept: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let (limit, model) = (kept["limit_bytes"].as_u64().unwrap(), &kept["measured"]["model"]);
    assert_eq!(limit, 256 << 20);
    for pass in ["train", "val"] {
        let seen = model[pass]["seen"].as_array().unwrap();
        let samples: Vec<u64> = seen.iter().map(|of| of["samples"].as_u64().unwrap()).collect();
        assert!(samples == [1] || (pass == "val" && samples == [1, 2]), "{pass}: {model}");
        for of in seen {
            let bytes = of["tensor_bytes"].as_u64().unwrap() + of["beside_bytes"].as_u64().unwrap();
            assert!((limit / 4..=limit).contains(&bytes), "{pass}: {bytes} of {limit}");
        }
    }
    // A model that cannot be built within it leaves assumptions, which are too much for the budget.
    let ended = plan_of(&of("2000000"), &[]);
    assert_eq!(ended.code, Some(3), "{ended}");
    assert!(ended.err.contains("the memory plan does not fit: it needs 1") && ended.err.contains("GiB"), "{ended}");
}

/// A rank program that knows no measurement, or dies in it, leaves a plan that says so.
#[test]
fn a_rank_program_without_an_answer_leaves_assumptions() {
    let runs = Runs::new(&[]);
    let mut command = runs.command(&["plan"]);
    let ended = run(command.env("HEADROOM_RANK", "/bin/false"), runs.path());
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(ended.out.contains("not measured (rank describe: exit status: 1)"), "{ended}");
}
