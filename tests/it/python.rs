//! The Python package as users have it, and `launch --exec` with everything around a program of theirs.

use crate::support::{Ended, folder, launch_program, rank_program, read_lines, run};
use crate::surroundings::{MEMFD_CREATE, sandboxed};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// An interpreter with numpy, h5py and pillow: that of `scripts/setup --tests` or of the benches, which have PyTorch as well, that of
/// `scripts/setup`, or one made for the tests.
pub fn python() -> &'static Path {
    static PYTHON: OnceLock<PathBuf> = OnceLock::new();
    PYTHON.get_or_init(|| {
        let serves = |python: &Path| {
            let imported = Command::new(python).args(["-c", "import numpy, h5py, PIL"]).output();
            imported.is_ok_and(|output| output.status.success())
        };
        let venv = rank_program().with_file_name("python-tests");
        let own = venv.join("bin/python");
        let known =
            [".venv/bin/python-cpu", ".bench-venv/bin/python", ".venv/bin/python"].map(|path| root().join(path));
        if let Some(known) = known.into_iter().chain([own.clone()]).find(|path| serves(path)) {
            return known;
        }
        let made = Command::new("python3").args(["-m", "venv", "--clear"]).arg(&venv).status();
        assert!(made.is_ok_and(|status| status.success()), "python3 -m venv {} failed", venv.display());
        let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "numpy", "h5py", "pillow"];
        let installed = Command::new(&own).args(pip).status();
        assert!(
            installed.is_ok_and(|status| status.success()),
            "pip cannot install numpy, h5py and pillow into {}",
            venv.display()
        );
        own
    })
}

/// The package with its extension, beside its tests.
fn package() -> &'static Path {
    static PACKAGE: OnceLock<tempfile::TempDir> = OnceLock::new();
    let made = PACKAGE.get_or_init(|| {
        let built = rank_program().with_file_name("lib_native.so");
        assert!(
            built.is_file(),
            "no {}: build it first with `cargo build --release -p headroom-train`",
            built.display()
        );
        let (from, to) = (root().join("launcher/python"), folder());
        for part in ["headroom_train", "tests", "examples"] {
            fs::create_dir(to.path().join(part)).unwrap();
            for file in fs::read_dir(from.join(part)).unwrap().map(|entry| entry.unwrap().path()) {
                if file.extension().is_some_and(|ext| ext == "py") {
                    fs::copy(&file, to.path().join(part).join(file.file_name().unwrap())).unwrap();
                }
            }
        }
        fs::copy(from.join("README.md"), to.path().join("README.md")).unwrap();
        fs::copy(&built, to.path().join("headroom_train/_native.abi3.so")).unwrap();
        to
    });
    made.path()
}

pub fn with_package(mut command: Command) -> Command {
    command.env("PYTHONPATH", package()).env_remove("HEADROOM_CACHE_SIZE").env("OMP_NUM_THREADS", "1");
    command
}

fn script(text: &str) -> Command {
    let mut command = with_package(Command::new(python()));
    command.arg("-c").arg(text);
    command
}

#[test]
fn the_packages_own_tests_pass() {
    let place = folder();
    let mut command = with_package(Command::new(python()));
    command.arg(package().join("tests/run.py"));
    let ended = run(&mut command, place.path());
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(ended.out.contains(" 0 failed in "), "{ended}");
}

const EPOCHS: &str = "
import sys, numpy as np, headroom_train as headroom
class Data:
    def __len__(self): return 40
    def __getitem__(self, i): return np.full(100, i), i
loader = headroom.DataLoader(headroom.cached(Data()), batch_size=8, shuffle=True, num_workers=2)
for _ in range(2):
    assert sorted(int(i) for _, ids in loader for i in ids) == list(range(40))
assert loader.decodes == 40, loader.decodes
loader.close()
print('all', headroom.stats()['entries'])
";

#[test]
fn where_memfd_is_refused_a_file_without_a_name_is_used_and_that_is_said() {
    let place = folder();
    let mut command = script(EPOCHS);
    sandboxed(&mut command, &[(&MEMFD_CREATE, 1)]);
    let ended = run(&mut command, place.path());
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(ended.out.contains("all 40"), "{ended}");
    assert_eq!(ended.err.matches("memfd_create is refused here").count(), 1, "{ended}");
}

const TRAIN: &str = "
import os, sys, time, numpy as np, headroom_train as headroom
class Data:
    def __len__(self): return 64
    def __getitem__(self, i): return np.full(1000, i, np.float32), i
loader = headroom.DataLoader(headroom.cached(Data()), batch_size=8, shuffle=True, seed=1, num_workers=1)
step = 0
for epoch in range(3):
    for x, y in loader:
        step += 1
        time.sleep(0.02)
        headroom.report(step, loss=1.0 / step, epoch=epoch, epochs=3, steps=12, samples=16, error=0.5)
print('rank', loader.rank, 'of', loader.world_size, 'hosts', headroom.stats()['hosts'], flush=True)
loader.close()
";

