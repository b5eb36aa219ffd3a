//! A task with stages through the real programs: `first` trains a line, `values` is a pass that writes what it says of every
//! point, `second` trains on these values.
//!
//! This program is `launch` and `rank` with that task, by the name that it is started with. Under its own name it is the
//! test, which starts the other two: they need a process each, and so a test without a harness.

use headroom::data::{DataError, Dataset, Dtype, FieldSpec, ReadRequest, Scratch};
use headroom::task::pass::{Opening, PartWeights, Pass, PassOutput, PassRange, Predictor};
use headroom::task::{Batch, Datasets, Metrics, Model, Output, Task, Team};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use spec::config::{Config, Key, Section, StageKind, StageSpec, TaskSpec, Verdict};
use spec::contract::Weights;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Kind, Tensor, nn};

const POINTS: usize = 1000;
/// Set: a batch of the pass takes so many milliseconds.
const SLOW: &str = "RELAY_SLOW_MS";
/// Names a file: while it is missing, the pass makes it and fails.
const FAILS: &str = "RELAY_FAILS";

const CONFIG: &str = "
task: relay
data: {sample_if_missing: false, dataset_path: .}
train: {batch_size: 10, num_epochs: 5, learning_rate: 0.2, optimizer: sgd, scheduler: none, warmup_epochs: 0,
        weight_decay: 0.0, early_stopping: false, num_workers: 1}
log: {plots: false, log_every: 1, save_every: 1}
watch: {ease: false}
stages:
  second: {train: {num_epochs: 2, batch_size: 20}}
";

struct RelaySpec;

static SECTION: Section = Section {
    prefix: "relay.",
    doc: "A task with stages.\n",
    keys: &[Key::new("relay.slope", "Slope of the line.\n", spec::config::Kind::Number)],
    nested: &[],
    inert: &[],
    earlier: None,
    defaults: || serde_json::json!({"slope": 3.0}),
    normal: |value| Ok(value.clone()),
};

impl TaskSpec for RelaySpec {
    fn section(&self) -> &'static Section {
        &SECTION
    }
    fn stages(&self, _: &Config) -> Vec<StageSpec> {
        let stage = |name, kind| StageSpec { name, kind };
        vec![stage("first", StageKind::Train), stage("values", StageKind::Pass), stage("second", StageKind::Train)]
    }
    fn defaults(&self, config: &mut Config) {
        config.train.patience = if config.stage.as_deref() == Some("second") { 7 } else { 20 };
    }
    fn losses(&self) -> &'static [&'static str] {
        &["mse"]
    }
    fn check(&self, _: &Config, _: &mut Verdict) {}
}

/// Pairs `x`, `y`: points of y = 3x - 1, or those of a file.
struct Pairs(Vec<[f32; 2]>, [FieldSpec; 2]);

impl Pairs {
    fn shared(pairs: Vec<[f32; 2]>) -> Arc<dyn Dataset> {
        let field = |name| FieldSpec::new(name, &[1], Dtype::F32);
        Arc::new(Self(pairs, [field("x"), field("y")]))
    }
    fn line(from: usize, to: usize) -> Vec<[f32; 2]> {
        let x = |n: usize| (n as f32 * 0.37).sin();
        (from..to).map(|n| [x(n), 3.0 * x(n) - 1.0]).collect()
    }
    fn splits(pairs: &[[f32; 2]]) -> Datasets {
        let part = |from: usize, to: usize| Pairs::shared(pairs[from..to].to_vec());
        Datasets::new(part(0, 800), part(800, 900), part(900, POINTS))
    }
}

impl Dataset for Pairs {
    fn len(&self) -> usize {
        self.0.len()
    }
    fn fields(&self) -> &[FieldSpec] {
        &self.1
    }
    fn read(&self, request: ReadRequest, out: &mut [&mut [u8]], _: &mut Scratch) -> Result<(), DataError> {
        for (out, value) in out.iter_mut().zip(self.0[request.index]) {
            out.copy_from_slice(&value.to_ne_bytes());
        }
        Ok(())
    }
    fn describe(&self, index: usize) -> String {
        format!("pair {index}")
    }
}

struct Straight(nn::Linear);

