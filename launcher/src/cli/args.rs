//! The options of each verb.

use super::numbers::at_least_one;
use crate::monitor::Listen;
use crate::run_dir::SplitChoice;
use clap::Args;
use host::logging::LEVELS;
use host::machine::colour::Colour;
use spec::config::DeviceChoice;
use spec::contract::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

#[derive(Clone, Debug, Args)]
pub struct HelpArgs {
    /// A key, a section, a verb, or exit-codes [default: the sections]
    #[arg(value_name = "TOPIC")]
    pub topic: Option<String>,
    /// All keys as Markdown, as in configs/README.md
    #[arg(long, conflicts_with_all = ["topic", "schema"])]
    pub markdown: bool,
    /// All keys as JSON Schema, as in configs/schema.json
    #[arg(long, conflicts_with = "topic")]
    pub schema: bool,
}

#[derive(Clone, Debug, Args)]
pub struct BenchMemoryArgs {
    /// Optimizer steps of each run
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: u64,
    /// Data set [default: sample data, made on the spot]
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Only features whose name contains this
    #[arg(long, value_name = "WORD")]
    pub only: Option<String>,
    /// As JSON, for programs
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Debug, Args)]
pub struct AnalyzeArgs {
    #[command(flatten)]
    pub read: ReadArgs,
    /// Draw it as well
    #[arg(long, value_name = "OUT.png")]
    pub plot: Option<PathBuf>,
    /// As JSON, for programs
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Debug, Args)]
pub struct PlotArgs {
    #[command(flatten)]
    pub read: ReadArgs,
    /// One figure: memory of the run, or of a monitor's log
    #[arg(long, value_name = "OUT.png")]
    pub out: Option<PathBuf>,
    /// The run's job, where it lies outside of its folder
    #[arg(long, value_name = "JOB.json", conflicts_with = "out")]
    pub job: Option<PathBuf>,
}

#[derive(Clone, Debug, Args)]
pub struct MonitorArgs {
    /// A run by its folder or name [default: the one that trains here now; where none does, the machine]
    #[arg(long, value_name = "RUN", conflicts_with = "pid")]
    pub run: Option<PathBuf>,
    /// A process, with all that it starts
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pub pid: Option<i32>,
    /// Seconds until the monitor ends [default: until Ctrl-C, or the end of what it watches]
    #[arg(long, value_name = "S", value_parser = seconds)]
    pub duration: Option<f64>,
    /// Seconds between two looks [default: 1 on a terminal, else 5]
    #[arg(long, value_name = "S", value_parser = seconds)]
    pub interval: Option<f64>,
    /// Seconds between two plots [default: one at the end]
    #[arg(long, value_name = "S", value_parser = seconds)]
    pub plot_interval: Option<f64>,
    /// One JSON object per look on standard output
    #[arg(long)]
    pub json: bool,
    /// File that holds the last look as Prometheus metrics, for node_exporter's textfile collector
    #[arg(long, value_name = "FILE.prom")]
    pub textfile: Option<PathBuf>,
    /// Serve metrics: 127.0.0.1:PORT or unix:PATH
    #[arg(long, value_name = "ADDR", value_parser = listen)]
    pub listen: Option<Listen>,
    /// Folder for log, report and plots [default: the run's, else this one]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Folder that holds the run folders
    #[arg(long, value_name = "DIR", default_value = "runs")]
    pub runs_dir: PathBuf,
}

#[derive(Clone, Debug, Args)]
pub struct RecommendArgs {
    /// As JSON, for programs
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Debug, Args)]
pub struct DoctorArgs {
    #[command(flatten)]
    pub read: ReadArgs,
    /// As JSON, for programs
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Debug, Args)]
pub struct ReadArgs {
    /// A run's folder or name, or a monitor's JSON log
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// Folder that holds the run folders
    #[arg(long, value_name = "DIR", default_value = "runs")]
    pub runs_dir: PathBuf,
}

/// Which config, how changed, for which device.
#[derive(Clone, Debug, Default, Args)]
pub struct ConfigArgs {
    /// A config's name in configs/, or a path
    #[arg(long, value_name = "NAME")]
    pub config: Option<String>,
    /// Train what your function gives: a PyTorch model and data sets; the key python.build
    #[arg(long, value_name = "MODULE:FUNCTION")]
    pub python: Option<String>,
    /// Override one key, such as train.batch_size=32
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// auto, cpu or cuda; wins over train.device
    #[arg(long, value_name = "WHICH", value_parser = device)]
    pub device: Option<DeviceChoice>,
}

