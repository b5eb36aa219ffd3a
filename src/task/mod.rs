//! One room per task: data set, model, loss, metrics, sample data.
//!
//! A task supplies data, model and metrics. The trainer does the rest: order, threads, accumulation, reduction over ranks,
//! schedule, checkpoints, evaluation.
//!
//! A task is two folders and two lines: its keys, defaults and checks in `launcher/spec/src/task/<name>`, its data, model and
//! metrics in `src/task/<name>`, and a line in the `tasks!` of each list. `tests/fixtures/toy_task` is such a pair of folders,
//! planned and trained by a test. The rank's half alone, without keys:
//!
//! ```no_run
#![doc = include_str!("../../tests/it/minimal_task.rs")]
//! ```

mod batch;
pub mod draw;
mod groups;
pub mod norm;
pub mod outline;
mod own_optimizer;
pub mod pass;
pub mod sample;

pub use batch::{Batch, Output};
pub use groups::{GroupSpec, ParamInfo};
pub use own_optimizer::OwnOptimizer;

use crate::data::split::{KeptSplit, SplitList};
use crate::data::{DataError, Dataset};
use crate::torch::{TorchError, error_of};
use cache::client::CacheClient;
use outline::Outline;
use pass::{Opening, Pass, StageInputs};
use spec::config::Config;
use spec::contract::MetricsRecord;
use std::any::Any;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use tch::{Tensor, nn};

/// Declares the module and the entry of each task.
macro_rules! tasks {
    ($($name:ident: $task:ident,)+) => {
        $(pub mod $name;)+

        /// Tasks of this package.
        const TASKS: &[&dyn Task] = &[$(&$name::$task),+];
    };
}

tasks! {
    emg: Emg,
    deblur: Deblur,
    cell: Cell,
    yolo: Yolo,
    python: Python,
}

/// Data sets of a run, as a task opens them.
pub struct Datasets {
    pub train: Arc<dyn Dataset>,
    pub val: Arc<dyn Dataset>,
    pub test: Arc<dyn Dataset>,
    /// The training samples as those of validation are; `None`: `train` itself will do. For evaluations of a run.
    pub train_whole: Option<Arc<dyn Dataset>>,
    /// The constant prediction that a model must beat, where a task has one (`emg`: the mean pose of the training
    /// files, radians).
    pub baseline: Option<Vec<f64>>,
    /// Files left out, with the reason, one line each.
    pub skipped: Vec<String>,
    /// Facts worth a line at the start, e.g. how many windows of how many files.
    pub notes: Vec<String>,
    /// Facts on the files that the task's model needs, in the task's own type.
    pub facts: Option<Arc<dyn Any + Send + Sync>>,
    /// Facts on the training data that the model needs with other data, such as their mean; kept in the run's folder and
    /// given back by [`Opening::carried`].
    pub carried: Option<serde_json::Value>,
    /// Which files each split has, for checkpoints; `None`: the task keeps no account of them.
    pub split: Option<SplitList>,
}

impl Datasets {
    /// Three splits without anything to say of them.
    pub fn new(train: Arc<dyn Dataset>, val: Arc<dyn Dataset>, test: Arc<dyn Dataset>) -> Self {
        Self {
            train,
            val,
            test,
            train_whole: None,
            baseline: None,
            skipped: Vec::new(),
            notes: Vec::new(),
            facts: None,
            carried: None,
            split: None,
        }
    }
}

