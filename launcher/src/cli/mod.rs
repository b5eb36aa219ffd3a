//! The command line of `launch`, and what can be said of it before the machine is asked.

mod args;
mod around;
mod infer;
mod numbers;
mod program;
mod torchrun;

pub use args::*;
pub use around::{Around, CompareArgs, CompletionsArgs, EnvArgs, ExportArgs, ManArgs, ReportArgs, RunsArgs, SweepArgs};
pub use infer::{EvaluateArgs, PredictArgs, TrainedArgs};
pub use program::ProgramArgs;
pub use torchrun::{Nproc, Streams, TorchrunArgs};

use crate::run_dir::Resume;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use host::machine::colour::Colour;
use spec::config::{Config, ConfigError, DeviceChoice, Folders, StageSpec};
use spec::contract::shown as shown_path;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Path of the rank program, where it does not lie beside `launch`.
pub const RANK_PROGRAM: &str = "HEADROOM_RANK";

/// torchrun's port where `--rdzv-endpoint` names none.
const DEFAULT_PORT: u16 = 29400;

const EXAMPLES: &str = "\
Examples:
  launch --gpus 3 --config quick_demo           a first look, no data needed
  launch plan --gpus 3 --config default         would it fit?
  launch --gpus 3 --config default --name night --set train.batch_size=32
  launch --gpus 3 --config default --name night --resume auto
  launch predict night --data new --out predicted   with what was trained
  launch --ranks 3 --exec python3 worker.py     any program, with RANK set
  launch --gpus 3 --cache 20GiB --name night --exec python3 train.py
                                                the same with a page cache, a memory plan, records and a watch";

/// Behind the name of an option.
const OF_PROGRAMS: &str = "goes with --exec: a config has keys for it";
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

const CONVERT_EXAMPLES: &str = "\
Examples:
  launch convert data/coco --out data/coco-yolo                COCO's annotations/instances_*.json
  launch convert data/labelled --out data/yolo --seed 7        labelme files beside their images, split 0.7,0.2,0.1

Images are linked, not copied; a data set is trained on as it is as well.";

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
                            launch predict|evaluate|plan|runs|compare|report|sweep|monitor|analyze|doctor|recommend|sample-data|convert|batch|\n              bench-memory|export-metrics|env|completions|man|help ...\n       launch --ranks N --exec PROGRAM [ARGS]...")]
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
    /// Colours: auto, always or never
    #[arg(long, global = true, value_name = "WHEN", value_parser = args::colour)]
    color: Option<Colour>,
}

// Only the verb that is used takes its options: the definition of all is a good part of a launcher's memory.
#[derive(Debug, Subcommand)]
#[command(defer = true)]
enum Verb {
    /// Print the memory plan of a run; start nothing
    #[command(after_help = PLAN_EXAMPLES)]
    Plan(Box<PlanArgs>),
    /// Write sample data in a task's true format
    #[command(after_help = SAMPLE_EXAMPLES)]
    SampleData(SampleDataArgs),
    /// Write a data set anew in a task's usual format: COCO or labelme as YOLO label files
    #[command(after_help = CONVERT_EXAMPLES)]
    Convert(ConvertArgs),
    /// Predict for other data with a trained run
    #[command(after_help = infer::PREDICT_EXAMPLES)]
    Predict(PredictArgs),
    /// Measure a trained run on a split of its data, or on other data
    #[command(after_help = infer::EVALUATE_EXAMPLES)]
    Evaluate(EvaluateArgs),
    /// Write the tensors that one rank trains on at one step
    #[command(after_help = BATCH_EXAMPLES)]
    Batch(BatchArgs),
    /// Which config, batch, workers and cache fit this machine
    Recommend(RecommendArgs),
    /// What went wrong in a run, why, and what to change
    Doctor(DoctorArgs),
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
    #[command(flatten)]
    Around(Around),
}

/// Parsed command.
#[derive(Clone, Debug)]
pub enum Command {
    Train(RunArgs),
    Plan(PlanArgs),
    Predict(PredictArgs),
    Evaluate(EvaluateArgs),
    SampleData(SampleDataArgs),
    Convert(ConvertArgs),
    Batch(BatchArgs),
    Recommend(RecommendArgs),
    Doctor(DoctorArgs),
    Analyze(AnalyzeArgs),
    Monitor(MonitorArgs),
    Plot(PlotArgs),
    BenchMemory(BenchMemoryArgs),
    Help(HelpArgs),
    Around(Around),
    Exec { run: RunArgs, with: ProgramArgs, program: OsString, args: Vec<OsString> },
    PlanExec { run: RunArgs, with: ProgramArgs, form: PlanForm, program: OsString, args: Vec<OsString> },
}

