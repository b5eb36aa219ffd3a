//! Shared parts of the integration tests: the programs, sample data, runs with a guard against hangs, readers.

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Far beyond what anything here takes, on any machine; only a hang reaches it.
const HANG: Duration = Duration::from_secs(240);

pub fn rank_program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_rank"))
}

/// `launch` is of another package, so cargo does not build it for this test.
pub fn launch_program() -> PathBuf {
    let path = rank_program().with_file_name("launch");
    assert!(path.is_file(), "no {}: build it first with `cargo build --release --workspace --bins`", path.display());
    path
}

/// Where all files of this test process lie; what earlier, killed ones left there is removed.
fn scratch() -> &'static Path {
    static SCRATCH: OnceLock<PathBuf> = OnceLock::new();
    SCRATCH.get_or_init(|| {
        let base = Path::new(env!("CARGO_TARGET_TMPDIR"));
        for entry in fs::read_dir(base).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if let Some(pid) = name.strip_prefix("it-")
                && !Path::new("/proc").join(pid).exists()
            {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        let own = base.join(format!("it-{}", std::process::id()));
        fs::create_dir_all(&own).unwrap();
        own
    })
}

pub fn folder() -> TempDir {
    tempfile::tempdir_in(scratch()).unwrap()
}

/// Four sessions of four seconds: 142 training windows of two files under [`TINY`].
pub fn sample_data() -> &'static Path {
    static DATA: OnceLock<PathBuf> = OnceLock::new();
    DATA.get_or_init(|| {
        let out = scratch().join("data");
        let mut command = Command::new(rank_program());
        command.args(["sample-data", "--task", "emg", "--sessions", "4", "--seconds", "4", "--out"]).arg(&out);
        let ended = run(&mut command, scratch());
        assert_eq!(ended.code, Some(0), "{ended}");
        out
    })
}

/// 300 cells of 100 genes and five types.
pub fn sample_cells() -> &'static Path {
    static DATA: OnceLock<PathBuf> = OnceLock::new();
    DATA.get_or_init(|| {
        let out = scratch().join("cells");
        let mut command = Command::new(rank_program());
        command.args(["sample-data", "--task", "cell", "--cells", "300", "--genes", "100", "--out"]).arg(&out);
        let ended = run(&mut command, scratch());
        assert_eq!(ended.code, Some(0), "{ended}");
        out
    })
}

/// A model of 5,800 parameters and windows of 0.1 s: a step takes milliseconds.
const TINY: &str = r#"
task: emg
seed: 7
data: {window_size: 200, stride: 100, normalize: true, rectify: true}
model:
  dropout: 0.0
  tds_stages:
    - {in_conv_kernel: 5, in_conv_stride: 4, num_blocks: 1, channels: 4, feature_width: 4, kernel_width: 5}
  decoder_hidden_size: 16
  decoder_num_layers: 1
train:
  batch_size: 4
  num_epochs: 100000
  max_steps: 20
  learning_rate: 2.0e-3
  weight_decay: 1.0e-3
  scheduler: none
  warmup_epochs: 0
  early_stopping: false
  restore_best_weights: false
  num_workers: 1
log: {log_every: 1, memory_every: 1, plots: false, save_every: 0}
"#;

/// Runs of the tiny config with some keys set, in a folder of their own.
pub struct Runs {
    folder: TempDir,
    sets: Vec<String>,
}

impl Runs {
    pub fn new(sets: &[&str]) -> Self {
        Self::of(TINY, sample_data(), sets)
    }

