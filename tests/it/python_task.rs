//! Task `python`: models of PyTorch train in the user's interpreter as in a plain loop, and fail with their own words.

use crate::support::{Ended, Run, Runs, assert_same_checkpoint, distance, folder, launch_program, rank_program, run};
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

const CONFIG: &str = "
task: python
seed: 7
data: {shuffle: false}
train: {batch_size: 8, num_epochs: 1000, max_steps: 50, learning_rate: 1.0e-2, weight_decay: 0, scheduler: none,
  warmup_epochs: 0, gradient_clip_norm: 0, early_stopping: false, restore_best_weights: false, num_workers: 1}
log: {log_every: 1, plots: false, save_every: 0}
";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

pub fn fixtures() -> PathBuf {
    root().join("tests/fixtures/python_task")
}

/// An interpreter that can import PyTorch: that of the set-up, whose CUDA libraries are stand-ins, or that of the benches.
pub fn python() -> &'static Path {
    static PYTHON: OnceLock<PathBuf> = OnceLock::new();
    PYTHON.get_or_init(|| {
        let trainer = rank_program().with_file_name("libheadroom_rank.so");
        let hint = "build it first with `cargo build --release -p headroom-rank`";
        assert!(trainer.is_file(), "no {}: {hint}", trainer.display());
        let has_torch = |python: &PathBuf| {
            Command::new(python).args(["-c", "import torch"]).output().is_ok_and(|output| output.status.success())
        };
        let known = [".venv/bin/python-cpu", ".bench-venv/bin/python"].map(|path| root().join(path));
        known
            .into_iter()
            .find(has_torch)
            .expect("no interpreter here can import PyTorch: `scripts/setup --tests` brings one")
    })
}

/// Runs of a function of the fixtures.
pub fn runs(build: &str, args: &str, sets: &[&str]) -> Runs {
    let own = [
        format!("python.build={build}"),
        format!("python.args={args}"),
        format!("python.interpreter={}", python().display()),
        format!("python.path=[{}]", fixtures().display()),
    ];
    let all: Vec<&str> = own.iter().map(String::as_str).chain(sets.iter().copied()).collect();
    Runs::of(CONFIG, Path::new("data"), &all)
}

/// Compares runs of 50 steps with a plain loop, by the names of their models.
pub fn equal_pytorch(runs: &[(String, Run)], place: &Path) {
    let mut command = Command::new(python());
    command.arg(fixtures().join("eager.py")).args(["50", "8"]).env("OMP_WAIT_POLICY", "passive");
    for (model, run) in runs {
        command.arg(model).arg(&run.path);
    }
    let ended = crate::support::run(&mut command, place);
    assert_eq!(ended.code, Some(0), "{ended}");
}

#[test]
fn eight_models_train_to_the_bit_as_in_a_plain_loop() {
    let models = ["batchnorm", "lstm", "transformer", "function", "checkpoint", "weight_norm", "frozen", "dropout"];
    let all = models.map(|model| runs("models:build", &format!("{{model: {model}}}"), &[]));
    let finished = models.iter().zip(&all).enumerate().map(|(number, (model, runs))| {
        // Both ways to start a rank.
        let start = if number % 2 == 0 { "python.start=fork" } else { "python.start=spawn" };
        (model.to_string(), runs.finish("a", &["--ranks", "1", "--set", start]))
    });
    equal_pytorch(&finished.collect::<Vec<_>>(), all[0].path());
}

#[test]
fn samples_of_different_sizes_are_collated_by_the_user() {
    let of = |sets: &[&str], ranks: &str, batch: &str| {
        let mut all = vec!["train.max_steps=12", "train.optimizer=sgd", "train.momentum=0", batch];
        all.extend(sets);
        let runs = runs("models:build_texts", "{}", &all);
        runs.finish("a", &["--ranks", ranks]).tensors(12, "model.safetensors")
    };
    let cached = of(&[], "1", "train.batch_size=8");
    assert!(cached == of(&["data.cache=off"], "1", "train.batch_size=8"), "a cached sample differs");
    let far = distance(&of(&[], "2", "train.batch_size=4"), &cached);
    assert!(far.norm < 1e-5, "{} of {}", far.norm, far.worst);
    let runs = runs("models:build_texts", "{}", &["python.sample_bytes=200"]);
    let ended = runs.train("a", &["--ranks", "1"]);
    assert!(ended.code == Some(10) && ended.err.contains("set python.sample_bytes="), "{ended}");
}

