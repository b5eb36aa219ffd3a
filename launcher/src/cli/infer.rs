//! Options of `launch predict` and `launch evaluate`.

use super::args::device;
use super::numbers::at_least_one;
use super::{ConfigArgs, RunArgs};
use clap::Args;
use host::logging::LEVELS;
use spec::config::DeviceChoice;
use spec::contract::Weights;
use std::path::PathBuf;

pub(super) const PREDICT_EXAMPLES: &str = "\
Examples:
  launch predict night --data recordings --out predicted
  launch predict runs/night --data more --out more-predicted --weights last --gpus 3

The run's own config is used; --set changes keys, such as train.val_batch_size. Outputs appear whole; what is done already
is not done again, so the same command continues a prediction that was stopped.";

pub(super) const EVALUATE_EXAMPLES: &str = "\
Examples:
  launch evaluate night                          the validation split, as training validated it
  launch evaluate night --split test --weights last
  launch evaluate night --data elsewhere --json  all samples of other data

The result is also in RUN/evaluate/<split>-<weights>/metrics.json.";

/// A trained model, and how it is run.
#[derive(Clone, Debug, Args)]
pub struct TrainedArgs {
    /// A run's folder or name
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// Folder that holds the run folders
    #[arg(long, value_name = "DIR", default_value = "runs")]
    pub runs_dir: PathBuf,
    /// Stage of the run, where it has stages [default: the last that trained]
    #[arg(long, value_name = "NAME")]
    pub stage: Option<String>,
    /// best, last, ema:DECAY or a safetensors file
    #[arg(long, value_name = "WHICH", default_value = "best")]
    pub weights: Weights,
    /// Override one key of the run's config
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// auto, cpu or cuda; wins over train.device
    #[arg(long, value_name = "WHICH", value_parser = device)]
    pub device: Option<DeviceChoice>,
    /// GPUs to use here; where there are none, CPU ranks
    #[arg(long, value_name = "N", value_parser = at_least_one, conflicts_with = "ranks")]
    pub gpus: Option<usize>,
    /// Ranks of this node, whatever the devices
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub ranks: Option<usize>,
    /// Refuse to start on fewer devices than asked for
    #[arg(long)]
    pub strict: bool,
    /// Restarts after failures
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub max_restarts: u32,
    /// Print the plan and stop
    #[arg(long)]
    pub dry_run: bool,
    /// Log lines of launch and ranks; wins over HEADROOM_LOG [default: warn]
    #[arg(long, value_name = "LEVEL", value_parser = clap::builder::PossibleValuesParser::new(LEVELS), hide_possible_values = true)]
    pub log_level: Option<String>,
}

impl TrainedArgs {
    /// The same options of a run.
    pub fn run_args(&self) -> RunArgs {
        let config = ConfigArgs { config: None, python: None, set: self.set.clone(), device: self.device };
        RunArgs {
            config,
            gpus: self.gpus,
            ranks: self.ranks,
            strict: self.strict,
            max_restarts: self.max_restarts,
            nnodes: 1,
            log_level: self.log_level.clone(),
            ..RunArgs::default()
        }
    }
}

#[derive(Clone, Debug, Args)]
pub struct PredictArgs {
    #[command(flatten)]
    pub of: TrainedArgs,
    /// Data to predict for, a folder or a file
    #[arg(long, value_name = "PATH")]
    pub data: PathBuf,
    /// Folder of the predictions
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

#[derive(Clone, Debug, Args)]
pub struct EvaluateArgs {
    #[command(flatten)]
    pub of: TrainedArgs,
    /// Split of the run's own data: train, val or test [default: val]
    #[arg(long, value_name = "SPLIT", value_parser = ["train", "val", "test"], hide_possible_values = true, conflicts_with = "data")]
    pub split: Option<String>,
    /// Other data, all of it
    #[arg(long, value_name = "PATH")]
    pub data: Option<PathBuf>,
    /// As JSON, for programs
    #[arg(long)]
    pub json: bool,
}