/// Options of a run.
#[derive(Clone, Debug, Default, Args)]
pub struct RunArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// GPUs to use here; where there are none, CPU ranks
    #[arg(long, value_name = "N", value_parser = at_least_one, conflicts_with = "ranks")]
    pub gpus: Option<usize>,
    /// Ranks of this node, whatever the devices
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub ranks: Option<usize>,
    /// Name of the run's folder [default: config and time]
    #[arg(long, value_name = "RUN")]
    pub name: Option<String>,
    /// Go on: auto (run --name), a run or checkpoint folder
    #[arg(long, value_name = "auto|PATH")]
    pub resume: Option<PathBuf>,
    /// Split of a resumed run whose files changed: keep (the checkpoint's, by names) or new
    #[arg(long, value_name = "keep|new", value_parser = split_choice, requires = "resume")]
    pub resume_split: Option<SplitChoice>,
    /// Refuse to start on fewer devices than asked for
    #[arg(long)]
    pub strict: bool,
    /// Restarts after failures
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub max_restarts: u32,
    /// Nodes of the job
    #[arg(long, value_name = "N", default_value = "1", value_parser = super::torchrun::nnodes)]
    pub nnodes: usize,
    /// This node's number, from 0
    #[arg(long, value_name = "R", default_value_t = 0)]
    pub node_rank: usize,
    /// Address of node 0: a host name, or an address of IPv4 or IPv6 (`[::1]` and `::1` are the same)
    #[arg(long, value_name = "A", value_parser = env::host)]
    pub master_addr: Option<String>,
    /// Free port on node 0
    #[arg(long, value_name = "P")]
    pub master_port: Option<u16>,
    /// How long nodes wait for each other, seconds
    #[arg(long, value_name = "S", default_value = "600", value_parser = seconds)]
    pub join_timeout: f64,
    /// File with a secret that all nodes share; wins over HEADROOM_JOIN_SECRET
    #[arg(long, value_name = "FILE")]
    pub join_secret: Option<PathBuf>,
    /// Where a scheduler's signal stops the run, have SLURM start the job again: `scontrol requeue`
    #[arg(long)]
    pub requeue: bool,
    #[command(flatten)]
    pub torchrun: super::TorchrunArgs,
    /// Train in legs; after each, the metrics decide whether to go on: see the config's `smart` keys
    #[arg(long, conflicts_with = "nnodes")]
    pub smart: bool,
    /// Run one stage of the task, in the run --name
    #[arg(long, value_name = "NAME", conflicts_with = "from")]
    pub stage: Option<String>,
    /// Run this stage and those behind it
    #[arg(long, value_name = "NAME")]
    pub from: Option<String>,
    /// Print the plan and stop, as `launch plan`
    #[arg(long)]
    pub dry_run: bool,
    /// Log lines of launch and ranks: off, error, warn, info, debug or trace; wins over HEADROOM_LOG [default: warn]
    #[arg(long, value_name = "LEVEL", value_parser = clap::builder::PossibleValuesParser::new(LEVELS), hide_possible_values = true)]
    pub log_level: Option<String>,
}

#[derive(Clone, Debug, Args)]
pub struct PlanArgs {
    #[command(flatten)]
    pub run: RunArgs,
    /// Plan for the machine described in FILE instead of this one
    #[arg(long, value_name = "FILE", conflicts_with = "write_machine")]
    pub machine: Option<PathBuf>,
    /// Write what a plan must know of this machine to FILE; needs no config
    #[arg(long, value_name = "FILE")]
    pub write_machine: Option<PathBuf>,
    /// As JSON, for programs
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub program: super::ProgramArgs,
    /// Plan for PROGRAM instead of a config; what follows is its own
    #[arg(long)]
    pub exec: bool,
}

