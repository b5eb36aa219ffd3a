//! The command line of `launch`, and what can be said of it before the machine is asked.

mod program;

pub use program::ProgramArgs;

use crate::logging::LEVELS;
use crate::run_dir::{Resume, SplitChoice};
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use spec::config::{Config, ConfigError, DeviceChoice, Folders};
use spec::contract::{env, shown as shown_path};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Path of the rank program, where it does not lie beside `launch`.
pub const RANK_PROGRAM: &str = "HEADROOM_RANK";

const EXAMPLES: &str = "\
Examples:
  launch --gpus 3 --config quick_demo           a first look, no data needed
  launch plan --gpus 3 --config default         would it fit?
  launch --gpus 3 --config default --name night --set train.batch_size=32
  launch --gpus 3 --config default --name night --resume auto
  launch --ranks 3 --exec python3 worker.py     any program, with RANK set
  launch --gpus 3 --cache 20GiB --name night --exec python3 train.py
                                                the same with a page cache, a memory plan, records and a watch";

const NO_PROGRAM: &str = "--exec needs a program: launch --ranks 3 --exec PROGRAM [ARGS]...";

const PLAN_EXAMPLES: &str = "\
Examples:
  launch plan --gpus 3 --config default
  launch plan --ranks 2 --config low_memory --set memory.budget=4GiB
  launch plan --write-machine node7.json           on the other machine; then here:
  launch plan --machine node7.json --gpus 3 --config default

The sizes of a model are measured once, by running passes on made-up samples (at most 30 s and a quarter of the
budget), and kept in $XDG_CACHE_HOME/headroom or ~/.cache/headroom. A plan for another machine rests on what was
measured here where no device of its kind is here; its lines say so.";

const SAMPLE_EXAMPLES: &str = "\
Example:
  launch sample-data --task emg --out sample-data/long --sessions 4 --seconds 60";

const MONITOR_EXAMPLES: &str = "\
Examples:
  launch monitor                                the run that trains here now
  launch monitor --run night --duration 3600 --plot-interval 60
  launch monitor --pid 4242                     any program, with its children";

const HELP_EXAMPLES: &str = "\
Examples:
  launch help train                             the keys of a section
  launch help train.batch_size                  a key: type, default, range, other names
  launch help exit-codes";

const BATCH_EXAMPLES: &str = "\
Example:
  launch batch --config quick_demo --step 0 --rank 0 --world 3 --out batch.safetensors";

/// Trains on every GPU of this machine, within a memory budget planned first.
#[derive(Debug, Parser)]
#[command(name = "launch", version, args_conflicts_with_subcommands = true, disable_help_subcommand = true)]
#[command(after_help = EXAMPLES)]
#[command(override_usage = "launch --gpus N --config NAME [--set key=value]... [OPTIONS]\n       \
                            launch plan|sample-data|batch|recommend|monitor|analyze|doctor|bench-memory|help ...\n       launch --ranks N --exec PROGRAM [ARGS]...")]
struct Cli {
    #[command(subcommand)]
    verb: Option<Verb>,
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    program: ProgramArgs,
    /// Run PROGRAM as every rank; what follows is its own
    #[arg(long)]
    exec: bool,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Print the memory plan of a run; start nothing
    #[command(after_help = PLAN_EXAMPLES)]
    Plan(PlanArgs),
    /// Write sample data in a task's true format
    #[command(after_help = SAMPLE_EXAMPLES)]
    SampleData(SampleDataArgs),
    /// Write the tensors that one rank trains on at one step
    #[command(after_help = BATCH_EXAMPLES)]
    Batch(BatchArgs),
    /// Which config, batch, workers and cache fit this machine
    Recommend(RecommendArgs),
    /// What went wrong in a run, why, and what to change
    Doctor(ReadArgs),
    /// Memory of a run, or of a monitor's log, in numbers: range, trend, peaks, plan against truth
    Analyze(AnalyzeArgs),
    /// Watch memory: of a run, of any program, of the machine
    #[command(after_help = MONITOR_EXAMPLES)]
    Monitor(MonitorArgs),
    /// Draw the figures of a run into its folder, or one figure of its memory into a file
    #[command(hide = true)]
    Plot(PlotArgs),
    /// Measure what each memory feature saves here: short runs with it off and on
    BenchMemory(BenchMemoryArgs),
    /// Explain a key or section of a config, a verb, or exit-codes
    #[command(after_help = HELP_EXAMPLES)]
    Help(HelpArgs),
}

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
    #[arg(long, value_name = "N", default_value = "1", value_parser = at_least_one)]
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
    /// Train in legs; after each, the metrics decide whether to go on: see the config's `smart` keys
    #[arg(long, conflicts_with = "nnodes")]
    pub smart: bool,
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
    #[command(flatten)]
    pub program: ProgramArgs,
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
}