#[test]
fn three_ranks_train_as_one_does() {
    let of = |ranks: &str, batch: &str| {
        let sets = ["train.max_steps=10", "train.optimizer=sgd", "train.momentum=0", batch];
        let runs = runs("models:build", "{model: function}", &sets);
        runs.finish("a", &["--ranks", ranks]).tensors(10, "model.safetensors")
    };
    let far = distance(&of("3", "train.batch_size=4"), &of("1", "train.batch_size=12"));
    assert!(far.norm < 1e-5, "{} of {}", far.norm, far.worst);
}

/// Trains 60 steps on two ranks as one run and as `broken`, which is stopped on the way and resumed; both end with the same bits.
pub fn stopped_and_resumed(runs: &Runs) -> Run {
    let whole = runs.finish("whole", &["--ranks", "2"]);
    let mut running = runs.start("broken", &["--ranks", "2"]);
    let broken = runs.run("broken");
    assert!(running.until("a few steps", || broken.steps_so_far() >= 5), "{}", running.wait());
    running.signal(Signal::TERM);
    let ended = running.wait();
    // It may have been done by then.
    assert!(matches!(ended.code, Some(75 | 0)), "{ended}");
    let broken = runs.finish("broken", &["--ranks", "2", "--resume", "auto"]);
    assert_same_checkpoint(&whole, &broken, 60, "resumed");
    whole
}

#[test]
fn a_stopped_run_goes_on_to_the_same_bits() {
    let runs = runs("models:build", "{model: batchnorm}", &["data.shuffle=true", "train.max_steps=60"]);
    let whole = stopped_and_resumed(&runs);
    let names: Vec<String> = whole.tensors(60, "model.safetensors").into_keys().collect();
    assert!(names.iter().any(|name| name == "body.2.running_mean"), "{names:?}");
}

#[test]
fn an_exception_ends_with_the_users_line() {
    let faults = [
        ("forward", "ValueError: no such thing", "# in forward"),
        ("backward", "ArithmeticError: no gradient", "# in backward"),
        ("dataset", "KeyError: 'no such sample'", "# in the data set"),
        ("transform", "TypeError: no augmentation", "# in transform"),
        ("metric", "ZeroDivisionError: no metric", "# in a metric"),
        ("build", "RuntimeError: no data sets", "# in build"),
    ];
    let source = fs::read_to_string(fixtures().join("faults.py")).unwrap();
    for (place, words, mark) in faults {
        let runs = runs("faults:build", &format!("{{place: {place}}}"), &["train.max_steps=30"]);
        let ended = runs.train("a", &["--ranks", "1"]);
        assert_eq!(ended.code, Some(10), "{place}: {ended}");
        let raised = source.lines().position(|line| line.ends_with(mark)).unwrap_or_else(|| panic!("{place}"));
        let line = source.lines().nth(raised).unwrap().trim();
        let last = format!("faults.py:{}: {line}", raised + 1);
        assert!(ended.err.contains(words) && ended.err.contains(&last), "{place}: {last}\n{ended}");
    }
}

#[test]
fn memory_that_runs_out_in_the_users_code_halves_the_micro_batch() {
    let runs = runs("faults:build", "{place: memory}", &["train.max_steps=5", "train.val_batch_size=4"]);
    let ended = runs.train("a", &["--ranks", "2"]);
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(format!("{ended}").contains("micro-batch 8 → 4"), "{ended}");
}