/// `launch` with `words` before `--exec python train.py`.
fn exec(place: &Path, words: &[&str]) -> Ended {
    fs::write(place.join("train.py"), TRAIN).unwrap();
    let mut command = with_package(Command::new(launch_program()));
    command.current_dir(place).args(words).arg("--exec").arg(python()).arg("train.py");
    run(&mut command, place)
}

fn json(path: PathBuf) -> Value {
    let text = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&text).unwrap()
}

#[test]
fn a_program_gets_cache_logs_records_and_a_plan_by_its_last_run() {
    let place = folder();
    let words = ["--ranks", "2", "--cache", "64MiB", "--log-dir", "out"];
    let ended = exec(place.path(), &[&words[..], &["--name", "first"]].concat());
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(ended.out.contains("not known yet") && ended.out.contains("page cache"), "{ended}");
    let first = place.path().join("out/first");
    for rank in 0..2 {
        let log = fs::read_to_string(first.join(format!("rank{rank}.log"))).unwrap();
        assert!(log.contains(&format!("rank {rank} of 2 hosts False")), "{log}");
        assert!(!read_lines(&first.join(format!("memory.rank{rank}.jsonl"))).is_empty());
    }
    let metrics = read_lines(&first.join("metrics.jsonl"));
    assert_eq!(
        (metrics.len(), metrics[11]["step"].as_u64(), metrics[11]["train.error"].as_f64()),
        (12, Some(12), Some(0.5))
    );
    let summary = json(first.join("summary.json"));
    assert_eq!((summary["status"].as_str(), summary["steps"].as_u64()), (Some("finished"), Some(12)), "{summary}");
    // Each of 64 samples is made once and read in three epochs.
    let counted = ["misses", "hits", "bypasses"].map(|name| summary["cache"][name].as_u64());
    assert_eq!(counted, [Some(64), Some(128), Some(0)], "{summary}");
    let peak = summary["peak_own_bytes_per_rank"][0].as_u64().unwrap();
    assert!(peak > 5 << 20, "a rank and its worker: {summary}");
    assert!(!read_lines(&first.join("memory.node.jsonl")).is_empty());
    assert!(!first.join("config.yaml").exists());
    assert!(["loss", "memory"].iter().all(|name| first.join(format!("plots/{name}.png")).is_file()));
    for verb in ["analyze", "doctor"] {
        let mut tool = Command::new(launch_program());
        let ended = run(tool.args([verb, "out/first"]).current_dir(place.path()), place.path());
        assert_eq!(ended.code, Some(0), "{verb}: {ended}");
    }
    let ended = exec(place.path(), &[&words[..], &["--name", "second"]].concat());
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(ended.out.contains("the most in its last run"), "{ended}");
    let plan = json(place.path().join("out/second/plan.json"));
    let line = plan["budget"]["lines"].as_array().unwrap().iter().find(|line| line["name"] == "program").unwrap();
    assert!(line["per_rank_bytes"].as_u64().unwrap() >= peak, "{plan}");
}

#[test]
fn a_plan_of_a_program_is_shown_and_one_that_cannot_fit_is_refused() {
    let place = folder();
    let plan = |words: &[&str]| {
        let mut command = Command::new(launch_program());
        command.arg("plan").args(words).args(["--exec", "python", "train.py"]);
        run(&mut command, place.path())
    };
    let ended = plan(&["--ranks", "3", "--cache", "32MiB"]);
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(ended.out.contains("page cache") && ended.out.contains("32.0 MiB"), "{ended}");
    let refused = plan(&["--cache", "32GiB", "--memory-budget", "1GiB"]);
    assert_eq!(refused.code, Some(i32::from(spec::contract::exit::PLAN)), "{refused}");
    assert!(refused.err.contains("does not fit"), "{refused}");
}

/// What a program starts, such as torchrun its ranks, shares the cache too.
#[test]
fn processes_that_a_program_starts_come_to_its_cache() {
    let place = folder();
    let inner = "
import headroom_train as headroom, numpy as np
cache = headroom.Cache()
print('sum', sum(int(cache.get_or(k, lambda: np.full(10, k))[0]) for k in range(20)), flush=True)
";
    let outer = format!(
        "import subprocess, sys\nfor _ in range(2):\n    subprocess.run([sys.executable, '-c', {inner:?}], check=True)"
    );
    let mut command = with_package(Command::new(launch_program()));
    command.current_dir(place.path());
    command.args(["--cache", "16MiB", "--name", "nested", "--exec"]).arg(python()).args(["-c", &outer]);
    let ended = run(&mut command, place.path());
    assert_eq!(ended.code, Some(0), "{ended}");
    assert_eq!(ended.out.matches("sum 190").count(), 2, "{ended}");
    let summary = json(place.path().join("runs/nested/summary.json"));
    assert_eq!(
        (summary["cache"]["misses"].as_u64(), summary["cache"]["hits"].as_u64()),
        (Some(20), Some(20)),
        "{summary}"
    );
}