/// A model with its loss.
pub trait Model {
    /// Forward pass and loss of one micro-batch. `train`: dropout on, and the statistics of [`norm::BatchNorm`] are those of
    /// the batch.
    fn forward(&self, batch: &Batch, train: bool) -> Output;
    /// [`Model::forward`] where the pass runs code that can fail by itself. This is what the trainer calls.
    ///
    /// # Errors
    /// Memory ran out in such code, or it failed.
    fn try_forward(&self, batch: &Batch, train: bool) -> Result<Output, TorchError> {
        Ok(self.forward(batch, train))
    }
    /// Backward pass from a loss that [`Model::try_forward`] gave, weighted.
    ///
    /// # Errors
    /// As [`Model::try_forward`]; libtorch refuses.
    fn backward(&self, loss: &Tensor) -> Result<(), TorchError> {
        loss.f_backward().map_err(|error| error_of("backward", &error))
    }
    /// [`Model::predict`] in the same way.
    ///
    /// # Errors
    /// As [`Model::try_forward`].
    fn try_predict(&self, batch: &Batch) -> Result<Tensor, TorchError> {
        Ok(self.predict(batch))
    }
    /// Numbers of each sample that every rank gets after each step, with the votes of that step; 0 for none. Each forward
    /// pass of training gives them in [`Output::share`].
    fn share_width(&self) -> usize {
        0
    }
    /// Takes what all samples of a finished step shared: f32 `[global batch, share_width]` on the rank's device, in the
    /// order of the global batch, the same for every number of ranks. Called once per step, before the next forward pass,
    /// and not for a step that is repeated. Changes [`Model::state`], in place and by operations on tensors alone.
    fn shared(&self, _values: &Tensor) {}
    /// The optimizer that updates this model in place of the trainer's, made once for a training. `None`: the trainer's.
    ///
    /// # Errors
    /// It cannot be made.
    fn own_optimizer(&self) -> Result<Option<Box<dyn OwnOptimizer>>, TorchError> {
        Ok(None)
    }
    /// True if a pass makes code for the shapes it meets, as a compiled graph does: its memory stays, whatever the samples.
    fn compiles(&self) -> bool {
        false
    }
    /// Tensors besides parameters and buffers that the next step depends on, such as the history of [`Model::shared`]: kept
    /// in checkpoints under these names. A resumed run copies the saved values into them before its first step.
    fn state(&self) -> Vec<(String, Tensor)> {
        Vec::new()
    }
    /// True if a forward pass reads [`Batch::step`], [`Batch::sample_ids`] or draws of the batch: such a step is never
    /// replayed as a CUDA graph, which repeats what the host computed when it was recorded.
    fn reads_step(&self) -> bool {
        false
    }
    /// True if the loss of a step is a quotient of two sums over all its samples, as where it is a mean over the objects in
    /// them: forward passes of training give their parts of both ([`Output::divided_by`]). The trainer divides the sums over
    /// all ranks and micro-batches (by 1 where the divisor is less), so that however a step is split its update is the same.
    /// The gradient is that of the quotient times the samples of the step.
    fn divides(&self) -> bool {
        false
    }
    /// Prediction for a micro-batch of a [`Pass`], whose fields are those of the pass: it may hold no targets.
    fn predict(&self, batch: &Batch) -> Tensor {
        self.forward(batch, false).prediction
    }
}

/// Online metrics: fixed-length sums, so that memory does not grow with the data set and ranks add up.
pub trait Metrics: Send {
    fn update(&mut self, batch: &Batch, output: &Output);
    /// Sums and counts so far, always of the same length; ranks add them element by element.
    fn sums(&self) -> Vec<f64>;
    /// Named values from (reduced) sums, without the `train.`/`val.` prefix: `loss`, `mae_deg`, ...
    fn values(&self, sums: &[f64]) -> Vec<(String, f64)>;
    /// What an evaluation's values need besides sums, as bytes of any length; every rank gets those of all by
    /// [`Metrics::gather`]. `None`, on all ranks alike: sums are enough.
    fn records(&self) -> Option<Vec<u8>> {
        None
    }
    /// Takes the bytes of all ranks, in rank order, before [`Metrics::values`] of an evaluation.
    fn gather(&mut self, _ranks: &[Vec<u8>]) {}
    /// Files about the evaluation whose values were asked for last: name in the run's folder, content.
    fn files(&self) -> Vec<(String, Vec<u8>)> {
        Vec::new()
    }
    /// Names of the values, at most three or so, that a person wants to see beside the monitored one.
    fn headline(&self) -> &[&str] {
        &[]
    }
    fn reset(&mut self);
}

/// Pictures of validation samples. Rank 0 has one.
pub trait Gallery {
    /// A batch of the validation split: takes what it wants to show, until it has enough.
    fn look(&mut self, batch: &Batch, output: &Output);
    /// Draws a PNG of the samples taken since the last call. `None` means no new samples.
    ///
    /// # Errors
    /// It cannot be drawn; training continues without it.
    fn picture(&mut self) -> Option<Result<Vec<u8>, String>>;
}

/// Files of a task in the run's folder that follow the training, beside metrics.jsonl. Rank 0 has one.
pub trait Journal {
    /// Takes the record of an epoch's last step, which holds the values of its validation.
    ///
    /// # Errors
    /// A file cannot be written; training continues.
    fn epoch(&mut self, record: &MetricsRecord) -> Result<(), String>;
}

