//! Additions for training on a device, as far as they can be tested without one. The rest is checked by
//! `scripts/check-gpu`, whose dry run is a test here too.

use crate::support::{Runs, distance, folder, launch_program, rank_program, run};
use serde_json::Value;
use std::path::Path;
use std::process::Command;

/// The program that checks a device.
const CHECK: &str = env!("CARGO_BIN_EXE_check-gpu");

/// Steps keep their numbers on the device, here the CPU.
fn on_device(runs: &Runs, name: &str, words: &[&str], overflow: Option<&str>) -> (crate::support::Run, String) {
    let mut command = runs.command(&[]);
    command.args(["--name", name]).args(words).env("HEADROOM_TEST_ON_DEVICE", "1");
    if let Some(overflow) = overflow {
        command.env("HEADROOM_TEST_OVERFLOW", overflow);
    }
    let ended = run(&mut command, runs.path());
    assert_eq!(ended.code, Some(0), "{name}: {ended}");
    (runs.run(name), ended.out + &ended.err)
}

#[test]
fn steps_on_the_device_are_those_of_the_host() {
    let runs =
        Runs::new(&["train.batch_size=6", "train.microbatch=4", "train.gradient_clip_norm=0.5", "train.ema_decay=0.9"]);
    let host = runs.finish("host", &["--ranks", "2"]);
    for log_every in [1, 4] {
        let set = format!("log.log_every={log_every}");
        let name = format!("device-{log_every}");
        let (device, _) = on_device(&runs, &name, &["--ranks", "2", "--set", &set], None);
        // The last step of an epoch is logged besides.
        assert_eq!(device.steps().len() as u64, 20 / log_every + u64::from(log_every > 1));
        for (step, loss) in device.steps().into_iter().zip(device.losses()) {
            let right = host.losses()[step as usize - 1];
            assert!((loss - right).abs() <= 1e-5 * right, "{loss} against {right} at step {step}");
        }
        // Adam makes more of rounding than a sum does: see `equal`.
        let far = distance(&device.tensors(20, "model.safetensors"), &host.tensors(20, "model.safetensors"));
        assert!(far.norm < 1e-3, "{:e} in {}", far.norm, far.worst);
    }
}

#[test]
fn an_overflow_on_one_rank_skips_one_step_on_all_and_a_resumed_run_keeps_the_scale() {
    let runs = Runs::new(&["train.amp=fp16", "log.save_every_steps=10"]);
    let (run, said) = on_device(&runs, "whole", &["--ranks", "3", "--set", "train.max_steps=16"], Some("1:5"));
    assert_eq!(said.matches("skipped on all ranks").count(), 1, "{said}");
    assert!(said.contains("step 6: the gradient overflowed at loss scale 65536"), "{said}");
    let scales: Vec<f64> = run.metrics().iter().map(|record| record["scale"].as_f64().unwrap()).collect();
    assert_eq!((&scales[..6], &scales[6..]), (&[65536.0; 6][..], &[32768.0; 10][..]));
    assert!(run.losses().iter().all(|loss| loss.is_finite()));
    // Fifteen steps count: the optimizer did not see the sixth.
    let steps = &run.tensors(16, "optimizer.safetensors")["step"].1;
    assert_eq!(f32::from_le_bytes(steps[..4].try_into().unwrap()), 15.0);
    let words = ["--ranks", "3", "--set", "train.max_steps=20", "--resume", "auto"];
    let (resumed, _) = on_device(&runs, "whole", &words, None);
    assert_eq!(resumed.metrics().last().unwrap()["scale"].as_f64(), Some(32768.0));
}

/// A run of two ranks whose second one has no memory left in step 8.
fn short(runs: &Runs, name: &str, log_every: &str) -> (crate::support::Run, String) {
    let mut command = runs.command(&[]);
    command.args(["--name", name, "--ranks", "2", "--set", log_every]);
    command.env("HEADROOM_TEST_ON_DEVICE", "1").env("HEADROOM_TEST_OUT_OF_MEMORY", "1:7");
    let ended = run(&mut command, runs.path());
    assert_eq!(ended.code, Some(0), "{name}: {ended}");
    (runs.run(name), ended.out + &ended.err)
}