impl SampleDataArgs {
    /// The task's usual sample data.
    pub fn of(task: &str, out: &Path, seed: u64) -> Self {
        let (task, out) = (task.to_string(), out.to_path_buf());
        Self { task, out, seed, layout: None, sessions: None, seconds: None }
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

/// Parsed command.
#[derive(Clone, Debug)]
pub enum Command {
    Train(RunArgs),
    Plan(PlanArgs),
    SampleData(SampleDataArgs),
    Batch(BatchArgs),
    Recommend(RecommendArgs),
    Doctor(ReadArgs),
    Analyze(AnalyzeArgs),
    Monitor(MonitorArgs),
    Plot(PlotArgs),
    BenchMemory(BenchMemoryArgs),
    Help(HelpArgs),
    Exec { run: RunArgs, with: ProgramArgs, program: OsString, args: Vec<OsString> },
    PlanExec { run: RunArgs, with: ProgramArgs, program: OsString, args: Vec<OsString> },
}

/// A command line that is not one.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// `--help` or `--version`: text for standard output, no mistake.
    #[error("{0}")]
    Shown(String),
    #[error("{0}")]
    Usage(String),
    #[error(
        "no rank program at {path}: build it with `cargo build --release`, or name it in {RANK_PROGRAM}",
        path = shown_path(.0)
    )]
    NoRank(PathBuf),
    #[error(
        "{path} cannot be executed: build the rank program with `cargo build --release`, or name it in {RANK_PROGRAM}",
        path = shown_path(.0)
    )]
    RankNotExecutable(PathBuf),
}

impl Command {
    /// Reads a command line, the program's name first.
    ///
    /// # Errors
    /// [`CliError::Shown`] for `--help` and `--version`; else what is wrong and how it is written.
    pub fn parse(line: impl IntoIterator<Item = OsString>) -> Result<Self, CliError> {
        let (head, tail) = split_exec(line.into_iter().collect());
        let cli = definition().try_get_matches_from(head).and_then(|found| Cli::from_arg_matches(&found));
        let cli = cli.map_err(shown)?;
        let command = match (cli.verb, tail) {
            (Some(Verb::Plan(args)), Some(mut tail)) if !tail.is_empty() => {
                let program = tail.remove(0);
                Command::PlanExec { run: args.run, with: args.program, program, args: tail }
            }
            (Some(Verb::Plan(_)), Some(_)) => return Err(usage(NO_PROGRAM)),
            (Some(Verb::Plan(args)), None) => Command::Plan(args),
            (Some(Verb::SampleData(args)), _) => Command::SampleData(args),
            (Some(Verb::Batch(args)), _) => Command::Batch(args),
            (Some(Verb::Recommend(args)), _) => Command::Recommend(args),
            (Some(Verb::Doctor(args)), _) => Command::Doctor(args),
            (Some(Verb::Analyze(args)), _) => Command::Analyze(args),
            (Some(Verb::Monitor(args)), _) => Command::Monitor(args),
            (Some(Verb::Plot(args)), _) => Command::Plot(args),
            (Some(Verb::BenchMemory(args)), _) => Command::BenchMemory(args),
            (Some(Verb::Help(args)), _) => Command::Help(args),
            (None, Some(mut tail)) if !tail.is_empty() => {
                let program = tail.remove(0);
                Command::Exec { run: cli.run, with: cli.program, program, args: tail }
            }
            (None, Some(_)) => {
                return Err(usage(NO_PROGRAM));
            }
            (None, None) => match cli.program.given() {
                Some(option) => return Err(usage(format!("{option} goes with --exec: a config has keys for it"))),
                None => Command::Train(cli.run),
            },
        };
        command.check()?;
        Ok(command)
    }