/// How the plan of a program is shown, and for which machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlanForm {
    pub json: bool,
    /// `None`: for this one.
    pub machine: Option<PathBuf>,
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
        let head = colour_last(head);
        let variable = |name: &str| std::env::var(name).ok();
        let head = torchrun::completed(head, tail.is_some(), variable);
        let cli = definition().try_get_matches_from(head).and_then(|found| Cli::from_arg_matches(&found));
        let cli = cli.map_err(shown)?;
        cli.color.unwrap_or_default().choose();
        let command = match (cli.verb, tail) {
            (Some(Verb::Plan(args)), Some(mut tail)) if !tail.is_empty() => {
                let program = tail.remove(0);
                if args.write_machine.is_some() {
                    return Err(usage("--write-machine and --exec do not go together: a machine is the same for all"));
                }
                let form = PlanForm { json: args.json, machine: args.machine };
                Command::PlanExec { run: args.run, with: args.program, form, program, args: tail }
            }
            (Some(Verb::Plan(_)), Some(_)) => return Err(usage(NO_PROGRAM)),
            (Some(Verb::Plan(args)), None) => match args.program.given() {
                Some(option) => return Err(usage(format!("{option} {OF_PROGRAMS}"))),
                None => Command::Plan(*args),
            },
            (Some(Verb::Predict(args)), _) => Command::Predict(args),
            (Some(Verb::Evaluate(args)), _) => Command::Evaluate(args),
            (Some(Verb::SampleData(args)), _) => Command::SampleData(args),
            (Some(Verb::Convert(args)), _) => Command::Convert(args),
            (Some(Verb::Batch(args)), _) => Command::Batch(args),
            (Some(Verb::Recommend(args)), _) => Command::Recommend(args),
            (Some(Verb::Doctor(args)), _) => Command::Doctor(args),
            (Some(Verb::Analyze(args)), _) => Command::Analyze(args),
            (Some(Verb::Monitor(args)), _) => Command::Monitor(args),
            (Some(Verb::Plot(args)), _) => Command::Plot(args),
            (Some(Verb::BenchMemory(args)), _) => Command::BenchMemory(args),
            (Some(Verb::Help(args)), _) => Command::Help(args),
            (Some(Verb::Around(verb)), _) => Command::Around(verb),
            (None, Some(mut tail)) if !tail.is_empty() => {
                let (run, with, program) = (cli.run, cli.program, tail.remove(0));
                match run.dry_run {
                    true => Command::PlanExec { run, with, form: PlanForm::default(), program, args: tail },
                    false => Command::Exec { run, with, program, args: tail },
                }
            }
            (None, Some(_)) => {
                return Err(usage(NO_PROGRAM));
            }
            (None, None) => match cli.program.given() {
                Some(option) => return Err(usage(format!("{option} {OF_PROGRAMS}"))),
                None => Command::Train(cli.run),
            },
        };
        let command = command.placed();
        command.check()?;
        Ok(command)
    }

    /// With `--rdzv-endpoint` as `--master-addr` and `--master-port`.
    fn placed(mut self) -> Self {
        if let Some(run) = self.run_args()
            && let Some(endpoint) = run.torchrun.rdzv_endpoint.clone()
        {
            run.master_addr = Some(endpoint.host);
            run.master_port = endpoint.port.or(Some(DEFAULT_PORT));
        }
        self
    }

    /// Options of a run, where the verb starts or plans one.
    pub fn run_args(&mut self) -> Option<&mut RunArgs> {
        match self {
            Command::Train(run) | Command::Exec { run, .. } | Command::PlanExec { run, .. } => Some(run),
            Command::Plan(PlanArgs { run, .. }) => Some(run),
            Command::Around(Around::Sweep(sweep)) => Some(&mut sweep.run),
            _ => None,
        }
    }

    /// Makes a number of ranks of `--nproc-per-node`. `machine`: usable GPUs and cores.
    ///
    /// # Errors
    /// A rank per GPU is asked for, and there is none.
    pub fn settle(&mut self, machine: impl Fn() -> (usize, usize)) -> Result<(), CliError> {
        let Some(run) = self.run_args() else { return Ok(()) };
        let Some(asked) = run.torchrun.nproc_per_node else { return Ok(()) };
        let (gpus, cores) = match asked {
            Nproc::Count(_) => (0, 0),
            _ => machine(),
        };
        run.ranks = Some(asked.ranks(gpus, cores)?);
        Ok(())
    }

    /// `--log-level`, where the verb has it.
    pub fn log_level(&self) -> Option<&str> {
        match self {
            Command::Train(run) | Command::Exec { run, .. } | Command::PlanExec { run, .. } => run.log_level.as_deref(),
            Command::Plan(args) => args.run.log_level.as_deref(),
            Command::Around(Around::Sweep(args)) => args.run.log_level.as_deref(),
            Command::Predict(PredictArgs { of, .. }) | Command::Evaluate(EvaluateArgs { of, .. }) => {
                of.log_level.as_deref()
            }
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
            Command::Predict(_) | Command::Evaluate(_) => Ok(()),
            Command::SampleData(_) | Command::Convert(_) | Command::Recommend(_) | Command::Doctor(_) => Ok(()),
            Command::Analyze(_)
            | Command::Monitor(_)
            | Command::Plot(_)
            | Command::BenchMemory(_)
            | Command::Help(_) => Ok(()),
            Command::Around(Around::Sweep(args)) => args.run.config.need().and_then(|()| args.check()),
            Command::Around(_) => Ok(()),
            Command::Exec { run, .. } | Command::PlanExec { run, .. } => {
                run.check_program().and_then(|()| run.check_nodes())
            }
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

    /// Options of a config mean nothing to a program under `--exec`.
    fn check_program(&self) -> Result<(), CliError> {
        let Self { config, smart, stage, from, .. } = self;
        let given = [
            (config.config.is_some(), "--config"),
            (config.python.is_some(), "--python"),
            (!config.set.is_empty(), "--set"),
            (config.device.is_some(), "--device"),
            (*smart, "--smart"),
            (stage.is_some(), "--stage"),
            (from.is_some(), "--from"),
        ];
        match given.into_iter().find(|(given, _)| *given) {
            Some((_, option)) => {
                Err(usage(format!("{option} and --exec do not go together: a program reads its own config")))
            }
            None => Ok(()),
        }
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
    /// The task's stages, each with its config. Empty: it has none.
    pub stages: Vec<Stage>,
}

/// A stage of a task, ready for the plan.
#[derive(Clone, Debug, PartialEq)]
pub struct Stage {
    pub spec: StageSpec,
    pub config: Config,
}

impl ConfigArgs {
    fn need(&self) -> Result<(), CliError> {
        let example = || usage("no config: name one with --config, such as --config quick_demo");
        (self.config.is_some() || self.python.is_some()).then_some(()).ok_or_else(example)
    }

    /// Finds the config and resolves it with the profile of the device that will be used: `cuda` if one is present
    /// and not declined.
    ///
    /// # Errors
    /// As [`spec::config::RawConfig::find`] and [`spec::config::RawConfig::resolve`].
    pub fn prepare(&self, gpu_present: bool, folders: &Folders) -> Result<Prepared, ConfigError> {
        let raw = match (&self.config, &self.python) {
            // All keys at their defaults.
            (None, Some(_)) => spec::task::parse_config("", "python.yaml")?,
            (config, _) => spec::task::find_config(config.as_deref().unwrap_or("default"), folders)?,
        };
        let of_python = self.python.iter().map(|place| format!("python.build={place}"));
        let mut sets: Vec<String> = of_python.chain(self.set.iter().cloned()).collect();
        if let Some(device) = self.device {
            sets.push(format!("train.device={}", device.word()));
        }
        let cuda = gpu_present && raw.device(&sets)? != DeviceChoice::Cpu;
        let profile = if cuda { "cuda" } else { "cpu" };
        let (config, mut notes) = raw.resolve_with_notes(profile, &sets)?;
        let specs = spec::task::find(&config.task).map(|task| task.stages(&config)).unwrap_or_default();
        let mut stages = Vec::with_capacity(specs.len());
        for spec in specs {
            let (config, more) = raw.resolve_stage(profile, &sets, Some(spec.name))?;
            notes.extend(more.into_iter().filter(|note| !notes.contains(note)).collect::<Vec<_>>());
            stages.push(Stage { spec, config });
        }
        Ok(Prepared { config, notes, stages })
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
pub fn definition() -> clap::Command {
    Cli::command()
        .mut_subcommand("plan", |plan| plan.defer(options_of_plan))
        .mut_subcommand("sample-data", |sample| sample.defer(options_of_sample_data))
}

fn options_of_plan(plan: clap::Command) -> clap::Command {
    const OF_TRAINING: [&str; 7] =
        ["name", "resume", "resume_split", "max_restarts", "join_timeout", "smart", "dry_run"];
    let hide = |plan: clap::Command, option| plan.mut_arg(option, |arg| arg.hide(true));
    OF_TRAINING.into_iter().fold(PlanArgs::augment_args(plan), hide)
}

fn options_of_sample_data(sample: clap::Command) -> clap::Command {
    let layouts = spec::task::all().iter().map(|task| (task.name(), task.sample_layouts()));
    let layouts: Vec<String> = layouts
        .filter_map(|(task, layouts)| Some(format!("{task}: {} [default: {}]", layouts.join(", "), layouts.first()?)))
        .collect();
    let layouts = layouts.join("; ");
    SampleDataArgs::augment_args(sample).mut_arg("layout", |arg| arg.help(layouts))
}

/// Cuts the line behind the first `--exec`, so that the program's own options are never taken for ours.
fn split_exec(mut line: Vec<OsString>) -> (Vec<OsString>, Option<Vec<OsString>>) {
    let Some(at) = line.iter().position(|word| word == "--exec") else {
        return (line, None);
    };
    let tail = line.split_off(at + 1);
    (line, Some(tail))
}

/// Puts a leading `--color` last: no option may stand before a verb, because those of training do not go with one.
fn colour_last(mut line: Vec<OsString>) -> Vec<OsString> {
    let words = match line.get(1).and_then(|word| word.to_str()) {
        Some("--color") => 2,
        Some(word) if word.starts_with("--color=") => 1,
        _ => 0,
    };
    if line.len() > words + 1 {
        line[1..].rotate_left(words);
    }
    line
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

#[cfg(test)]
mod tests;