impl Model for Straight {
    fn forward(&self, batch: &Batch, _train: bool) -> Output {
        let prediction = batch.fields[0].apply(&self.0);
        let loss = (&prediction - &batch.fields[1]).square().mean(Kind::Float);
        Output::new(loss, prediction)
    }
}

#[derive(Default)]
struct MeanLoss([f64; 2]);

impl Metrics for MeanLoss {
    fn update(&mut self, batch: &Batch, output: &Output) {
        self.0[0] += output.loss.double_value(&[]) * batch.len() as f64;
        self.0[1] += batch.len() as f64;
    }
    fn sums(&self) -> Vec<f64> {
        self.0.to_vec()
    }
    fn values(&self, sums: &[f64]) -> Vec<(String, f64)> {
        vec![("loss".into(), sums[0] / sums[1])]
    }
    fn reset(&mut self) {
        *self = Self::default();
    }
}

/// Writes `x` and the model's `y` of each point.
struct Values {
    outputs: Vec<PassOutput>,
    part: PathBuf,
    bytes: Vec<u8>,
}

impl Predictor for Values {
    fn outputs(&self) -> &[PassOutput] {
        &self.outputs
    }
    fn range_samples(&self) -> u64 {
        64
    }
    fn identity(&self) -> String {
        format!("{POINTS} points")
    }
    fn begin(&mut self, _: &PassRange, part: &Path) -> Result<(), DataError> {
        (self.part, self.bytes) = (part.to_owned(), Vec::new());
        Ok(())
    }
    fn take(&mut self, batch: &Batch, prediction: &Tensor) -> Result<(), DataError> {
        let slow = std::env::var(SLOW).ok().and_then(|ms| ms.parse().ok()).unwrap_or(0);
        std::thread::sleep(Duration::from_millis(slow));
        let values = |tensor: &Tensor| Vec::<f32>::try_from(tensor.flatten(0, -1)).unwrap();
        for (x, y) in values(&batch.fields[0]).into_iter().zip(values(prediction)) {
            self.bytes.extend([x.to_le_bytes(), y.to_le_bytes()].concat());
        }
        Ok(())
    }
    fn end(&mut self) -> Result<(), DataError> {
        if let Some(file) = std::env::var_os(FAILS).filter(|file| !Path::new(file).exists()) {
            std::fs::write(file, "").unwrap();
            return Err(DataError::NothingUsable("a fault that passes".into()));
        }
        std::fs::write(&self.part, &self.bytes).map_err(|e| DataError::output(&self.part, e))
    }
    fn finish(&mut self, folder: &Path) -> Result<Vec<String>, DataError> {
        assert!(folder.join("values.bin").is_file());
        Ok(vec!["values are written".into()])
    }
}

struct Relay;

impl Task for Relay {
    fn name(&self) -> &'static str {
        "relay"
    }
    fn open(&self, config: &Config, team: &Team, _: &Path) -> Result<Datasets, DataError> {
        if config.stage.as_deref() != Some("second") || team.stages == Default::default() {
            return Ok(Pairs::splits(&Pairs::line(0, POINTS)));
        }
        let path = team.stages.folder("values")?.join("values.bin");
        let bytes = std::fs::read(&path).map_err(|e| DataError::File { path, problem: e.to_string() })?;
        let number = |cell: &[u8]| f32::from_le_bytes(cell.try_into().unwrap());
        Ok(Pairs::splits(
            &bytes.chunks_exact(8).map(|pair| [number(&pair[..4]), number(&pair[4..])]).collect::<Vec<_>>(),
        ))
    }
    fn pass(&self, opening: &Opening) -> Result<Pass, DataError> {
        let data = || Pairs::shared(Pairs::line(0, POINTS));
        let outputs = vec![PassOutput { name: "values.bin".into(), samples: 0..POINTS as u64 }];
        let folder = opening.team.stages.folder("first")?.to_owned();
        let weights = vec![PartWeights { prefix: "first.".into(), folder, weights: Weights::Last }];
        let predictor = Box::new(Values { outputs, part: PathBuf::new(), bytes: Vec::new() });
        Ok(Pass { datasets: Datasets::new(data(), data(), data()), weights, predictor })
    }
    fn model(&self, config: &Config, _: &Datasets, vs: &nn::Path) -> Result<Box<dyn Model>, DataError> {
        let linear = |vs: &nn::Path| nn::linear(vs, 1, 1, nn::LinearConfig::default());
        let is_pass = config.stage.as_deref() == Some("values");
        Ok(Box::new(Straight(if is_pass { linear(&(vs / "first")) } else { linear(vs) })))
    }
    fn metrics(&self, _: &Config, _: &Datasets) -> Result<Box<dyn Metrics>, DataError> {
        Ok(Box::new(MeanLoss::default()))
    }
}