#[test]
fn a_step_without_memory_is_repeated_with_half_the_micro_batch_in_the_same_order() {
    let runs = Runs::new(&["train.batch_size=6", "train.optimizer=sgd", "train.momentum=0.9"]);
    let (whole, _) = on_device(&runs, "whole", &["--ranks", "2"], None);
    for every in [1, 20] {
        // Learnt of at once where every step is logged, else a step late.
        let (run, said) = short(&runs, &format!("short-{every}"), &format!("log.log_every={every}"));
        assert!(said.contains("rank 1: out of memory at step 8 (as a test asked for): micro-batch 6 → 3"), "{said}");
        assert_eq!(said.matches("out of memory").count(), 1, "{said}");
        let far = distance(&run.tensors(20, "model.safetensors"), &whole.tensors(20, "model.safetensors"));
        assert!(far.norm < 1e-4, "{:e} in {}", far.norm, far.worst);
        let steps = run.steps();
        assert!(steps.windows(2).all(|pair| pair[0] < pair[1]) && steps.ends_with(&[20]), "{steps:?}");
    }
}

#[test]
fn a_loss_that_is_no_number_stops_with_the_last_good_weights() {
    let runs = Runs::new(&[
        "train.learning_rate=1e18",
        "train.gradient_clip_norm=0",
        "train.optimizer=sgd",
        "log.log_every=10",
    ]);
    let mut command = runs.command(&[]);
    command.args(["--name", "bad", "--ranks", "2"]).env("HEADROOM_TEST_ON_DEVICE", "1");
    let ended = run(&mut command, runs.path());
    assert_eq!(ended.code, Some(spec::contract::exit::NONFINITE.into()), "{ended}");
    let good: u64 = ended
        .err
        .split("checkpoints/step-")
        .nth(1)
        .unwrap()
        .chars()
        .take_while(char::is_ascii_digit)
        .collect::<String>()
        .parse()
        .unwrap();
    for (name, (_, bytes)) in runs.run("bad").tensors(good, "model.safetensors") {
        assert!(crate::support::floats(&bytes).iter().all(|v| v.is_finite()), "{name}");
    }
}

#[test]
fn amp_auto_times_both_and_says_what_it_kept() {
    let runs = Runs::new(&["train.amp=auto"]);
    let ended = runs.train("auto", &["--ranks", "2"]);
    assert_eq!(ended.code, Some(0), "{ended}");
    let said = ended.out.clone() + &ended.err;
    assert_eq!(said.matches("train.amp auto: ").count(), 1, "{said}");
}

fn figures(text: &str) -> Value {
    let line = text.lines().find(|line| line.contains('{')).unwrap_or_else(|| panic!("{text}"));
    serde_json::from_str(&line[line.find('{').unwrap()..]).unwrap()
}

#[test]
fn the_check_of_a_device_runs_without_one() {
    let folder = folder();
    let mut three = Command::new(launch_program());
    three.args(["--ranks", "3", "--exec"]).arg(CHECK).args(["contract", "--cpu"]);
    let ended = run(&mut three, folder.path());
    assert_eq!(ended.code, Some(0), "{ended}");
    let found = figures(&ended.out);
    assert_eq!((found["world_size"].as_u64(), found["backend"].as_str()), (Some(3), Some("shm")));
    for words in [&["copy", "--bytes", "1000000"][..], &["net", "--width", "32", "--batch", "4", "--steps", "5"]] {
        let mut command = Command::new(CHECK);
        command.args(words).arg("--cpu");
        let ended = run(&mut command, folder.path());
        assert_eq!(ended.code, Some(0), "{ended}");
        assert!(figures(&ended.out).as_object().unwrap().values().any(|v| v.as_f64().is_some_and(|v| v > 0.0)));
    }
    let mut missing = Command::new(CHECK);
    missing.args(["copy", "--device", "63"]);
    let ended = run(&mut missing, folder.path());
    assert_eq!(ended.code, Some(spec::contract::exit::USAGE.into()), "{ended}");
}

#[test]
fn the_script_that_checks_devices_runs_dry() {
    let folder = folder();
    let out = folder.path().join("out");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/check-gpu");
    let mut command = Command::new(script);
    command.arg("--dry-run").arg("--bin").arg(rank_program().parent().unwrap()).arg("--out").arg(&out);
    // Those that the other tests here do not make themselves.
    let only = "contract,collectives,collectives_two_nodes,two_nodes,step_net,copy,direct,data_wait,memory,fallbacks,allocator,\
                graphs,wire";
    command.arg("--work").arg(folder.path().join("work")).args(["--only", only]);
    let ended = run(&mut command, folder.path());
    assert_eq!(ended.code, Some(0), "{ended}");
    let figures: Value = serde_json::from_slice(&std::fs::read(out.join("check-gpu.json")).unwrap()).unwrap();
    let checks = figures["checks"].as_object().unwrap();
    let failed: Vec<_> = checks.iter().filter(|(_, check)| check["status"] == "failed").collect();
    assert!(checks.len() >= 11 && failed.is_empty(), "{failed:?}");
}