    /// Runs of another config, on these data.
    pub fn of(config: &str, data: &Path, sets: &[&str]) -> Self {
        let folder = folder();
        fs::write(folder.path().join("tiny.yaml"), config).unwrap();
        let mut all = vec![
            format!("data.dataset_path={}", data.display()),
            format!("log.runs_dir={}", folder.path().join("runs").display()),
            // Results do not depend on how full the machine is.
            "watch.ease=false".into(),
        ];
        all.extend(sets.iter().map(|set| set.to_string()));
        Self { folder, sets: all }
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// `launch <verb> --config tiny --set …`.
    pub fn command(&self, verb: &[&str]) -> Command {
        let mut command = Command::new(launch_program());
        command.args(verb).arg("--config").arg(self.folder.path().join("tiny.yaml"));
        for set in &self.sets {
            command.arg("--set").arg(set);
        }
        // Two threads that spin for each other on cores that others use too: seconds per step. The results are the same.
        command.env("OMP_WAIT_POLICY", "passive");
        command
    }

    /// Trains `name`; `words` are options of `launch`.
    pub fn train(&self, name: &str, words: &[&str]) -> Ended {
        self.start(name, words).wait()
    }

    pub fn start(&self, name: &str, words: &[&str]) -> Running {
        // Behind the common keys: the last one wins.
        let mut command = self.command(&[]);
        command.args(["--name", name]).args(words);
        Running::start(&mut command, self.folder.path())
    }

    /// Trains to the end.
    pub fn finish(&self, name: &str, words: &[&str]) -> Run {
        let ended = self.train(name, words);
        assert_eq!(ended.code, Some(0), "{name}: {ended}");
        self.run(name)
    }

    pub fn run(&self, name: &str) -> Run {
        Run { path: self.folder.path().join("runs").join(name) }
    }
}

/// A run's folder.
pub struct Run {
    pub path: PathBuf,
}

impl Run {
    pub fn checkpoint(&self, step: u64) -> PathBuf {
        self.path.join(format!("checkpoints/step-{step}"))
    }

    pub fn metrics(&self) -> Vec<Value> {
        read_lines(&self.path.join("metrics.jsonl"))
    }

    /// Steps in metrics.jsonl, as they stand there.
    pub fn steps(&self) -> Vec<u64> {
        self.metrics().iter().map(|record| record["step"].as_u64().unwrap()).collect()
    }

    pub fn losses(&self) -> Vec<f64> {
        self.metrics().iter().map(|record| record["loss"].as_f64().unwrap()).collect()
    }

    pub fn summary(&self) -> Value {
        serde_json::from_slice(&fs::read(self.path.join("summary.json")).unwrap()).unwrap()
    }

    pub fn tensors(&self, step: u64, file: &str) -> Tensors {
        read_tensors(&self.checkpoint(step).join(file))
    }

    /// Lines of metrics.jsonl so far, whole ones.
    pub fn steps_so_far(&self) -> usize {
        let text = fs::read(self.path.join("metrics.jsonl")).unwrap_or_default();
        text.iter().filter(|&&byte| byte == b'\n').count()
    }
}

/// A program that runs; it is killed when the test ends without waiting for it.
pub struct Running {
    pub child: Child,
    files: TempDir,
    done: bool,
}

impl Running {
    /// Output goes to files, so that nothing waits for a reader.
    pub fn start(command: &mut Command, folder: &Path) -> Self {
        let files = tempfile::tempdir_in(folder).unwrap();
        let file = |name: &str| File::create(files.path().join(name)).unwrap();
        command.stdin(Stdio::null()).stdout(file("out")).stderr(file("err"));
        // Measurements of models are kept between tests, and apart from the user's.
        if !command.get_envs().any(|(name, _)| name == "XDG_CACHE_HOME") {
            command.env("XDG_CACHE_HOME", Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache"));
        }
        let child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        Self { child, files, done: false }
    }

    /// Folder of what it prints: `out` and `err`.
    pub fn files(&self) -> PathBuf {
        self.files.path().to_owned()
    }

    pub fn read(&self, name: &str) -> String {
        String::from_utf8_lossy(&fs::read(self.files.path().join(name)).unwrap()).into_owned()
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits until `done`; false: the program ended before.
    pub fn until(&mut self, what: &str, mut done: impl FnMut() -> bool) -> bool {
        let end = Instant::now() + HANG;
        while !done() {
            if self.child.try_wait().unwrap().is_some() {
                return done();
            }
            assert!(Instant::now() < end, "{what}: never\n{}\n{}", self.read("out"), self.read("err"));
            std::thread::sleep(Duration::from_micros(500));
        }
        true
    }

    /// The process that trains as `rank`: a child of this program.
    pub fn rank(&self, rank: usize) -> Pid {
        let parent = self.child.id().to_string();
        let wanted = format!("RANK={rank}");
        let found = fs::read_dir("/proc").unwrap().flatten().find_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
            let of_parent = stat.rsplit_once(") ")?.1.split(' ').nth(1)? == parent;
            let environment = fs::read(entry.path().join("environ")).ok().filter(|_| of_parent)?;
            environment.split(|&byte| byte == 0).any(|word| word == wanted.as_bytes()).then_some(pid)
        });
        Pid::from_raw(found.unwrap_or_else(|| panic!("no process of rank {rank}\n{}", self.read("err")))).unwrap()
    }