fn main() -> ExitCode {
    let name = std::env::args_os().next().map(PathBuf::from);
    let name = name.as_deref().and_then(Path::file_name).and_then(|name| name.to_str()).unwrap_or_default();
    if matches!(name, "launch" | "rank") {
        spec::task::add(&[&RelaySpec]).unwrap();
        headroom::task::add(&[&Relay]).unwrap();
        let code = if name == "rank" { headroom::rank::main() } else { launcher::command::main(std::env::args_os()) };
        return ExitCode::from(code);
    }
    // As a harness does: words are parts of the names of tests to run.
    let tests: [(&str, fn()); 7] = [
        ("stages_are_planned_run_in_order_and_closed_by_one_table", in_order),
        ("a_run_of_stages_stopped_in_a_training_ends_with_the_same_bits", stopped_in_training),
        ("a_run_of_stages_stopped_in_a_pass_ends_with_the_same_bytes_on_other_ranks", stopped_in_pass),
        ("single_stages_need_those_before_them_and_notice_when_they_changed", single_stages),
        ("a_stage_that_fails_is_started_again_and_later_ones_wait_for_it", failing),
        ("stages_that_are_not_there_are_refused_by_their_names", refused),
        ("the_tools_read_every_stage_of_a_run", tools),
    ];
    let filters: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    for (name, test) in tests {
        if filters.is_empty() || filters.iter().any(|word| format!("toy_stages {name}").contains(word.as_str())) {
            test();
            println!("test {name} ... ok");
        }
    }
    ExitCode::SUCCESS
}

/// The two programs with the toy task, beside a config.
struct Programs(tempfile::TempDir);

struct Ended {
    code: Option<i32>,
    text: String,
}

