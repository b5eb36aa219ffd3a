//! The resolved configuration: what every room of Headroom reads. Nothing here depends on the machine.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A complete run, as resolved from a YAML file, its device profile and `--set` overrides.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Name of the config, from its file name; names the run folder.
    pub name: String,
    /// Which task's room trains: `emg` or `deblur`.
    pub task: String,
    /// Seed of everything random: split, order of samples, initial weights, dropout.
    pub seed: u64,
    pub data: DataConfig,
    /// Keys of the task's model: `emg` has them at the top of [`ModelConfig`], `deblur` in [`ModelConfig::vrt`].
    pub model: ModelConfig,
    pub train: TrainConfig,
    pub memory: MemoryConfig,
    pub watch: WatchConfig,
    pub smart: SmartConfig,
    pub ddp: DdpConfig,
    pub log: LogConfig,
}

/// Where samples come from and how they are cut, normalised and split.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataConfig {
    /// Folder searched recursively for `.hdf5` and `.h5` files, or one file.
    pub dataset_path: PathBuf,
    /// Make sample data in the true format at `dataset_path` when nothing is there.
    pub sample_if_missing: bool,
    pub hdf5_group: String,
    pub table_name: String,
    /// Channels expected in the `emg` member.
    pub emg_channels: usize,
    /// Angles expected in the `joint_angles` member.
    pub joint_angles_channels: usize,
    /// Rows of one window.
    pub window_size: usize,
    /// Rows between the starts of neighbouring windows.
    pub stride: usize,
    /// Shares of *files* for train, validation and test; sum 1.
    pub split_ratio: [f64; 3],
    /// Normalise EMG with statistics of the training files.
    pub normalize: bool,
    pub max_samples_for_normalize: usize,
    /// Full-wave rectification of the EMG, before normalisation.
    pub rectify: bool,
    pub shuffle: bool,
    /// How far samples are mixed; see [`ShuffleMode`].
    pub shuffle_mode: ShuffleMode,
    /// `block`: pages (chunks of a file) that samples are drawn from at a time.
    pub shuffle_window: usize,
    /// Control experiment: pair every window's angles with another window's EMG.
    pub shuffle_emg: bool,
    /// Bytes of decoded HDF5 chunks that a rank keeps.
    pub chunk_cache_size: u64,
    /// Upper bound of the node's page cache; absent: what the plan has left.
    pub cache_size_gb: Option<f64>,
    /// `auto`, `pin`, `lru`, `next_use` or `off`.
    pub cache: CachePolicy,
    /// What an entry of the page cache holds.
    pub cache_entries: CacheEntries,
    /// Leave out files that cannot be read (counted, with a warning) instead of stopping.
    pub skip_bad: bool,
    /// Leave out windows that touch a block where inverse kinematics failed (all angles zero).
    pub skip_ik_failures: bool,
    /// Cut the number of windows of an epoch per split; 0: all. For demonstrations.
    pub max_train_windows: usize,
    pub max_val_windows: usize,
    /// Clips of `deblur`.
    pub deblur: DeblurData,
}

/// Clips of blurred and sharp frames with the spike camera's stream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DeblurData {
    /// How sequences lie below `data.dataset_path`.
    pub layout: ClipLayout,
    pub train_split: String,
    pub val_split: String,
    pub test_split: String,
    /// Endings of frame files, with the dot.
    pub image_exts: Vec<String>,
    /// Consecutive frames of a clip.
    pub clip_len: usize,
    /// Side of the random square cut from a training clip, pixels; 0: whole frames.
    pub crop_size: usize,
    /// Side of the square cut from the middle of a validation clip; 0: whole frames.
    pub val_crop_size: usize,
    /// Folder of `.dat` files in each sequence.
    pub spike_dir: String,
    /// Rows and columns of the spike camera.
    pub spike_h: usize,
    pub spike_w: usize,
    pub spike_encoding: SpikeEncoding,
    /// Time bins that a frame's spike planes are summed into.
    pub voxel_bins: usize,
    /// Counts become `ln(1 + count)`.
    pub log1p: bool,
    /// Then `(x - mean) / std`.
    pub norm_mean: f64,
    pub norm_std: f64,
    /// Read `.npy` voxels from `voxel_dir` instead of spikes.
    pub use_precomputed_voxels: bool,
    pub voxel_dir: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClipLayout {
    Auto,
    /// `<split>/<sequence>/{blur,sharp,spike}`.
    Gopro,
    /// `train_GT`, `train_GT_blurred` and a meta_info file.
    Kair,
}

