//! General sections: keys that every task has.

use super::Kind;
use super::range::Range::{Above, AtLeast, Filled, Share, Within};
use super::rates::Rates;
use crate::{choices, keys};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

keys! {
    /// Where samples come from, in which order they are read, and what is kept of them.
    #[serde(default, deny_unknown_fields)]
    pub struct DataConfig in "data." {
        /// Folder of the data set, or one file.
        dataset_path: PathBuf = "data".into(), range = Filled, aliases = &["data.root", "data"];
        /// Make sample data in the task's true format at `dataset_path` when nothing is there.
        sample_if_missing: bool = false;
        /// Distance between the starts of neighbouring samples: rows between windows, frames between clips.
        stride: usize = 1, range = AtLeast(1.0);
        /// Shares of *files* for train, validation and test; their sum is 1.
        split_ratio: [f64; 3] = [0.7, 0.15, 0.15], range = Within(0.0, 1.0);
        /// Read training samples in random order.
        shuffle: bool = true;
        /// How far samples are mixed.
        shuffle_mode: ShuffleMode = ShuffleMode::Global;
        /// `block`: pages (chunks of a file) that samples are drawn from at a time.
        shuffle_window: usize = 64, range = AtLeast(1.0), unit = "pages";
        /// Decoded HDF5 chunks that a rank keeps.
        chunk_cache_size: u64 = 64 << 20, kind = Kind::Bytes, unit = "bytes";
        /// Upper bound of the node's page cache. Null: what the plan has left.
        cache_size_gb: Option<f64> = None, range = AtLeast(0.0), unit = "GiB";
        /// Policy of the page cache.
        cache: CachePolicy = CachePolicy::Auto, aliases = &["data.use_ram_cache"];
        /// Content of an entry of the page cache.
        cache_entries: CacheEntries = CacheEntries::Auto;
        /// Leave out files that cannot be read (counted, with a warning) instead of stopping.
        skip_bad: bool = true;
        /// Most training samples of an epoch, for demonstrations. 0: all.
        max_train_windows: usize = 0, unit = "samples";
        /// Most validation samples, for demonstrations. 0: all.
        max_val_windows: usize = 0, unit = "samples";
    }
}

choices! {
    /// Reach of `data.shuffle`.
    pub enum ShuffleMode {
        /// Every sample is equally likely at every position.
        Global = "global",
        /// Pages in a random order, samples drawn from `shuffle_window` of them: one read per page and epoch.
        Block = "block",
        /// Sequences (files) in a random order, their samples one after the other.
        Grouped = "grouped",
        /// Sequences in a random order, their samples shuffled.
        GroupedShuffled = "grouped_shuffled",
    }
}

choices! {
    /// Policy of the page cache.
    pub enum CachePolicy {
        /// The task's own choice.
        Auto = "auto",
        /// The entries read first stay.
        Pin = "pin",
        /// The least recently used entry is evicted.
        Lru = "lru",
        /// The entry needed latest is evicted: the order of samples is known ahead.
        NextUse = "next_use",
        /// No page cache.
        Off = "off",
    }
}

choices! {
    /// Content of an entry of the page cache.
    pub enum CacheEntries {
        /// By the sizes of data set and cache.
        Auto = "auto",
        /// The bytes that one read yields.
        Chunk = "chunk",
        /// Single samples, where the order is known ahead and global.
        Sample = "sample",
    }
}

