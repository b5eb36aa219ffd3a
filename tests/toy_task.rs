//! A task that is added as `src/task` says: two folders and two lines. The folders are those of `fixtures/toy_task`, as
//! they would stand in `launcher/spec/src/task/toy` and `src/task/toy`; the lines are `registry.patch`.
//!
//! This program is `launch` and `rank` with that task, by the name that it is started with. Under its own name it is the
//! test, which starts the other two: they need a process of their own, and so a test without a harness.

// What each half calls `crate` and `spec` in its place has the same names here.
extern crate self as spec;
extern crate spec as shared;

pub use headroom::data;
pub use shared::{config, contract};

#[path = "fixtures/toy_task/task/mod.rs"]
pub mod rank_half;
#[path = "fixtures/toy_task/spec/mod.rs"]
pub mod spec_half;

pub mod task {
    pub use crate::spec_half as toy;
    pub use headroom::task::*;
}

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output, Stdio};

fn main() -> ExitCode {
    let name = std::env::args_os().next().map(PathBuf::from);
    let name = name.as_deref().and_then(Path::file_name).and_then(|name| name.to_str()).unwrap_or_default();
    if matches!(name, "launch" | "rank") {
        shared::task::add(&[&spec_half::Toy]).unwrap();
        headroom::task::add(&[&rank_half::Toy]).unwrap();
        return ExitCode::from(if name == "rank" { headroom::rank::main() } else { launcher_main() });
    }
    // As a harness does: words are parts of the names of tests to run.
    let mut filters = std::env::args().skip(1).filter(|word| !word.starts_with('-')).peekable();
    if filters.peek().is_none() || filters.any(|word| "toy_task".contains(&word)) {
        the_two_lines_are_all_that_the_tree_needs();
        the_toy_task_is_explained_checked_planned_and_trained();
        println!("test toy_task ... ok");
    }
    ExitCode::SUCCESS
}

fn launcher_main() -> u8 {
    launcher::command::main(std::env::args_os())
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(file: &str) -> String {
    std::fs::read_to_string(root().join(file)).unwrap_or_else(|e| panic!("{file}: {e}"))
}

/// The patch adds one line to each of two files, and fits them as they are. The documents say the same.
fn the_two_lines_are_all_that_the_tree_needs() {
    let patch = read("tests/fixtures/toy_task/registry.patch");
    let parts: Vec<&str> = patch.split("--- a/").skip(1).collect();
    assert_eq!(parts.len(), 2, "{patch}");
    for (part, file) in parts.into_iter().zip(["launcher/spec/src/task/mod.rs", "src/task/mod.rs"]) {
        assert!(part.starts_with(file), "{part}");
        let lines: Vec<&str> = part.lines().skip(3).collect();
        let of = |sign: char| lines.iter().filter(|line| line.starts_with(sign)).count();
        assert_eq!((of('+'), of('-')), (1, 0), "{part}");
        let before: Vec<&str> = lines.iter().filter_map(|line| line.strip_prefix(' ')).collect();
        assert!(read(file).contains(&before.join("\n")), "{file} does not hold {before:?}");
    }
    let readme = read("README.md");
    assert!(readme.contains("- **A task**: a folder in `launcher/spec/src/task`"), "{readme}");
    assert!(readme.contains("a folder in `src/task` (data, model, metrics), and one\n  line in the list of each"));
    let rustdoc = read("src/task/mod.rs");
    assert!(
        rustdoc.contains("//! A task is two folders and two lines:") && rustdoc.contains("tests/fixtures/toy_task")
    );
}

/// The two programs with the toy task, beside a config.
struct Programs(tempfile::TempDir);

impl Programs {
    fn new() -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let own = std::env::current_exe().unwrap();
        for name in ["launch", "rank"] {
            std::os::unix::fs::symlink(&own, folder.path().join(name)).unwrap();
        }
        std::fs::write(folder.path().join("toy.yaml"), read("tests/fixtures/toy_task/toy.yaml")).unwrap();
        Self(folder)
    }

    fn launch(&self, words: &[&str]) -> Output {
        let mut command = Command::new(self.0.path().join("launch"));
        command.args(words).current_dir(self.0.path()).stdin(Stdio::null());
        command.env("HEADROOM_RANK", self.0.path().join("rank")).env("XDG_CACHE_HOME", self.0.path().join("cache"));
        command.env("OMP_WAIT_POLICY", "passive").output().unwrap()
    }

    /// What `launch` prints, where it ends with `code`.
    fn says(&self, code: i32, words: &[&str]) -> String {
        let ended = self.launch(words);
        let text = [ended.stdout, ended.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        assert_eq!(ended.status.code(), Some(code), "launch {words:?}: {}\n{text}", ended.status);
        text
    }
}

fn the_toy_task_is_explained_checked_planned_and_trained() {
    let programs = Programs::new();
    let help = programs.says(0, &["help", "toy.slope"]);
    assert!(help.contains("Slope of the line") && help.contains("must be -10 to 10"), "{help}");
    for (set, says) in [
        ("toy.slope=11", "toy.slope is 11; it must be -10 to 10"),
        ("toy.slope=0", "toy.slope is 0; a flat line teaches nothing"),
        ("toy.slop=1", "did you mean toy.slope?"),
        ("train.loss_type=mae", "task toy knows mse"),
    ] {
        let refused = programs.says(2, &["plan", "--ranks", "1", "--config", "toy.yaml", "--set", set]);
        assert!(refused.contains(says), "{set}: {refused}");
    }
    let plan = programs.says(0, &["plan", "--ranks", "2", "--config", "toy.yaml"]);
    assert!(plan.contains("measured in ") && !plan.contains("not measured"), "{plan}");
    programs.says(0, &["--ranks", "2", "--config", "toy.yaml", "--name", "line"]);
    let run = programs.0.path().join("runs/line");
    let summary: serde_json::Value = serde_json::from_slice(&std::fs::read(run.join("summary.json")).unwrap()).unwrap();
    assert_eq!((&summary["status"], &summary["steps"]), (&"finished".into(), &(5 * 50).into()), "{summary}");
    assert!(summary["metrics"]["test.loss"].as_f64().is_some_and(|loss| loss < 1e-3), "{summary}");
    let mut weights = Vec::new();
    for checkpoint in std::fs::read_dir(run.join("checkpoints")).unwrap().map(|entry| entry.unwrap().path()) {
        if let Ok(bytes) = std::fs::read(checkpoint.join("model.safetensors")) {
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let weight = file.tensor("weight").unwrap().data().try_into().unwrap();
            weights.push(f32::from_le_bytes(weight));
        }
    }
    assert!(weights.iter().any(|weight| (weight + 2.5).abs() < 0.05), "{weights:?}");
}