impl Programs {
    fn new() -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let own = std::env::current_exe().unwrap();
        for name in ["launch", "rank"] {
            std::os::unix::fs::symlink(&own, folder.path().join(name)).unwrap();
        }
        std::fs::write(folder.path().join("relay.yaml"), CONFIG).unwrap();
        Self(folder)
    }

    fn command(&self, words: &[&str]) -> Command {
        let file = |name: &str| std::fs::File::create(self.0.path().join(name)).unwrap();
        let mut command = Command::new(self.0.path().join("launch"));
        command.args(words).current_dir(self.0.path()).stdin(Stdio::null()).stdout(file("out")).stderr(file("err"));
        let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache");
        command.env("HEADROOM_RANK", self.0.path().join("rank")).env("XDG_CACHE_HOME", cache);
        command.env("OMP_WAIT_POLICY", "passive");
        command
    }

    fn text(&self) -> String {
        let read = |name: &str| std::fs::read_to_string(self.0.path().join(name)).unwrap_or_default();
        read("out") + &read("err")
    }

    /// Waits for `command`; `then` is called again and again until it returns true.
    fn end(&self, command: &mut Command, mut then: impl FnMut(&mut std::process::Child) -> bool) -> Ended {
        let mut child = command.spawn().unwrap();
        let (began, mut done) = (Instant::now(), false);
        let code = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status.code();
            }
            done = done || then(&mut child);
            assert!(began.elapsed() < Duration::from_secs(240), "a hang\n{}", self.text());
            std::thread::sleep(Duration::from_millis(2));
        };
        Ended { code, text: self.text() }
    }

    /// What `launch` prints, where it ends with `code`.
    fn says(&self, code: i32, words: &[&str]) -> String {
        let ended = self.end(&mut self.command(words), |_| true);
        assert_eq!(ended.code, Some(code), "launch {words:?}\n{}", ended.text);
        ended.text
    }

    fn train(&self, code: i32, words: &[&str]) -> String {
        self.says(code, &[&["--config", "relay.yaml"], words].concat())
    }

    fn run(&self, path: &str) -> PathBuf {
        self.0.path().join("runs").join(path)
    }

    fn json(&self, path: &str) -> Value {
        let path = self.run(path);
        serde_json::from_slice(&std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))).unwrap()
    }

    fn bytes(&self, path: &str) -> Vec<u8> {
        std::fs::read(self.run(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
    }

    /// The weights of the last step of a stage.
    fn weights(&self, stage: &str) -> Vec<u8> {
        let steps = std::fs::read_dir(self.run(stage).join("checkpoints")).unwrap().flatten();
        let step = |name: String| name.strip_prefix("step-")?.parse::<u64>().ok();
        let last = steps.filter_map(|entry| step(entry.file_name().into_string().ok()?)).max().unwrap();
        self.bytes(&format!("{stage}/checkpoints/step-{last}/model.safetensors"))
    }
}

fn in_order() {
    let programs = Programs::new();
    let plan = programs.says(0, &["plan", "--ranks", "2", "--config", "relay.yaml"]);
    let at = |text: &str| plan.find(text).unwrap_or_else(|| panic!("{text}: {plan}"));
    assert!(at("stage first\n") < at("stage values\n") && at("stage values\n") < at("stage second\n"), "{plan}");
    assert_eq!((plan.matches("staging slots").count(), plan.matches("samples at a time").count()), (2, 1), "{plan}");

    let text = programs.train(0, &["--ranks", "2", "--name", "r"]);
    for part in ["stage first (1 of 3)", "stage values (2 of 3)", "values are written", "all stages"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(text.matches('┌').count(), 1, "one table: {text}");
    let (first, values) = (programs.json("r/first/summary.json"), programs.json("r/values/summary.json"));
    assert_eq!((&first["status"], &first["steps"]), (&"finished".into(), &200.into()));
    assert_eq!(
        (&values["status"], &values["samples"], &values["outputs"]),
        (&"finished".into(), &1000.into(), &1.into())
    );
    // Keys of the file's section, of the task for this stage, and of the run.
    let second = programs.json("r/second/job.json");
    let train = &second["config"]["train"];
    assert_eq!(
        (&second["config"]["stage"], &train["num_epochs"], &train["patience"]),
        (&"second".into(), &2.into(), &7.into())
    );
    assert_eq!(programs.json("r/first/job.json")["config"]["train"]["num_epochs"], 5);
    assert_eq!(second["earlier"][1]["name"], "values");
    assert!(!programs.run("r/values/parts").exists() && !programs.run("r/values/checkpoints").exists());
    let points: Vec<f32> = programs
        .bytes("r/values/values.bin")
        .chunks_exact(4)
        .map(|cell| f32::from_le_bytes(cell.try_into().unwrap()))
        .collect();
    assert_eq!(points.len(), 2 * POINTS);
    for (n, pair) in points.chunks_exact(2).enumerate() {
        assert_eq!(pair[0], (n as f32 * 0.37).sin(), "in the order of the inputs");
        assert!((pair[1] - (3.0 * pair[0] - 1.0)).abs() < 1e-3, "{n}: {pair:?}");
    }

    // The same on one rank and on three; and each stage once.
    for ranks in ["1", "3"] {
        programs.train(
            0,
            &[
                "--ranks",
                ranks,
                "--name",
                ranks,
                "--set",
                "train.batch_size=6",
                "--set",
                "stages.second.train.batch_size=6",
            ],
        );
        let other = programs.bytes(&format!("{ranks}/values/values.bin"));
        assert_eq!(other.len(), 8 * POINTS);
    }
    let exists = programs.train(2, &["--ranks", "2", "--name", "r"]);
    assert!(exists.contains("the run r exists already"), "{exists}");
    let done = programs.train(0, &["--ranks", "2", "--name", "r", "--resume", "auto"]);
    assert_eq!(done.matches("done already").count(), 3, "{done}");
    // A stage that is named is looked at again.
    let more = [
        "--ranks",
        "2",
        "--name",
        "r",
        "--resume",
        "auto",
        "--stage",
        "second",
        "--set",
        "stages.second.train.num_epochs=3",
    ];
    programs.train(0, &more);
    assert_eq!(programs.json("r/second/summary.json")["steps"], 3 * 20);
}

fn stopped_in_training() {
    let programs = Programs::new();
    let long = ["--config", "relay.yaml", "--ranks", "1", "--set", "stages.first.train.num_epochs=60"];
    programs.says(0, &[&long[..], &["--name", "whole"]].concat());
    let records = programs.run("cut/first/metrics.jsonl");
    let ended = programs.end(&mut programs.command(&[&long[..], &["--name", "cut"]].concat()), |child| {
        let begun = std::fs::read(&records).is_ok_and(|text| text.len() > 4000);
        begun && kill_process(Pid::from_child(child), Signal::TERM).is_ok()
    });
    assert_eq!(ended.code, Some(75), "{}", ended.text);
    for part in ["--name cut --resume auto", "values          not run"] {
        assert!(ended.text.contains(part), "{part}: {}", ended.text);
    }
    assert!(!programs.run("cut/values").exists());
    let text = programs.says(0, &[&long[..], &["--resume", "auto"]].concat());
    assert!(text.contains("run cut, stage first: going on from"), "{text}");
    for stage in ["first", "second"] {
        assert!(programs.weights(&format!("whole/{stage}")) == programs.weights(&format!("cut/{stage}")), "{stage}");
    }
    assert!(programs.bytes("whole/values/values.bin") == programs.bytes("cut/values/values.bin"));
}

fn stopped_in_pass() {
    let programs = Programs::new();
    programs.train(0, &["--ranks", "1", "--name", "whole"]);
    programs.train(0, &["--ranks", "1", "--name", "cut", "--stage", "first"]);
    let parts = programs.run("cut/values/parts");
    let mut command =
        programs.command(&["--config", "relay.yaml", "--ranks", "2", "--name", "cut", "--from", "values"]);
    let ended = programs.end(command.env(SLOW, "15"), |child| {
        let done = std::fs::read_dir(&parts).into_iter().flatten().flatten();
        let whole = done.filter(|entry| !entry.file_name().to_string_lossy().starts_with('.')).count();
        whole >= 3 && kill_process(Pid::from_child(child), Signal::TERM).is_ok()
    });
    assert_eq!(ended.code, Some(75), "{}", ended.text);
    assert!(ended.text.contains("stopped; what is whole stays") && !programs.run("cut/values/values.bin").exists());
    assert_eq!(programs.json("cut/values/summary.json")["status"], "stopped");
    let text = programs.train(0, &["--ranks", "3", "--name", "cut", "--resume", "auto"]);
    assert!(text.contains("stage first: done already") && text.contains("of 1000 samples are done already"), "{text}");
    assert!(programs.bytes("whole/values/values.bin") == programs.bytes("cut/values/values.bin"));
}

fn single_stages() {
    let programs = Programs::new();
    let early = programs.train(2, &["--ranks", "1", "--name", "r", "--from", "values"]);
    assert!(
        early.contains("stage values needs ") && early.contains(" before it, and there is no run called r"),
        "{early}"
    );
    assert!(!programs.run("r").exists());
    programs.train(0, &["--ranks", "1", "--name", "r"]);
    let again = programs.train(2, &["--ranks", "1", "--name", "r", "--stage", "second"]);
    assert!(again.contains("stage second of run r was begun already"), "{again}");
    let before = programs.weights("r/second");
    std::fs::remove_dir_all(programs.run("r/second")).unwrap();
    programs.train(0, &["--ranks", "1", "--name", "r", "--stage", "second"]);
    assert!(before == programs.weights("r/second"));
    // A path leads to its stage and those behind it.
    let path = programs.run("r/second").display().to_string();
    let text = programs.train(0, &["--ranks", "1", "--resume", &path]);
    assert!(text.contains("stage second: done already") && !text.contains("stage values: done"), "{text}");
    // What a stage was made from is no longer there.
    std::fs::remove_dir_all(programs.run("r/first")).unwrap();
    let missing = programs.train(2, &["--ranks", "1", "--name", "r", "--resume", "auto", "--from", "second"]);
    assert!(missing.contains("stage second needs stage first, which is not done in run r"), "{missing}");
    let stale = programs.train(2, &["--ranks", "1", "--name", "r", "--resume", "auto"]);
    assert!(stale.contains("stage values was made from an earlier state of stage first"), "{stale}");
}

fn failing() {
    let programs = Programs::new();
    let words = ["--config", "relay.yaml", "--ranks", "2", "--name", "r"];
    let flag = programs.0.path().join("failed");
    let ended = programs.end(programs.command(&words).env(FAILS, &flag), |_| true);
    assert_eq!(ended.code, Some(4), "{}", ended.text);
    assert!(
        ended.text.contains("a fault that passes") && ended.text.contains("second          not run"),
        "{}",
        ended.text
    );
    assert!(!programs.run("r/second").exists());
    std::fs::remove_file(&flag).unwrap();
    let again = [&words[..], &["--resume", "auto", "--max-restarts", "1"]].concat();
    let ended = programs.end(programs.command(&again).env(FAILS, &flag), |_| true);
    assert_eq!(ended.code, Some(0), "{}", ended.text);
    assert!(ended.text.contains("going on with what is not done yet"), "{}", ended.text);
    assert_eq!(programs.json("r/values/summary.json")["restarts"], 1);
    assert_eq!(programs.json("r/second/summary.json")["status"], "finished");
}

fn refused() {
    let programs = Programs::new();
    for (words, says) in [
        (&["--stage", "third"][..], "unknown stage third; the stages of task relay are: first, values, second"),
        (&["--from", "third"], "unknown stage third"),
        (&["--stage", "first", "--from", "first"], "cannot be used with"),
        (&["--set", "stages.third.train.num_epochs=1"], "unknown stage third; the stages of task relay"),
        (&["--set", "stages.first.train.num_epoch=1"], "did you mean stages.first."),
        (&["--set", "stages.first.task=emg"], "all stages of a run have the same task"),
        (&["--smart"], "leave --smart out"),
        (
            &["--nnodes", "2", "--node-rank", "0", "--master-addr", "::1", "--master-port", "1", "--name", "n"],
            "run on one node",
        ),
        (&["--resume", "nowhere"], "no run with stages is there"),
    ] {
        let text = programs.train(2, &[&["--ranks", "1"], words].concat());
        assert!(text.contains(says), "{words:?}: {text}");
    }
    std::fs::write(programs.0.path().join("emg.yaml"), "task: emg\nstages: {first: {train: {num_epochs: 1}}}\n")
        .unwrap();
    let text = programs.says(2, &["plan", "--config", "emg.yaml"]);
    assert!(text.contains("emg.yaml:2") && text.contains("task emg has no stages"), "{text}");
    let text = programs.says(2, &["plan", "--config", "relay.yaml", "--set", "task=emg", "--stage", "first"]);
    assert!(text.contains("has no stages"), "{text}");
}

fn tools() {
    let programs = Programs::new();
    programs.train(0, &["--ranks", "1", "--name", "r"]);
    let doctor = programs.says(0, &["doctor", "r"]);
    assert!(["r/first:", "r/values:", "r/second:"].iter().all(|stage| doctor.contains(stage)), "{doctor}");
    let text = programs.says(0, &["analyze", "r", "--json"]);
    let found: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(found.as_object().unwrap().keys().collect::<Vec<_>>(), ["first", "second", "values"]);
    programs.says(0, &["analyze", "r/values"]);
    let evaluated = programs.says(0, &["evaluate", "r", "--stage", "first", "--weights", "last", "--json"]);
    let found: Value = serde_json::from_str(evaluated.split("\nlaunch:").next().unwrap().split("\n[").next().unwrap())
        .unwrap_or_else(|e| panic!("{e}: {evaluated}"));
    let records = std::fs::read_to_string(programs.run("r/first/metrics.jsonl")).unwrap();
    let last: Value = serde_json::from_str(records.lines().last().unwrap()).unwrap();
    assert_eq!(found["metrics"]["val.loss"], last["val.loss"]);
    let none = programs.says(4, &["predict", "r", "--data", "relay.yaml", "--out", "p"]);
    assert!(none.contains("task relay has no predictions to write: use launch evaluate"), "{none}");
}