keys! {
    /// The training loop: batch, optimizer, schedule, stopping.
    #[serde(default, deny_unknown_fields)]
    pub struct TrainConfig in "train." {
        /// Device of the ranks; `--device` wins.
        device: DeviceChoice = DeviceChoice::Auto, aliases = &["device"];
        /// Samples per rank and accumulation step.
        batch_size: usize = 64, range = AtLeast(1.0), aliases = &["batch"];
        /// Batches whose gradients are added up before an optimizer step.
        gradient_accumulation_steps: usize = 1, range = AtLeast(1.0);
        /// Samples per forward and backward pass. Null: the whole batch.
        microbatch: Option<usize> = None, range = AtLeast(1.0);
        /// Leave out a last batch of an epoch that is not full.
        drop_last: bool = true;
        /// Epochs to train.
        num_epochs: usize = 100, range = AtLeast(1.0), aliases = &["train.epochs", "epochs"];
        /// Optimizer steps after which training stops. Null: `num_epochs` decides.
        max_steps: Option<u64> = None, range = AtLeast(1.0);
        /// Learning rate after the warm-up.
        learning_rate: f64 = 5e-4, range = Above(0.0), aliases = &["train.lr", "train.optim.lr", "lr0"];
        /// Weight decay; decoupled in `adamw`.
        weight_decay: f64 = 0.01, range = AtLeast(0.0), aliases = &["train.optim.weight_decay", "weight_decay"];
        /// Optimizer.
        optimizer: OptimizerKind = OptimizerKind::Adamw, aliases = &["train.optim.type", "optimizer"];
        /// `sgd` and `musgd`: momentum.
        momentum: f64 = 0.9, range = Share, aliases = &["momentum"];
        /// `sgd` and `musgd`: Nesterov's form of the momentum.
        nesterov: bool = false;
        /// `adam` and `adamw`: decay of the two moments.
        betas: [f64; 2] = [0.9, 0.999], range = Share, aliases = &["train.optim.betas"];
        /// `adam` and `adamw`: term that keeps the division finite.
        eps: f64 = 1e-8, range = Above(0.0);
        /// Course of the learning rate after the warm-up.
        scheduler: SchedulerKind = SchedulerKind::Cosine, aliases = &["train.sched.type"];
        /// `step`: epochs between reductions.
        step_size: usize = 30, range = AtLeast(1.0), unit = "epochs";
        /// `step` and `plateau`: factor of a reduction, above 0.
        gamma: f64 = 0.5, range = Within(0.0, 1.0);
        /// `plateau`: epochs without improvement before a reduction.
        plateau_patience: usize = 5, unit = "epochs";
        /// Lowest learning rate.
        min_learning_rate: f64 = 0.0, range = AtLeast(0.0);
        /// `linear` and `cosine`: last learning rate as a share of `learning_rate`; `min_learning_rate` where that is higher.
        lrf: f64 = 0.0, range = Within(0.0, 1.0), aliases = &["lrf"];
        /// How often `linear` and `cosine` change the learning rate.
        schedule_by: ScheduleBy = ScheduleBy::Step;
        /// Warm-up in epochs.
        warmup_epochs: f64 = 5.0, range = AtLeast(0.0), unit = "epochs", aliases = &["warmup_epochs"];
        /// Warm-up in optimizer steps; wins over `warmup_epochs`.
        warmup_steps: Option<u64> = None, unit = "steps", aliases = &["train.sched.warmup_steps"];
        /// Course of the warm-up.
        warmup_mode: WarmupMode = WarmupMode::Before;
        /// `within`: learning rate at the beginning of the warm-up.
        warmup_rate: f64 = 0.0, range = AtLeast(0.0);
        /// `sgd` and `musgd`: momentum at the beginning of the warm-up. Null: `momentum` from the first step on.
        warmup_momentum: Option<f64> = None, range = Share, aliases = &["warmup_momentum"];
        /// Accumulate one batch at the beginning of the warm-up, and `gradient_accumulation_steps` at its end.
        warmup_accumulation: bool = false;
        /// The loss; which ones there are depends on the task.
        loss_type: String = "mse".into(), kind = Kind::Word;
        /// Global norm that gradients are clipped to. 0: off.
        gradient_clip_norm: f64 = 1.0, range = AtLeast(0.0), aliases = &["train.max_grad_norm"];
        /// Stop when the monitored metric no longer improves.
        early_stopping: bool = true;
        /// Epochs without improvement before early stopping.
        patience: usize = 20, unit = "epochs", aliases = &["patience"];
        /// Least change of the monitored metric that counts as improvement.
        min_delta: f64 = 1e-4, range = AtLeast(0.0);
        /// Metric watched for the best weights, early stopping and `plateau`, as named in metrics.jsonl.
        monitor_metric: String = "val.loss".into(), kind = Kind::Metric, aliases = &["log.monitor"];
        /// Direction in which the metric improves.
        monitor_mode: MonitorMode = MonitorMode::Min, aliases = &["log.mode"];
        /// End with the weights of the best epoch.
        restore_best_weights: bool = true;
        /// Decay of the exponential moving average of the weights, or a list of them: an average each, of which the first
        /// is validated. Null: no average.
        ema_decay: Rates = Rates::default(), range = Share;
        /// Steps τ over which the decay rises: after step n it is `ema_decay` · (1 − exp(−n/τ)). 0: it is constant.
        ema_ramp: f64 = 0.0, range = AtLeast(0.0), unit = "steps";
        /// Buffers, such as running statistics, in the averages.
        ema_buffers: EmaBuffers = EmaBuffers::Copy;
        /// Take the statistics of batch normalisation over the samples of all ranks.
        sync_batchnorm: bool = false, aliases = &["train.sync_bn", "ddp.sync_batchnorm"];
        /// Safetensors file with initial weights, PyTorch `state_dict` names.
        init_from: Option<PathBuf> = None;
        /// Loader threads per rank. Null or `auto`: as many as the cores allow. 0: the step's own thread.
        num_workers: Option<usize> = None, unit = "threads", aliases = &["train.workers", "dataloader.train_workers", "workers"];
        /// Batch slots per loader thread.
        prefetch_factor: usize = 2, range = AtLeast(1.0), aliases = &["dataloader.train_prefetch_factor"];
        /// Copy to a GPU from pinned memory; no effect on CPU ranks.
        pin_memory: bool = true, aliases = &["dataloader.pin_memory"];
        /// Keep loader threads between epochs.
        persistent_workers: bool = true, aliases = &["dataloader.persistent_workers"];
        /// Sum up the training metrics in every step. False: only the loss of a step and the metrics of validation.
        compute_metrics_online: bool = true;
        /// Samples per rank in validation. Null: `batch_size`.
        val_batch_size: Option<usize> = None, range = AtLeast(1.0);
        /// Time that a collective may wait for its peers.
        step_timeout: f64 = 600.0, range = Above(0.0), unit = "s";
        /// Time between asking ranks to stop and SIGKILL.
        stop_grace: f64 = 25.0, range = AtLeast(0.0), unit = "s";
        /// Mixed precision.
        amp: Amp = Amp::Off, aliases = &["amp"];
        /// Record the step as a CUDA graph and replay it. CUDA only.
        cuda_graph: CudaGraph = CudaGraph::Auto;
        /// Bind each rank and its loader threads to the cores next to its GPU, where the machine has several memory nodes.
        bind_numa: bool = true, aliases = &["train.numa_affinity"];
        /// Multiply f32 matrices on the tensor cores of a GPU, with 10 bits of precision in place of 23: several times faster.
        /// Convolutions do so in any case, as in PyTorch. No effect on CPU ranks.
        tf32: bool = false, aliases = &["train.allow_tf32"];
        /// Let cuDNN try its algorithms on the first batch of each shape and keep the fastest. No effect on CPU ranks.
        cudnn_benchmark: bool = false, aliases = &["train.benchmark"];
    }
    inert {
        "train.resume_from_checkpoint" => RESUME;
        "train.checkpoint_path" => RESUME;
        "train.compile_model" => "there is no graph compiler to switch on";
        "train.ddp_compression" => "gradients are reduced as f32";
    }
}