    /// `--log-level`, where the verb has it.
    pub fn log_level(&self) -> Option<&str> {
        match self {
            Command::Train(run) | Command::Exec { run, .. } | Command::PlanExec { run, .. } => run.log_level.as_deref(),
            Command::Plan(args) => args.run.log_level.as_deref(),
            _ => None,
        }
    }

    fn check(&self) -> Result<(), CliError> {
        match self {
            Command::Plan(PlanArgs { run, write_machine: Some(_), .. }) if run.config.config.is_none() => Ok(()),
            Command::Train(run) | Command::Plan(PlanArgs { run, .. }) => {
                run.config.need()?;
                run.check_nodes()?;
                let unnamed = run.nnodes > 1 && run.name.is_none() && !matches!(run.resume(), Resume::Path(_));
                if unnamed && matches!(self, Command::Train(_)) {
                    return Err(usage("--nnodes above 1 needs --name: all nodes share one run folder"));
                }
                Ok(())
            }
            Command::Batch(args) if args.rank >= args.world => {
                Err(usage(format!("--rank {} of --world {}: ranks count from 0", args.rank, args.world)))
            }
            Command::Batch(args) => args.config.need(),
            Command::SampleData(_) | Command::Recommend(_) | Command::Doctor(_) => Ok(()),
            Command::Analyze(_)
            | Command::Monitor(_)
            | Command::Plot(_)
            | Command::BenchMemory(_)
            | Command::Help(_) => Ok(()),
            Command::Exec { run, .. } | Command::PlanExec { run, .. } if run.config.config.is_some() => {
                Err(usage("--config and --exec do not go together: a program reads its own config"))
            }
            Command::Exec { run, .. } | Command::PlanExec { run, .. } => run.check_nodes(),
        }
    }
}

impl RunArgs {
    pub fn resume(&self) -> Resume {
        match &self.resume {
            None => Resume::No,
            Some(path) if path == Path::new("auto") => Resume::Auto,
            Some(path) => Resume::Path(path.clone()),
        }
    }

    /// Ranks asked for on this node, by either option.
    pub fn local_ranks(&self) -> Option<usize> {
        self.ranks.or(self.gpus)
    }

    fn check_nodes(&self) -> Result<(), CliError> {
        if self.node_rank >= self.nnodes {
            let (rank, nodes) = (self.node_rank, self.nnodes);
            return Err(usage(format!("--node-rank {rank} of --nnodes {nodes}: nodes count from 0")));
        }
        if self.nnodes > 1 && (self.master_addr.is_none() || self.master_port.is_none()) {
            return Err(usage("--nnodes above 1 needs --master-addr and --master-port, the same on every node"));
        }
        Ok(())
    }
}

/// A config ready for the plan.
#[derive(Clone, Debug, PartialEq)]
pub struct Prepared {
    pub config: Config,
    /// Lines for the user.
    pub notes: Vec<String>,
}

impl ConfigArgs {
    fn need(&self) -> Result<(), CliError> {
        let example = || usage("no config: name one with --config, such as --config quick_demo");
        self.config.is_some().then_some(()).ok_or_else(example)
    }

    /// Finds the config and resolves it with the profile of the device that will be used: `cuda` if one is present
    /// and not declined.
    ///
    /// # Errors
    /// As [`spec::config::RawConfig::find`] and [`spec::config::RawConfig::resolve`].
    pub fn prepare(&self, gpu_present: bool, folders: &Folders) -> Result<Prepared, ConfigError> {
        let raw = spec::task::find_config(self.config.as_deref().unwrap_or("default"), folders)?;
        let mut sets = self.set.clone();
        if let Some(device) = self.device {
            sets.push(format!("train.device={}", device.word()));
        }
        let cuda = gpu_present && raw.device(&sets)? != DeviceChoice::Cpu;
        let (config, notes) = raw.resolve_with_notes(if cuda { "cuda" } else { "cpu" }, &sets)?;
        Ok(Prepared { config, notes })
    }
}

/// Headroom's own folder: the nearest one above the executable that holds `configs/`.
pub fn home(exe: &Path) -> Option<PathBuf> {
    exe.ancestors().skip(1).find(|folder| folder.join("configs").is_dir()).map(Path::to_path_buf)
}