#[test]
fn killed_workers_are_replaced_and_a_killed_rank_is_named() {
    let pids = folder();
    let of = |kind: &str| -> Vec<Pid> {
        let names = fs::read_dir(pids.path()).unwrap().flatten().map(|entry| entry.file_name().into_string().unwrap());
        let of_kind = names.filter(|name| name.starts_with(kind)).collect::<Vec<_>>();
        of_kind.iter().filter_map(|name| Pid::from_raw(name.rsplit('.').next()?.parse().ok()?)).collect()
    };
    let runs = runs("faults:build", "{place: none}", &["data.cache=off", "train.max_steps=100000"]);
    let mut command = runs.command(&[]);
    command.args(["--ranks", "2", "--name", "a"]).env("PIDS", pids.path());
    let mut running = crate::support::Running::start(&mut command, runs.path());
    // One that nobody has reaped yet is dead all the same.
    let alive = |pid: &Pid| {
        let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
    };
    let run = runs.run("a");
    assert!(running.until("steps", || run.steps_so_far() >= 5), "{}", running.wait());
    let before = of("worker");
    for pid in before.iter().filter(|pid| alive(pid)) {
        // One that ended by itself meanwhile cannot be killed.
        let _ = kill_process(*pid, Signal::KILL);
    }
    let steps = run.steps_so_far();
    assert!(running.until("more steps", || run.steps_so_far() > steps + 5), "{}", running.wait());
    let killed = of("rank1")[0];
    kill_process(killed, Signal::KILL).unwrap();
    let ended = running.wait();
    assert_eq!(ended.code, Some(137), "{ended}");
    assert!(ended.err.contains("rank 1"), "{ended}");
    let left: Vec<Pid> = of("").into_iter().filter(alive).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn predictions_are_an_array() {
    let runs = runs("models:build", "{model: dropout}", &["train.max_steps=25"]);
    runs.finish("a", &["--ranks", "1"]);
    let out = runs.path().join("out");
    let mut command = Command::new(launch_program());
    command.args(["predict"]).arg(runs.path().join("runs/a")).arg("--data").arg(fixtures()).arg("--out").arg(&out);
    let ended = run(&mut command, runs.path());
    assert_eq!(ended.code, Some(0), "{ended}");
    let bytes = fs::read(out.join("predictions.npy")).unwrap();
    assert!(String::from_utf8_lossy(&bytes).contains("'shape': (16, 16,)"), "{:?}", &bytes[..64]);
    assert_eq!(bytes.len(), 128 + 16 * 16 * 4);
}

#[test]
fn another_pytorch_is_refused_with_the_way() {
    let runs = runs("models:build", "{}", &[]);
    let fake = folder();
    fs::create_dir(fake.path().join("torch")).unwrap();
    fs::write(fake.path().join("torch/__init__.py"), "__version__ = '2.15.0+cpu'\n").unwrap();
    let mut command = runs.command(&[]);
    command.args(["--ranks", "1", "--name", "a"]).env("PYTHONPATH", fake.path());
    let Ended { code, err, .. } = run(&mut command, runs.path());
    assert_eq!(code, Some(2), "{err}");
    assert!(err.contains("PyTorch 2.15.0") && err.contains("torch==2.11.*") && err.contains("headroom-train"), "{err}");
}

/// `scripts/setup --tests` brings the packages of all but BERT, which is tested where transformers is installed.
#[test]
fn the_examples_train() {
    let examples = [("resnet", "torchvision", "{pictures: 30}"), ("unet", "numpy", "{volumes: 10, width: 4}")];
    let more = [("bert", "transformers", "{sentences: 64}"), ("timm_model", "timm", "{side: 32, samples: 32}")];
    for (name, package, args) in examples.into_iter().chain(more) {
        let there = Command::new(python()).args(["-c", &format!("import {package}")]).output().unwrap();
        if !there.status.success() {
            assert!(
                package == "transformers" || !python().ends_with("python-cpu"),
                "no {package}: scripts/setup --tests"
            );
            continue;
        }
        let place = folder();
        let mut command = Command::new(launch_program());
        command.current_dir(place.path()).args(["--ranks", "1", "--name", "a", "--config"]);
        command.arg(root().join("configs/python").join(format!("{name}.yaml")));
        let path = format!("python.path=[{}]", root().join("configs/python").display());
        let interpreter = format!("python.interpreter={}", python().display());
        let args = format!("python.args={args}");
        for set in [path.as_str(), &interpreter, &args, "train.max_steps=2", "train.batch_size=4", "log.plots=false"] {
            command.args(["--set", set]);
        }
        let ended = run(&mut command, place.path());
        assert_eq!(ended.code, Some(0), "{name}: {ended}");
        let lines =
            fs::read_to_string(root().join("configs/python").join(format!("{name}.py"))).unwrap().lines().count();
        assert!(lines <= 60, "{name}.py has {lines} lines");
    }
}

#[test]
fn a_function_is_enough_on_the_command_line() {
    let place = folder();
    let mut command = Command::new(launch_program());
    command.current_dir(place.path()).args(["--ranks", "1", "--name", "a", "--python", "models:build"]);
    let path = format!("python.path=[{}]", fixtures().display());
    let interpreter = format!("python.interpreter={}", python().display());
    for set in [
        path.as_str(),
        &interpreter,
        "python.args={model: normed, samples: 64}",
        "train.num_epochs=1",
        "log.plots=false",
    ] {
        command.args(["--set", set]);
    }
    let ended = run(&mut command, place.path());
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(place.path().join("runs/a/checkpoints").is_dir(), "{ended}");
    // Not even numpy's threads are in the way, though one rank may have all cores.
    assert!(!format!("{ended}").contains("one by one"), "{ended}");
}

#[test]
fn ranks_are_started_one_by_one_where_the_forking_process_cannot_serve() {
    for (place, why) in [("thread", "1 threads run"), ("zygote", "signal: 9")] {
        let runs = runs("faults:build", &format!("{{place: {place}}}"), &["train.max_steps=3"]);
        let ended = runs.train("a", &["--ranks", "2"]);
        assert_eq!(ended.code, Some(0), "{place}: {ended}");
        let text = format!("{ended}");
        assert!(text.contains("ranks are started one by one, not forked") && text.contains(why), "{place}: {ended}");
    }
}