const RESUME: &str = "resuming is asked for on the command line, --resume auto|PATH";

choices! {
    /// Device of the ranks.
    pub enum DeviceChoice {
        /// GPUs where there are any.
        Auto = "auto",
        Cpu = "cpu",
        Cuda = "cuda",
    }
}

choices! {
    /// Optimizer.
    pub enum OptimizerKind {
        Adam = "adam",
        Adamw = "adamw",
        Sgd = "sgd",
        /// SGD, and for matrices and filters a step along their orthogonalised momentum (Muon) besides.
        Musgd = "musgd",
        /// The task's choice for its data; `adamw` where it has none.
        Auto = "auto",
    }
}

impl OptimizerKind {
    /// True for the kinds that read `train.momentum` and `train.nesterov`.
    pub fn has_momentum(self) -> bool {
        matches!(self, Self::Sgd | Self::Musgd)
    }
}

choices! {
    /// Course of the learning rate.
    pub enum SchedulerKind {
        /// Constant.
        None = "none",
        /// Times `gamma` every `step_size` epochs.
        Step = "step",
        /// Half a cosine down to `min_learning_rate`.
        Cosine = "cosine",
        /// A straight line down to `lrf`, or to `min_learning_rate`.
        Linear = "linear",
        /// Times `gamma` after `plateau_patience` epochs without improvement.
        Plateau = "plateau",
    }
}