    pub fn wait(mut self) -> Ended {
        let end = Instant::now() + HANG;
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None => assert!(Instant::now() < end, "a hang\n{}\n{}", self.read("out"), self.read("err")),
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        self.done = true;
        Ended { code: status.code(), out: self.read("out"), err: self.read("err") }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.done {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

pub struct Ended {
    /// `None`: by a signal.
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "ended with {:?}\n{}\n{}", self.code, self.out, self.err)
    }
}

pub fn run(command: &mut Command, folder: &Path) -> Ended {
    Running::start(command, folder).wait()
}

pub fn read_lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}"))).collect()
}

/// Shape and bytes of each tensor of a safetensors file.
pub type Tensors = BTreeMap<String, (Vec<usize>, Vec<u8>)>;

pub fn read_tensors(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    file.iter().map(|(name, view)| (name.to_string(), (view.shape().to_vec(), view.data().to_vec()))).collect()
}

pub fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect()
}

/// Largest difference over tensors: ‖a − b‖ / ‖b‖ of a tensor, and |a − b| / max |b| of its elements.
pub struct Distance {
    pub norm: f64,
    pub element: f64,
    pub worst: String,
}

pub fn distance(a: &Tensors, b: &Tensors) -> Distance {
    assert!(a.keys().eq(b.keys()), "{:?}\n{:?}", a.keys(), b.keys());
    let mut most = Distance { norm: 0.0, element: 0.0, worst: String::new() };
    for (name, (shape, bytes)) in a {
        assert_eq!(shape, &b[name].0, "{name}");
        let (x, y) = (floats(bytes), floats(&b[name].1));
        let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
        let differences = || x.iter().zip(&y).map(|(x, y)| f64::from(*x) - f64::from(*y));
        let largest = y.iter().fold(0.0, |most: f64, y| most.max(f64::from(y.abs())));
        let relative = norm(&mut differences()) / norm(&mut y.iter().map(|&y| f64::from(y)));
        let element = differences().fold(0.0, |most: f64, d| most.max(d.abs())) / largest;
        assert!(relative.is_finite() && element.is_finite(), "{name}");
        if relative > most.norm {
            (most.norm, most.worst) = (relative, name.clone());
        }
        most.element = most.element.max(element);
    }
    most
}

/// Checks that the checkpoint of `step` holds the same bytes in both runs: tensors and loop state (except times).
pub fn assert_same_checkpoint(a: &Run, b: &Run, step: u64, what: &str) {
    for file in ["model.safetensors", "optimizer.safetensors", "ema.safetensors"] {
        let read = |run: &Run| fs::read(run.checkpoint(step).join(file)).ok();
        let (x, y) = (read(a), read(b));
        assert!(file.starts_with("ema") || x.is_some(), "{what}: no {file} of step {step}");
        assert!(x == y, "{what}: {file} of step {step} differs");
    }
    let state = |run: &Run| {
        let text = fs::read(run.checkpoint(step).join("state.json")).unwrap();
        let mut state = serde_json::from_slice::<Value>(&text).unwrap()["state"].take();
        state.as_object_mut().unwrap().remove("train_s").unwrap();
        state
    };
    assert_eq!(state(a), state(b), "{what}");
}