/// How a `.dat` file holds its spikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SpikeEncoding {
    Auto,
    /// One bit per spike, lowest bit first.
    Packed,
    /// One byte, 0 or 1, per spike.
    Bytes,
}

/// What `data.shuffle` mixes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShuffleMode {
    /// Every sample is equally likely at every position.
    Global,
    /// Pages in a random order, samples drawn from `shuffle_window` of them: one read per page and epoch.
    Block,
    /// Sequences (files) in a random order, their samples one after the other.
    Grouped,
    /// Sequences in a random order, their samples shuffled.
    GroupedShuffled,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CachePolicy {
    Auto,
    Pin,
    Lru,
    NextUse,
    Off,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CacheEntries {
    /// By the sizes of data set and cache.
    Auto,
    /// What one read yields.
    Chunk,
    /// Single samples, where the order is known ahead and global.
    Sample,
}

/// Models by task. `emg`: TDS-LSTM, convolutional stages over EMG, then a recurrent decoder that feeds its pose back.
/// `deblur`: [`ModelConfig::vrt`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelConfig {
    pub input_size: usize,
    pub output_size: usize,
    pub dropout: f64,
    pub tds_stages: Vec<TdsStage>,
    /// `lstm` or `mlp`.
    pub decoder_type: DecoderType,
    pub decoder_hidden_size: usize,
    pub decoder_num_layers: usize,
    /// Hidden sizes of the MLP decoder.
    pub decoder_mlp_hidden: Vec<usize>,
    /// Feed the previous pose back into the decoder.
    pub decoder_state_condition: bool,
    /// The decoder's output is a velocity that is added to the previous pose; else it is the pose.
    pub predict_velocity: bool,
    /// Factor on the decoder's output.
    pub output_scale: f64,
    /// Decoder steps per second.
    pub rollout_freq: f64,
    /// Samples per second of the recording.
    pub original_sampling_rate: f64,
    pub vrt: VrtModel,
}

/// Video restoration transformer with a spike branch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VrtModel {
    /// Channels of the seven U-net stages and of stage 8.
    pub dims: Vec<usize>,
    /// Blocks of the seven U-net stages, then of each group of stage 8.
    pub depths: Vec<usize>,
    pub heads: usize,
    /// Attention window: frames, rows, columns.
    pub window: Vec<usize>,
    pub deform_groups: usize,
    /// Groups, counted over `depths`, that attend within single frames.
    pub independent_groups: Vec<usize>,
    pub flow: FlowKind,
    /// Warp neighbours by deformable convolution; false: by flow alone.
    pub deformable: bool,
    pub drop_path: f64,
    /// Fuse the spike stream; false: frames only.
    pub use_spike: bool,
    /// Heads of the spikes' attention over time.
    pub tsa_heads: usize,
    /// Heads of the cross-attention from frames to spikes.
    pub fuse_heads: usize,
    /// Most pixels that spike attention takes at a time.
    pub max_batch_tokens: usize,
    /// Side of a tile of spike attention, pixels.
    pub chunk_size: usize,
    /// Recompute attention in the backward pass instead of keeping its activations.
    pub checkpoint_attn: bool,
    /// The same for the feed-forward parts.
    pub checkpoint_ffn: bool,
}

