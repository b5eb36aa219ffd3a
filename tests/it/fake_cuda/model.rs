//! The model of CUDA: built once, then one job at a time runs on it and is reported by it.

use crate::support::{Ended, Running, folder, launch_program};
use rustix::process::Pid;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use tempfile::TempDir;

/// Bytes of the numbers of a step: `NUMBERS` of src/train/device.rs, f32.
const STEP_BYTES: &str = "80";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// `site-packages` of the environment whose libtorch this build links.
pub fn site_packages() -> PathBuf {
    let libtorch = std::env::var_os("LIBTORCH").map_or_else(|| root().join(".libtorch"), PathBuf::from);
    let libtorch = libtorch.canonicalize().unwrap_or_else(|e| panic!("{}: {e}: run scripts/setup", libtorch.display()));
    libtorch.parent().unwrap().to_owned()
}

/// The folder of the built model. Its name follows from its sources: it is built again when one of them changes.
pub fn built() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let sources = root().join("tests/fake_cuda");
        let mut hasher = DefaultHasher::new();
        let mut names: Vec<_> = fs::read_dir(&sources).unwrap().map(|entry| entry.unwrap().path()).collect();
        names.sort();
        names.iter().for_each(|path| fs::read(path).unwrap().hash(&mut hasher));
        site_packages().hash(&mut hasher);
        let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fake_cuda-{:x}", hasher.finish()));
        if !out.join("done").exists() {
            let made = Command::new(sources.join("build")).arg(site_packages()).arg(&out).output().unwrap();
            let text = String::from_utf8_lossy(&made.stderr);
            assert!(made.status.success(), "the model of CUDA does not build: {text}");
            fs::write(out.join("done"), "").unwrap();
        }
        out
    })
}

/// A job on the model.
pub struct Job {
    folder: TempDir,
    command: Command,
}

/// What a rank did on the model.
pub struct Report(pub Value);

impl Job {
    /// `launch` with these words on `gpus` devices, and what it prints in files of a folder that goes with the job.
    pub fn new(gpus: usize, words: &[&str]) -> Job {
        let (built, folder) = (built(), folder());
        let mut command = Command::new(launch_program());
        let libraries = ["lib", "driver", "nvml"].map(|part| built.join(part).display().to_string());
        command
            .args(words)
            .args(["--name", "job", "--set", "watch.ease=false", "--set", "log.plots=false"])
            .arg("--set")
            .arg(format!("log.runs_dir={}", folder.path().display()))
            .env("LD_PRELOAD", built.join("libfake_cuda.so"))
            .env("LD_LIBRARY_PATH", libraries.join(":"))
            .env("FAKE_CUDA_OPERATORS", built.join("operators.so"))
            .env("TORCH_CUDNN_V8_API_DISABLED", "1")
            .env("FAKE_CUDA_GPUS", gpus.to_string())
            .env("FAKE_CUDA_OUT", folder.path())
            .env("FAKE_CUDA_STEP_BYTES", STEP_BYTES)
            .env("OMP_WAIT_POLICY", "passive")
            // Sizes that were measured on the model are not this machine's.
            .env("XDG_CACHE_HOME", built.join("cache"))
            // Stacks are for whoever asks.
            .env_remove("RUST_BACKTRACE")
            .env_remove("CUDA_VISIBLE_DEVICES");
        Job { folder, command }
    }

    pub fn set(mut self, sets: &[&str]) -> Job {
        for set in sets {
            self.command.args(["--set", set]);
        }
        self
    }

    pub fn env(mut self, name: &str, value: impl AsRef<std::ffi::OsStr>) -> Job {
        self.command.env(name, value);
        self
    }

    /// Without NVML on this machine.
    pub fn without_nvml(mut self) -> Job {
        let built = built();
        let libraries = ["lib", "driver"].map(|part| built.join(part).display().to_string());
        self.command.env("LD_LIBRARY_PATH", libraries.join(":"));
        self
    }

    /// A fault of the model, in the words of its README.
    pub fn fault(self, fault: &str) -> Job {
        self.env("FAKE_CUDA_FAULT", fault)
    }

    pub fn run(self) -> Done {
        self.start().wait()
    }

    pub fn start(mut self) -> AtWork {
        let running = Running::start(&mut self.command, self.folder.path());
        AtWork { running, folder: self.folder }
    }
}

/// A job that runs.
pub struct AtWork {
    running: Running,
    folder: TempDir,
}

impl AtWork {
    /// Waits until a rank is suspended.
    pub fn stopped_child(&mut self) -> Pid {
        let launch = self.running.child.id();
        let mut found = None;
        let stopped = |pid: &str| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T'))
        };
        let came = self.running.until("a rank stands still", || {
            let children = fs::read_to_string(format!("/proc/{launch}/task/{launch}/children")).unwrap_or_default();
            found = children.split_whitespace().find(|pid| stopped(pid)).and_then(|pid| pid.parse().ok());
            found.is_some()
        });
        assert!(came, "the job ended before");
        Pid::from_raw(found.unwrap()).unwrap()
    }

    pub fn wait(self) -> Done {
        Done { ended: self.running.wait(), folder: self.folder }
    }
}

/// A job that has ended.
pub struct Done {
    pub ended: Ended,
    pub folder: TempDir,
}

impl Done {
    pub fn text(&self) -> String {
        format!("{}{}", self.ended.out, self.ended.err)
    }

    /// Every rank's report, by its number. Helpers that measured the model have no steps of training and are left out.
    pub fn reports(&self) -> BTreeMap<u64, Report> {
        let mut all = BTreeMap::new();
        for entry in fs::read_dir(self.folder.path()).unwrap().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if !name.starts_with("rank") || !name.ends_with(".json") {
                continue;
            }
            let text = fs::read_to_string(entry.path()).unwrap();
            let report: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{name}: {e}: {text}"));
            // A helper that measured the model: on the device as well, and without the launcher's environment.
            if report["device_order"] == "" {
                continue;
            }
            all.insert(report["rank"].as_u64().unwrap(), Report(report));
        }
        all
    }

    pub fn plan(&self) -> Value {
        serde_json::from_slice(&fs::read(self.folder.path().join("job/plan.json")).unwrap()).unwrap()
    }
}

impl Report {
    /// Steps in the steady state: without those before the recording, and without the last, which is waited for.
    fn steady(&self) -> Vec<&Value> {
        let steps = self.0["steps"].as_array().unwrap();
        assert!(steps.len() >= 8, "{} steps", steps.len());
        steps[5..steps.len() - 1].iter().collect()
    }

    /// The most of a count in a steady step.
    pub fn most(&self, name: &str) -> u64 {
        self.steady().iter().map(|step| step[name].as_u64().unwrap()).max().unwrap()
    }

    /// Kernels, copies and collectives of a step: of the recorded one, or of one as it is written.
    pub fn captures(&self) -> Vec<&Value> {
        self.0["captures"].as_array().unwrap().iter().collect()
    }

    pub fn number(&self, name: &str) -> u64 {
        self.0[name].as_u64().unwrap()
    }

    pub fn list(&self, name: &str) -> Vec<String> {
        self.0[name].as_array().unwrap().iter().map(|item| item.to_string()).collect()
    }
}