/// The rank program: `named` (from [`RANK_PROGRAM`]), else `rank` beside the executable.
///
/// # Errors
/// There is no such file, or it is no program.
pub fn rank_program(named: Option<OsString>, exe: &Path) -> Result<PathBuf, CliError> {
    let path = named.map(PathBuf::from).unwrap_or_else(|| exe.with_file_name("rank"));
    if !path.is_file() {
        return Err(CliError::NoRank(path));
    }
    match rustix::fs::access(&path, rustix::fs::Access::EXEC_OK) {
        Ok(()) => Ok(path),
        Err(_) => Err(CliError::RankNotExecutable(path)),
    }
}

/// The command line, without `launch plan`'s options that mean nothing to a plan: it takes those of training, so that a line
/// can be tried by a word put into it.
fn definition() -> clap::Command {
    const OF_TRAINING: [&str; 7] =
        ["name", "resume", "resume_split", "max_restarts", "join_timeout", "smart", "dry_run"];
    let layouts = spec::task::TASKS.iter().map(|task| (task.name(), task.sample_layouts()));
    let layouts: Vec<String> = layouts
        .filter_map(|(task, layouts)| Some(format!("{task}: {} [default: {}]", layouts.join(", "), layouts.first()?)))
        .collect();
    let layouts = layouts.join("; ");
    let hide = |plan: clap::Command, option| plan.mut_arg(option, |arg| arg.hide(true));
    Cli::command()
        .mut_subcommand("plan", |plan| OF_TRAINING.into_iter().fold(plan, hide))
        .mut_subcommand("sample-data", |sample| sample.mut_arg("layout", |arg| arg.help(layouts)))
}

/// Cuts the line behind the first `--exec`, so that the program's own options are never taken for ours.
fn split_exec(mut line: Vec<OsString>) -> (Vec<OsString>, Option<Vec<OsString>>) {
    let Some(at) = line.iter().position(|word| word == "--exec") else {
        return (line, None);
    };
    let tail = line.split_off(at + 1);
    (line, Some(tail))
}

fn shown(error: clap::Error) -> CliError {
    let text = error.render().to_string();
    match error.use_stderr() {
        false => CliError::Shown(text),
        true => CliError::Usage(text.strip_prefix("error: ").unwrap_or(&text).trim_end().to_string()),
    }
}

fn usage(text: impl Into<String>) -> CliError {
    CliError::Usage(text.into())
}

