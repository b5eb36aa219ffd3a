//! Options of the verbs around a run: its records for other tools, its page, runs beside each other.

use super::{CliError, ReadArgs, RunArgs};
use crate::track::Form;
use clap::{Args, Subcommand};
use std::path::PathBuf;

pub(super) const EXPORT_EXAMPLES: &str = "\
Examples:
  launch export-metrics night --to csv             runs/night/metrics.csv
  launch export-metrics night --to mlflow          mlruns/, which `mlflow ui` shows
  launch export-metrics night --to wandb-offline   wandb/offline-run-…, which `wandb sync` uploads
  launch export-metrics night --to tensorboard     as log.tensorboard: true writes while a run trains";

pub(super) const REPORT_EXAMPLES: &str = "\
Examples:
  launch report night                       runs/night/report.html
  launch report a b c --out compared.html   runs beside each other";

pub(super) const SWEEP_EXAMPLES: &str = "\
Examples:
  launch sweep --config quick_demo --name lr --set train.learning_rate=1e-3,3e-4
  launch sweep --gpus 3 --config default --name grid --set train.batch_size=32,64 --set seed=1,2

Every value of a list is tried with every value of the others, one run after the other: <name>-000, <name>-001 and so on.
The same command continues a sweep that was stopped. A value with commas stands in brackets or quotes: x=[1,2],[3,4].";

#[derive(Clone, Debug, Args)]
pub struct ExportArgs {
    #[command(flatten)]
    pub read: ReadArgs,
    /// csv, tensorboard, mlflow or wandb-offline
    #[arg(long, value_name = "FORM", value_parser = form)]
    pub to: Form,
    /// File (csv) or folder to write to [default: the run's folder; ./mlruns; ./wandb]
    #[arg(long, value_name = "PATH")]
    pub out: Option<PathBuf>,
}

#[derive(Clone, Debug, Args)]
pub struct ReportArgs {
    /// Folders or names of runs
    #[arg(value_name = "RUN", required = true)]
    pub runs: Vec<PathBuf>,
    /// Folder that holds the run folders
    #[arg(long, value_name = "DIR", default_value = "runs")]
    pub runs_dir: PathBuf,
    /// Page to write [default: report.html in the first run's folder]
    #[arg(long, value_name = "FILE.html")]
    pub out: Option<PathBuf>,
}

#[derive(Clone, Debug, Args)]
pub struct RunsArgs {
    /// Folder that holds the run folders
    #[arg(long, value_name = "DIR", default_value = "runs")]
    pub runs_dir: PathBuf,
    /// As JSON, for programs
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Debug, Args)]
pub struct CompareArgs {
    /// Folders or names of two or more runs
    #[arg(value_name = "RUN", required = true, num_args = 2..)]
    pub runs: Vec<PathBuf>,
    /// Folder that holds the run folders
    #[arg(long, value_name = "DIR", default_value = "runs")]
    pub runs_dir: PathBuf,
    /// As JSON, for programs
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Debug, Args)]
pub struct SweepArgs {
    #[command(flatten)]
    pub run: RunArgs,
    /// Continue after runs that failed
    #[arg(long)]
    pub keep_going: bool,
}

#[derive(Clone, Debug, Args)]
pub struct EnvArgs {
    /// As JSON, for programs
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Debug, Args)]
pub struct CompletionsArgs {
    /// bash, elvish, fish, powershell or zsh
    #[arg(value_name = "SHELL")]
    pub shell: clap_complete::Shell,
}

#[derive(Clone, Debug, Args)]
pub struct ManArgs {
    /// A verb [default: launch itself]
    #[arg(value_name = "VERB")]
    pub verb: Option<String>,
    /// Write the pages of all verbs into a folder
    #[arg(long, value_name = "DIR", conflicts_with = "verb")]
    pub out: Option<PathBuf>,
}

impl SweepArgs {
    pub(super) fn check(&self) -> Result<(), CliError> {
        let run = &self.run;
        let wrong = |text: &str| Err(CliError::Usage(text.into()));
        if run.nnodes > 1 {
            return wrong("a sweep runs on one node: leave --nnodes out");
        }
        if run.name.is_none() {
            return wrong("a sweep needs --name: its runs are <name>-000, <name>-001 and so on");
        }
        match run.resume.is_some() || run.smart {
            true => wrong("a sweep continues by itself, and each run trains once: leave --resume and --smart out"),
            false => Ok(()),
        }
    }
}

fn form(text: &str) -> Result<Form, String> {
    match text {
        "csv" => Ok(Form::Csv),
        "tensorboard" => Ok(Form::TensorBoard),
        "mlflow" => Ok(Form::Mlflow),
        "wandb-offline" => Ok(Form::WandbOffline),
        _ => Err("expected csv, tensorboard, mlflow or wandb-offline".into()),
    }
}

/// Verbs around a run.
#[derive(Clone, Debug, Subcommand)]
#[command(defer = true)]
pub enum Around {
    /// List the runs: status, best metric, time, memory against plan
    Runs(RunsArgs),
    /// What differs between runs, in config and result
    Compare(CompareArgs),
    /// Write one HTML page of a run, or of runs beside each other
    #[command(after_help = REPORT_EXAMPLES)]
    Report(ReportArgs),
    /// Train with every combination of values, one run after the other
    #[command(after_help = SWEEP_EXAMPLES)]
    Sweep(Box<SweepArgs>),
    /// Write a run's metrics for MLflow, W&B, TensorBoard, or as CSV
    #[command(after_help = EXPORT_EXAMPLES)]
    ExportMetrics(ExportArgs),
    /// Versions, limits and devices of this machine: what a bug report needs
    Env(EnvArgs),
    /// Completions of the command line for a shell
    Completions(CompletionsArgs),
    /// Manual page of launch or of a verb
    Man(ManArgs),
}