choices! {
    /// How often a smooth schedule changes the learning rate.
    pub enum ScheduleBy {
        /// With every optimizer step.
        Step = "step",
        /// At the beginning of every epoch.
        Epoch = "epoch",
    }
}

choices! {
    /// Course of the warm-up.
    pub enum WarmupMode {
        /// The learning rate rises to `learning_rate`; the scheduler begins after it.
        Before = "before",
        /// The scheduler runs from the first step on; in the warm-up, the learning rate rises from `warmup_rate` to the
        /// scheduler's.
        Within = "within",
    }
}

choices! {
    /// Buffers in averages of the weights.
    pub enum EmaBuffers {
        /// They are those of the trained model.
        Copy = "copy",
        /// Those of floating point are averaged as the weights are.
        Average = "average",
    }
}

choices! {
    /// Direction in which a metric improves.
    pub enum MonitorMode {
        Min = "min",
        Max = "max",
    }
}

choices! {
    /// Mixed precision.
    pub enum Amp {
        Off = "off",
        Bf16 = "bf16",
        Fp16 = "fp16",
        /// Off or bf16, whichever makes the first steps faster.
        Auto = "auto",
    }
}

choices! {
    /// Recording of a step as a CUDA graph.
    pub enum CudaGraph {
        /// Where it can be.
        Auto = "auto",
        On = "on",
        Off = "off",
    }
}

keys! {
    /// How much of the node Headroom may use.
    #[serde(default, deny_unknown_fields)]
    pub struct MemoryConfig in "memory." {
        /// Bytes (`20GiB`, a plain number) or a share (`80%`) of the smaller of physical memory and cgroup limit.
        budget: Budget = Budget::Percent(80.0);
        /// Optimizer steps between two releases of memory that allocators and loaders keep for speed. 0: never.
        cleanup_every: u64 = 0, unit = "steps", aliases = &["train.cleanup_every", "train.empty_cache_every"];
    }
}

/// A budget as written.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "serde_json::Value", into = "serde_json::Value")]
pub enum Budget {
    Bytes(u64),
    Percent(f64),
}

keys! {
    /// How memory is watched while training, and what is done when it is short. Thresholds are the guides'.
    #[serde(default, deny_unknown_fields)]
    pub struct WatchConfig in "watch." {
        /// Watch memory.
        enabled: bool = true;
        /// Give memory back under pressure. False: only warn.
        response: bool = true;
        /// Begin with smaller settings where memory is fuller than 80 % before training.
        ease: bool = true;
        /// Note, warning and critical, of the budget, of physical memory and of the cgroup's limit.
        ram_percent: [f64; 3] = [70.0, 80.0, 90.0], unit = "%";
        /// The same of each device's memory.
        gpu_percent: [f64; 3] = [80.0, 90.0, 95.0], unit = "%";
        /// Level from which on the run stops with a checkpoint, when everything else is given back.
        stop_percent: f64 = 97.0, unit = "%";
        /// Time between two looks; a fifth of it under pressure.
        period: f64 = 0.5, range = Within(0.05, 3600.0), unit = "s";
        /// Time without pressure before reductions are taken back.
        recover: f64 = 30.0, range = AtLeast(0.0), unit = "s";
        /// Run the ranks in a separate memory cgroup where that is permitted.
        cgroup: bool = true;
    }
}

keys! {
    /// Training in legs with `launch --smart`: after each, the recorded metrics decide about another.
    #[serde(default, deny_unknown_fields)]
    pub struct SmartConfig in "smart." {
        /// Epochs of the first leg.
        leg_epochs: usize = 100, range = AtLeast(1.0);
        /// Epochs of each further leg.
        increment: usize = 50, range = AtLeast(1.0);
        /// Most epochs of all legs.
        max_total_epochs: usize = 500, range = AtLeast(1.0);
        /// Comparisons with values of metrics.jsonl, separated by commas: `val.mae_deg<=6, val.loss<=0.02`.
        targets: Option<String> = None;
        /// Epochs over which progress is judged, in two halves.
        window: usize = 20, range = AtLeast(2.0), unit = "epochs";
        /// Least difference between the means of the window's halves that counts as progress.
        threshold: f64 = 0.001, range = AtLeast(0.0);
    }
}

