//! `scripts/check-gpu`, rehearsed whole on the model, and the folder that travels to a machine with a GPU.

use super::model::built;
use crate::support::{folder, rank_program, run};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

fn script() -> Command {
    Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/check-gpu"))
}

fn programs() -> PathBuf {
    rank_program().parent().unwrap().to_owned()
}

#[test]
fn every_check_of_a_gpu_runs_on_the_model() {
    let work = folder();
    let out = work.path().join("out");
    let mut command = script();
    command.arg("--model").arg(built()).arg("--bin").arg(programs()).arg("--out").arg(&out).args(["--budget", "500"]);
    let ended = run(command.arg("--work").arg(work.path().join("work")), work.path());
    assert_eq!(ended.code, Some(0), "{ended}");
    let result: Value = serde_json::from_slice(&std::fs::read(out.join("check-gpu.json")).unwrap()).unwrap();
    assert_eq!(result["setup"]["status"], "passed");
    let checks = result["checks"].as_object().unwrap();
    let with = |status: &'static str| {
        let those = checks.iter().filter(move |(_, check)| check["status"] == status);
        those.map(|(name, _)| name.as_str()).collect::<Vec<_>>()
    };
    assert_eq!([with("failed"), with("missed")].concat(), Vec::<&str>::new(), "{checks:#?}");
    let passed = with("passed");
    for name in ["contract", "graphs", "copy", "memory", "allocator", "step_emg", "step_net", "amp_auto"] {
        assert!(passed.contains(&name), "{name}: {}", checks[name]);
    }
    // What one GPU without a newer NCCL runs fits into one command.
    let several =
        ["collectives", "collectives_two_nodes", "three_ranks", "two_nodes", "overflow", "wire", "graphs_of_three"];
    let seconds: f64 = checks
        .iter()
        .filter(|(name, _)| !several.contains(&name.as_str()))
        .map(|(_, check)| check["estimate_s"].as_f64().unwrap())
        .sum();
    assert!(seconds <= 500.0, "{seconds} s");
}

#[test]
fn a_set_up_that_fails_is_in_the_json_and_a_small_budget_begins_nothing() {
    let work = folder();
    let out = work.path().join("out");
    let mut command = script();
    command.args(["--bin", "/nowhere", "--dry-run", "--out"]).arg(&out).arg("--work").arg(work.path().join("work"));
    let ended = run(&mut command, work.path());
    assert_eq!(ended.code, Some(1), "{ended}");
    let result: Value = serde_json::from_slice(&std::fs::read(out.join("check-gpu.json")).unwrap()).unwrap();
    assert!(result["setup"]["status"] == "failed" && result["setup"]["error"].as_str().unwrap().contains("/nowhere"));
    let mut command = script();
    command
        .arg("--model")
        .arg(built())
        .arg("--bin")
        .arg(programs())
        .args(["--budget", "1", "--only", "step_emg", "--out"]);
    let ended = run(command.arg(&out).arg("--work").arg(work.path().join("again")), work.path());
    assert_eq!(ended.code, Some(0), "{ended}");
    let result: Value = serde_json::from_slice(&std::fs::read(out.join("check-gpu.json")).unwrap()).unwrap();
    assert_eq!(result["checks"]["step_emg"]["status"], "skipped", "{result:#}");
}

#[test]
fn what_travels_to_a_gpu_is_small_and_runs() {
    let work = folder();
    let packed = work.path().join("packed");
    let ended = run(script().arg("--bin").arg(programs()).arg("--pack").arg(&packed), work.path());
    assert_eq!(ended.code, Some(0), "at most 30 MiB: {ended}");
    println!("{}", ended.out.trim());
    let mut command = Command::new(packed.join("scripts/check-gpu"));
    command.arg("--dry-run").arg("--bin").arg(packed.join("bin")).args(["--only", "contract,allocator", "--out"]);
    let ended = run(command.arg(work.path()).arg("--work").arg(work.path().join("work")), work.path());
    assert_eq!(ended.code, Some(0), "{ended}");
}