/// Draws pictures of the training data: name in the run's folder, PNG or the reason why there is none.
pub type Drawing = Box<dyn FnOnce() -> Vec<(String, Result<Vec<u8>, String>)> + Send>;

/// Gives every rank's bytes, in rank order, for this rank's.
pub type Gather<'a> = dyn Fn(&[u8]) -> Result<Vec<Vec<u8>>, DataError> + 'a;

/// A way for the ranks of a run to share what each found out about its part of the files.
/// `gather(bytes)` returns every rank's bytes in rank order.
pub struct Team<'a> {
    pub rank: usize,
    pub world_size: usize,
    pub gather: &'a Gather<'a>,
    /// The node's page cache, where there is one.
    pub cache: Option<Arc<CacheClient>>,
    /// The split of the checkpoint that the run resumes from, where it has one.
    pub kept: Option<&'a KeptSplit>,
    /// Folders of earlier stages.
    pub stages: StageInputs,
}

/// A task. Adding one touches its folder, the list above, and the same two places in `spec::task`.
pub trait Task: Send + Sync {
    fn name(&self) -> &'static str;
    /// Opens the data sets. `index_dir`: where facts about unchanged files may be kept from run to run.
    fn open(&self, config: &Config, team: &Team, index_dir: &Path) -> Result<Datasets, DataError>;
    /// Shapes of samples and sizes of the data set, for a plan. By default the data sets are opened; a task that knows them
    /// from names and headers answers faster, and where there are no files yet.
    ///
    /// # Errors
    /// As [`Task::open`].
    fn outline(&self, config: &Config, index_dir: &Path) -> Result<Outline, DataError> {
        Ok(Outline::of_open(self.open(config, &Team::alone(), index_dir)?))
    }
    /// The same for the samples of [`Task::predictor`], as those of validation.
    ///
    /// # Errors
    /// As [`Task::outline`].
    fn predict_outline(&self, config: &Config, index_dir: &Path) -> Result<Outline, DataError> {
        self.outline(config, index_dir)
    }
    /// The config with smaller samples, and how many times larger its own samples are. Passes of large samples are measured
    /// with small ones first. `None`: its samples are small, or have one size.
    fn shrunk(&self, _config: &Config) -> Option<(Config, f64)> {
        None
    }
    /// Opens data that are not those of training, for `launch evaluate --data`: all samples in `val`, with targets.
    ///
    /// # Errors
    /// As [`Task::open`]; the task evaluates its own data alone.
    fn evaluation(&self, _opening: &Opening) -> Result<Datasets, DataError> {
        Err(DataError::NoPass { task: self.name(), what: "evaluates no data but those of its run: leave --data out" })
    }
    /// Opens data to predict for, without targets, for `launch predict`.
    ///
    /// # Errors
    /// As [`Task::open`]; the task predicts nothing.
    fn predictor(&self, _opening: &Opening) -> Result<Pass, DataError> {
        Err(DataError::NoPass { task: self.name(), what: "has no predictions to write: use launch evaluate" })
    }
    /// Opens the pass of the stage `config.stage`; its outputs lie in the stage's folder.
    ///
    /// # Errors
    /// As [`Task::open`]; an earlier stage is missing.
    fn pass(&self, opening: &Opening) -> Result<Pass, DataError> {
        let _ = opening;
        Err(DataError::NoPass { task: self.name(), what: "has no such stage" })
    }
    /// Builds the model's parameters under `vs`, named as PyTorch's `state_dict` would.
    ///
    /// # Errors
    /// A file that the model or its loss needs cannot be read.
    fn model(&self, config: &Config, datasets: &Datasets, vs: &nn::Path) -> Result<Box<dyn Model>, DataError>;
    /// # Errors
    /// As [`Task::model`].
    fn metrics(&self, config: &Config, datasets: &Datasets) -> Result<Box<dyn Metrics>, DataError>;
    /// Everything that shapes the parameters: a checkpoint of another architecture is refused. Left out, the task's section.
    fn architecture(&self, config: &Config) -> String {
        config.task_section().to_string()
    }
    /// Groups of parameters that the optimizer treats differently. Parameters in none of them form a group called `rest`
    /// that follows the config. None by default: one group.
    /// `global_batch`: samples of a step.
    fn groups(&self, _config: &Config, _parameters: &[ParamInfo], _global_batch: u64) -> Vec<GroupSpec> {
        Vec::new()
    }
    /// Changes what follows from the task's keys and data, such as the optimizer under `train.optimizer: auto`. `global_batch`:
    /// samples of a step. Returns lines that say so.
    fn settle(&self, _config: &mut Config, _datasets: &Datasets, _global_batch: u64) -> Vec<String> {
        Vec::new()
    }
    /// True for a tensor that a file of `train.init_from` may lack, or hold in another shape, as the head of a model for other
    /// classes: it is drawn then.
    fn begins_anew(&self, _name: &str) -> bool {
        false
    }
    /// Pictures after each validation, where the task has any.
    fn gallery(&self, _config: &Config, _datasets: &Datasets) -> Option<Box<dyn Gallery>> {
        None
    }
    /// Pictures of the training data, such as its first samples. Rank 0 of a new run draws them in a thread beside training:
    /// without tensors, which would take cores from it.
    fn drawing(&self, _config: &Config, _datasets: &Datasets) -> Option<Drawing> {
        None
    }
    /// Keeps files of the task's own in the run's folder. Rank 0 has one.
    fn journal(&self, _config: &Config, _run_dir: &Path) -> Option<Box<dyn Journal>> {
        None
    }
    /// Writes sample data in the task's true format.
    ///
    /// # Errors
    /// They cannot be written, or the task has none.
    fn sample_data(&self, _request: &SampleRequest) -> Result<(), DataError> {
        Err(DataError::NoSampleData { task: self.name() })
    }
    /// Writes a data set in the task's usual format, and returns lines for the user.
    ///
    /// # Errors
    /// It cannot be read or written, or the task reads one format alone.
    fn convert(&self, _request: &ConvertRequest) -> Result<Vec<String>, DataError> {
        Err(DataError::NoPass { task: self.name(), what: "has no other format to convert from" })
    }
}