fn device(text: &str) -> Result<DeviceChoice, String> {
    text.parse().map_err(|_| "expected auto, cpu or cuda".into())
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

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|count| *count >= 1).ok_or_else(|| "expected a whole number of 1 or more".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn parse(line: &str) -> Result<Command, CliError> {
        Command::parse(std::iter::once("launch").chain(line.split_whitespace()).map(OsString::from))
    }

    fn wrong(line: &str) -> String {
        match parse(line) {
            Err(CliError::Usage(text)) => text,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn definition_is_sound() {
        definition().debug_assert();
    }

    #[test]
    fn training_is_what_no_verb_means() {
        let line = "--gpus 3 --config configs/a.yaml --set a=1 --set b=2 --name r --resume auto --device cpu --strict";
        let Command::Train(run) = parse(line).unwrap() else { panic!() };
        assert_eq!((run.local_ranks(), run.config.set.len(), run.resume()), (Some(3), 2, Resume::Auto));
        assert_eq!((run.config.device, run.strict, run.nnodes), (Some(DeviceChoice::Cpu), true, 1));
        assert_eq!(run.resume_split, None);
        let Command::Train(run) = parse("--config a --resume auto --resume-split keep").unwrap() else { panic!() };
        assert_eq!(run.resume_split, Some(SplitChoice::Keep));
        assert!(matches!(parse("plan --gpus 2 --config a").unwrap(), Command::Plan(args) if args.run.gpus == Some(2)));
        assert!(
            matches!(parse("sample-data --task emg --out d").unwrap(), Command::SampleData(args) if args.seed == 42)
        );
        let batch = parse("batch --config a --step 3 --rank 1 --world 3 --out f.safetensors").unwrap();
        assert!(matches!(batch, Command::Batch(args) if (args.step, args.rank, args.world) == (3, 1, 3)));
    }

    #[test]
    fn everything_behind_exec_is_the_programs() {
        let Command::Exec { run, with, program, args } =
            parse("--ranks 2 --cache 1GiB --exec prog --gpus 9 --exec -x -- y").unwrap()
        else {
            panic!()
        };
        assert_eq!(with, ProgramArgs { cache: Some(1 << 30), ..ProgramArgs::default() });
        assert!(matches!(parse("plan --gpus 2 --exec prog -x").unwrap(), Command::PlanExec { .. }));
        assert_eq!((run.ranks, run.gpus, program), (Some(2), None, "prog".into()));
        assert_eq!(args, ["--gpus", "9", "--exec", "-x", "--", "y"]);
    }

    #[test]
    fn mistakes_say_what_to_write() {
        for (line, says) in [
            ("", "no config: name one with --config"),
            ("--gpus 0 --config a", "expected a whole number of 1 or more"),
            ("--gpus 2 --ranks 2 --config a", "cannot be used with"),
            ("--config a --device gpu", "expected auto, cpu or cuda"),
            ("--config a --resume auto --resume-split old", "expected keep or new"),
            ("--config a --resume-split keep", "--resume <auto|PATH>"),
            ("--config a --gpu 3", "--gpus"),
            ("--ranks 2 --exec", "--exec needs a program"),
            ("--config a --ranks 2 --exec p", "do not go together"),
            ("plan --exec", "--exec needs a program"),
            ("plan --config a --exec p", "do not go together"),
            ("--config a --cache 1GiB", "--cache goes with --exec"),
            ("--cache 40% --exec p", "such as 20GiB"),
            ("plan", "no config: name one with --config"),
            ("plan --machine a --write-machine b", "cannot be used with"),
            ("--config a --nnodes 2 --node-rank 2", "--node-rank 2 of --nnodes 2"),
            ("--config a --nnodes 2", "needs --master-addr and --master-port"),
            ("--config a --nnodes 2 --master-addr h --master-port 1", "needs --name"),
            ("batch --config a --step 1 --rank 3 --world 3 --out f", "--rank 3 of --world 3"),
        ] {
            let text = wrong(line);
            assert!(text.contains(says) && !text.starts_with("error"), "{line}: {text}");
        }
        assert!(wrong("bench-memory --steps 0").contains("--steps"));
        let help = |line: &str| parse(line).unwrap_err().to_string();
        assert!(help("--help").contains("--max-restarts") && !help("plan --help").contains("--max-restarts"));
        assert!(parse("plan --write-machine a").is_ok() && parse("plan --config a --machine b").is_ok());
        assert!(help("plan --help").contains("--strict") && parse("plan --config a --smart").is_ok());
        assert!(matches!(parse("--help"), Err(CliError::Shown(text)) if text.contains("sample-data")));
    }

    #[test]
    fn device_decides_on_the_profile() {
        let cwd = tempfile::tempdir().unwrap();
        let text = "profiles: {cpu: {seed: 1}, cuda: {seed: 2}}\n";
        std::fs::write(cwd.path().join("a.yaml"), text).unwrap();
        let seed = |gpu, device| {
            let args = ConfigArgs { config: Some("a".into()), set: vec![], device };
            args.prepare(gpu, &Folders { cwd: cwd.path(), headroom: None, home: None }).unwrap().config.seed
        };
        assert_eq!((seed(true, None), seed(false, None)), (2, 1));
        assert_eq!((seed(true, Some(DeviceChoice::Cpu)), seed(false, Some(DeviceChoice::Cuda))), (1, 1));
    }

    #[test]
    fn rank_program_and_home_are_found_from_the_executable() {
        let root = tempfile::tempdir().unwrap();
        let exe = root.path().join("target/release/launch");
        std::fs::create_dir_all(exe.parent().unwrap()).unwrap();
        assert!(home(&exe).is_none_or(|found| found != root.path()));
        std::fs::create_dir(root.path().join("configs")).unwrap();
        assert_eq!(home(&exe).as_deref(), Some(root.path()));
        assert!(rank_program(None, &exe).unwrap_err().to_string().contains("cargo build --release"));
        let rank = exe.with_file_name("rank");
        std::fs::write(&rank, "").unwrap();
        assert!(rank_program(None, &exe).unwrap_err().to_string().contains("cannot be executed"));
        std::fs::set_permissions(&rank, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(rank_program(None, &exe).unwrap(), rank);
        assert_eq!(rank_program(Some(rank.clone().into()), Path::new("/x/launch")).unwrap(), rank);
    }
}