#[derive(Clone, Debug, Args)]
pub struct SampleDataArgs {
    /// The task whose format is written
    #[arg(long, value_name = "TASK")]
    pub task: String,
    /// Folder to write to
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Seed of the data
    #[arg(long, value_name = "N", default_value_t = 42)]
    pub seed: u64,
    /// Layout of the files
    #[arg(long, value_name = "LAYOUT")]
    pub layout: Option<String>,
    /// Sessions to write [default: the task's]
    #[arg(long, value_name = "N")]
    pub sessions: Option<usize>,
    /// Seconds per session [default: the task's]
    #[arg(long, value_name = "S")]
    pub seconds: Option<f64>,
    /// Cells to write, by task cell [default: the task's]
    #[arg(long, value_name = "N")]
    pub cells: Option<usize>,
    /// Genes of each cell, by task cell [default: the task's]
    #[arg(long, value_name = "N")]
    pub genes: Option<usize>,
}

impl SampleDataArgs {
    /// The task's usual sample data.
    pub fn of(task: &str, out: &Path, seed: u64) -> Self {
        let (task, out) = (task.to_string(), out.to_path_buf());
        Self { task, out, seed, layout: None, sessions: None, seconds: None, cells: None, genes: None }
    }

    /// The command line of the rank program that does it.
    pub fn words(&self) -> Vec<OsString> {
        let mut words: Vec<OsString> = vec!["sample-data".into(), "--task".into(), self.task.clone().into()];
        words.extend(["--out".into(), self.out.clone().into_os_string()]);
        let mut option = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                words.extend([name.into(), value.into()]);
            }
        };
        option("--seed", Some(self.seed.to_string()));
        option("--layout", self.layout.clone());
        option("--sessions", self.sessions.map(|n| n.to_string()));
        option("--seconds", self.seconds.map(|s| s.to_string()));
        option("--cells", self.cells.map(|n| n.to_string()));
        option("--genes", self.genes.map(|n| n.to_string()));
        words
    }
}

#[derive(Clone, Debug, Args)]
pub struct ConvertArgs {
    /// The data set, in any format that the task reads
    #[arg(value_name = "DATA")]
    pub data: PathBuf,
    /// Folder to write to
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// The task whose format is written
    #[arg(long, value_name = "TASK", default_value = "yolo")]
    pub task: String,
    /// Seed of the split, where the data set has none
    #[arg(long, value_name = "N", default_value_t = 42)]
    pub seed: u64,
    /// Shares of training, validation and test, where the data set has no split
    #[arg(long, value_name = "SHARES", default_value = "0.7,0.2,0.1")]
    pub split_ratio: String,
}

impl ConvertArgs {
    /// The command line of the rank program that does it.
    pub fn words(&self) -> Vec<OsString> {
        let mut words: Vec<OsString> = vec!["convert".into(), "--task".into(), self.task.clone().into()];
        words.extend(["--data".into(), self.data.clone().into_os_string()]);
        words.extend(["--out".into(), self.out.clone().into_os_string()]);
        words.extend(["--seed".into(), self.seed.to_string().into()]);
        words.extend(["--split-ratio".into(), self.split_ratio.clone().into()]);
        words
    }
}

#[derive(Clone, Debug, Args)]
pub struct BatchArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Optimizer step, from 0
    #[arg(long, value_name = "N")]
    pub step: u64,
    /// Which rank, from 0
    #[arg(long, value_name = "R")]
    pub rank: usize,
    /// Ranks of the job
    #[arg(long, value_name = "W", value_parser = at_least_one)]
    pub world: usize,
    /// File to write
    #[arg(long, value_name = "FILE.safetensors")]
    pub out: PathBuf,
}

pub(super) fn device(text: &str) -> Result<DeviceChoice, String> {
    text.parse().map_err(|_| "expected auto, cpu or cuda".into())
}

fn listen(text: &str) -> Result<Listen, String> {
    text.parse()
}

pub(super) fn colour(text: &str) -> Result<Colour, String> {
    match text {
        "auto" => Ok(Colour::Auto),
        "always" => Ok(Colour::Always),
        "never" => Ok(Colour::Never),
        _ => Err("expected auto, always or never".into()),
    }
}

fn split_choice(text: &str) -> Result<SplitChoice, String> {
    match text {
        "keep" => Ok(SplitChoice::Keep),
        "new" => Ok(SplitChoice::New),
        _ => Err("expected keep or new".into()),
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    let positive = |seconds: &f64| seconds.is_finite() && *seconds > 0.0;
    text.parse().ok().filter(positive).ok_or_else(|| "expected a number of seconds above 0".into())
}