/// Where the optical flow of the warping comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FlowKind {
    Zero,
    #[serde(rename = "spynet")]
    SpyNet,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecoderType {
    Lstm,
    Mlp,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TdsStage {
    pub in_conv_kernel: usize,
    pub in_conv_stride: usize,
    pub num_blocks: usize,
    pub channels: usize,
    pub feature_width: usize,
    pub kernel_width: usize,
}

/// The training loop: batch, optimizer, schedule, stopping.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// `auto`, `cpu` or `cuda`; `--device` wins.
    pub device: DeviceChoice,
    /// Samples per rank and accumulation step.
    pub batch_size: usize,
    pub gradient_accumulation_steps: usize,
    /// Samples per forward and backward pass; absent: the whole batch.
    pub microbatch: Option<usize>,
    pub num_epochs: usize,
    /// Stop after this many optimizer steps; absent: by epochs.
    pub max_steps: Option<u64>,
    pub learning_rate: f64,
    pub weight_decay: f64,
    pub optimizer: OptimizerKind,
    pub momentum: f64,
    pub betas: [f64; 2],
    pub eps: f64,
    pub scheduler: SchedulerKind,
    /// `step`: epochs between reductions.
    pub step_size: usize,
    /// `step` and `plateau`: factor of a reduction.
    pub gamma: f64,
    /// `plateau`: epochs without improvement before a reduction.
    pub plateau_patience: usize,
    pub min_learning_rate: f64,
    pub warmup_epochs: f64,
    /// Warm-up in optimizer steps; wins over `warmup_epochs`.
    pub warmup_steps: Option<u64>,
    pub loss_type: LossType,
    /// Weight of the MAE term in `mse+mae`.
    pub mae_weight: f64,
    /// `charbonnier`: where the loss turns from square to absolute, in units of the prediction.
    pub charbonnier_delta: f64,
    /// Weight of the perceptual term; needs `perceptual_file`.
    pub perceptual_weight: f64,
    /// Safetensors file with VGG16's convolutions, torchvision's names; absent: no perceptual term.
    pub perceptual_file: Option<PathBuf>,
    /// Safetensors file with all of VGG16's convolutions and the five layers of LPIPS; absent: LPIPS is not measured.
    pub lpips_file: Option<PathBuf>,
    /// Clip to this global norm; 0: off.
    pub gradient_clip_norm: f64,
    pub early_stopping: bool,
    pub patience: usize,
    pub min_delta: f64,
    /// Metric watched for the best weights, early stopping and `plateau`, as named in metrics.jsonl.
    pub monitor_metric: String,
    pub monitor_mode: MonitorMode,
    pub restore_best_weights: bool,
    /// Decay of the exponential moving average of the weights; absent: none.
    pub ema_decay: Option<f64>,
    /// Safetensors file with initial weights, PyTorch `state_dict` names.
    pub init_from: Option<PathBuf>,
    /// Loader threads of the node per rank; absent: automatic. 0: the step's own thread.
    pub num_workers: Option<usize>,
    pub prefetch_factor: usize,
    /// For copies to a GPU; no effect on CPU ranks.
    pub pin_memory: bool,
    pub persistent_workers: bool,
    /// Sum up the training metrics in every step; false: only the loss of a step and the metrics of validation.
    pub compute_metrics_online: bool,
    /// Samples per rank in validation; absent: `batch_size`.
    pub val_batch_size: Option<usize>,
    /// Seconds that a collective may wait for its peers.
    pub step_timeout: f64,
    /// Seconds between asking ranks to stop and SIGKILL.
    pub stop_grace: f64,
    pub amp: Amp,
    /// Record the step as a CUDA graph and replay it; `auto`: where it can be. CUDA only.
    pub cuda_graph: CudaGraph,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceChoice {
    Auto,
    Cpu,
    Cuda,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerKind {
    Adam,
    Adamw,
    Sgd,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SchedulerKind {
    None,
    Step,
    Cosine,
    Plateau,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LossType {
    #[serde(rename = "mse")]
    Mse,
    #[serde(rename = "mae")]
    Mae,
    #[serde(rename = "mse+mae")]
    MseMae,
    /// Mean of `sqrt(e² + delta²)`.
    #[serde(rename = "charbonnier")]
    Charbonnier,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MonitorMode {
    Min,
    Max,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Amp {
    Off,
    Bf16,
    Fp16,
    /// Off or bf16, whichever makes the first steps faster.
    Auto,
}

/// Whether a step is recorded once as a CUDA graph and replayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CudaGraph {
    Auto,
    On,
    Off,
}

/// Element type in which gradients travel between CUDA ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wire {
    F32,
    Bf16,
}

/// How much of the node Headroom may use.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MemoryConfig {
    /// Bytes (`"20GiB"`, a plain number) or a share (`"80%"`) of the smaller of physical memory and cgroup limit.
    pub budget: Budget,
    /// Optimizer steps between two releases of what allocators and loaders keep for speed; 0: never.
    pub cleanup_every: u64,
}

/// How memory is watched while training, and what is done when it is short.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WatchConfig {
    pub enabled: bool,
    /// Give memory back under pressure; else only warn.
    pub response: bool,
    /// Begin with smaller settings where memory is fuller than 80 % before training.
    pub ease: bool,
    /// Note, warning and critical, percent of the budget, of physical memory and of the cgroup's limit.
    pub ram_percent: [f64; 3],
    /// The same of each device's memory.
    pub gpu_percent: [f64; 3],
    /// Percent from which on, when all else is given, the run stops with a checkpoint.
    pub stop_percent: f64,
    /// Seconds between two looks; a fifth of it under pressure.
    pub period: f64,
    /// Seconds without pressure before what was given is taken back.
    pub recover: f64,
    /// Run the ranks in a memory cgroup of their own where that is permitted.
    pub cgroup: bool,
}

/// Training in legs with `launch --smart`: after each, the recorded metrics decide whether to go on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SmartConfig {
    /// Epochs of the first leg.
    pub leg_epochs: usize,
    /// Epochs of each further leg.
    pub increment: usize,
    /// Never more epochs than this.
    pub max_total_epochs: usize,
    /// Comparisons with values of metrics.jsonl, separated by commas: `val.mae_deg<=6, val.loss<=0.02`.
    pub targets: Option<String>,
    /// Epochs over which progress is judged.
    pub window: usize,
    /// Least difference between the means of the window's halves that counts as progress.
    pub threshold: f64,
}

/// A budget as written.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "serde_json::Value", into = "serde_json::Value")]
pub enum Budget {
    Bytes(u64),
    Percent(f64),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DdpConfig {
    /// Size of a gradient bucket in MiB; the first is 1 MiB at most.
    pub bucket_mb: f64,
    /// Element type of gradients between CUDA ranks: `f32` or `bf16` (half the bytes, 8 bits of precision).
    pub wire: Wire,
}

/// What is written, where and how often.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// Folder that holds the run folders.
    pub runs_dir: PathBuf,
    /// Optimizer steps between lines of metrics.jsonl.
    pub log_every: u64,
    /// Optimizer steps between memory lines.
    pub memory_every: u64,
    /// Epochs between checkpoints; 0: only by `save_every_steps` and at the end.
    pub save_every: u64,
    /// Optimizer steps between checkpoints; 0: off.
    pub save_every_steps: u64,
    pub save_best_only: bool,
    /// Checkpoints kept besides the best.
    pub keep_last: usize,
    pub plots: bool,
    /// Validation samples that `deblur` writes as pictures after an epoch; 0: none.
    pub images: usize,
    /// Language of warnings and advice for people.
    pub language: Language,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Language {
    En,
    Zh,
}