/// [`TASKS`] and those of the program.
static ALL: OnceLock<Vec<&'static dyn Task>> = OnceLock::new();

/// Every task, in the order of `spec::task::all`.
pub fn all() -> &'static [&'static dyn Task] {
    ALL.get_or_init(|| TASKS.to_vec())
}

/// Adds tasks whose other halves `spec::task::add` took.
///
/// # Errors
/// Tasks were added or asked for already.
pub fn add(own: &[&'static dyn Task]) -> Result<(), String> {
    ALL.set([TASKS, own].concat()).map_err(|_| "tasks are added once, before any is asked for".into())
}

/// The task called `name`.
///
/// # Errors
/// No task has that name; the message lists all tasks.
pub fn find(name: &str) -> Result<&'static dyn Task, String> {
    all().iter().find(|task| task.name() == name).copied().ok_or_else(|| {
        let known: Vec<&str> = all().iter().map(|task| task.name()).collect();
        format!("task {name} is unknown: choose one of {}", known.join(", "))
    })
}

/// A data set to write anew in a task's usual format.
#[derive(Clone, Debug, clap::Args)]
pub struct ConvertRequest {
    #[arg(long, default_value = "yolo")]
    pub task: String,
    /// The data set, in any format that the task reads.
    #[arg(long)]
    pub data: PathBuf,
    /// The folder to make; it must not hold anything yet.
    #[arg(long)]
    pub out: PathBuf,
    /// Seed of the split, where the data set has none.
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
    /// Shares of training, validation and test, where the data set has no split.
    #[arg(long, default_value = "0.7,0.2,0.1")]
    pub split_ratio: String,
}

/// Kind and place of sample data.
#[derive(Clone, Debug, clap::Args)]
pub struct SampleRequest {
    #[arg(long, default_value = "emg")]
    pub task: String,
    /// The folder to make; it must not hold anything yet.
    #[arg(long)]
    pub out: PathBuf,
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
    /// `emg`: `gzip` (chunked, shuffled) or `contiguous`. `deblur`: `packed`, `bytes` or `kair`. `cell`: `csr`, `gzip` or `dense`.
    /// `yolo`: `yolo`, `coco` or `labelme`.
    #[arg(long)]
    pub layout: Option<String>,
    /// Sessions to write. Default: the task's own number.
    #[arg(long)]
    pub sessions: Option<usize>,
    /// Length of a session in seconds. Default: the task's own.
    #[arg(long)]
    pub seconds: Option<f64>,
    /// `cell`: cells to write. Default: the task's own number.
    #[arg(long)]
    pub cells: Option<usize>,
    /// `cell`: genes of each. Default: the task's own number.
    #[arg(long)]
    pub genes: Option<usize>,
}