keys! {
    /// How ranks exchange gradients.
    #[serde(default, deny_unknown_fields)]
    pub struct DdpConfig in "ddp." {
        /// Size of a gradient bucket; the first is 1 MiB at most.
        bucket_mb: f64 = 25.0, range = Above(0.0), unit = "MiB";
        /// Element type of gradients between CUDA ranks.
        wire: Wire = Wire::F32;
        /// Keep each rank's part of the optimizer's state only (ZeRO-1): a rank updates its part of the weights, then all
        /// ranks share the parts. The results are the same.
        shard_optimizer: bool = false, aliases = &["ddp.zero1", "train.shard_optimizer"];
        /// Which buffers, such as running statistics, count where ranks have different ones: at the start, in each
        /// evaluation and in each checkpoint.
        buffers: BufferMode = BufferMode::Broadcast;
    }
}

choices! {
    /// How ranks bring their buffers together before an evaluation or a checkpoint.
    pub enum BufferMode {
        /// Rank 0's, on all ranks.
        Broadcast = "broadcast",
        /// The mean over the ranks; rank 0's where they hold whole numbers.
        Mean = "mean",
        /// Every rank keeps its own. A checkpoint's weights hold rank 0's.
        Local = "local",
    }
}

choices! {
    /// Element type in which gradients travel between CUDA ranks.
    pub enum Wire {
        F32 = "f32",
        /// Half the bytes, 8 bits of precision.
        Bf16 = "bf16",
    }
}

keys! {
    /// Records, checkpoints and plots: where and how often.
    #[serde(default, deny_unknown_fields)]
    pub struct LogConfig in "log." {
        /// Folder that holds the run folders.
        runs_dir: PathBuf = "runs".into(), range = Filled, aliases = &["project"];
        /// Optimizer steps between lines of metrics.jsonl.
        log_every: u64 = 10, range = AtLeast(1.0), unit = "steps", aliases = &["train.log_every"];
        /// Optimizer steps between memory lines.
        memory_every: u64 = 100, range = AtLeast(1.0), unit = "steps";
        /// Epochs between checkpoints. 0: only by `save_every_steps` and at the end.
        save_every: u64 = 1, unit = "epochs";
        /// Optimizer steps between checkpoints. 0: off.
        save_every_steps: u64 = 0, unit = "steps";
        /// Save only checkpoints of a new best epoch.
        save_best_only: bool = false;
        /// Epochs between checkpoints that are kept for good, counted from the first. 0: none.
        keep_every: u64 = 0, unit = "epochs";
        /// Checkpoints kept besides the best.
        keep_last: usize = 3, range = AtLeast(1.0);
        /// Draw plots at the end.
        plots: bool = true, aliases = &["plots"];
        /// Write TensorBoard's event files into the run's folder: `tensorboard --logdir runs`.
        tensorboard: bool = false;
        /// Validation samples that a task with pictures writes after an epoch. 0: none.
        images: usize = 2;
        /// Language of warnings and advice.
        language: Language = Language::En;
    }
    inert {
        "log.save_dir" => ONE_RUN_FOLDER;
        "log.checkpoint_dir" => ONE_RUN_FOLDER;
        "log.log_dir" => ONE_RUN_FOLDER;
        "log.val_every_steps" => "validation is at the end of every epoch";
        "log.enable_timing_log" => TIMING;
        "log.timing_console" => TIMING;
        "log.timing_file" => TIMING;
        "log.timing_console_interval" => TIMING;
        "log.timing_file_interval" => TIMING;
    }
}

const ONE_RUN_FOLDER: &str = "a run keeps everything in <log.runs_dir>/<run>; set log.runs_dir to move it";
const TIMING: &str = "every logged step's data_wait_s and step_s are in metrics.jsonl";

choices! {
    /// Language of warnings and advice.
    pub enum Language {
        En = "en",
        Zh = "zh",
    }
}
